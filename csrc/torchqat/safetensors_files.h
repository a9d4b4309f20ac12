#pragma once

#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <string>

// Files that are written whole or not at all, and read as they are. Errors name the path and the system's
// reason.
namespace torchqat {

constexpr const char* kSave = "save_safetensors";
constexpr const char* kLoad = "load_safetensors";

// Closes what a constructor that raises leaves open.
class Descriptor {
 public:
  Descriptor() = default;
  Descriptor(const Descriptor&) = delete;
  Descriptor& operator=(const Descriptor&) = delete;
  ~Descriptor() { close(); }

  bool open(const char* path, int flags);
  bool close();
  int number() const { return number_; }

 private:
  int number_ = -1;
};

// A file in the folder where it shall be in the end. It has no name until it is whole, so that no part of it
// is left even where the process is killed; on file systems that have no such files, it has a name of its
// own from the start. That is removed unless the file gets to its place. (Between its first name and its
// last one a whole file may be left.)
class NewFile {
 public:
  explicit NewFile(const std::string& path);
  ~NewFile();
  void write(const void* data, size_t size);
  void commit();

 private:
  bool open_unnamed();
  template <typename Take>
  void take_name(Take take);

  const std::string& path_;
  std::filesystem::path target_;
  std::filesystem::path own_;  // empty while the file has no name, or when it has its last
  std::string link_;           // to a file without a name
  Descriptor file_;
};

class OldFile {
 public:
  explicit OldFile(const std::string& path);
  uint64_t size() const { return size_; }
  void read(void* data, size_t size);

 private:
  const std::string& path_;
  Descriptor file_;
  uint64_t size_ = 0;
};

}  // namespace torchqat
