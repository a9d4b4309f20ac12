#include <torch/library.h>

#include "torchqat/ops/staircase_relu.h"

// Every operator of torchqat, in the order of the documentation. Names that begin with _ are private:
// the differentiable halves that autograd composes.
TORCH_LIBRARY(qat, m) {
  const std::vector<at::Tag> tags{at::Tag::pt2_compliant_tag};  // every operator works under torch.compile

  m.def(
      "staircase_relu(Tensor x, Tensor alpha, int bits, *, str ste='clipped_relu', "
      "str alpha_grad='three_valued', int channel_dim=1) -> Tensor",
      tags);
  m.def("staircase_codes(Tensor x, Tensor alpha, int bits, *, int channel_dim=1) -> Tensor",
      tags);
  m.def("ste_names() -> str[]", torchqat::ste_names);

  m.def("_staircase_relu_forward(Tensor x, Tensor alpha, int bits, int channel_dim) -> (Tensor y, Tensor regions)", tags);
  m.def(
      "_staircase_relu_backward(Tensor grad, Tensor saved, Tensor alpha, SymInt[] stride, int bits, str ste, "
      "str alpha_grad, int channel_dim) -> (Tensor grad_x, Tensor grad_alpha)",
      tags);
  m.def("_bounded_alpha(Tensor alpha, float minimum, float grad_scale, float grad_clip) -> Tensor", tags);
}
