#include <ATen/Parallel.h>
#include <torch/library.h>

#include <algorithm>
#include <atomic>

#include "torchqat/cpu/pack_codes_kernels.h"
#include "torchqat/math/pack_codes.h"
#include "torchqat/ops/pack_codes_device.h"

namespace torchqat {
namespace {

const PackCodesKernels& kernels() { return TORCHQAT_BEST_ISA(pack_codes_kernels()); }

// Codes that a thread takes at least. A multiple of eight, so that the parts begin with a byte.
constexpr int64_t kPart = at::internal::GRAIN_SIZE;
static_assert(kPart % math::kCodesTogether == 0);

// Calls f(first code, first byte, codes) for parts of n codes, in parallel.
template <typename F>
void for_each_part(int64_t n, int64_t bits, F&& f) {
  at::parallel_for(0, at::divup(n, kPart), 1, [&](int64_t begin, int64_t end) {
    f(begin * kPart, begin * kPart / math::kCodesTogether * bits, std::min(n, end * kPart) - begin * kPart);
  });
}

at::Tensor pack(const at::Tensor& codes, int64_t bits) {
  auto packed = pack_codes_meta(codes, bits);
  const auto rows = codes.contiguous();
  const auto* from = rows.const_data_ptr<uint8_t>();
  auto* to = packed.mutable_data_ptr<uint8_t>();
  std::atomic<unsigned> seen = 0;
  for_each_part(codes.numel(), bits, [&](int64_t code, int64_t byte, int64_t n) {
    seen |= kernels().pack(from + code, to + byte, bits, n);
  });
  TORCH_CHECK_VALUE(seen >> bits == 0, "pack_codes: codes must be less than ", 1 << bits, " for bits=", bits,
                    ", got ", static_cast<int>(rows.max().item<uint8_t>()));
  return packed;
}

at::Tensor unpack(const at::Tensor& packed, int64_t bits, c10::SymIntArrayRef size) {
  auto codes = unpack_codes_meta(packed, bits, size);
  const auto bytes = packed.contiguous();
  const auto* from = bytes.const_data_ptr<uint8_t>();
  auto* to = codes.mutable_data_ptr<uint8_t>();
  for_each_part(codes.numel(), bits, [&](int64_t code, int64_t byte, int64_t n) {
    kernels().unpack(from + byte, to + code, bits, n);
  });
  return codes;
}

}  // namespace

TORCH_LIBRARY_IMPL(qat, CPU, m) {
  m.impl("pack_codes", pack);
  m.impl("unpack_codes", unpack);
}

}  // namespace torchqat
