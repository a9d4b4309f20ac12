#pragma once

#include <ATen/Version.h>

#include <string>

namespace torchqat {

// Kernels that use vectors are compiled once for each of these (CMakeLists.txt), in namespaces of their own.
enum class InstructionSet { sse2, avx2, avx512 };

// The best that the processor has, or less where the environment variable ATEN_CPU_CAPABILITY tells ATen so.
inline InstructionSet instruction_set() {
  static const InstructionSet best = [] {
    const std::string capability = at::get_cpu_capability();
    if (capability == "AVX512") return InstructionSet::avx512;
    return capability == "AVX2" ? InstructionSet::avx2 : InstructionSet::sse2;
  }();
  return best;
}

}  // namespace torchqat
