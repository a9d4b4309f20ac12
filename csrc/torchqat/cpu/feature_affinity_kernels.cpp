// Compiled once for each instruction set, see simd.h.
#include "torchqat/cpu/feature_affinity_kernels.h"

#include <algorithm>
#include <cmath>

#include "torchqat/cpu/simd_memory.h"
#include "torchqat/math/feature_affinity.h"

namespace torchqat::TORCHQAT_ISA {
namespace {

// Pixels that are taken together. Their columns stay in the first cache while they are read twice.
constexpr int64_t kBlock = 64;

// The features of one channel and `count` pixels, in their op-math type.
template <typename S>
void read_row(const Columns<const S>& from, int64_t channel, int64_t pixel, int64_t count, OpMath<S>* row) {
  const S* start = from.data + channel * from.channel_stride + pixel * from.pixel_stride;
  if (from.pixel_stride == 1 && count == kBlock) {
    for (int64_t i = 0; i < kBlock; i += Vec<OpMath<S>>::size) store(row + i, load(start + i));
  } else {
    for (int64_t i = 0; i < count; ++i) row[i] = static_cast<OpMath<S>>(start[i * from.pixel_stride]);
  }
}

template <typename S, typename W>
TORCHQAT_ALL_INLINE void unit(const Columns<const S>& features, double eps, W* unit, double* norms) {
  OpMath<S> row[kBlock] = {};
  for (int64_t pixel = 0; pixel < features.pixels; pixel += kBlock) {
    const int64_t count = std::min(kBlock, features.pixels - pixel);
    double factor[kBlock] = {};
    for (int64_t c = 0; c < features.channels; ++c) {
      read_row(features, c, pixel, count, row);
      for (int64_t i = 0; i < kBlock; ++i) factor[i] += static_cast<double>(row[i]) * row[i];
    }
    for (int64_t i = 0; i < count; ++i) {
      norms[pixel + i] = std::sqrt(factor[i]);
      factor[i] = math::UnitColumn<double>{norms[pixel + i], eps}.scale();
    }
    for (int64_t c = 0; c < features.channels; ++c) {
      read_row(features, c, pixel, count, row);
      W* to = unit + c * features.pixels + pixel;
      for (int64_t i = 0; i < count; ++i) to[i] = static_cast<W>(row[i] * factor[i]);
    }
  }
}

template <typename S, typename W>
TORCHQAT_ALL_INLINE void gradient(const W* grad, const Columns<const S>& features, const double* norms,
                                  double eps, double factor, const Columns<OpMath<S>>& grad_features) {
  OpMath<S> row[kBlock] = {};
  for (int64_t pixel = 0; pixel < features.pixels; pixel += kBlock) {
    const int64_t count = std::min(kBlock, features.pixels - pixel);
    const W* grads = grad + pixel;
    double dots[kBlock] = {};
    for (int64_t c = 0; c < features.channels; ++c) {
      read_row(features, c, pixel, count, row);
      const W* of = grads + c * features.pixels;
      for (int64_t i = 0; i < count; ++i) dots[i] += static_cast<double>(of[i]) * row[i];
    }
    for (int64_t c = 0; c < features.channels; ++c) {
      read_row(features, c, pixel, count, row);
      const W* of = grads + c * features.pixels;
      for (int64_t i = 0; i < count; ++i) {
        const math::UnitColumn<double> column{norms[pixel + i], eps};
        row[i] = static_cast<OpMath<S>>(factor * column.gradient(of[i], row[i], dots[i]));
      }
      auto* to = grad_features.data + c * grad_features.channel_stride + pixel * grad_features.pixel_stride;
      for (int64_t i = 0; i < count; ++i) to[i * grad_features.pixel_stride] = row[i];
    }
  }
}

}  // namespace

template <typename S, typename W>
const ColumnKernels<S, W>& column_kernels() {
  static constexpr ColumnKernels<S, W> kernels{unit<S, W>, gradient<S, W>};
  return kernels;
}

template <typename W>
TORCHQAT_ALL_INLINE double take_signs(W* values, int64_t count) {
  constexpr int64_t kRun = 512;  // so many are summed in W before the sum goes on in double
  double total = 0;
  for (int64_t start = 0; start < count; start += kRun) {
    const int64_t end = std::min(count, start + kRun);
    int64_t i = start;
    Vec<W> sums[kGroup / Vec<W>::size];
    for (auto& sum : sums) sum = Vec<W>(W(0));
    const auto group = [&](W* at) {
      for (int lane = 0; lane < kGroup; lane += Vec<W>::size) {
        const auto v = load(at + lane);
        sums[lane / Vec<W>::size] = sums[lane / Vec<W>::size] + math::magnitude(v);
        store(at + lane, math::sign(v));
      }
    };
    for (; i + kGroup <= end; i += kGroup) group(values + i);
    if (i < end) {
      Padded<W> rest(values + i, end - i);
      group(rest);
      std::copy_n(rest.values, end - i, values + i);
    }
    W lanes[kGroup];
    for (int lane = 0; lane < kGroup; lane += Vec<W>::size) store(lanes + lane, sums[lane / Vec<W>::size]);
    for (const W lane : lanes) total += lane;
  }
  return total;
}

#define INSTANTIATE(S, W) template const ColumnKernels<S, W>& column_kernels();
INSTANTIATE(float, float)
INSTANTIATE(c10::Half, float)
INSTANTIATE(c10::BFloat16, float)
INSTANTIATE(float, double)
INSTANTIATE(double, double)
INSTANTIATE(c10::Half, double)
INSTANTIATE(c10::BFloat16, double)
#undef INSTANTIATE
template double take_signs(float*, int64_t);
template double take_signs(double*, int64_t);

}  // namespace torchqat::TORCHQAT_ISA
