#include "torchqat/safetensors_header.h"

#include <algorithm>
#include <charconv>
#include <optional>
#include <set>
#include <tuple>
#include <utility>

namespace torchqat {
namespace {

constexpr const char* kMetadata = "__metadata__";

struct Dtype {
  const char* name;
  at::ScalarType type;
};

constexpr Dtype kDtypes[] = {
    {"I64", at::kLong}, {"F64", at::kDouble}, {"F32", at::kFloat}, {"I32", at::kInt}, {"BF16", at::kBFloat16},
    {"F16", at::kHalf}, {"I16", at::kShort},  {"I8", at::kChar},   {"U8", at::kByte}, {"BOOL", at::kBool}};

void append_utf8(std::string& text, uint32_t c) {
  const auto add = [&](uint32_t byte) { text += static_cast<char>(byte); };
  if (c < 0x80) return add(c);
  if (c < 0x800) {
    add(0xc0 | c >> 6);
  } else {
    if (c < 0x10000) {
      add(0xe0 | c >> 12);
    } else {
      add(0xf0 | c >> 18);
      add(0x80 | (c >> 12 & 0x3f));
    }
    add(0x80 | (c >> 6 & 0x3f));
  }
  add(0x80 | (c & 0x3f));
}

// Only the JSON that a header has: objects of known depth, so that nothing recurses.
class Parser {
 public:
  Parser(std::string_view text, const std::string& path) : text_(text), path_(path) {}

  TensorHeader parse() {
    if (text_.empty() || text_[0] != '{') refuse_file(path_, "the header must begin with '{'");
    if (!is_utf8(text_)) refuse_file(path_, "the header must be UTF-8");
    TensorHeader header;
    std::set<std::string> names;
    object([&](std::string name) {
      if (!names.insert(name).second) refuse_file(path_, "the name '", name, "' is there twice");
      if (name == kMetadata) {
        parse_metadata(header.metadata);
      } else {
        header.entries.push_back(parse_entry(std::move(name)));
      }
    });
    skip_blanks();
    if (at_ != text_.size()) fail("nothing but spaces");
    return header;
  }

 private:
  [[noreturn]] void fail(const char* expected) {
    refuse_file(path_, "the header must have ", expected, " at byte ", at_);
  }

  void parse_metadata(std::map<std::string, std::string>& metadata) {
    object([&](std::string key) {
      if (!metadata.emplace(key, string()).second) {
        refuse_file(path_, "the metadata '", key, "' is there twice");
      }
    });
  }

  TensorEntry parse_entry(std::string name) {
    std::optional<at::ScalarType> dtype;
    std::optional<std::vector<int64_t>> shape, offsets;
    object([&](const std::string& key) {
      if (key == "dtype" && !dtype) {
        dtype = parse_dtype(name);
      } else if (key == "shape" && !shape) {
        shape = integers();
      } else if (key == "data_offsets" && !offsets) {
        offsets = integers();
      } else {
        refuse_file(path_, "tensor '", name, "' must have dtype, shape and data_offsets once each, got '",
                    key, "'");
      }
    });
    if (!dtype || !shape || !offsets || offsets->size() != 2) {
      refuse_file(path_, "tensor '", name, "' must have dtype, shape and two data_offsets");
    }
    return {std::move(name), *dtype, std::move(*shape), (*offsets)[0], (*offsets)[1]};
  }

  at::ScalarType parse_dtype(const std::string& name) {
    const std::string dtype = string();
    for (const auto& known : kDtypes) {
      if (dtype == known.name) return known.type;
    }
    refuse_file(path_, "tensor '", name, "' has the dtype '", dtype, "', which torchqat does not read");
  }

  void skip_blanks() { at_ = std::min(text_.find_first_not_of(" \t\n\r", at_), text_.size()); }

  bool take(char c) {
    skip_blanks();
    const bool there = at_ < text_.size() && text_[at_] == c;
    at_ += there;
    return there;
  }

  void expect(char c, const char* expected) {
    if (!take(c)) fail(expected);
  }

  // Behind the opening bracket: `item`s with commas between them.
  template <class Item>
  void items(char close, const char* expected, Item item) {
    if (take(close)) return;
    do item();
    while (take(','));
    expect(close, expected);
  }

  template <class Member>
  void object(Member member) {
    expect('{', "'{'");
    items('}', "',' or '}'", [&] {
      std::string key = string();
      expect(':', "':'");
      member(std::move(key));
    });
  }

  std::vector<int64_t> integers() {
    std::vector<int64_t> values;
    expect('[', "'['");
    items(']', "',' or ']'", [&] { values.push_back(integer()); });
    return values;
  }

  int64_t integer() {
    skip_blanks();
    const char *begin = text_.data() + at_, *end = text_.data() + text_.size();
    const auto is_digit = [&](const char* c) { return c < end && '0' <= *c && *c <= '9'; };
    int64_t value = 0;
    const auto [after, error] = std::from_chars(begin, end, value);
    if (!is_digit(begin) || (*begin == '0' && is_digit(begin + 1)) || error != std::errc()) {
      fail("an integer from 0 to 2^63 - 1");
    }
    at_ += after - begin;
    return value;
  }

  std::string string() {
    expect('"', "a string");
    std::string value;
    while (at_ < text_.size() && text_[at_] != '"') {
      if (static_cast<unsigned char>(text_[at_]) < 0x20) fail("no control character");
      if (text_[at_] == '\\') {
        ++at_;
        append_escaped(value);
      } else {
        value += text_[at_++];
      }
    }
    if (at_ == text_.size()) fail("the end of a string");
    ++at_;
    return value;
  }

  void append_escaped(std::string& value) {
    constexpr std::string_view kNames = "\"\\/bfnrt", kMeant = "\"\\/\b\f\n\r\t";
    const char c = at_ < text_.size() ? text_[at_] : '\0';
    const size_t k = kNames.find(c);
    if (c != 'u' && k == std::string_view::npos) fail("a known escape");
    ++at_;
    if (c == 'u') {
      append_utf8(value, code_point());
    } else {
      value += kMeant[k];
    }
  }

  // Behind \u; two of them make one character where they are surrogates.
  uint32_t code_point() {
    const uint32_t first = hexadecimal();
    if (first < 0xd800 || first > 0xdfff) return first;
    const bool pair = first < 0xdc00 && text_.substr(at_, 2) == "\\u";
    if (pair) at_ += 2;
    const uint32_t second = pair ? hexadecimal() : 0;
    if (second < 0xdc00 || second > 0xdfff) fail("surrogates in pairs");
    return 0x10000 + ((first - 0xd800) << 10) + (second - 0xdc00);
  }

  uint32_t hexadecimal() {
    const std::string_view digits = text_.substr(at_, 4);
    uint32_t value = 0;
    const auto [after, error] = std::from_chars(digits.data(), digits.data() + digits.size(), value, 16);
    if (error != std::errc() || after != digits.data() + 4) fail("four hexadecimal digits");
    at_ += 4;
    return value;
  }

  std::string_view text_;
  const std::string& path_;
  size_t at_ = 0;
};

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

bool is_utf8(std::string_view text) {
  for (size_t i = 0; i < text.size();) {
    const auto byte = [&](size_t k) { return i + k < text.size() ? text[i + k] & 0xffu : 0u; };
    const unsigned lead = byte(0), second = byte(1);
    const size_t length = lead < 0x80 ? 1 : lead < 0xe0 ? 2 : lead < 0xf0 ? 3 : 4;
    if ((0x80 <= lead && lead < 0xc2) || lead > 0xf4) return false;
    for (size_t k = 1; k < length; ++k) {
      if ((byte(k) & 0xc0) != 0x80) return false;
    }
    // Longer than need be, a surrogate, or beyond U+10FFFF.
    if ((lead == 0xe0 && second < 0xa0) || (lead == 0xed && second > 0x9f) ||
        (lead == 0xf0 && second < 0x90) || (lead == 0xf4 && second > 0x8f)) {
      return false;
    }
    i += length;
  }
  return true;
}

int dtype_order(at::ScalarType dtype) {
  const auto* found = std::find_if(std::begin(kDtypes), std::end(kDtypes),
                                   [&](const Dtype& known) { return known.type == dtype; });
  return found == std::end(kDtypes) ? -1 : static_cast<int>(found - kDtypes);
}

TensorHeader parse_header(std::string_view text, int64_t data_bytes, const std::string& path) {
  TensorHeader header = Parser(text, path).parse();
  auto& entries = header.entries;
  std::sort(entries.begin(), entries.end(), [](const TensorEntry& a, const TensorEntry& b) {
    return std::tie(a.begin, a.end) < std::tie(b.begin, b.end);
  });
  int64_t at = 0;
  for (const auto& entry : entries) {
    if (entry.begin != at || entry.end < at || entry.end > data_bytes) {
      refuse_file(path, "the bytes of tensor '", entry.name, "' must begin at ", at,
                  ", where the one before it ends, and lie within ", data_bytes, ", got data_offsets ",
                  entry.begin, " to ", entry.end);
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
