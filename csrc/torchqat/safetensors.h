#pragma once

#include <ATen/ATen.h>

#include <map>
#include <string>

#include "torchqat/macros.h"

namespace torchqat {

// What a safetensors file holds: tensors by name, and text by name. Names and text are UTF-8.
struct TensorFile {
  std::map<std::string, at::Tensor> tensors;
  std::map<std::string, std::string> metadata;
};

// Writes a file of the safetensors format (https://github.com/huggingface/safetensors), byte by byte as its
// reference implementation does but for the order of metadata. Tensors: dense, float64, float32, float16,
// bfloat16, int64, int32, int16, int8, uint8 or bool, of any strides and any device; those that share memory
// are written one by one. The file is made beside `path` and then takes its name: an error leaves no part of
// a file behind, and what was at `path` as it was. Raises c10::TypeError and c10::ValueError for what cannot
// be written, c10::Error with the path and the system's reason where the file cannot be.
TORCHQAT_API void save_safetensors(const std::string& path, const TensorFile& file);

// Reads such a file; the tensors are on the CPU, contiguous. Nothing in it is trusted: c10::ValueError with
// the path says what is wrong with it, c10::Error with the path and the system's reason why it cannot be
// read.
TORCHQAT_API TensorFile load_safetensors(const std::string& path);

}  // namespace torchqat
