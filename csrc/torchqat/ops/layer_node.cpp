#include "torchqat/ops/layer_node.h"

#include <torch/library.h>

namespace torchqat {
namespace {

at::Tensor copy_with_size(const at::Tensor& grad, c10::SymIntArrayRef) { return grad.clone(); }

at::Tensor copy_with_size_meta(const at::Tensor& grad, c10::SymIntArrayRef size) {
  return grad.sym_sizes() == size ? at::empty_like(grad) : at::empty_symint(size, grad.options());
}

at::Tensor copy_in_backward(const at::Tensor& tensor, const at::Tensor&) { return tensor.clone(); }

at::Tensor copy_in_backward_meta(const at::Tensor& tensor, const at::Tensor&) {
  return at::empty_like(tensor);
}

}  // namespace

at::Tensor with_size(const at::Tensor& grad, c10::SymIntArrayRef size) {
  static const auto op =
      c10::Dispatcher::singleton().findSchemaOrThrow("qat::_with_size", "").typed<decltype(copy_with_size)>();
  return op.call(grad, size);
}

at::Tensor in_backward(const at::Tensor& tensor, const at::Tensor& grad) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("qat::_in_backward", "")
                             .typed<decltype(copy_in_backward)>();
  return op.call(tensor, grad);
}

TORCH_LIBRARY_IMPL(qat, CompositeExplicitAutograd, m) {
  m.impl("_with_size", copy_with_size);
  m.impl("_in_backward", copy_in_backward);
}

TORCH_LIBRARY_IMPL(qat, FuncTorchBatched, m) { m.impl("_in_backward", copy_in_backward); }

TORCH_LIBRARY_IMPL(qat, Meta, m) {
  m.impl("_with_size", copy_with_size_meta);
  m.impl("_in_backward", copy_in_backward_meta);
}

}  // namespace torchqat
