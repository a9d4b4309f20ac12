#include "mnist.h"

#include <ATen/ATen.h>
#include <c10/util/accumulate.h>
#include <zlib.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <cstring>
#include <memory>
#include <stdexcept>
#include <string>
#include <tuple>
#include <utility>

namespace {

namespace fs = std::filesystem;

constexpr int64_t kMaxImages = 60000, kSide = 28;

class IdxFile {
 public:
  explicit IdxFile(const fs::path& path) : path_(path) {
    if (fs::is_directory(path)) fail(std::strerror(EISDIR));
    file_.reset(gzopen(path.c_str(), "rb"));  // reads plain files as they are
    if (!file_) fail(std::strerror(errno));
  }

  // The bytes of a file with so many dimensions: 0, 0, 8, the number of dimensions, their sizes, the values.
  at::Tensor read(uint8_t dimensions) {
    const std::array<uint8_t, 4> magic{0, 0, 8, dimensions};
    if (read_four() != magic)
      fail("it does not begin as an idx file of " + std::to_string(dimensions) + " dimensions");
    std::vector<int64_t> sizes;
    for (uint8_t d = 0; d < dimensions; ++d) {
      const auto bytes = read_four();
      sizes.push_back(int64_t{bytes[0]} << 24 | bytes[1] << 16 | bytes[2] << 8 | bytes[3]);
      // Before memory is asked for: a damaged file can say anything.
      if (sizes.back() > (d ? kSide : kMaxImages)) fail("it is larger than MNIST's");
    }
    const auto count = c10::multiply_integers(sizes);
    // One byte more than there shall be: at the end of the file zlib compares the checksum.
    auto values = at::empty({count + 1}, at::kByte);
    const auto got = gzread(file_.get(), values.mutable_data_ptr(), static_cast<unsigned>(count + 1));
    if (got > count) fail("it is longer than it says");
    check(got == count);
    return values.slice(0, 0, count).view(sizes);
  }

 private:
  std::array<uint8_t, 4> read_four() {
    std::array<uint8_t, 4> bytes{};
    check(gzread(file_.get(), bytes.data(), 4) == 4);
    return bytes;
  }
  void check(bool whole) const {
    int error = Z_OK;
    gzerror(file_.get(), &error);
    if (error == Z_ERRNO) fail(std::strerror(errno));
    if (!whole || error != Z_OK) fail("it is damaged or cut short");
  }
  [[noreturn]] void fail(const std::string& why) const {
    throw std::runtime_error("cannot read " + path_.string() + ": " + why);
  }

  struct Close {
    void operator()(gzFile_s* file) const { gzclose(file); }
  };
  fs::path path_;
  std::unique_ptr<gzFile_s, Close> file_;
};

at::Tensor read_idx(const fs::path& folder, const std::string& name, uint8_t dimensions) {
  for (const auto* suffix : {"", ".gz"}) {
    const auto path = folder / (name + suffix);
    if (fs::exists(path)) return IdxFile(path).read(dimensions);
  }
  throw std::runtime_error(folder.string() + " has neither " + name + " nor " + name + ".gz");
}

// Images and labels of one part, train or t10k.
std::pair<at::Tensor, at::Tensor> read_part(const fs::path& folder, const std::string& part, int64_t subset) {
  const auto images = read_idx(folder, part + "-images-idx3-ubyte", 3);
  const auto labels = read_idx(folder, part + "-labels-idx1-ubyte", 1);
  const auto refuse = [&](const std::string& why) {
    throw std::runtime_error("the " + part + " files in " + folder.string() + " " + why);
  };
  if (images.size(0) != labels.size(0))
    refuse("hold " + std::to_string(images.size(0)) + " images and " + std::to_string(labels.size(0)) +
           " labels");
  if (images.size(0) < 2 || images.size(1) != kSide || images.size(2) != kSide ||
      labels.max().item<int>() > 9)
    refuse("do not hold images of 28 x 28 pixels in 10 classes");
  return {images.slice(0, 0, subset).unsqueeze(1), labels.slice(0, 0, subset).to(at::kLong)};
}

}  // namespace

at::Tensor Mnist::normalized(const at::Tensor& some) const { return (some.to(at::kFloat) - mean) / std; }

std::vector<at::Tensor> Mnist::batches(int64_t batch_size) const {
  const int64_t count = images.size(0);
  // Batch normalization cannot train on one image: rather than that, batches of two take in a third.
  return at::randperm(count).tensor_split(std::min((count + batch_size - 1) / batch_size, count / 2));
}

Mnist load_mnist(const fs::path& folder, int64_t subset) {
  if (!fs::is_directory(folder)) throw std::runtime_error(folder.string() + " is not a folder");
  Mnist mnist;
  std::tie(mnist.images, mnist.labels) = read_part(folder, "train", subset);
  std::tie(mnist.test_images, mnist.test_labels) = read_part(folder, "t10k", subset);
  const auto pixels = mnist.images.to(at::kDouble);
  mnist.mean = pixels.mean().item<float>();
  mnist.std = pixels.std().item<float>();
  if (!(mnist.std > 0))
    throw std::runtime_error("the train files in " + folder.string() +
                             " hold images of one color: there is nothing to learn from them");
  return mnist;
}
