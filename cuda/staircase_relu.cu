#include <ATen/Dispatch.h>
#include <ATen/OpMathType.h>
#include <ATen/cuda/CUDAContext.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <torch/library.h>

#include "staircase_relu.cuh"
#include "torchqat/ops/layout.h"
#include "torchqat/ops/staircase_relu_device.h"
#include "torchqat/ops/ste.h"

namespace torchqat {
namespace {

// Calls f(stream, step sizes) on the device of `dense`, for T as the op-math type.
template <typename T, typename F>
void with_steps(const at::Tensor& dense, const at::Tensor& alpha, int64_t bits, int64_t channel_dim, F&& f) {
  const auto view = channel_view(dense, alpha_channel_dim(dense, alpha, channel_dim));
  const auto step = alpha.to(c10::CppTypeToScalarType<T>::value).contiguous();
  f(at::cuda::getCurrentCUDAStream(), cuda::StepSizes<T>{step.template const_data_ptr<T>(), view, bits});
}

// x's staircase or its step indices into `out`, and `kept_bits` for each element into `kept`.
template <int kept_bits>
void run_forward(const at::Tensor& x, const at::Tensor& alpha, int64_t bits, int64_t channel_dim,
                 const at::Tensor& out, uint8_t* kept) {
  const c10::cuda::CUDAGuard device(x.device());
  const int64_t n = out.numel();
  if (n == 0) return;
  const auto in = laid_out_as(x, out);
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, x.scalar_type(), "staircase_relu_cuda", [&] {
    const auto* src = in.const_data_ptr<scalar_t>();
    const auto run = [&](auto* to) {
      with_steps<at::opmath_type<scalar_t>>(
          out, alpha, bits, channel_dim, [&](auto stream, const auto& steps) {
            C10_CUDA_CHECK(cuda::launch_staircase_relu<kept_bits>(src, to, kept, steps, n, stream));
          });
    };
    if constexpr (kept_bits == 0) {
      if (out.scalar_type() == at::kByte) return run(out.mutable_data_ptr<uint8_t>());
    }
    run(out.mutable_data_ptr<scalar_t>());
  });
}

at::Tensor forward(const at::Tensor& x, const at::Tensor& alpha, int64_t bits, std::string_view ste,
                   std::string_view alpha_grad, int64_t channel_dim, bool save_codes) {
  auto y = staircase_relu_meta(x, alpha, bits, ste, alpha_grad, channel_dim, save_codes);
  run_forward<0>(x, alpha, bits, channel_dim, y, nullptr);
  return y;
}

at::Tensor codes(const at::Tensor& x, const at::Tensor& alpha, int64_t bits, int64_t channel_dim) {
  auto k = staircase_codes_meta(x, alpha, bits, channel_dim);
  run_forward<0>(x, alpha, bits, channel_dim, k, nullptr);
  return k;
}

std::tuple<at::Tensor, at::Tensor> forward_keeping(const at::Tensor& x, const at::Tensor& alpha, int64_t bits,
                                                   int64_t channel_dim, bool codes) {
  auto result = staircase_relu_forward_meta(x, alpha, bits, channel_dim, codes);
  const auto& [y, kept] = result;
  math::with_code_bits(kept_bits(bits, codes), [&, &y = y, &kept = kept](auto width) {
    run_forward<width>(x, alpha, bits, channel_dim, y, kept.mutable_data_ptr<uint8_t>());
  });
  return result;
}

at::Tensor rebuild(const at::Tensor& codes, const at::Tensor& alpha, c10::SymIntArrayRef size,
                   c10::SymIntArrayRef stride, at::ScalarType dtype, int64_t bits, int64_t channel_dim,
                   const at::Tensor& grad) {
  auto y = staircase_relu_rebuild_meta(codes, alpha, size, stride, dtype, bits, channel_dim, grad);
  const c10::cuda::CUDAGuard device(codes.device());
  const int64_t n = y.numel();
  if (n == 0) return y;
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, dtype, "staircase_relu_cuda", [&] {
    with_steps<at::opmath_type<scalar_t>>(y, alpha, bits, channel_dim, [&](auto stream, const auto& steps) {
      math::with_code_bits(math::state_bits(bits), [&](auto width) {
        C10_CUDA_CHECK(cuda::launch_staircase_relu_rebuild<width>(
            codes.const_data_ptr<uint8_t>(), y.mutable_data_ptr<scalar_t>(), steps, n, stream));
      });
    });
  });
  return y;
}

// Calls f(kept) for what the forward pass left: regions, states, or x.
template <typename scalar_t, typename F>
void with_kept(const at::Tensor& kept, int kept_bits, std::string_view ste, const math::AlphaSlope& slope,
               F&& f) {
  using opmath_t = at::opmath_type<scalar_t>;
  if (kept.scalar_type() != at::kByte) {
    with_ste(ste, [&]<typename Ste>(Ste) {
      f(cuda::FromX<Ste, scalar_t, opmath_t>{kept.const_data_ptr<scalar_t>(), {slope}});
    });
    return;
  }
  math::RegionBackward<opmath_t> slopes;
  with_ste(ste, [&]<typename Ste>(Ste) { slopes = math::region_backward<opmath_t, Ste>(slope); });
  math::with_code_bits(kept_bits, [&](auto width) {
    f(cuda::FromCodes<width, opmath_t>{kept.const_data_ptr<uint8_t>(), slopes, slope.exact});
  });
}

std::tuple<at::Tensor, at::Tensor> backward(const at::Tensor& grad, const at::Tensor& saved,
                                            const at::Tensor& alpha, c10::SymIntArrayRef size,
                                            c10::SymIntArrayRef stride, int64_t bits, std::string_view ste,
                                            std::string_view alpha_grad, int64_t channel_dim, bool codes) {
  auto result = staircase_relu_backward_meta(grad, saved, alpha, size, stride, bits, ste, alpha_grad,
                                             channel_dim, codes);
  const auto& [grad_x, grad_alpha] = result;
  const c10::cuda::CUDAGuard device(grad.device());
  const int64_t n = grad_x.numel();
  if (n == 0) {
    grad_alpha.zero_();
    return result;
  }
  const auto upstream = laid_out_as(grad, grad_x);
  const auto kept = saved.scalar_type() == at::kByte ? saved : laid_out_as(saved, grad_x);
  const auto view = channel_view(grad_x, alpha_channel_dim(grad_x, alpha, channel_dim));
  const auto step = alpha.to(at::toOpMathType(grad.scalar_type())).contiguous();
  const auto partial =
      at::empty({view.channels, cuda::alpha_slices(view, n)}, grad.options().dtype(at::kDouble));
  const auto total = at::empty({view.channels}, grad.options().dtype(at::kDouble));
  const auto stream = at::cuda::getCurrentCUDAStream();
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, grad.scalar_type(), "staircase_relu_cuda", [&] {
    using opmath_t = at::opmath_type<scalar_t>;
    const cuda::StepSizes<opmath_t> steps{step.const_data_ptr<opmath_t>(), view, bits};
    with_kept<scalar_t>(
        kept, kept_bits(bits, codes), ste, alpha_slope(alpha_grad, bits), [&](const auto& from) {
          C10_CUDA_CHECK(cuda::launch_staircase_relu_backward(
              upstream.const_data_ptr<scalar_t>(), from, grad_x.mutable_data_ptr<scalar_t>(),
              total.mutable_data_ptr<double>(), partial.mutable_data_ptr<double>(), steps, n, stream));
        });
  });
  grad_alpha.copy_(total.view_as(grad_alpha));
  return result;
}

}  // namespace

TORCH_LIBRARY_IMPL(qat, CUDA, m) {
  m.impl("staircase_relu", forward);
  m.impl("staircase_codes", codes);
  m.impl("_staircase_relu_forward", forward_keeping);
  m.impl("_staircase_relu_rebuild", rebuild);
  m.impl("_staircase_relu_backward", backward);
}

}  // namespace torchqat
