#pragma once

// Stands in for CUDA's header of this name: the type alone, torch's from its header-only part. Arithmetic is
// done in float, as in the kernels.
#include <torch/headeronly/util/Half.h>

using __half = c10::Half;
