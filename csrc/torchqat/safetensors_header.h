#pragma once

#include <ATen/ATen.h>

#include <map>
#include <optional>
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
constexpr const char* kMetadata = "__metadata__";
constexpr const char* kCutShort = "; the file may have been cut short";

// Raises c10::ValueError, with `path` in it, unless the entries fill `data_bytes` without holes and overlaps.
TensorHeader parse_header(std::string_view text, int64_t data_bytes, const std::string& path);

// What the text says, whether or not it can be.
TensorHeader parse_json(std::string_view text, const std::string& path);

// Compact JSON, with spaces behind it to a multiple of 8.
std::string format_header(const TensorHeader& header);

// The order in which the reference implementation writes dtypes, which keeps every tensor aligned; -1 for
// those that torchqat does not write.
int dtype_order(at::ScalarType dtype);

// The dtype that the format calls so; none where torchqat does not read it.
std::optional<at::ScalarType> dtype_called(std::string_view name);

bool is_utf8(std::string_view text);

// For messages: text from a file, its control characters as \u00xx, and about a hundred characters at most.
std::string printable(std::string_view text);

inline const char* part_of_message(const char* ours) { return ours; }
inline std::string part_of_message(const std::string& of_file) { return printable(of_file); }
inline std::string part_of_message(at::IntArrayRef shape) { return printable(c10::str(shape)); }
template <typename T>
const T& part_of_message(const T& number) {
  return number;
}

// Of the parts, strings and shapes are taken to come from the file.
template <class... Parts>
[[noreturn]] void refuse_file(const std::string& path, const Parts&... parts) {
  C10_THROW_ERROR(ValueError, c10::str("load_safetensors: ", path, ": ", part_of_message(parts)...));
}

}  // namespace torchqat
