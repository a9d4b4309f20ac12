#pragma once

// Everything a LibTorch program uses.
#include "torchqat/build_info.h"
#include "torchqat/calibrate.h"
#include "torchqat/checkpoint.h"
#include "torchqat/distill/faqd_loss.h"
#include "torchqat/nn/feature_affinity_loss.h"
#include "torchqat/nn/quant_layers.h"
#include "torchqat/nn/staircase_relu.h"
#include "torchqat/ops/bcgd_step.h"
#include "torchqat/ops/feature_affinity_loss.h"
#include "torchqat/ops/pack_codes.h"
#include "torchqat/ops/quantize_weight.h"
#include "torchqat/ops/staircase_relu.h"
#include "torchqat/optim/bcgd.h"
#include "torchqat/optim/param_groups.h"
#include "torchqat/registration.h"
#include "torchqat/safetensors.h"
