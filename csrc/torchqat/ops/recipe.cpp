#include "torchqat/ops/recipe.h"

#include <ATen/SavedTensorHooks.h>
#include <ATen/autocast_mode.h>
#include <torch/csrc/autograd/variable.h>

#include <vector>

namespace torchqat {
namespace {

// Autograd's record of a tensor, with a recipe: it has the life of the tensor, and a view knows its base.
struct RecordWithRecipe : torch::autograd::AutogradMeta {
  std::shared_ptr<Recipe> recipe;
  int64_t version = 0;
  // Tensor.data may be given others. The storage is held weakly: its address is not given anew meanwhile.
  c10::weak_intrusive_ptr<c10::StorageImpl> storage{c10::intrusive_ptr<c10::StorageImpl>()};
  std::vector<c10::SymInt> size, stride;
  const void* hooks = nullptr;

  // Whether the tensor, or what it is a view of, still is what the recipe makes.
  bool describes(const at::Tensor& tensor) const {
    const auto* memory = tensor.unsafeGetTensorImpl()->unsafe_storage().unsafeGetStorageImpl();
    if (version != tensor._version() || storage._unsafe_get_target() != memory || !recipe->is_fresh())
      return false;
    return tensor.is_view() ||
           (tensor.sym_sizes() == size && tensor.sym_strides() == stride && tensor.sym_storage_offset() == 0);
  }
};

// The saved-tensor hooks that are in force. Where they have changed since a tensor was made, a checkpoint may
// begin, and its recomputation gets the tensor without the recipe: both must save alike, so neither takes it.
const void* saved_tensor_hooks() {
  const auto hooks = at::SavedTensorDefaultHooks::get_hooks(/*ignore_is_tracing=*/true);
  return hooks ? hooks->first.ptr(&hooks->first.pyinterpreter()) : nullptr;
}

// A view, from the tensor that it is a view of.
struct View : RecipeOf<View> {
  at::Tensor make(const at::Tensor& grad) const override {
    return base->make(grad).as_strided_symint(size, stride, offset);
  }
  void each_field(auto&& f) { each(f, base, size, stride, offset); }

  std::shared_ptr<Recipe> base;
  std::vector<c10::SymInt> size, stride;
  c10::SymInt offset;
};

// A tensor in another dtype.
struct Cast : RecipeOf<Cast> {
  at::Tensor make(const at::Tensor& grad) const override { return base->make(grad).to(dtype); }
  void each_field(auto&& f) { each(f, base, dtype); }

  std::shared_ptr<Recipe> base;
  at::ScalarType dtype;
};

}  // namespace

void attach_recipe(const at::Tensor& tensor, std::shared_ptr<Recipe> recipe) {
  TORCH_INTERNAL_ASSERT(!tensor.is_view());
  auto record = std::make_unique<RecordWithRecipe>();
  record->recipe = std::move(recipe);
  record->version = tensor._version();
  record->storage = tensor.unsafeGetTensorImpl()->unsafe_storage().getWeakStorageImpl();
  record->size = tensor.sym_sizes().vec();
  record->stride = tensor.sym_strides().vec();
  record->hooks = saved_tensor_hooks();
  if (const auto* before = torch::autograd::impl::get_autograd_meta(tensor)) {
    record->grad_fn_ = before->grad_fn_;
    record->output_nr_ = before->output_nr_;
  }
  tensor.unsafeGetTensorImpl()->set_autograd_meta(std::move(record));
}

std::shared_ptr<Recipe> recipe_of(const at::Tensor& tensor) {
  const bool is_view = tensor.is_view();
  const auto* record = dynamic_cast<const RecordWithRecipe*>(
      torch::autograd::impl::get_autograd_meta(is_view ? tensor._base() : tensor));
  if (record == nullptr || !record->describes(tensor) || record->hooks != saved_tensor_hooks() ||
      tensor.is_neg() || tensor.is_conj())
    return nullptr;
  if (!is_view) return record->recipe;
  if (tensor.scalar_type() != tensor._base().scalar_type()) return nullptr;
  auto view = std::make_shared<View>();
  view->base = record->recipe;
  view->size = tensor.sym_sizes().vec();
  view->stride = tensor.sym_strides().vec();
  view->offset = tensor.sym_storage_offset();
  return view;
}

at::Tensor autocast_with_recipe(const at::Tensor& tensor, at::ScalarType dtype, c10::DeviceType device) {
  const auto cast = at::autocast::cached_cast(dtype, tensor, device);
  const auto recipe = cast.grad_fn() && !cast.is_same(tensor) ? recipe_of(tensor) : nullptr;
  if (!recipe) return cast;
  auto of_cast = std::make_shared<Cast>();
  of_cast->base = recipe;
  of_cast->dtype = cast.scalar_type();
  attach_recipe(cast, std::move(of_cast));
  return cast;
}

}  // namespace torchqat
