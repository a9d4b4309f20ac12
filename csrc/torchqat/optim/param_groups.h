#pragma once

#include <torch/arg.h>
#include <torch/nn/module.h>

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "torchqat/macros.h"
#include "torchqat/optim/bcgd.h"

namespace torchqat::optim {

struct TORCHQAT_API ParamGroupsOptions {
  TORCH_ARG(std::optional<double>, alpha_lr) = std::nullopt;  // of the step sizes; none: as the optimizer's
  TORCH_ARG(std::optional<double>, alpha_weight_decay) = std::nullopt;
  TORCH_ARG(bool, quantize_first) = true;             // whether the first of the layers with weights,
  TORCH_ARG(bool, quantize_last) = true;              // and the last, are quantized
  TORCH_ARG(std::vector<std::string>, exclude) = {};  // names of modules whose weights stay float
  TORCH_ARG(std::optional<int64_t>, channel_dim) = std::nullopt;  // 0: one scale per output channel
  TORCH_ARG(std::string, method) = "exact";                       // see quantize_weight
};

// Sorts the parameters of a model into groups for BCGD: `quantized`, the weights of linear layers and
// convolutions; `alphas`, the step sizes of StaircaseReLUs, with their alpha_min as min_value; `float`,
// everything else. Frozen parameters are in no group, every other one is in exactly one; a weight that
// several modules share is quantized only where each of them would have it quantized. Without weight_bits the
// same groups have float weights. Empty groups are left out.
TORCHQAT_API std::vector<ParamGroup> param_groups(const torch::nn::Module& model,
                                                  std::optional<int64_t> weight_bits,
                                                  const ParamGroupsOptions& options = {});

}  // namespace torchqat::optim
