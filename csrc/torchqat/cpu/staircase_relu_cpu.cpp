#include <ATen/Dispatch.h>
#include <ATen/OpMathType.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <algorithm>
#include <vector>

#include "torchqat/cpu/staircase_kernels.h"
#include "torchqat/math/step_codes.h"
#include "torchqat/ops/layout.h"
#include "torchqat/ops/staircase_relu_device.h"
#include "torchqat/ops/ste.h"

namespace torchqat {
namespace {

template <typename S>
const auto& kernels() {
  return TORCHQAT_BEST_ISA(staircase_kernels<S, at::opmath_type<S>>());
}

// Elements that one thread takes at a time, a multiple of the eight that share bytes of what is kept.
constexpr int64_t kGrain = at::internal::GRAIN_SIZE;
static_assert(kGrain % math::kCodesTogether == 0);

// Calls f(begin, end) for parts of [0, n), in parallel. They begin at multiples of kGrain.
template <typename F>
void for_each_part(int64_t n, F&& f) {
  if (n <= kGrain) return f(0, n);
  at::parallel_for(0, at::divup(n, kGrain), 1,
                   [&](int64_t from, int64_t to) { f(from * kGrain, std::min(n, to * kGrain)); });
}

// alpha in op-math type, and which element has which.
template <typename T>
class AlphaOf {
 public:
  AlphaOf(const at::Tensor& alpha, const at::Tensor& dense, std::optional<int64_t> channel_dim, int64_t bits)
      : alpha_(in_op_math(alpha)),
        steps_{alpha_.template const_data_ptr<T>(), channel_view(dense, channel_dim), bits} {}
  operator const StepSizes<T>&() const { return steps_; }

 private:
  // Most often it is that already, and then a call of Tensor.to costs more than sixteen elements.
  static at::Tensor in_op_math(const at::Tensor& alpha) {
    constexpr auto dtype = c10::CppTypeToScalarType<T>::value;
    return (alpha.scalar_type() == dtype ? alpha : alpha.to(dtype)).contiguous();
  }

  at::Tensor alpha_;
  StepSizes<T> steps_;
};

// The staircase of x into y, and `kept_bits` for each element into `kept`.
void run_forward(const at::Tensor& x, const at::Tensor& alpha, int64_t bits, int64_t channel_dim,
                 const at::Tensor& y, uint8_t* kept, int kept_bits) {
  const auto in = laid_out_as(x, y);
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, x.scalar_type(), "staircase_relu_cpu", [&] {
    const AlphaOf<at::opmath_type<scalar_t>> steps(alpha, y, alpha_channel_dim(x, alpha, channel_dim), bits);
    const auto* from = in.const_data_ptr<scalar_t>();
    auto* to = y.mutable_data_ptr<scalar_t>();
    for_each_part(y.numel(), [&](int64_t begin, int64_t end) {
      kernels<scalar_t>().forward(from, to, kept, kept_bits, steps, begin, end);
    });
  });
}

at::Tensor forward(const at::Tensor& x, const at::Tensor& alpha, int64_t bits, std::string_view ste,
                   std::string_view alpha_grad, int64_t channel_dim, bool save_codes) {
  auto y = staircase_relu_meta(x, alpha, bits, ste, alpha_grad, channel_dim, save_codes);
  run_forward(x, alpha, bits, channel_dim, y, nullptr, 0);
  return y;
}

std::tuple<at::Tensor, at::Tensor> forward_keeping(const at::Tensor& x, const at::Tensor& alpha, int64_t bits,
                                                   int64_t channel_dim, bool codes) {
  auto [y, kept] = staircase_relu_forward_meta(x, alpha, bits, channel_dim, codes);
  run_forward(x, alpha, bits, channel_dim, y, kept.mutable_data_ptr<uint8_t>(), kept_bits(bits, codes));
  return {y, kept};
}

at::Tensor rebuild(const at::Tensor& codes, const at::Tensor& alpha, c10::SymIntArrayRef size,
                   c10::SymIntArrayRef stride, at::ScalarType dtype, int64_t bits, int64_t channel_dim,
                   const at::Tensor& grad) {
  auto y = staircase_relu_rebuild_meta(codes, alpha, size, stride, dtype, bits, channel_dim, grad);
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, dtype, "staircase_relu_cpu", [&] {
    const AlphaOf<at::opmath_type<scalar_t>> steps(alpha, y, alpha_channel_dim(y, alpha, channel_dim), bits);
    const auto* from = codes.const_data_ptr<uint8_t>();
    auto* to = y.mutable_data_ptr<scalar_t>();
    for_each_part(y.numel(), [&](int64_t begin, int64_t end) {
      kernels<scalar_t>().rebuild(from, math::state_bits(bits), to, steps, begin, end);
    });
  });
  return y;
}

at::Tensor codes(const at::Tensor& x, const at::Tensor& alpha, int64_t bits, int64_t channel_dim) {
  auto k = staircase_codes_meta(x, alpha, bits, channel_dim);
  const auto in = laid_out_as(x, k);
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, x.scalar_type(), "staircase_codes_cpu", [&] {
    const AlphaOf<at::opmath_type<scalar_t>> steps(alpha, k, alpha_channel_dim(x, alpha, channel_dim), bits);
    const auto* from = in.const_data_ptr<scalar_t>();
    auto* to = k.mutable_data_ptr<uint8_t>();
    for_each_part(k.numel(), [&](int64_t begin, int64_t end) {
      kernels<scalar_t>().codes(from, to, steps, begin, end);
    });
  });
  return k;
}

// Calls f(begin, end, sums) for parts of [0, n), in parallel, and puts the sums of all parts, one for each
// channel, into grad_alpha. The parts and their order are fixed by the shapes alone.
template <typename F>
void sum_parts(int64_t n, int64_t channels, const at::Tensor& grad_alpha, F&& f) {
  const int64_t part = at::divup(std::max<int64_t>(kGrain, 8 * channels), kGrain) * kGrain;
  const int64_t parts = std::max<int64_t>(at::divup(n, part), 1);
  std::vector<double> sums(parts * channels);
  const auto run = [&](int64_t from, int64_t to) {
    for (int64_t p = from; p < to; ++p) f(p * part, std::min(n, (p + 1) * part), &sums[p * channels]);
  };
  parts == 1 ? run(0, 1) : at::parallel_for(0, parts, 1, run);
  for (int64_t i = channels; i < parts * channels; ++i) sums[i % channels] += sums[i];
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, grad_alpha.scalar_type(), "alpha_grad", [&] {
    auto* to = grad_alpha.mutable_data_ptr<scalar_t>();
    // A channel view merges the channels of a dimension of size 1, and of an empty tensor.
    const bool merged = channels != grad_alpha.numel();
    for (int64_t c = 0; c < grad_alpha.numel(); ++c) to[c] = static_cast<scalar_t>(sums[merged ? 0 : c]);
  });
}

std::tuple<at::Tensor, at::Tensor> backward(const at::Tensor& grad, const at::Tensor& saved,
                                            const at::Tensor& alpha, c10::SymIntArrayRef size,
                                            c10::SymIntArrayRef stride, int64_t bits, std::string_view ste,
                                            std::string_view alpha_grad, int64_t channel_dim, bool codes) {
  auto [grad_x, grad_alpha] = staircase_relu_backward_meta(grad, saved, alpha, size, stride, bits, ste,
                                                           alpha_grad, channel_dim, codes);
  const auto upstream = laid_out_as(grad, grad_x);
  const bool from_x = saved.scalar_type() != at::kByte;
  const auto kept = from_x ? laid_out_as(saved, grad_x) : saved;
  const auto slope = alpha_slope(alpha_grad, bits);
  const auto run = [&, grad_x = grad_x, grad_alpha = grad_alpha]<typename scalar_t>(scalar_t) {
    using T = at::opmath_type<scalar_t>;
    const auto* g = upstream.const_data_ptr<scalar_t>();
    auto* out = grad_x.mutable_data_ptr<scalar_t>();
    const AlphaOf<T> steps_of(alpha, grad_x, alpha_channel_dim(grad_x, alpha, channel_dim), bits);
    const StepSizes<T>& steps = steps_of;
    const auto sum = [&](auto&& f) { sum_parts(grad_x.numel(), steps.view.channels, grad_alpha, f); };
    if (!from_x) {
      const auto* from = kept.const_data_ptr<uint8_t>();
      math::RegionBackward<T> slopes;
      with_ste(ste, [&]<typename Ste>(Ste) { slopes = math::region_backward<T, Ste>(slope); });
      const bool exact = slope.exact && codes;
      sum([&](int64_t begin, int64_t end, double* sums) {
        kernels<scalar_t>().backward(g, from, kept_bits(bits, codes), out, sums, slopes, exact, steps, begin,
                                     end);
      });
    } else {
      const auto* x = kept.const_data_ptr<scalar_t>();
      const auto from_x = kernels<scalar_t>().backward_from_x[ste_index(ste)];
      sum([&](int64_t begin, int64_t end, double* sums) {
        from_x(g, x, out, sums, slope, steps, begin, end);
      });
    }
  };
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, grad.scalar_type(), "staircase_relu_cpu",
                                  [&] { run(scalar_t()); });
  return {grad_x, grad_alpha};
}

}  // namespace

TORCH_LIBRARY_IMPL(qat, CPU, m) {
  m.impl("staircase_relu", forward);
  m.impl("staircase_codes", codes);
  m.impl("_staircase_relu_forward", forward_keeping);
  m.impl("_staircase_relu_rebuild", rebuild);
  m.impl("_staircase_relu_backward", backward);
}

}  // namespace torchqat
