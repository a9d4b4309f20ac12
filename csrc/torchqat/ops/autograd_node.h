#pragma once

#include <torch/csrc/autograd/function.h>
#include <torch/csrc/autograd/functions/utils.h>
#include <torch/csrc/autograd/saved_variable.h>
#include <torch/csrc/dynamo/compiled_autograd.h>

#include <memory>
#include <string>
#include <string_view>
#include <type_traits>
#include <utility>

// Derivatives are hand-written autograd nodes rather than torch::autograd::Function, which torch.func
// refuses. A node's backward must call dispatcher operators only, so that compilers can trace it.
namespace torchqat {

// A new node of type T. torch 2.13 moved nodes from shared_ptr to intrusive_ptr; this serves both.
template <class T, class Node = torch::autograd::Node>
auto make_node() {
  if constexpr (std::is_base_of_v<c10::intrusive_ptr_target, Node>) {
    return c10::make_intrusive<T>();
  } else {
    using namespace torch::autograd;  // deleteNode, which newer versions lack
    return std::shared_ptr<T>(new T(), [](Node* node) { deleteNode(node); });
  }
}

// What a first derivative that keeps its graph hangs from, where a second one is missing: an error rather
// than a gradient of zero. `inputs` are the edges to all that the first derivative depends on.
struct NoSecondDerivative : torch::autograd::Node {
  torch::autograd::variable_list apply(torch::autograd::variable_list&&) override {
    TORCH_CHECK_NOT_IMPLEMENTED(false, op, ": second derivatives are not implemented");
  }
  std::string name() const override { return "NoSecondDerivative"; }

  std::string op;
};

inline void refuse_second_derivative(std::string_view op, const torch::autograd::variable_list& derivatives,
                                     torch::autograd::edge_list inputs) {
  const auto node = make_node<NoSecondDerivative>();
  node->op = op;
  node->set_next_edges(std::move(inputs));
  for (const auto& derivative : derivatives) {
    if (derivative.defined()) torch::autograd::set_history(derivative, node);
  }
}

inline bool has_tangent(const at::Tensor& t) { return t._fw_grad(/*level=*/0).defined(); }

}  // namespace torchqat
