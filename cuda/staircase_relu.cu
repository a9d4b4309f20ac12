#include <ATen/Dispatch.h>
#include <ATen/OpMathType.h>
#include <ATen/cuda/CUDAContext.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <torch/library.h>

#include "staircase_relu.cuh"
#include "torchqat/ops/layout.h"
#include "torchqat/ops/staircase_relu.h"
#include "torchqat/ops/ste.h"

namespace torchqat {
namespace {

// x's staircase, its codes, or its staircase and regions, into a tensor that the prologue allocated.
void run_forward(const at::Tensor& x, const at::Tensor& alpha, int64_t bits, int64_t channel_dim,
                 const at::Tensor& out, uint16_t* regions) {
  const c10::cuda::CUDAGuard device(x.device());
  const int64_t n = out.numel();
  if (n == 0) return;
  const auto in = laid_out_as(x, out);
  const auto view = channel_view(out, alpha_channel_dim(x, alpha, channel_dim));
  const auto step = alpha.to(at::toOpMathType(x.scalar_type())).contiguous();
  const auto stream = at::cuda::getCurrentCUDAStream();
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, x.scalar_type(), "staircase_relu_cuda", [&] {
    using opmath_t = at::opmath_type<scalar_t>;
    const auto* src = in.const_data_ptr<scalar_t>();
    const cuda::StepSizes<opmath_t> steps{step.const_data_ptr<opmath_t>(), view, bits};
    if (out.scalar_type() == at::kByte) {
      C10_CUDA_CHECK(
          cuda::launch_staircase_relu(src, out.mutable_data_ptr<uint8_t>(), regions, steps, n, stream));
    } else {
      C10_CUDA_CHECK(
          cuda::launch_staircase_relu(src, out.mutable_data_ptr<scalar_t>(), regions, steps, n, stream));
    }
  });
}

at::Tensor forward(const at::Tensor& x, const at::Tensor& alpha, int64_t bits, std::string_view ste,
                   std::string_view alpha_grad, int64_t channel_dim) {
  auto y = staircase_relu_meta(x, alpha, bits, ste, alpha_grad, channel_dim);
  run_forward(x, alpha, bits, channel_dim, y, nullptr);
  return y;
}

at::Tensor codes(const at::Tensor& x, const at::Tensor& alpha, int64_t bits, int64_t channel_dim) {
  auto k = staircase_codes_meta(x, alpha, bits, channel_dim);
  run_forward(x, alpha, bits, channel_dim, k, nullptr);
  return k;
}

std::tuple<at::Tensor, at::Tensor> forward_with_regions(const at::Tensor& x, const at::Tensor& alpha,
                                                        int64_t bits, int64_t channel_dim) {
  auto result = staircase_relu_forward_meta(x, alpha, bits, channel_dim);
  const auto& [y, regions] = result;
  run_forward(x, alpha, bits, channel_dim, y,
              reinterpret_cast<uint16_t*>(regions.mutable_data_ptr<uint8_t>()));
  return result;
}

// Calls f(kept) for what the forward pass left: regions, or x.
template <typename scalar_t, typename F>
void with_kept(const at::Tensor& kept, std::string_view ste, const math::AlphaSlope& slope, F&& f) {
  using opmath_t = at::opmath_type<scalar_t>;
  with_ste(ste, [&]<typename Ste>(Ste) {
    if (kept.scalar_type() == at::kByte) {
      const auto* words = reinterpret_cast<const uint16_t*>(kept.const_data_ptr<uint8_t>());
      f(cuda::FromRegions<opmath_t>{words, math::region_backward<opmath_t, Ste>(slope)});
    } else {
      f(cuda::FromX<Ste, scalar_t, opmath_t>{kept.const_data_ptr<scalar_t>(), {slope}});
    }
  });
}

std::tuple<at::Tensor, at::Tensor> backward(const at::Tensor& grad, const at::Tensor& saved,
                                            const at::Tensor& alpha, c10::SymIntArrayRef size,
                                            c10::SymIntArrayRef stride, int64_t bits, std::string_view ste,
                                            std::string_view alpha_grad, int64_t channel_dim) {
  auto result =
      staircase_relu_backward_meta(grad, saved, alpha, size, stride, bits, ste, alpha_grad, channel_dim);
  const auto& [grad_x, grad_alpha] = result;
  const c10::cuda::CUDAGuard device(grad.device());
  const int64_t n = grad.numel();
  if (n == 0) {
    grad_alpha.zero_();
    return result;
  }
  const auto upstream = laid_out_as(grad, grad_x);
  const auto kept = saved.scalar_type() == at::kByte ? saved : laid_out_as(saved, grad_x);
  const auto view = channel_view(grad_x, alpha_channel_dim(grad, alpha, channel_dim));
  const auto step = alpha.to(at::toOpMathType(grad.scalar_type())).contiguous();
  const auto partial =
      at::empty({view.channels, cuda::alpha_slices(view, n)}, grad.options().dtype(at::kDouble));
  const auto total = at::empty({view.channels}, grad.options().dtype(at::kDouble));
  const auto stream = at::cuda::getCurrentCUDAStream();
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, grad.scalar_type(), "staircase_relu_cuda", [&] {
    using opmath_t = at::opmath_type<scalar_t>;
    const cuda::StepSizes<opmath_t> steps{step.const_data_ptr<opmath_t>(), view, bits};
    with_kept<scalar_t>(kept, ste, alpha_slope(alpha_grad, bits), [&](const auto& from) {
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
  m.impl("_staircase_relu_forward", forward_with_regions);
  m.impl("_staircase_relu_backward", backward);
}

}  // namespace torchqat
