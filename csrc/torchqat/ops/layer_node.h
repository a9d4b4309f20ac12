#pragma once

#include <algorithm>
#include <functional>
#include <initializer_list>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "torchqat/ops/recipe.h"

namespace torchqat {

// Whether the gradient in an operator's i-th argument is asked for.
using IsNeeded = std::function<bool(size_t)>;

// A copy of the gradient, of which it is stated what size it has: compiled autograd does not know while it
// traces.
at::Tensor with_size(const at::Tensor& grad, c10::SymIntArrayRef size);

// A copy of a tensor, for which compilers see that it is made in backward: what is computed of it is not
// kept.
at::Tensor in_backward(const at::Tensor& tensor, const at::Tensor& grad);

// The backward pass of an operator. K is what it keeps, saved: K::op is the operator's name in
// messages, and K::derivatives(grad, is_needed) calls dispatcher operators only.
template <typename K>
struct LayerNode : torch::autograd::Node {
  torch::autograd::variable_list apply(torch::autograd::variable_list&& grads) override {
    if (!grads[0].defined()) return torch::autograd::variable_list(num_outputs());
    const std::lock_guard lock(mutex_);
    check_graph_is_there();
    auto result = kept->derivatives(grads[0], [this](size_t i) { return task_should_compute_output(i); });
    if (at::GradMode::is_enabled()) {
      auto inputs = next_edges();
      inputs.push_back(torch::autograd::impl::gradient_edge(grads[0]));
      refuse_second_derivative(K::op, result, std::move(inputs));
    }
    return result;
  }
  void release_variables() override {
    const std::lock_guard lock(mutex_);
    kept.reset();
  }
  std::string name() const override { return std::string(K::op) + "_backward"; }
  void compiled_args(CompiledNodeArgs& args) const override {
    check_graph_is_there();
    kept->each_field([&](auto& field) { collect(args, field); });
    args.collect(size);
  }
  torch::autograd::variable_list apply_with_saved(const torch::autograd::variable_list& grads,
                                                  SwapSavedVariables& swap) override {
    check_graph_is_there();
    kept->each_field([&](auto& field) { before(swap, field); });
    swap.before(size);
    auto result = apply({grads[0].defined() ? with_size(grads[0], size) : at::Tensor()});
    kept->each_field([&](auto& field) { after(swap, field); });
    swap.after(size);
    return result;
  }

  void check_graph_is_there() const { TORCH_CHECK(kept, torch::autograd::ERR_BACKWARD_TWICE); }

  mutable std::optional<K> kept;  // compiled_args visits its fields as the others do, and is const
  std::vector<c10::SymInt> size;  // of the result
};

// Gives an operator's result its history: what backward is to keep, and what the operator has read.
template <typename K>
void set_layer_history(const at::Tensor& result, K kept, torch::autograd::edge_list edges) {
  auto node = make_node<LayerNode<K>>();
  node->kept.emplace(std::move(kept)).each_field([](auto& field) { save(field); });
  node->size = result.sym_sizes().vec();
  node->set_next_edges(std::move(edges));
  torch::autograd::set_history(result, node);
}

inline bool any_tangent(std::initializer_list<at::Tensor> inputs) {
  return std::any_of(inputs.begin(), inputs.end(),
                     [](const auto& t) { return t.defined() && has_tangent(t); });
}

// Whether backward will ask for a gradient in one of the inputs. Tensors with forward-mode tangents are left
// to torch, whose layers pass them on.
inline bool is_differentiated(std::initializer_list<at::Tensor> inputs) {
  return at::GradMode::is_enabled() && !any_tangent(inputs) &&
         std::any_of(inputs.begin(), inputs.end(),
                     [](const auto& t) { return t.defined() && t.requires_grad(); });
}

}  // namespace torchqat
