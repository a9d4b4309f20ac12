#include "torchqat/safetensors.h"

#include <fcntl.h>
#include <sys/stat.h>
#include <torch/library.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <filesystem>
#include <system_error>
#include <tuple>
#include <utility>
#include <vector>

#include "torchqat/safetensors_header.h"

namespace torchqat {
namespace {

constexpr const char* kSave = "save_safetensors";
constexpr const char* kLoad = "load_safetensors";

[[noreturn]] void fail(const char* function, const std::string& path, const std::string& reason) {
  C10_THROW_ERROR(Error, c10::str(function, ": ", path, ": ", reason));
}

[[noreturn]] void fail_system(const char* function, const std::string& path, int error) {
  fail(function, path, std::generic_category().message(error));
}

void check_regular(const char* function, const std::string& path, const struct stat& facts) {
  if (S_ISDIR(facts.st_mode)) fail_system(function, path, EISDIR);
  if (!S_ISREG(facts.st_mode)) fail(function, path, "not a regular file");
}

// Before any call of the system, which would take what is in front of the NUL.
void check_path(const char* function, const std::string& path) {
  TORCH_CHECK_VALUE(path.find('\0') == std::string::npos, function, ": a path must have no NUL in it, got ",
                    path);
}

// Closes what a constructor that raises leaves open.
class Descriptor {
 public:
  Descriptor() = default;
  Descriptor(const Descriptor&) = delete;
  Descriptor& operator=(const Descriptor&) = delete;
  ~Descriptor() { close(); }

  bool open(const char* path, int flags) { return (number_ = ::open(path, flags | O_CLOEXEC, 0666)) >= 0; }
  bool close() { return number_ < 0 || ::close(std::exchange(number_, -1)) == 0; }
  int number() const { return number_; }

 private:
  int number_ = -1;
};

// A file under a name of its own, in the folder where it shall be in the end; removed unless it gets there.
class NewFile {
 public:
  explicit NewFile(const std::string& path) : path_(path) {
    check_path(kSave, path);
    std::error_code missing;
    target_ = std::filesystem::canonical(path, missing);  // a link stays one
    if (missing) target_ = path;
    struct stat there {};
    if (stat(target_.c_str(), &there) == 0) check_regular(kSave, path, there);
    static std::atomic<unsigned> count{0};
    do {
      own_ = target_.parent_path() / c10::str(".torchqat-", getpid(), "-", count++, ".tmp");
      if (file_.open(own_.c_str(), O_WRONLY | O_CREAT | O_EXCL)) return;
    } while (errno == EEXIST);
    fail_system(kSave, path, errno);
  }
  ~NewFile() {
    if (!done_) unlink(own_.c_str());
  }

  void write(const void* data, size_t size) {
    for (const char* at = static_cast<const char*>(data); size > 0;) {
      const ssize_t count = ::write(file_.number(), at, size);
      if (count < 0 && errno == EINTR) continue;
      if (count <= 0) fail_system(kSave, path_, count < 0 ? errno : ENOSPC);
      at += count;
      size -= static_cast<size_t>(count);
    }
  }

  void commit() {
    if (fsync(file_.number()) != 0) fail_system(kSave, path_, errno);
    if (!file_.close()) fail_system(kSave, path_, errno);
    if (rename(own_.c_str(), target_.c_str()) != 0) fail_system(kSave, path_, errno);
    done_ = true;
  }

 private:
  const std::string& path_;
  std::filesystem::path target_, own_;
  Descriptor file_;
  bool done_ = false;
};

class OldFile {
 public:
  explicit OldFile(const std::string& path) : path_(path) {
    check_path(kLoad, path);
    // A pipe must not wait for its writer.
    if (!file_.open(path.c_str(), O_RDONLY | O_NONBLOCK)) fail_system(kLoad, path, errno);
    struct stat facts {};
    if (fstat(file_.number(), &facts) != 0) fail_system(kLoad, path, errno);
    check_regular(kLoad, path, facts);
    size_ = static_cast<uint64_t>(facts.st_size);
  }
  uint64_t size() const { return size_; }

  void read(void* data, size_t size) {
    for (char* at = static_cast<char*>(data); size > 0;) {
      const ssize_t count = ::read(file_.number(), at, size);
      if (count < 0 && errno == EINTR) continue;
      if (count < 0) fail_system(kLoad, path_, errno);
      if (count == 0) refuse_file(path_, "became shorter while it was read");
      at += count;
      size -= static_cast<size_t>(count);
    }
  }

 private:
  const std::string& path_;
  Descriptor file_;
  uint64_t size_ = 0;
};

void check_tensor(const std::string& name, const at::Tensor& tensor) {
  TORCH_CHECK_VALUE(name != "__metadata__" && is_utf8(name), kSave,
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
  const uint64_t length = text.size();
  NewFile out(path);
  out.write(&length, sizeof length);
  out.write(text.data(), text.size());
  for (const auto& tensor : tensors) {
    const auto plain = tensor.detach().to(at::kCPU).resolve_neg().contiguous();
    out.write(plain.const_data_ptr(), plain.nbytes());
  }
  out.commit();
}

TensorFile load_safetensors(const std::string& path) {
  OldFile in(path);
  uint64_t length = 0;
  if (in.size() < sizeof length) refuse_file(path, "must have 8 bytes for a length, has ", in.size());
  in.read(&length, sizeof length);
  const uint64_t left = in.size() - sizeof length;
  if (length > kMaxHeader || length > left) {
    refuse_file(path, "the header must be within ", std::min(left, kMaxHeader), " bytes, got a length of ",
                length);
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
