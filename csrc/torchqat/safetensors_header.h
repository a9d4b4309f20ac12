#pragma once

#include <ATen/ATen.h>

#include <map>
#include <string>
#include <string_view>
#include <vector>

// The header of a safetensors file: text on one side, what it says on the other.
namespace torchqat {

struct TensorEntry {
  std::string name;
  at::ScalarType dtype;
  std::vector<int64_t> shape;
  int64_t begin, end;  // bytes after the header
};

struct TensorHeader {
  std::vector<TensorEntry> entries;  // in the order of their bytes
  std::map<std::string, std::string> metadata;
};

constexpr uint64_t kMaxHeader = 100'000'000;  // bytes; the format's own bound

// Raises c10::ValueError, with `path` in it, unless the entries fill `data_bytes` without holes and overlaps.
TensorHeader parse_header(std::string_view text, int64_t data_bytes, const std::string& path);

// Compact JSON, with spaces behind it to a multiple of 8.
std::string format_header(const TensorHeader& header);

// The order in which the reference implementation writes dtypes, which keeps every tensor aligned; -1 for
// those that torchqat does not write.
int dtype_order(at::ScalarType dtype);

bool is_utf8(std::string_view text);

template <class... Parts>
[[noreturn]] void refuse_file(const std::string& path, const Parts&... parts) {
  C10_THROW_ERROR(ValueError, c10::str("load_safetensors: ", path, ": ", parts...));
}

}  // namespace torchqat
