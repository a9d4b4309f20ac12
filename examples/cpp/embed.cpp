// Runs a network that was trained and saved from Python, and shows the codes of a layer:
//   embed FILE.safetensors
// FILE is a LeNet-5 for 28 x 28 pixels with 2-bit activations, as torchqat.save_checkpoint(FILE, model)
// writes it: quantized.safetensors of `python examples/train_classifier.py --dataset mnist`, or of
// train_mnist here.
#include <torch/utils.h>

#include <exception>
#include <iostream>

#include "lenet5.h"

int main(int argc, char** argv) try {
  TORCH_CHECK_VALUE(argc == 2, "usage: embed FILE.safetensors");
  const torch::NoGradGuard no_grad;
  auto net = lenet5(/*act_bits=*/2);
  torchqat::load_checkpoint(argv[1], *net);
  net->eval();

  at::manual_seed(0);
  auto x = at::randn({1, 1, 28, 28});
  size_t number = 0;
  for (auto& layer : *net) {
    if (number++ == kLastMap) {
      const auto& staircase = net->at<torchqat::nn::StaircaseReLUImpl>(kLastMap);
      const auto codes = torchqat::staircase_codes(x, staircase.step_size(), staircase.options.bits());
      std::cout << staircase << ", codes of its first channel:\n" << codes[0][0].to(at::kInt) << "\n";
    }
    x = layer.forward(x);
  }
  std::cout << "class " << x.argmax().item<int>() << std::endl;
} catch (const c10::Error& error) {
  std::cerr << "embed: " << error.what_without_backtrace() << std::endl;
  return 1;
} catch (const std::exception& error) {
  std::cerr << "embed: " << error.what() << std::endl;
  return 1;
}
