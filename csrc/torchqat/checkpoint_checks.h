#pragma once

#include <ATen/ATen.h>

#include <map>
#include <string>

// What load_checkpoint refuses. `what` begins the messages.
namespace torchqat {

using Tensors = std::map<std::string, at::Tensor>;
using Texts = std::map<std::string, std::string>;

const std::string kExtraState = "_extra_state";  // the last part of the names of generators' states

inline bool begins(const std::string& text, const std::string& prefix) { return text.rfind(prefix, 0) == 0; }
bool is_extra_state(const std::string& name);

// Throws where the texts whose keys begin with `prefix` differ: settings of a `kind` in the file, and
// `whose`.
void check_settings(const std::string& what, const Texts& ours, const Texts& metadata,
                    const std::string& prefix, const char* kind, const char* whose);

// Throws where a file's tensors are not like the model's own.
void check_model_state(const std::string& what, const Tensors& saved, const Tensors& own);

}  // namespace torchqat
