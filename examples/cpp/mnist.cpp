#include "mnist.h"

#include <ATen/ATen.h>
#include <zlib.h>

#include <array>
#include <cstring>
#include <filesystem>
#include <memory>
#include <stdexcept>
#include <vector>

namespace {

// gzread takes plain files as they are.
class IdxFile {
 public:
  explicit IdxFile(const std::filesystem::path& path) : path_(path), file_(gzopen(path.c_str(), "rb")) {
    if (!file_ || std::filesystem::is_directory(path)) fail(std::strerror(file_ ? EISDIR : errno));
  }

  // The bytes of a file with so many dimensions.
  at::Tensor read(int dimensions) {
    const std::array<uint8_t, 4> magic{0, 0, 8, static_cast<uint8_t>(dimensions)};  // 8: of bytes
    std::array<uint8_t, 4> begin{};
    read_into(begin.data(), begin.size());
    if (begin != magic) fail("it does not begin as an idx file of " + std::to_string(dimensions) + " dimensions");
    std::vector<int64_t> sizes;
    int64_t count = 1;
    for (int d = 0; d < dimensions; ++d) {
      std::array<uint8_t, 4> size{};
      read_into(size.data(), size.size());
      sizes.push_back(int64_t{size[0]} << 24 | size[1] << 16 | size[2] << 8 | size[3]);
      const int64_t limit = d ? 28 : 1 << 20;  // no more memory than MNIST takes, whatever the file says
      if (sizes.back() > limit) fail("it is larger than MNIST's");
      count *= sizes.back();
    }
    auto values = at::empty(sizes, at::kByte);
    read_into(values.mutable_data_ptr<uint8_t>(), count);
    uint8_t more = 0;
    if (gzread(file_.get(), &more, 1) != 0) fail("it is longer than it says");
    return values;
  }

 private:
  void read_into(uint8_t* to, int64_t count) {
    if (gzread(file_.get(), to, static_cast<unsigned>(count)) != count) fail("it is damaged or cut short");
  }
  [[noreturn]] void fail(const std::string& why) const {
    throw std::runtime_error("cannot read " + path_.string() + ": " + why);
  }

  struct Close {
    void operator()(gzFile_s* file) const { gzclose(file); }
  };
  std::filesystem::path path_;
  std::unique_ptr<gzFile_s, Close> file_;
};

at::Tensor read_idx(const std::filesystem::path& folder, const std::string& name, int dimensions) {
  for (const auto* suffix : {"", ".gz"}) {
    const auto path = folder / (name + suffix);
    if (std::filesystem::exists(path)) return IdxFile(path).read(dimensions);
  }
  throw std::runtime_error(folder.string() + " has no " + name + " and no " + name + ".gz");
}

// Images and labels of one part, train or t10k.
std::pair<at::Tensor, at::Tensor> read_part(const std::filesystem::path& folder, const std::string& part) {
  const auto images = read_idx(folder, part + "-images-idx3-ubyte", 3);
  const auto labels = read_idx(folder, part + "-labels-idx1-ubyte", 1);
  if (images.size(1) != 28 || images.size(2) != 28 || images.size(0) != labels.size(0) || labels.numel() == 0 ||
      labels.max().item<int>() > 9)
    throw std::runtime_error("the " + part + " files in " + folder.string() +
                             " do not hold images of 28 x 28 pixels in 10 classes");
  return {images.unsqueeze(1), labels.to(at::kLong)};
}

}  // namespace

Mnist load_mnist(const std::string& folder) {
  if (!std::filesystem::is_directory(folder)) throw std::runtime_error(folder + " is not a folder");
  Mnist mnist;
  std::tie(mnist.images, mnist.labels) = read_part(folder, "train");
  std::tie(mnist.test_images, mnist.test_labels) = read_part(folder, "t10k");
  return mnist;
}
