#pragma once

#include <torch/csrc/autograd/function.h>
#include <torch/csrc/autograd/functions/utils.h>
#include <torch/csrc/autograd/saved_variable.h>
#include <torch/csrc/dynamo/compiled_autograd.h>

#include <memory>
#include <type_traits>

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

inline bool has_tangent(const at::Tensor& t) { return t._fw_grad(/*level=*/0).defined(); }

}  // namespace torchqat
