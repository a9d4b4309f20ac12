// An operator, its gradient, and a module: prints the sum of y, the gradient of alpha, and a loss of 0.
#include <torchqat/torchqat.h>

#include <iostream>

int main() {
  const auto x = at::tensor({-1.0f, 0.2f, 9.0f}).requires_grad_();
  const auto alpha = at::tensor(0.5f).requires_grad_();
  const auto y = torchqat::staircase_relu(x, alpha, /*bits=*/2);
  y.sum().backward();

  torchqat::nn::FeatureAffinityLoss affinity(torchqat::nn::FeatureAffinityLossOptions().norm("fro"));
  const auto features = at::ones({1, 2, 3, 3});
  std::cout << y.sum().item<float>() << ' ' << alpha.grad().item<float>() << ' '
            << affinity(features, features).item<float>() << '\n';
}
