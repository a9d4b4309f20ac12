#include "torchqat/build_info.h"

#include <ATen/Version.h>

#include <sstream>

namespace torchqat {

// The macros are CMake's (cmake/TorchQATBuildInfo.cmake).
BuildInfo build_info() {
  BuildInfo info{TORCHQAT_VERSION,  TORCHQAT_TORCH_VERSION, TORCHQAT_CUDA_VERSION,   {},
                 TORCHQAT_COMPILER, TORCHQAT_COMMIT,        at::get_cpu_capability()};
  std::istringstream architectures(TORCHQAT_ARCHITECTURES);
  for (std::string name; architectures >> name;) info.cuda_architectures.push_back(name);
  return info;
}

}  // namespace torchqat
