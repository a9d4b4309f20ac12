#include <ATen/Dispatch.h>
#include <ATen/OpMathType.h>
#include <ATen/cuda/CUDAContext.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <torch/library.h>

#include <limits>
#include <memory>
#include <vector>

#include "bcgd_step.cuh"
#include "torchqat/ops/bcgd_step_device.h"

namespace torchqat {
namespace {

// The numbers that are on the device, in the type of the arithmetic; undefined where there is none, or it is
// on the CPU and has been read.
template <typename opmath_t>
struct DeviceNumbers {
  explicit DeviceNumbers(const BcgdStep& s) {
    const auto dtype = c10::CppTypeToScalarType<opmath_t>::value;
    if (!s.lr.is_cpu()) lr = s.lr.to(dtype);
    if (s.grad_scale) grad_scale = s.grad_scale->to(dtype);
    if (s.found_inf) found_inf = s.found_inf->to(dtype);
  }
  static const opmath_t* pointer(const at::Tensor& t) {
    return t.defined() ? t.const_data_ptr<opmath_t>() : nullptr;
  }

  at::Tensor lr, grad_scale, found_inf;
};

template <typename scalar_t>
cuda::StepTensor<scalar_t, at::opmath_type<scalar_t>> pointers(const BcgdItem& item) {
  using opmath_t = at::opmath_type<scalar_t>;
  return {item.param.mutable_data_ptr<scalar_t>(),
          item.grad.const_data_ptr<scalar_t>(),
          item.latent.mutable_data_ptr<opmath_t>(),
          item.buffer.defined() ? item.buffer.mutable_data_ptr<opmath_t>() : nullptr,
          item.scale.mutable_data_ptr<opmath_t>(),
          item.steps.defined() ? item.steps.mutable_data_ptr<float>() : nullptr,
          item.view,
          item.param.numel() / item.view.channels};
}

// Memory for n elements, from torch's allocator; whoever frees it before the kernels have run frees it in
// their stream.
template <typename T>
at::Tensor scratch_for(int64_t n, const at::Device& device) {
  return at::empty({n * static_cast<int64_t>(sizeof(T))}, at::TensorOptions(at::kByte).device(device));
}
template <typename T>
T* typed(const at::Tensor& scratch) {
  return static_cast<T*>(scratch.mutable_data_ptr());
}

template <typename Batch>
void run_batch(const Batch& batch, const at::Device& device) {
  using opmath_t = typename Batch::Opmath;
  using Sums = math::StepSums<math::kWarmSteps>;
  const auto sums = scratch_for<Sums>(batch.slice_count(), device);
  const auto levels_at = scratch_for<opmath_t>(batch.scale_count(), device);
  const int64_t large = batch.projection == math::Projection::ternary ? batch.large_scale_count() : 0;
  const auto bins = scratch_for<cuda::TernaryBins<opmath_t>>(large, device);
  const auto states = scratch_for<cuda::TernaryState<opmath_t>>(large, device);
  const cuda::StepScratch<opmath_t> scratch{
      typed<Sums>(sums),
      typed<opmath_t>(levels_at),
      {typed<cuda::TernaryBins<opmath_t>>(bins), typed<cuda::TernaryState<opmath_t>>(states)}};
  C10_CUDA_CHECK(cuda::launch_bcgd_step(batch, scratch, at::cuda::getCurrentCUDAStream()));
}

template <typename scalar_t>
void step_items(const BcgdStep& s, const std::vector<BcgdItem>& items) {
  using opmath_t = at::opmath_type<scalar_t>;
  using Batch = cuda::StepBatch<scalar_t, opmath_t>;
  using Numbers = DeviceNumbers<opmath_t>;
  const Numbers numbers(s);
  Batch empty{};
  empty.bits = static_cast<int>(s.bits);
  empty.projection = projection_of(s.method, s.bits);
  empty.rule = step_rule<opmath_t>(s);
  empty.lr = Numbers::pointer(numbers.lr);
  empty.grad_scale = Numbers::pointer(numbers.grad_scale);
  empty.found_inf = Numbers::pointer(numbers.found_inf);
  auto batch = std::make_unique<Batch>(empty);
  for (size_t i = 0; i < items.size(); ++i) {
    const auto tensor = pointers<scalar_t>(items[i]);
    TORCH_CHECK_VALUE(tensor.per_scale <= std::numeric_limits<unsigned>::max(),
                      "bcgd_step_: at most 2^32 - 1 elements may share a scale on a GPU, got ",
                      tensor.per_scale);
    batch->append(tensor);
    if (!batch->is_full() && i + 1 < items.size()) continue;
    run_batch(*batch, s.params[0].device());
    *batch = empty;
  }
}

void step(const BcgdStep& s) {
  check_bcgd_step(s);
  if (s.params.empty()) return;
  const c10::cuda::CUDAGuard device(s.params[0].device());
  for_each_dtype(s, [&](at::ScalarType dtype, const std::vector<BcgdItem>& items) {
    AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, dtype, "bcgd_step_cuda",
                                    [&] { step_items<scalar_t>(s, items); });
  });
}

}  // namespace

TORCH_LIBRARY_IMPL(qat, CUDA, m) { m.impl("bcgd_step_", bcgd_step_kernel<step>); }

}  // namespace torchqat
