#include <torch/library.h>

#include "torchqat/ops/layer_node.h"
#include "torchqat/ops/layers.h"

namespace torchqat {
namespace {

at::Tensor plain(const at::Tensor& input, at::IntArrayRef kernel_size, at::IntArrayRef stride,
                 at::IntArrayRef padding, at::IntArrayRef dilation, bool ceil_mode) {
  return at::max_pool2d(input, kernel_size, stride, padding, dilation, ceil_mode);
}

auto dispatched() {
  static const auto op =
      c10::Dispatcher::singleton().findSchemaOrThrow("qat::_max_pool2d", "").typed<decltype(plain)>();
  return op;
}

// The smallest type that holds the indices of a plane's pixels.
at::ScalarType index_type(const at::Tensor& input) {
  const auto pixels = input.sym_size(-1) * input.sym_size(-2);
  if (pixels <= 1 << 8) return at::kByte;
  if (pixels <= 1 << 15) return at::kShort;
  return pixels <= int64_t{1} << 31 ? at::kInt : at::kLong;
}

// What max pooling keeps for backward: the indices of the elements that it has taken.
struct Pooling {
  static constexpr std::string_view op = "max_pool2d";

  torch::autograd::variable_list derivatives(const at::Tensor& grad, const IsNeeded&) const {
    const auto where = indices.get().to(at::kLong);
    at::AutoDispatchBelowADInplaceOrView below_autograd;
    const auto x = at::empty_strided_symint(size, x_stride, grad.options());  // its values do not matter
    return {at::max_pool2d_with_indices_backward(grad, x, kernel_size, stride, padding, dilation, ceil_mode,
                                                 where)};
  }
  void each_field(auto&& f) {
    each(f, indices, size, x_stride, kernel_size, stride, padding, dilation, ceil_mode);
  }

  Ingredient indices;
  std::vector<c10::SymInt> size, x_stride;
  std::vector<int64_t> kernel_size, stride, padding, dilation;
  bool ceil_mode = false;
};

// Its result: those elements.
struct Pooled : RecipeOf<Pooled> {
  at::Tensor make(const at::Tensor& grad) const override {
    const auto x = input->make(grad);
    const auto where = indices.get().to(at::kLong);
    at::AutoDispatchBelowADInplaceOrView below_autograd;
    return x.flatten(2).gather(2, where.flatten(2)).view_symint(where.sym_sizes()).contiguous(format);
  }
  void each_field(auto&& f) { each(f, input, indices, format); }

  std::shared_ptr<Recipe> input;
  Ingredient indices;
  at::MemoryFormat format = at::MemoryFormat::Contiguous;
};

at::Tensor autograd(const at::Tensor& input, at::IntArrayRef kernel_size, at::IntArrayRef stride,
                    at::IntArrayRef padding, at::IntArrayRef dilation, bool ceil_mode) {
  auto pooled = std::make_shared<Pooled>();
  if (is_differentiated({input}) && input.dim() == 4) pooled->input = recipe_of(input);
  if (!pooled->input) return plain(input, kernel_size, stride, padding, dilation, ceil_mode);
  Pooling pooling{{},
                  input.sym_sizes().vec(),
                  input.sym_strides().vec(),
                  kernel_size.vec(),
                  stride.vec(),
                  padding.vec(),
                  dilation.vec(),
                  ceil_mode};
  at::Tensor y;
  {
    at::AutoDispatchBelowADInplaceOrView below_autograd;
    at::Tensor indices;
    std::tie(y, indices) =
        at::max_pool2d_with_indices(input, kernel_size, stride, padding, dilation, ceil_mode);
    indices = indices.to(index_type(input));
    pooling.indices = indices;
    pooled->indices = indices;
  }
  pooled->format = y.suggest_memory_format();
  set_layer_history(y, std::move(pooling), torch::autograd::collect_next_edges(input));
  attach_recipe(y, std::move(pooled));
  return y;
}

}  // namespace

at::Tensor layer_max_pool2d(const at::Tensor& input, at::IntArrayRef kernel_size, at::IntArrayRef stride,
                            at::IntArrayRef padding, at::IntArrayRef dilation, bool ceil_mode) {
  return dispatched().call(input, kernel_size, stride, padding, dilation, ceil_mode);
}

TORCH_LIBRARY_IMPL(qat, CompositeExplicitAutograd, m) { m.impl("_max_pool2d", plain); }

TORCH_LIBRARY_IMPL(qat, Autograd, m) { m.impl("_max_pool2d", autograd); }

// torch.vmap batches what it calls.
TORCH_LIBRARY_IMPL(qat, FuncTorchBatched, m) { m.impl("_max_pool2d", plain); }

}  // namespace torchqat
