#include <torch/library.h>

#include "torchqat/ops/feature_affinity_loss.h"
#include "torchqat/ops/staircase_relu.h"
#include "torchqat/ops/step_size.h"
#include "torchqat/registration.h"

bool torchqat::detail::operators_are_registered() { return true; }

// Every operator of torchqat, in the order of the documentation. Names that begin with _ are private:
// the differentiable halves that autograd composes.
TORCH_LIBRARY(qat, m) {
  const std::vector<at::Tag> tags{at::Tag::pt2_compliant_tag};  // every operator works under torch.compile

  m.def(
      "staircase_relu(Tensor x, Tensor alpha, int bits, *, str ste='clipped_relu', "
      "str alpha_grad='three_valued', int channel_dim=1, bool save_codes=False) -> Tensor",
      tags);
  m.def("staircase_codes(Tensor x, Tensor alpha, int bits, *, int channel_dim=1) -> Tensor", tags);
  m.def("ste_names() -> str[]", torchqat::ste_names);
  m.def(
      "quantize_weight(Tensor weight, int bits, *, str method='exact', int? channel_dim=None) "
      "-> (Tensor quantized, Tensor scale)",
      tags);
  m.def("weight_codes(Tensor weight, Tensor scale, int bits, *, int? channel_dim=None) -> Tensor", tags);
  m.def("pack_codes(Tensor codes, int bits) -> Tensor", tags);
  m.def("unpack_codes(Tensor packed, int bits, SymInt[] size) -> Tensor", tags);
  m.def(
      "bcgd_step_(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] latents, Tensor(c!)[] scales, "
      "Tensor(d!)[] momentum_buffers, Tensor(e!)[] steps, *, Tensor lr, int bits, int? channel_dim=None, "
      "str method='exact', float momentum=0.0, float dampening=0.0, float weight_decay=0.0, bool "
      "nesterov=False, "
      "float blend=1e-5, bool maximize=False, Tensor? grad_scale=None, Tensor? found_inf=None) -> ()",
      tags);

  m.def(
      "feature_affinity_loss(Tensor student, Tensor teacher, *, str norm='l1', str reduction='mean', "
      "float eps=1e-5) -> Tensor",
      tags);
  m.def(
      "fast_feature_affinity_loss(Tensor student, Tensor teacher, Tensor probes, *, str norm='l1', "
      "str reduction='mean', float eps=1e-5) -> Tensor",
      tags);
  m.def(
      "recommend_feature_affinity(int student_channels, int teacher_channels, int pixels, *, int probes=15) "
      "-> str",
      torchqat::recommend_feature_affinity);

  m.def(
      "_staircase_relu_forward(Tensor x, Tensor alpha, int bits, int channel_dim, bool codes) "
      "-> (Tensor y, Tensor kept)",
      tags);
  m.def(
      "_staircase_relu_rebuild(Tensor codes, Tensor alpha, SymInt[] size, SymInt[] stride, ScalarType dtype, "
      "int bits, int channel_dim, Tensor grad) -> Tensor",
      tags);
  m.def(
      "_staircase_relu_backward(Tensor grad, Tensor saved, Tensor alpha, SymInt[] size, SymInt[] stride, int "
      "bits, str ste, str alpha_grad, int channel_dim, bool codes) -> (Tensor grad_x, Tensor grad_alpha)",
      tags);
  m.def(
      "_convolution(Tensor input, Tensor weight, Tensor? bias, SymInt[] stride, SymInt[] padding, "
      "SymInt[] dilation, SymInt groups, bool recompute) -> Tensor",
      tags);
  m.def(
      "_batch_norm(Tensor input, Tensor? weight, Tensor? bias, Tensor(a!) running_mean, "
      "Tensor(b!) running_var, float momentum, float eps) -> Tensor",
      tags);
  m.def("_in_backward(Tensor tensor, Tensor grad) -> Tensor", tags);
  m.def("_with_size(Tensor grad, SymInt[] size) -> Tensor", tags);
  m.def("_linear(Tensor input, Tensor weight, Tensor? bias) -> Tensor", tags);
  m.def(
      "_max_pool2d(Tensor input, int[] kernel_size, int[] stride, int[] padding, int[] dilation, "
      "bool ceil_mode) -> Tensor",
      tags);
  m.def(
      "_feature_affinity_loss(Tensor student, Tensor teacher, str norm, str reduction, float eps) "
      "-> (Tensor loss, Tensor gradient)",
      tags);
  m.def(
      "_fast_feature_affinity_loss(Tensor student, Tensor teacher, Tensor probes, str norm, str reduction, "
      "float eps) -> (Tensor loss, Tensor gradient)",
      tags);
  m.def("_feature_affinity_backward(Tensor grad, Tensor gradient, ScalarType dtype) -> Tensor", tags);
  m.def("_count_magnitudes(Tensor x, Tensor(a!) counts) -> ()", torchqat::count_magnitudes);
  m.def("_best_step_sizes(Tensor counts, int bits) -> float[]", torchqat::best_step_sizes);
  m.def("_empty_magnitude_counts(int channels) -> Tensor", torchqat::empty_magnitude_counts);
  m.def("_bounded_alpha(Tensor alpha, float minimum, float grad_scale, float grad_clip) -> Tensor", tags);
  m.def("_save_safetensors(str path, str[] names, Tensor[] tensors, Dict(str, str) metadata) -> ()");
  m.def("_load_safetensors(str path) -> (str[] names, Tensor[] tensors, Dict(str, str) metadata)");
}
