#include "torchqat/safetensors.h"

#include <torch/library.h>

#include <algorithm>
#include <tuple>
#include <utility>
#include <vector>

#include "torchqat/safetensors_files.h"
#include "torchqat/safetensors_header.h"

namespace torchqat {
namespace {

void check_tensor(const std::string& name, const at::Tensor& tensor) {
  TORCH_CHECK_VALUE(name != kMetadata && is_utf8(name), kSave,
                    ": a name must be UTF-8 and not __metadata__, got '", name, "'");
  TORCH_CHECK_TYPE(tensor.defined(), kSave, ": tensor '", name, "' must be defined");
  TORCH_CHECK_TYPE(dtype_order(tensor.scalar_type()) >= 0, kSave, ": tensor '", name, "' has the dtype ",
                   tensor.scalar_type(), ", which is not written");
  TORCH_CHECK_TYPE(tensor.layout() == at::kStrided && !tensor.is_meta(), kSave, ": tensor '", name,
                   "' must be dense and have values, got layout ", tensor.layout(), " on ", tensor.device());
}

// The header, and the tensors in its order.
std::pair<TensorHeader, std::vector<at::Tensor>> in_file_order(const TensorFile& file) {
  std::vector<std::pair<std::string, at::Tensor>> sorted;
  for (const auto& [name, tensor] : file.tensors) {
    check_tensor(name, tensor);
    sorted.emplace_back(name, tensor);
  }
  std::stable_sort(sorted.begin(), sorted.end(), [](const auto& a, const auto& b) {
    return dtype_order(a.second.scalar_type()) < dtype_order(b.second.scalar_type());
  });
  TensorHeader header{{}, file.metadata};
  std::vector<at::Tensor> tensors;
  int64_t at = 0;
  for (auto& [name, tensor] : sorted) {
    const int64_t end = at + tensor.numel() * tensor.element_size();
    header.entries.push_back({std::move(name), tensor.scalar_type(), tensor.sizes().vec(), at, end});
    tensors.push_back(std::move(tensor));
    at = end;
  }
  for (const auto& [key, value] : file.metadata) {
    TORCH_CHECK_VALUE(is_utf8(key) && is_utf8(value), kSave, ": metadata must be UTF-8, got '", key, "': '",
                      value, "'");
  }
  return {std::move(header), std::move(tensors)};
}

void write_file(const std::string& path, const std::string& header, const std::vector<at::Tensor>& tensors) {
  const uint64_t length = header.size();
  NewFile out(path);
  out.write(&length, sizeof length);
  out.write(header.data(), header.size());
  for (const auto& tensor : tensors) {
    const auto plain = tensor.detach().to(at::kCPU).resolve_neg().contiguous();
    out.write(plain.const_data_ptr(), plain.nbytes());
  }
  out.commit();
}

void check_bool(const std::string& path, const TensorEntry& entry, const at::Tensor& tensor) {
  const auto* bytes = static_cast<const unsigned char*>(tensor.const_data_ptr());
  if (std::any_of(bytes, bytes + tensor.numel(), [](unsigned char byte) { return byte > 1; })) {
    refuse_file(path, "tensor '", entry.name, "' is BOOL and must have bytes 0 and 1 only");
  }
}

}  // namespace

void save_safetensors(const std::string& path, const TensorFile& file) {
  const auto [header, tensors] = in_file_order(file);
  const std::string text = format_header(header);
  TORCH_CHECK_VALUE(text.size() <= kMaxHeader, kSave, ": ", path, ": the names and the metadata must fit ",
                    kMaxHeader, " bytes, got ", text.size());
  try {
    write_file(path, text, tensors);
  } catch (...) {  // else nothing is unwound, nor the file removed, where nobody catches
    throw;
  }
}

TensorFile load_safetensors(const std::string& path) {
  OldFile in(path);
  uint64_t length = 0;
  if (in.size() < sizeof length) {
    refuse_file(path, "must have 8 bytes for a length, has ", in.size(), kCutShort);
  }
  in.read(&length, sizeof length);
  const uint64_t left = in.size() - sizeof length;
  if (length > kMaxHeader || length > left) {
    refuse_file(path, "the header must be within ", std::min(left, kMaxHeader), " bytes, got a length of ",
                length, length > kMaxHeader ? "" : kCutShort);
  }
  std::string text(length, '\0');
  in.read(text.data(), text.size());
  auto header = parse_header(text, static_cast<int64_t>(left - length), path);

  TensorFile file{{}, std::move(header.metadata)};
  for (const auto& entry : header.entries) {
    const auto tensor = at::empty(entry.shape, at::TensorOptions(entry.dtype));
    in.read(tensor.mutable_data_ptr(), tensor.nbytes());
    if (entry.dtype == at::kBool) check_bool(path, entry, tensor);
    file.tensors.emplace(entry.name, tensor);
  }
  return file;
}

namespace {

// What Python calls.
using Metadata = c10::Dict<std::string, std::string>;

void save(std::string path, std::vector<std::string> names, at::TensorList tensors, Metadata metadata) {
  TORCH_CHECK_VALUE(names.size() == tensors.size(), kSave, ": one name for each of ", tensors.size(),
                    " tensors, got ", names.size());
  TensorFile file;
  for (size_t i = 0; i < names.size(); ++i) {
    TORCH_CHECK_VALUE(file.tensors.emplace(names[i], tensors[i]).second, kSave, ": the name '", names[i],
                      "' is there twice");
  }
  for (const auto& item : metadata) file.metadata.emplace(item.key(), item.value());
  save_safetensors(path, file);
}

std::tuple<std::vector<std::string>, std::vector<at::Tensor>, Metadata> load(std::string path) {
  TensorFile file = load_safetensors(path);
  std::vector<std::string> names;
  std::vector<at::Tensor> tensors;
  for (auto& [name, tensor] : file.tensors) {
    names.push_back(name);
    tensors.push_back(std::move(tensor));
  }
  Metadata metadata;
  for (const auto& [key, value] : file.metadata) metadata.insert(key, value);
  return {std::move(names), std::move(tensors), std::move(metadata)};
}

}  // namespace

TORCH_LIBRARY_IMPL(qat, CompositeExplicitAutograd, m) {
  m.impl("_save_safetensors", save);
  m.impl("_load_safetensors", load);
}

}  // namespace torchqat
