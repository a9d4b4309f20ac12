#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <filesystem>
#include <vector>

// MNIST's images (N, 1, 28, 28), uint8, and labels (N), int64.
struct Mnist {
  at::Tensor images, labels, test_images, test_labels;
  double mean, std;  // of the pixels of the training images

  at::Tensor normalized(const at::Tensor& some) const;

  // The training images of one epoch in random order: their indices, in batches of nearly equal size, none of
  // one image alone.
  std::vector<at::Tensor> batches(int64_t batch_size) const;
};

// Reads the four idx files of a folder, gzipped (.gz) or plain, and takes the first `subset` images of each
// part. std::runtime_error says what is wrong with them.
Mnist load_mnist(const std::filesystem::path& folder, int64_t subset);
