#pragma once

#include <string>
#include <vector>

#include "torchqat/macros.h"

namespace torchqat {

// What this library was built from, and what it runs on.
struct BuildInfo {
  std::string torchqat;                         // version
  std::string torch;                            // version it was built against
  std::string cuda;                             // version of the CUDA toolkit; empty for a CPU-only build
  std::vector<std::string> cuda_architectures;  // as CMake names them
  std::string compiler;
  std::string commit;          // empty where it was not built from a git checkout
  std::string cpu_capability;  // the instruction set that its kernels choose here: DEFAULT, AVX2 or AVX512
};
TORCHQAT_API BuildInfo build_info();

}  // namespace torchqat
