// The JSON of a safetensors header, and text that may be anything.
#include <algorithm>
#include <charconv>
#include <optional>
#include <set>
#include <utility>

#include "torchqat/safetensors_header.h"

namespace torchqat {
namespace {

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
    if (const auto known = dtype_called(dtype)) return *known;
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

}  // namespace

TensorHeader parse_json(std::string_view text, const std::string& path) { return Parser(text, path).parse(); }

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

std::string printable(std::string_view text) {
  constexpr size_t kMost = 100;
  constexpr std::string_view kHex = "0123456789abcdef";
  std::string result;
  for (size_t i = 0; i < text.size(); ++i) {
    const auto byte = static_cast<unsigned char>(text[i]);
    const bool within_character = (byte & 0xc0) == 0x80 && result.size() < kMost + 3;
    if (result.size() >= kMost && !within_character) return result + "...";
    const bool of_c1 = byte == 0xc2 && i + 1 < text.size() && (text[i + 1] & 0xe0) == 0x80;  // U+0080 to 9F
    if (byte < 0x20 || byte == 0x7f || of_c1) {
      const auto code = static_cast<unsigned char>(of_c1 ? text[++i] : text[i]);
      ((result += "\\u00") += kHex[code >> 4]) += kHex[code & 15];
    } else {
      result += text[i];
    }
  }
  return result;
}

}  // namespace torchqat
