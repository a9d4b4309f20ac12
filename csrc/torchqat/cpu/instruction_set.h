#pragma once

#include <ATen/Version.h>

#include <string>

namespace torchqat {

// Whether kernels made for AVX2 are used: where the processor has it, unless ATen is told otherwise by the
// environment variable ATEN_CPU_CAPABILITY. They are compiled twice (CMakeLists.txt), in namespaces of their
// own.
inline bool use_avx2() {
  static const bool yes =
      at::get_cpu_capability() == "AVX2" || at::get_cpu_capability().starts_with("AVX512");
  return yes;
}

}  // namespace torchqat
