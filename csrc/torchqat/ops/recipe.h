#pragma once

#include <ATen/ATen.h>

#include <memory>
#include <optional>
#include <utility>

#include "torchqat/ops/autograd_node.h"

// Tensors that backward passes need, but need not keep: they make them again, bit by bit, from less. What
// made a tensor leaves a recipe with it; what reads the tensor keeps a copy of the recipe instead.
namespace torchqat {

using torch::dynamo::autograd::CompiledNodeArgs;
using torch::dynamo::autograd::SwapSavedVariables;

// A tensor that a recipe begins with: itself while the forward pass runs; in what a node of the graph keeps,
// what autograd has saved of it. Each node saves its own, as checkpointing wants it.
class Ingredient {
 public:
  Ingredient() = default;
  Ingredient(at::Tensor tensor)  // NOLINT: a tensor is one
      : live_(std::move(tensor)), version_(live_.defined() ? live_._version() : 0) {}
  Ingredient(Ingredient&&) = default;
  Ingredient& operator=(Ingredient&&) = default;
  Ingredient(const Ingredient& other) : live_(other.live_), version_(other.version_) {
    TORCH_INTERNAL_ASSERT(!other.saved_);  // what is saved is one node's
  }

  // Whether nothing has written into it since the recipe was made.
  bool is_fresh() const { return !live_.defined() || live_._version() == version_; }

  at::Tensor get() const { return saved_ ? saved_->unpack() : live_; }
  void save() {
    saved_.emplace(live_, /*is_output=*/false);
    live_.reset();
  }
  torch::autograd::SavedVariable& saved() { return *saved_; }

 private:
  at::Tensor live_;
  int64_t version_ = 0;
  std::optional<torch::autograd::SavedVariable> saved_;
};

struct Recipe {
  virtual ~Recipe() = default;

  // The tensor: values, dtype and strides. Calls dispatcher operators only. What computes it gets the
  // gradient that backward has begun with, and does not read it: compilers run what depends on no gradient in
  // the forward pass, and keep the result.
  virtual at::Tensor make(const at::Tensor& grad) const = 0;
  // A copy for a node to keep.
  virtual std::shared_ptr<Recipe> saved() const = 0;
  // Whether all that it begins with is as it was when the tensor was made.
  virtual bool is_fresh() = 0;

  // What compiled autograd asks of a node.
  virtual void collect(CompiledNodeArgs& args) = 0;
  virtual void before(SwapSavedVariables& swap) = 0;
  virtual void after(SwapSavedVariables& swap) = 0;
};

// What is done with each field of what a node keeps.
inline void save(Ingredient& field) { field.save(); }
inline void save(std::shared_ptr<Recipe>& field) { field = field->saved(); }
template <typename T>
void save(T&) {}

inline bool is_fresh(Ingredient& field) { return field.is_fresh(); }
inline bool is_fresh(std::shared_ptr<Recipe>& field) { return field->is_fresh(); }
template <typename T>
bool is_fresh(T&) {
  return true;
}

inline void collect(CompiledNodeArgs& args, Ingredient& field) {
  args.collect(field.saved(), /*is_output=*/false);
}
inline void collect(CompiledNodeArgs& args, std::shared_ptr<Recipe>& field) { field->collect(args); }
template <typename T>
void collect(CompiledNodeArgs& args, T& field) {
  args.collect(field);
}

inline void before(SwapSavedVariables& swap, Ingredient& field) { swap.before(field.saved()); }
inline void before(SwapSavedVariables& swap, std::shared_ptr<Recipe>& field) { field->before(swap); }
template <typename T>
void before(SwapSavedVariables& swap, T& field) {
  swap.before(field);
}

inline void after(SwapSavedVariables& swap, Ingredient& field) { swap.after(field.saved()); }
inline void after(SwapSavedVariables& swap, std::shared_ptr<Recipe>& field) { field->after(swap); }
template <typename T>
void after(SwapSavedVariables& swap, T& field) {
  swap.after(field);
}

// Calls f(field) for each of `fields`.
template <typename F, typename... Fields>
void each(F&& f, Fields&... fields) {
  (f(fields), ...);
}

// A copy for a node to keep; T::each_field(f) calls f(field) for every field.
template <typename T>
std::shared_ptr<T> saved_copy(T kept) {
  auto copy = std::make_shared<T>(std::move(kept));
  copy->each_field([](auto& field) { save(field); });
  return copy;
}

// The same for every recipe.
template <typename Self>
struct RecipeOf : Recipe {
  std::shared_ptr<Recipe> saved() const override { return saved_copy(static_cast<const Self&>(*this)); }
  bool is_fresh() override {
    bool fresh = true;
    self().each_field([&](auto& field) { fresh = fresh && torchqat::is_fresh(field); });
    return fresh;
  }
  void collect(CompiledNodeArgs& args) override {
    self().each_field([&](auto& field) { torchqat::collect(args, field); });
  }
  void before(SwapSavedVariables& swap) override {
    self().each_field([&](auto& field) { torchqat::before(swap, field); });
  }
  void after(SwapSavedVariables& swap) override {
    self().each_field([&](auto& field) { torchqat::after(swap, field); });
  }

 private:
  Self& self() { return static_cast<Self&>(*this); }
};

// A tensor that is kept as it is.
struct Whole : RecipeOf<Whole> {
  at::Tensor make(const at::Tensor&) const override { return tensor.get(); }
  void each_field(auto&& f) { each(f, tensor); }

  Ingredient tensor;
};

// Leaves a recipe with the new result of an operator, whose history it keeps. It lives as long as the tensor.
void attach_recipe(const at::Tensor& tensor, std::shared_ptr<Recipe> recipe);

// The recipe of a tensor, or of a view of one that has a recipe; null where there is none, or where something
// has written into the tensor since, or into what the recipe begins with.
std::shared_ptr<Recipe> recipe_of(const at::Tensor& tensor);

// The tensor in the dtype that autocast computes a layer in, with the recipe that it has.
at::Tensor autocast_with_recipe(const at::Tensor& tensor, at::ScalarType dtype, c10::DeviceType device);

}  // namespace torchqat
