#include <ATen/cuda/CUDAContext.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <torch/library.h>

#include "pack_codes.cuh"
#include "torchqat/ops/pack_codes_device.h"

namespace torchqat {
namespace {

at::Tensor pack(const at::Tensor& codes, int64_t bits) {
  const c10::cuda::CUDAGuard device(codes.device());
  auto packed = pack_codes_meta(codes, bits);
  if (codes.numel() == 0) return packed;
  const auto rows = codes.contiguous();
  math::with_packed_bits(bits, [&](auto width) {
    C10_CUDA_CHECK(cuda::launch_pack_codes<width>(rows.const_data_ptr<uint8_t>(),
                                                  packed.mutable_data_ptr<uint8_t>(), rows.numel(),
                                                  at::cuda::getCurrentCUDAStream()));
  });
  return packed;
}

at::Tensor unpack(const at::Tensor& packed, int64_t bits, c10::SymIntArrayRef size) {
  const c10::cuda::CUDAGuard device(packed.device());
  auto codes = unpack_codes_meta(packed, bits, size);
  if (codes.numel() == 0) return codes;
  const auto bytes = packed.contiguous();
  math::with_packed_bits(bits, [&](auto width) {
    C10_CUDA_CHECK(cuda::launch_unpack_codes<width>(bytes.const_data_ptr<uint8_t>(),
                                                    codes.mutable_data_ptr<uint8_t>(), codes.numel(),
                                                    at::cuda::getCurrentCUDAStream()));
  });
  return codes;
}

}  // namespace

TORCH_LIBRARY_IMPL(qat, CUDA, m) {
  m.impl("pack_codes", pack);
  m.impl("unpack_codes", unpack);
}

}  // namespace torchqat
