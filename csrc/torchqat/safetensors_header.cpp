#include "torchqat/safetensors_header.h"

#include <algorithm>
#include <iterator>
#include <tuple>

namespace torchqat {
namespace {

struct Dtype {
  const char* name;
  at::ScalarType type;
};

constexpr Dtype kDtypes[] = {
    {"I64", at::kLong}, {"F64", at::kDouble}, {"F32", at::kFloat}, {"I32", at::kInt}, {"BF16", at::kBFloat16},
    {"F16", at::kHalf}, {"I16", at::kShort},  {"I8", at::kChar},   {"U8", at::kByte}, {"BOOL", at::kBool}};

// dtype and shape against the bytes. The product leaves zeros out: torch's strides must not overflow either.
void check_size(const TensorEntry& entry, const std::string& path) {
  int64_t bytes = static_cast<int64_t>(at::elementSize(entry.dtype));
  bool overflow = false, empty = false;
  for (const int64_t size : entry.shape) {
    overflow |= __builtin_mul_overflow(bytes, std::max<int64_t>(size, 1), &bytes);
    empty |= size == 0;
  }
  if (overflow)
    refuse_file(path, "the shape of tensor '", entry.name, "' overflows: ", at::IntArrayRef(entry.shape));
  if (empty) bytes = 0;
  if (entry.end - entry.begin != bytes) {
    refuse_file(path, "tensor '", entry.name, "' must have ", bytes, " bytes, ", entry.dtype, " of shape ",
                at::IntArrayRef(entry.shape), ", got data_offsets ", entry.begin, " to ", entry.end);
  }
}

void append_quoted(std::string& text, const std::string& value) {
  constexpr std::string_view kMeant = "\"\\\b\f\n\r\t", kNames = "\"\\bfnrt", kHex = "0123456789abcdef";
  text += '"';
  for (const char c : value) {
    const size_t k = kMeant.find(c);
    if (k != std::string_view::npos) {
      (text += '\\') += kNames[k];
    } else if (static_cast<unsigned char>(c) < 0x20) {
      ((text += "\\u00") += kHex[c >> 4]) += kHex[c & 15];
    } else {
      text += c;
    }
  }
  text += '"';
}

}  // namespace

std::optional<at::ScalarType> dtype_called(std::string_view name) {
  for (const auto& known : kDtypes) {
    if (name == known.name) return known.type;
  }
  return std::nullopt;
}

int dtype_order(at::ScalarType dtype) {
  const auto* found = std::find_if(std::begin(kDtypes), std::end(kDtypes),
                                   [&](const Dtype& known) { return known.type == dtype; });
  return found == std::end(kDtypes) ? -1 : static_cast<int>(found - kDtypes);
}

TensorHeader parse_header(std::string_view text, int64_t data_bytes, const std::string& path) {
  TensorHeader header = parse_json(text, path);
  auto& entries = header.entries;
  std::sort(entries.begin(), entries.end(), [](const TensorEntry& a, const TensorEntry& b) {
    return std::tie(a.begin, a.end) < std::tie(b.begin, b.end);
  });
  int64_t at = 0;
  for (const auto& entry : entries) {
    if (entry.begin != at || entry.end < at || entry.end > data_bytes) {
      refuse_file(path, "the bytes of tensor '", entry.name, "' must begin at ", at,
                  ", where the one before it ends, and lie within ", data_bytes, ", got data_offsets ",
                  entry.begin, " to ", entry.end,
                  entry.begin == at && entry.end > data_bytes ? kCutShort : "");
    }
    check_size(entry, path);
    at = entry.end;
  }
  if (at != data_bytes) {
    refuse_file(path, "the tensors must fill the ", data_bytes, " bytes of data, got ", at);
  }
  return header;
}

std::string format_header(const TensorHeader& header) {
  std::string text = "{";
  const auto begin = [&](const std::string& name) {
    if (text.back() != '{') text += ',';
    append_quoted(text, name);
    text += ':';
  };
  if (!header.metadata.empty()) {
    begin(kMetadata);
    text += '{';
    for (const auto& [key, value] : header.metadata) {
      begin(key);
      append_quoted(text, value);
    }
    text += '}';
  }
  for (const auto& entry : header.entries) {
    begin(entry.name);
    text += c10::str("{\"dtype\":\"", kDtypes[dtype_order(entry.dtype)].name, "\",\"shape\":[",
                     c10::Join(",", entry.shape), "],\"data_offsets\":[", entry.begin, ",", entry.end, "]}");
  }
  text += '}';
  text.append((8 - text.size() % 8) % 8, ' ');
  return text;
}

}  // namespace torchqat
