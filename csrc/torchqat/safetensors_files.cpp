#include "torchqat/safetensors_files.h"

#include <c10/util/Exception.h>
#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <atomic>
#include <cerrno>
#include <system_error>
#include <utility>

#include "torchqat/safetensors_header.h"

namespace torchqat {
namespace {

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

}  // namespace

bool Descriptor::open(const char* path, int flags) {
  return (number_ = ::open(path, flags | O_CLOEXEC, 0666)) >= 0;
}

bool Descriptor::close() { return number_ < 0 || ::close(std::exchange(number_, -1)) == 0; }

NewFile::NewFile(const std::string& path) : path_(path) {
  check_path(kSave, path);
  std::error_code missing;
  target_ = std::filesystem::canonical(path, missing);  // a link stays one
  if (missing) target_ = path;
  struct stat there {};
  if (stat(target_.c_str(), &there) == 0) check_regular(kSave, path, there);
  if (!open_unnamed()) take_name([&] { return file_.open(own_.c_str(), O_WRONLY | O_CREAT | O_EXCL); });
}

NewFile::~NewFile() {
  if (!own_.empty()) unlink(own_.c_str());
}

// Whether the folder has such files, and there is a way to name them later.
bool NewFile::open_unnamed() {
  const auto folder = target_.has_parent_path() ? target_.parent_path() : std::filesystem::path(".");
  if (!file_.open(folder.c_str(), O_WRONLY | O_TMPFILE)) return false;
  link_ = c10::str("/proc/self/fd/", file_.number());
  if (access(link_.c_str(), F_OK) == 0) return true;
  link_.clear();
  file_.close();
  return false;
}

// `take` makes a file called own_.
template <typename Take>
void NewFile::take_name(Take take) {
  static std::atomic<unsigned> count{0};
  do {
    own_ = target_.parent_path() / c10::str(".torchqat-", getpid(), "-", count++, ".tmp");
    if (take()) return;
  } while (errno == EEXIST);
  const int error = errno;
  own_.clear();
  fail_system(kSave, path_, error);
}

void NewFile::write(const void* data, size_t size) {
  for (const char* at = static_cast<const char*>(data); size > 0;) {
    const ssize_t count = ::write(file_.number(), at, size);
    if (count < 0 && errno == EINTR) continue;
    if (count <= 0) fail_system(kSave, path_, count < 0 ? errno : ENOSPC);
    at += count;
    size -= static_cast<size_t>(count);
  }
}

void NewFile::commit() {
  if (fsync(file_.number()) != 0) fail_system(kSave, path_, errno);
  if (!link_.empty()) {
    take_name(
        [&] { return linkat(AT_FDCWD, link_.c_str(), AT_FDCWD, own_.c_str(), AT_SYMLINK_FOLLOW) == 0; });
  }
  if (!file_.close()) fail_system(kSave, path_, errno);
  if (rename(own_.c_str(), target_.c_str()) != 0) fail_system(kSave, path_, errno);
  own_.clear();
}

OldFile::OldFile(const std::string& path) : path_(path) {
  check_path(kLoad, path);
  // A pipe must not wait for its writer.
  if (!file_.open(path.c_str(), O_RDONLY | O_NONBLOCK)) fail_system(kLoad, path, errno);
  struct stat facts {};
  if (fstat(file_.number(), &facts) != 0) fail_system(kLoad, path, errno);
  check_regular(kLoad, path, facts);
  size_ = static_cast<uint64_t>(facts.st_size);
}

void OldFile::read(void* data, size_t size) {
  for (char* at = static_cast<char*>(data); size > 0;) {
    const ssize_t count = ::read(file_.number(), at, size);
    if (count < 0 && errno == EINTR) continue;
    if (count < 0) fail_system(kLoad, path_, errno);
    if (count == 0) refuse_file(path_, "became shorter while it was read");
    at += count;
    size -= static_cast<size_t>(count);
  }
}

}  // namespace torchqat
