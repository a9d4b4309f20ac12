#pragma once

// Everything a LibTorch program uses.
#include "torchqat/nn/feature_affinity_loss.h"
#include "torchqat/ops/bcgd_step.h"
#include "torchqat/ops/feature_affinity_loss.h"
#include "torchqat/ops/pack_codes.h"
#include "torchqat/ops/quantize_weight.h"
#include "torchqat/ops/staircase_relu.h"
#include "torchqat/registration.h"
