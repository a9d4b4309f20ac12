#pragma once

#include <torch/nn/modules/activation.h>
#include <torch/nn/modules/container/sequential.h>
#include <torchqat/torchqat.h>

#include <cmath>
#include <cstdint>
#include <optional>

// LeNet-5 as examples/models.py has it, for images of 28 x 28 pixels: the same layers under the same numbers,
// so that states of either language load in the other. With `act_bits` each ReLU is a staircase, and the
// layers keep its codes for backward. `width` multiplies the numbers of channels.
inline torch::nn::Sequential lenet5(std::optional<int64_t> act_bits = std::nullopt, double width = 1) {
  namespace nn = torch::nn;
  namespace qnn = torchqat::nn;
  const auto wide = [&](double channels) { return static_cast<int64_t>(std::nearbyint(width * channels)); };
  const int64_t first = wide(32), second = wide(64), third = wide(512);
  nn::Sequential net;
  const auto relu = [&] {
    if (act_bits)
      net->push_back(qnn::StaircaseReLU(*act_bits));
    else
      net->push_back(nn::ReLU());
  };
  net->push_back(qnn::QuantConv2d(nn::Conv2dOptions(1, first, 5).padding(2).bias(false)));
  net->push_back(nn::BatchNorm2d(first));
  relu();
  net->push_back(qnn::QuantMaxPool2d(2));
  net->push_back(qnn::QuantConv2d(nn::Conv2dOptions(first, second, 5).padding(2).bias(false)));
  net->push_back(nn::BatchNorm2d(second));
  relu();
  net->push_back(qnn::QuantMaxPool2d(2));
  net->push_back(nn::Flatten());
  net->push_back(qnn::QuantLinear(nn::LinearOptions(second * 7 * 7, third).bias(false)));
  net->push_back(nn::BatchNorm1d(third));
  relu();
  net->push_back(qnn::QuantLinear(third, 10));
  return net;
}

// The number of the layer whose output is the last feature map, (batch, channels, 14, 14).
constexpr size_t kLastMap = 6;

struct Seen {
  at::Tensor logits, map;
};

// Runs the layers one by one, and keeps the last feature map.
inline Seen look(torch::nn::Sequential& net, at::Tensor x) {
  Seen seen;
  size_t number = 0;
  for (auto& layer : *net) {
    x = layer.forward(x);
    if (number++ == kLastMap) seen.map = x;
  }
  seen.logits = x;
  return seen;
}
