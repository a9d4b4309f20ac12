#pragma once

// Stands in for CUDA's header of this name, as cuda_fp16.h does.
#include <torch/headeronly/util/BFloat16.h>

using __nv_bfloat16 = c10::BFloat16;
