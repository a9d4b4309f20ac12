#include "torchqat/checkpoint_checks.h"

#include <set>
#include <sstream>

#include "torchqat/safetensors_header.h"

namespace torchqat {
namespace {

void check_names(const std::string& what, const Tensors& saved, const Tensors& own) {
  const auto refuse_missing = [&](const char* kind, const Tensors& from, const Tensors& in) {
    std::ostringstream names;
    size_t count = 0;
    for (const auto& [name, value] : from) {
      if (!in.count(name) && ++count <= 5) names << (count > 1 ? ", '" : "'") << printable(name) << "'";
    }
    if (count > 5) names << " and " << count - 5 << " more";
    TORCH_CHECK_VALUE(count == 0, what, ": must have the names of the model, ", kind, " ", names.str());
  };
  refuse_missing("lacks", own, saved);
  refuse_missing("also has", saved, own);
}

bool is_integer(const at::Tensor& value) {
  return at::isIntegralType(value.scalar_type(), /*includeBool=*/false);
}

bool is_whole(const at::Tensor& value, const at::Tensor& ours) {
  const auto exact = value.to(at::kCPU, at::kDouble);
  return at::equal(exact.to(ours.scalar_type()).to(at::kDouble), exact);
}

// BatchNorm's counter of batches is an integer, but for a LibTorch model after to(dtype).
void check_dtype(const std::string& what, const std::string& name, const at::Tensor& value,
                 const at::Tensor& ours) {
  if (value.scalar_type() == ours.scalar_type()) return;
  const bool floating = value.is_floating_point();
  if (ours.is_floating_point() && (floating || (value.dim() == 0 && is_integer(value)))) return;
  TORCH_CHECK_VALUE(value.dim() == 0 && floating && is_integer(ours), what, ": '", name, "' must be ",
                    ours.scalar_type(), ", got ", value.scalar_type());
  TORCH_CHECK_VALUE(is_whole(value, ours), what, ": '", name, "' must be a whole number for ",
                    ours.scalar_type(), ", got ", value.item<double>());
}

}  // namespace

bool is_extra_state(const std::string& name) {
  return name == kExtraState || name.ends_with("." + kExtraState);
}

void check_settings(const std::string& what, const Texts& ours, const Texts& metadata,
                    const std::string& prefix, const char* kind, const char* whose) {
  std::set<std::string> keys;
  for (const auto* texts : {&ours, &metadata}) {
    for (const auto& [key, text] : *texts) {
      if (begins(key, prefix)) keys.insert(key);
    }
  }
  for (const auto& key : keys) {
    const auto of = [&](const Texts& texts) {
      const auto found = texts.find(key);
      return found == texts.end() ? "none" : found->second;
    };
    TORCH_CHECK_VALUE(of(metadata) == of(ours), what, ": ", kind, " '", printable(key.substr(prefix.size())),
                      "' must be the same in the file and in ", whose, ": the file has ",
                      printable(of(metadata)), "; ", whose, " has ", of(ours));
  }
}

void check_model_state(const std::string& what, const Tensors& saved, const Tensors& own) {
  check_names(what, saved, own);
  for (const auto& [name, value] : saved) {
    const auto& ours = own.at(name);
    if (is_extra_state(name)) continue;  // its module's own affair
    TORCH_CHECK_VALUE(value.sizes() == ours.sizes(), what, ": '", name, "' must have shape ", ours.sizes(),
                      ", got ", printable(c10::str(value.sizes())));
    check_dtype(what, name, value, ours);
  }
}

}  // namespace torchqat
