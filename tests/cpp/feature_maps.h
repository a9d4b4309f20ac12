#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <sys/mman.h>

#include <array>
#include <cmath>
#include <functional>
#include <limits>
#include <random>
#include <vector>

#include "feature_columns.cuh"
#include "kernel_test.h"

// Feature maps for the tests of the feature affinity kernels: random ones, their memory in every layout, and
// unit columns and their gradient from the definitions, in double.
namespace torchqat::cuda::testing {

using Doubles = std::vector<double>;

constexpr double kEps = 1e-5;
constexpr double kInf = std::numeric_limits<double>::infinity();
constexpr double kNan = std::numeric_limits<double>::quiet_NaN();

template <typename T>
constexpr bool kHalf = sizeof(T) == 2;
// StorageTypes, as these kernels have them: the emulator's __half is c10::Half, and CUDA's is not.
using FeatureTypes = ::testing::Types<double, float, __nv_bfloat16, __half>;
// What the kernels compute with.
template <typename T>
using Wide = opmath_t<T>;
// Half a unit in the last place of 1.
template <typename T>
double rounding() {
  return std::is_same_v<T, double>   ? std::ldexp(1, -53)
         : std::is_same_v<T, float>  ? std::ldexp(1, -24)
         : std::is_same_v<T, __half> ? std::ldexp(1, -11)
                                     : std::ldexp(1, -8);
}

constexpr double kFactor = 0.5;  // of the gradient in the features

// (images, channels, pixels), row after row.
struct Map {
  int64_t images, channels, pixels;
  Doubles at;

  Map(int64_t b, int64_t c, int64_t n) : images(b), channels(c), pixels(n), at(b * c * n, 0.0) {}
  double& operator()(int64_t b, int64_t c, int64_t n) { return at[(b * channels + c) * pixels + n]; }
  double operator()(int64_t b, int64_t c, int64_t n) const { return at[(b * channels + c) * pixels + n]; }
};

inline double norm_of(const Map& f, int64_t b, int64_t n) {
  double largest = 0, sum = 0;
  for (int64_t c = 0; c < f.channels; ++c) largest = std::max(largest, std::abs(f(b, c, n)));
  if (largest == 0) return 0;
  for (int64_t c = 0; c < f.channels; ++c) sum += std::pow(f(b, c, n) / largest, 2);
  return largest * std::sqrt(sum);
}

inline Map unit_of(const Map& f) {
  Map unit(f.images, f.channels, f.pixels);
  for (int64_t b = 0; b < f.images; ++b) {
    for (int64_t n = 0; n < f.pixels; ++n) {
      const double norm = norm_of(f, b, n);
      for (int64_t c = 0; c < f.channels; ++c) unit(b, c, n) = norm == 0 ? 0 : f(b, c, n) / (norm + kEps);
    }
  }
  return unit;
}

// The gradient in the features from that in their unit columns: a = f / (n + eps), dn/df = f / n.
inline Map expect_features_gradient(const Map& f, const Map& grad) {
  Map result(f.images, f.channels, f.pixels);
  for (int64_t b = 0; b < f.images; ++b) {
    for (int64_t n = 0; n < f.pixels; ++n) {
      const double norm = norm_of(f, b, n);
      if (norm == 0) continue;
      double along = 0;
      for (int64_t c = 0; c < f.channels; ++c) along += f(b, c, n) / norm * grad(b, c, n);
      for (int64_t c = 0; c < f.channels; ++c) {
        result(b, c, n) =
            grad(b, c, n) / (norm + kEps) - f(b, c, n) / (norm + kEps) * (along / (norm + kEps));
      }
    }
  }
  return result;
}

// The gradient in the features, from the one in unit columns that the kernels had.
template <typename W, typename T>
void expect_backward(const Map& s, const Map& grad_unit, const Map& grad_features) {
  const Map expected = expect_features_gradient(s, grad_unit);
  for (int64_t b = 0; b < s.images; ++b) {
    for (int64_t n = 0; n < s.pixels; ++n) {
      double largest = 0;  // of the terms; W's rounding of the norm and of the terms, T's of the result
      for (int64_t c = 0; c < s.channels; ++c) {
        const double norm = norm_of(s, b, n);
        if (norm != 0) largest = std::max(largest, std::abs(grad_unit(b, c, n)) / (norm + kEps));
      }
      for (int64_t c = 0; c < s.channels; ++c) {
        const double value = kFactor * expected(b, c, n);
        const double smallest = kHalf<T> ? std::ldexp(1, -25) : 0;  // half of float16's subnormal step
        ASSERT_NEAR(
            grad_features(b, c, n), value,
            rounding<T>() * std::abs(value) + 8 * rounding<W>() * std::sqrt(s.channels) * largest + smallest)
            << b << ", " << c << ", " << n;
      }
    }
  }
}

// Strides of image, channel and pixel.
using Strides = std::array<int64_t, 3>;
struct Layout {
  const char* name;
  std::function<Strides(const Map&)> strides;
};
inline const std::vector<Layout> kLayouts = {
    {"contiguous",
     [](const Map& m) {
       return Strides{m.channels * m.pixels, m.pixels, 1};
     }},
    {"channels last",
     [](const Map& m) {
       return Strides{m.channels * m.pixels, 1, m.channels};
     }},
    {"sliced",
     [](const Map& m) {
       return Strides{m.channels * (2 * m.pixels + 3), 2 * m.pixels + 3, 2};
     }},
    {"transposed", [](const Map& m) {
       return Strides{1, m.images * m.pixels, m.images};
     }}};

inline int64_t extent(const Map& map, const Strides& s) {
  return (map.images - 1) * s[0] + (map.channels - 1) * s[1] + (map.pixels - 1) * s[2] + 1;
}
template <typename T>
Features<T> features_at(T* data, const Map& map, const Strides& s) {
  return {data, map.channels, map.pixels, s[0], s[1], s[2]};
}

// What lies between the features is NaN: nobody may read it.
template <typename T>
std::vector<T> laid_out(const Map& map, const Strides& s) {
  std::vector<T> memory(extent(map, s), static_cast<T>(kNan));
  for (int64_t b = 0; b < map.images; ++b) {
    for (int64_t c = 0; c < map.channels; ++c) {
      for (int64_t n = 0; n < map.pixels; ++n)
        memory[b * s[0] + c * s[1] + n * s[2]] = static_cast<T>(static_cast<Wide<T>>(map(b, c, n)));
    }
  }
  return memory;
}

// The elements of a map; what lies between them must still be what it was.
template <typename T>
Map read_map(const std::vector<T>& memory, Map map, const Strides& s, T between) {
  std::vector<T> rest = memory;
  for (int64_t b = 0; b < map.images; ++b) {
    for (int64_t c = 0; c < map.channels; ++c) {
      for (int64_t n = 0; n < map.pixels; ++n) {
        T& element = rest[b * s[0] + c * s[1] + n * s[2]];
        map(b, c, n) = static_cast<Wide<T>>(element);
        element = between;
      }
    }
  }
  for (const T& element : rest) EXPECT_TRUE(same_bits(element, between)) << "written between the elements";
  return map;
}

// Features as after a ReLU, to the precision of T: about a third of them 0, norms from 1e-3 to 1e3.
template <typename T>
Map random_features(int64_t images, int64_t channels, int64_t pixels, unsigned seed) {
  std::mt19937 random(seed);
  const auto uniform = [&] { return static_cast<double>(random() % 65536) / 65536; };
  Map map(images, channels, pixels);
  for (int64_t b = 0; b < images; ++b) {
    for (int64_t n = 0; n < pixels; ++n) {
      const double size = std::pow(10, 6 * uniform() - 3);
      for (int64_t c = 0; c < channels; ++c) {
        const double f = std::max(0.0, 1.5 * uniform() - 0.5);
        map(b, c, n) = static_cast<Wide<T>>(static_cast<T>(static_cast<Wide<T>>(size * f)));
      }
    }
  }
  return map;
}

#ifndef __CUDACC__
// Memory for n elements of which few are touched.
template <typename T>
class FarBuffer {
 public:
  explicit FarBuffer(int64_t n) : bytes_(n * sizeof(T)) {
    data_ = mmap(nullptr, bytes_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (data_ == MAP_FAILED) throw std::bad_alloc();
  }
  ~FarBuffer() { munmap(data_, bytes_); }
  FarBuffer(const FarBuffer&) = delete;
  FarBuffer& operator=(const FarBuffer&) = delete;
  T* data() { return static_cast<T*>(data_); }
  T at(int64_t i) { return data()[i]; }
  void set(int64_t i, T value) { data()[i] = value; }

 private:
  size_t bytes_;
  void* data_;
};
#endif

}  // namespace torchqat::cuda::testing
