#pragma once

#include <string>
#include <vector>

#include "torchqat/optim/bcgd.h"

// What BCGD refuses: options out of range, groups that cannot be.
namespace torchqat::optim {

// The options of a group of a BCGD.
const BCGDOptions& options_of(const torch::optim::OptimizerParamGroup& group);

// Throws where an option is out of range; the rules of torch::optim::SGD. `what` begins the message.
void check_options(const BCGDOptions& options, const std::string& what = "BCGD");

// Throws where parameters cannot be a group with these options beside the groups that are there.
void check_group(const BCGDOptions& options, const std::vector<at::Tensor>& params,
                 const std::vector<torch::optim::OptimizerParamGroup>& groups);

}  // namespace torchqat::optim
