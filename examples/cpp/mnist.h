#pragma once

#include <ATen/core/Tensor.h>

#include <string>

// MNIST's images (N, 1, 28, 28), uint8, and labels (N), int64.
struct Mnist {
  at::Tensor images, labels, test_images, test_labels;
};

// Reads the four idx files of a folder, gzipped (.gz) or plain. std::runtime_error says what is wrong with them.
Mnist load_mnist(const std::string& folder);
