#pragma once

#include <ATen/ATen.h>

#include <optional>
#include <string_view>
#include <utility>
#include <vector>

#include "torchqat/math/bcgd.h"
#include "torchqat/math/channel_view.h"

// What the devices share of the step.
namespace torchqat {

// The arguments of bcgd_step_ by name.
struct BcgdStep {
  at::TensorList params, grads, latents, scales, momentum_buffers, steps;
  const at::Tensor& lr;
  int64_t bits;
  std::optional<int64_t> channel_dim;
  std::string_view method;
  double momentum, dampening, weight_decay;
  bool nesterov;
  double blend;
  bool maximize;
  const std::optional<at::Tensor>& grad_scale;
  const std::optional<at::Tensor>& found_inf;
};

// Calls f(list, its name, whether the step writes it) for the lists of tensors.
template <typename F>
void for_each_list(const BcgdStep& s, F&& f) {
  f(s.params, "params", true);
  f(s.grads, "grads", false);
  f(s.latents, "latents", true);
  f(s.scales, "scales", true);
  f(s.momentum_buffers, "momentum_buffers", true);
  f(s.steps, "steps", true);
}

// Checks the arguments; every backend does it first, and it is all that the Meta kernel does.
void check_bcgd_step(const BcgdStep& step);

// What a backend registers: the check, then `run`. Under the keys above the backends `run` calls the operator
// again.
template <void (*run)(const BcgdStep&)>
void bcgd_step_kernel(at::TensorList params, at::TensorList grads, at::TensorList latents,
                      at::TensorList scales, at::TensorList momentum_buffers, at::TensorList steps,
                      const at::Tensor& lr, int64_t bits, std::optional<int64_t> channel_dim,
                      std::string_view method, double momentum, double dampening, double weight_decay,
                      bool nesterov, double blend, bool maximize, const std::optional<at::Tensor>& grad_scale,
                      const std::optional<at::Tensor>& found_inf) {
  run({params, grads, latents, scales, momentum_buffers, steps, lr, bits, channel_dim, method, momentum,
       dampening, weight_decay, nesterov, blend, maximize, grad_scale, found_inf});
}

// How the step finds its scale.
math::Projection projection_of(std::string_view method, int64_t bits);

// The tensors of one parameter as kernels take them: dense and in one memory order. `buffer` and `steps` are
// undefined without momentum.
struct BcgdItem {
  at::Tensor param, grad, latent, scale, buffer, steps;
  math::ChannelView view;
};

// The items of the parameters of one dtype. Tensors that are not dense, or not laid out like their parameter,
// are replaced by copies, which write_back() copies to where they belong.
class BcgdItems {
 public:
  BcgdItems(const BcgdStep& step, at::ScalarType dtype);
  void write_back() const;

  std::vector<BcgdItem> items;

 private:
  at::Tensor in_place(const at::Tensor& t, const at::Tensor& like);

  std::vector<std::pair<at::Tensor, at::Tensor>> copies_;  // where it belongs, the copy
};

// Calls f(items) for the parameters of each dtype that there is.
template <typename F>
void for_each_dtype(const BcgdStep& step, F&& f) {
  for (const auto dtype : {at::kDouble, at::kFloat, at::kHalf, at::kBFloat16}) {
    const BcgdItems group(step, dtype);
    if (group.items.empty()) continue;
    f(dtype, group.items);
    group.write_back();
  }
}

// The numbers of the rule. What lives on another device than the CPU is 1 here, and the kernel reads it.
template <typename T>
math::StepRule<T> step_rule(const BcgdStep& step) {
  const auto on_cpu = [](const at::Tensor& t) { return t.is_cpu() ? t.item<double>() : 1.0; };
  const double lr = on_cpu(step.lr);
  TORCH_CHECK_VALUE(lr >= 0, "bcgd_step_: lr must be at least 0, got ", lr);
  const double divisor = step.grad_scale ? on_cpu(*step.grad_scale) : 1.0;
  return {T(lr),
          T(step.momentum),
          T(1.0 - step.dampening),
          T(step.weight_decay),
          T(1.0 - step.blend),
          T(step.blend),
          T(step.maximize ? -divisor : divisor),
          step.nesterov};
}

}  // namespace torchqat
