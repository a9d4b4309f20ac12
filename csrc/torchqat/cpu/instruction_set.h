#pragma once

#include <ATen/Version.h>

#include <string>

// Kernels that use vectors are compiled once for each instruction set (CMakeLists.txt), in namespaces of
// their own. DECLARE(isa) is what a header declares in one of them.
#define TORCHQAT_FOR_EACH_ISA(DECLARE) DECLARE(sse2) DECLARE(avx2) DECLARE(avx512)

// `f` of the namespace that is best here.
#define TORCHQAT_BEST_ISA(...)                                       \
  (instruction_set() == InstructionSet::avx512 ? avx512::__VA_ARGS__ \
   : instruction_set() == InstructionSet::avx2 ? avx2::__VA_ARGS__   \
                                               : sse2::__VA_ARGS__)

namespace torchqat {

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
