#include "torchqat/ops/layer_node.h"

#include <torch/library.h>

namespace torchqat {
namespace {

at::Tensor copy(const at::Tensor& grad, c10::SymIntArrayRef) { return grad.clone(); }

at::Tensor copy_meta(const at::Tensor& grad, c10::SymIntArrayRef size) {
  return grad.sym_sizes() == size ? at::empty_like(grad) : at::empty_symint(size, grad.options());
}

}  // namespace

at::Tensor with_size(const at::Tensor& grad, c10::SymIntArrayRef size) {
  static const auto op =
      c10::Dispatcher::singleton().findSchemaOrThrow("qat::_with_size", "").typed<decltype(copy)>();
  return op.call(grad, size);
}

TORCH_LIBRARY_IMPL(qat, CompositeExplicitAutograd, m) { m.impl("_with_size", copy); }

TORCH_LIBRARY_IMPL(qat, Meta, m) { m.impl("_with_size", copy_meta); }

}  // namespace torchqat
