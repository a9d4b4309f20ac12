#pragma once

#include <torch/nn/module.h>

#include <string>

#include "torchqat/macros.h"
#include "torchqat/optim/bcgd.h"
#include "torchqat/safetensors.h"

namespace torchqat {

// Writes the state of a model, and of its optimizer, into one safetensors file, which
// torchqat.load_checkpoint reads in Python: every parameter and buffer under its name, the state of each of
// the optimizer's parameters as `optimizer.<name>.latent`, `.scale`, `.momentum_buffer`, `.step`, the random
// numbers of a FastFeatureAffinityLoss as `<name>._extra_state`, and as metadata what the state was trained
// with. Learning rates and other options are not in it: they are the program's. The file takes its name when
// it is whole.
TORCHQAT_API void save_checkpoint(const std::string& path, const torch::nn::Module& model,
                                  const optim::BCGD* optimizer = nullptr);

// Loads such a file, written here or in Python, into a model of the same names and shapes; with an optimizer
// of the same groups training goes on bit for bit. Floating-point values are converted to the model's dtypes;
// so is a single number that is an integer on one side only, such as BatchNorm's counter after to(dtype),
// which must be whole to become one. Everything is checked first: when it throws
// (c10::ValueError with the path, or c10::Error where the file cannot be read), nothing has changed. Without
// an optimizer the file may be any other safetensors file with the model's names.
TORCHQAT_API void load_checkpoint(const std::string& path, torch::nn::Module& model,
                                  optim::BCGD* optimizer = nullptr);

// The same without a file: what save_checkpoint writes, in copies, to which a program can add metadata of its
// own, and the loading of it. `what` begins the messages of errors.
TORCHQAT_API TensorFile checkpoint_of(const torch::nn::Module& model, const optim::BCGD* optimizer = nullptr);
TORCHQAT_API void restore_checkpoint(const TensorFile& file, torch::nn::Module& model,
                                     optim::BCGD* optimizer = nullptr,
                                     const std::string& what = "restore_checkpoint");

}  // namespace torchqat
