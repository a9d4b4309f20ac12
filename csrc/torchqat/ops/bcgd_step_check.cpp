#include <ATen/MemoryOverlap.h>
#include <ATen/OpMathType.h>

#include <algorithm>
#include <functional>
#include <vector>

#include "torchqat/ops/bcgd_step_device.h"
#include "torchqat/ops/dtypes.h"
#include "torchqat/ops/quantize_weight_device.h"

namespace torchqat {
namespace {

void check_dense(const at::Tensor& t, const char* list, size_t i) {
  TORCH_CHECK_TYPE(t.layout() == at::kStrided, "bcgd_step_: ", list, "[", i,
                   "] must be a dense tensor, got layout ", t.layout());
}

void check_dtype(const at::Tensor& t, at::ScalarType dtype, const char* list, size_t i) {
  check_dense(t, list, i);
  TORCH_CHECK_TYPE(t.scalar_type() == dtype, "bcgd_step_: ", list, "[", i, "] must be ", dtype, ", got ",
                   t.scalar_type());
}

void check_like(const at::Tensor& t, const at::Tensor& param, at::ScalarType dtype, const char* list,
                size_t i) {
  check_dtype(t, dtype, list, i);
  TORCH_CHECK_VALUE(t.sym_sizes() == param.sym_sizes(), "bcgd_step_: ", list, "[", i,
                    "] must have the shape of params[", i, "], ", param.sym_sizes(), ", got ", t.sym_sizes());
}

void check_scale(const BcgdStep& s, const at::Tensor& param, size_t i) {
  const auto& scale = s.scales[i];
  check_dtype(scale, at::toOpMathType(param.scalar_type()), "scales", i);
  if (!s.channel_dim) {
    TORCH_CHECK_VALUE(scale.dim() == 0, "bcgd_step_: scales[", i,
                      "] must be 0-dim (channel_dim is None), got shape ", scale.sym_sizes());
    return;
  }
  const int64_t dim = *s.channel_dim;
  TORCH_CHECK_VALUE(-param.dim() <= dim && dim < param.dim(),
                    "bcgd_step_: channel_dim must be a dimension of params[", i, "], which has shape ",
                    param.sym_sizes(), ", got ", dim);
  TORCH_CHECK_VALUE(scale.dim() == 1 && scale.sym_size(0) == param.sym_size(dim), "bcgd_step_: scales[", i,
                    "] must have shape [", param.sym_size(dim), "], one for each channel of dimension ", dim,
                    " of params[", i, "], got ", scale.sym_sizes());
}

void check_length(at::TensorList list, const char* name, size_t length, const char* why) {
  TORCH_CHECK_VALUE(list.size() == length, "bcgd_step_: ", name, " must have ", length, " tensors, ", why,
                    ", got ", list.size());
}

void check_lengths(const BcgdStep& s) {
  const size_t n = s.params.size();
  check_length(s.grads, "grads", n, "one for each of params");
  check_length(s.latents, "latents", n, "one for each of params");
  check_length(s.scales, "scales", n, "one for each of params");
  const bool has_momentum = s.momentum != 0;
  const char* why = has_momentum ? "one for each of params" : "as momentum is 0";
  check_length(s.momentum_buffers, "momentum_buffers", has_momentum ? n : 0, why);
  check_length(s.steps, "steps", has_momentum ? n : 0, why);
}

void check_options(const BcgdStep& s) {
  TORCH_CHECK_VALUE(1 <= s.bits && s.bits <= 8, "bcgd_step_: bits must be in 1..8, got ", s.bits);
  weight_method("bcgd_step_", s.method, s.bits);
  TORCH_CHECK_VALUE(s.momentum >= 0, "bcgd_step_: momentum must be at least 0, got ", s.momentum);
  TORCH_CHECK_VALUE(s.weight_decay >= 0, "bcgd_step_: weight_decay must be at least 0, got ", s.weight_decay);
  TORCH_CHECK_VALUE(0 <= s.blend && s.blend <= 1, "bcgd_step_: blend must be in [0, 1], got ", s.blend);
  TORCH_CHECK_VALUE(!s.nesterov || (s.momentum > 0 && s.dampening == 0),
                    "bcgd_step_: nesterov needs a momentum and no dampening, got momentum = ", s.momentum,
                    ", dampening = ", s.dampening);
}

void check_scalar(const at::Tensor& t, const char* name, const at::Tensor* param) {
  TORCH_CHECK_TYPE(t.layout() == at::kStrided && is_supported(t.scalar_type()), "bcgd_step_: ", name,
                   " must be a dense float tensor, got ", t.scalar_type(), " of layout ", t.layout());
  TORCH_CHECK_VALUE(t.sym_numel() == 1, "bcgd_step_: ", name, " must have one element, got shape ",
                    t.sym_sizes());
  TORCH_CHECK_VALUE(!param || t.device() == param->device(), "bcgd_step_: ", name,
                    " must be on the device of params, ", param->device(), ", got ", t.device());
}

void check_scalars(const BcgdStep& s) {
  const at::Tensor* param = s.params.empty() ? nullptr : &s.params[0];
  check_scalar(s.lr, "lr", s.lr.is_cpu() ? nullptr : param);
  if (s.grad_scale) check_scalar(*s.grad_scale, "grad_scale", param);
  if (s.found_inf) check_scalar(*s.found_inf, "found_inf", param);
}

void check_tensors(const BcgdStep& s, size_t i) {
  const auto& param = s.params[i];
  check_dense(param, "params", i);
  TORCH_CHECK_TYPE(is_supported(param.scalar_type()), "bcgd_step_: params[", i, "] must be ",
                   kSupportedDtypes, ", got ", param.scalar_type());
  const auto opmath = at::toOpMathType(param.scalar_type());
  check_like(s.grads[i], param, param.scalar_type(), "grads", i);
  check_like(s.latents[i], param, opmath, "latents", i);
  check_scale(s, param, i);
  if (s.steps.empty()) return;
  check_like(s.momentum_buffers[i], param, opmath, "momentum_buffers", i);
  check_dtype(s.steps[i], at::kFloat, "steps", i);
  TORCH_CHECK_VALUE(s.steps[i].dim() == 0, "bcgd_step_: steps[", i, "] must be 0-dim, got shape ",
                    s.steps[i].sym_sizes());
}

// Where a tensor that the step writes lies in its storage, in bytes. Of a tensor that is not dense it is the
// first element alone: those of others may lie between its own, and whether they meet later on is not looked
// at.
struct Extent {
  const void* storage;
  int64_t begin;
  int64_t end;
  const char* list;
  size_t i;
};

Extent extent_of(const at::Tensor& t, const char* list, size_t i) {
  const auto size = static_cast<int64_t>(t.element_size());
  const int64_t begin = t.storage_offset() * size;
  const int64_t bytes = t.is_non_overlapping_and_dense() ? t.numel() * size : 1;
  return {t.storage().unsafeGetStorageImpl(), begin, begin + bytes, list, i};
}

void check_disjoint(std::vector<Extent>& extents) {
  std::stable_sort(extents.begin(), extents.end(), [](const Extent& a, const Extent& b) {
    return a.storage == b.storage ? a.begin < b.begin : std::less<>()(a.storage, b.storage);
  });
  for (size_t k = 1; k < extents.size(); ++k) {
    const Extent& a = extents[k - 1];
    const Extent& b = extents[k];
    TORCH_CHECK_VALUE(a.storage != b.storage || a.end <= b.begin, "bcgd_step_: ", a.list, "[", a.i, "] and ",
                      b.list, "[", b.i, "], which the step writes, must not share memory; is a parameter in ",
                      "the list twice?");
  }
}

// One device for all; and nothing that is written is there twice, or overlaps itself.
void check_memory(const BcgdStep& s) {
  std::vector<Extent> extents;
  for_each_list(s, [&](at::TensorList list, const char* name, bool written) {
    for (size_t i = 0; i < list.size(); ++i) {
      const auto& t = list[i];
      TORCH_CHECK_VALUE(t.device() == s.params[0].device(), "bcgd_step_: ", name, "[", i,
                        "] must be on the device of ", "params[0], ", s.params[0].device(), ", got ",
                        t.device());
      if (!written || t.unsafeGetTensorImpl()->has_symbolic_sizes_strides() || t.numel() == 0) continue;
      TORCH_CHECK_VALUE(at::has_internal_overlap(t) != at::MemOverlap::Yes, "bcgd_step_: ", name, "[", i,
                        "] must not overlap itself, got strides ", t.strides());
      extents.push_back(extent_of(t, name, i));
    }
  });
  check_disjoint(extents);
}

}  // namespace

void check_bcgd_step(const BcgdStep& s) {
  check_options(s);
  check_lengths(s);
  for (size_t i = 0; i < s.params.size(); ++i) check_tensors(s, i);
  check_memory(s);
  check_scalars(s);
}

}  // namespace torchqat
