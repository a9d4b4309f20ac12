// Loops of calls on few elements: what a call costs a C++ program before it has anything to compute. Python
// loads this library and times the loops in turn (cases/call_overhead.py).
#include <ATen/ATen.h>
#include <torch/csrc/autograd/autograd.h>
#include <torchqat/ops/staircase_relu.h>

#include <vector>

namespace {

constexpr int64_t kElements = 16;
constexpr int64_t kBits = 4;
constexpr int64_t kTop = (1 << kBits) - 1;
constexpr double kStep = 0.1;

// What a loop measures, in the order in which cases/call_overhead.py numbers them.
enum Passes : int { kNoGradient, kForward, kForwardAndBackward };

// Calls activation(inputs) again and again; what it returns is let go each time, with its graph if there is
// one.
template <typename Activation>
void repeat(int64_t calls, int passes, std::vector<at::Tensor> inputs, const Activation& activation) {
  for (auto& input : inputs) input.requires_grad_(passes != kNoGradient);
  const auto seed = at::ones_like(inputs[0]);
  for (int64_t i = 0; i < calls; ++i) {
    const auto y = activation(inputs);
    if (passes == kForwardAndBackward) torch::autograd::grad({y}, inputs, {seed});
  }
}

}  // namespace

extern "C" {

void staircase_relu(int64_t calls, int passes) {
  repeat(calls, passes, {at::randn(kElements), at::full({}, kStep)},
         [](const auto& in) { return torchqat::staircase_relu(in[0], in[1], kBits); });
}

void staircase_relu_fixed_alpha(int64_t calls, int passes) {
  repeat(calls, passes, {at::randn(kElements)}, [alpha = at::full({}, kStep)](const auto& in) {
    return torchqat::staircase_relu(in[0], alpha, kBits);
  });
}

void relu(int64_t calls, int passes) {
  repeat(calls, passes, {at::randn(kElements)}, [](const auto& in) { return at::relu(in[0]); });
}

void gelu(int64_t calls, int passes) {
  repeat(calls, passes, {at::randn(kElements)}, [](const auto& in) { return at::gelu(in[0], "tanh"); });
}

void fake_quantize(int64_t calls, int passes) {
  repeat(calls, passes, {at::randn(kElements)},
         [](const auto& in) { return at::fake_quantize_per_tensor_affine(in[0], kStep, 0, 0, kTop); });
}

void fake_quantize_learnable(int64_t calls, int passes) {
  repeat(calls, passes, {at::randn(kElements), at::full({1}, kStep)},
         [zero = at::zeros({1})](const auto& in) {
           return at::_fake_quantize_learnable_per_tensor_affine(in[0], in[1], zero, 0, kTop);
         });
}
}
