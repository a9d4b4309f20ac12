#include "torchqat/ops/pack_codes.h"

#include <c10/util/safe_numerics.h>
#include <torch/library.h>

#include <cstdint>
#include <limits>
#include <string_view>

#include "torchqat/math/pack_codes.h"
#include "torchqat/ops/pack_codes_device.h"

namespace torchqat {
namespace {

void check(std::string_view op, std::string_view name, const at::Tensor& input, int64_t bits) {
  TORCH_CHECK_TYPE(input.layout() == at::kStrided, op, ": ", name, " must be a dense tensor, got layout ",
                   input.layout());
  TORCH_CHECK_TYPE(input.scalar_type() == at::kByte, op, ": ", name, " must be uint8, got ",
                   input.scalar_type());
  TORCH_CHECK_VALUE(bits == 1 || bits == 2 || bits == 4 || bits == 8, op, ": bits must be 1, 2, 4 or 8, got ",
                    bits);
}

// Elements of a tensor of that size.
c10::SymInt elements(c10::SymIntArrayRef size) {
  for (const auto& extent : size) {
    TORCH_CHECK_VALUE(extent.sym_ge(0).expect_true(__FILE__, __LINE__),
                      "unpack_codes: size must have no negative numbers, got ", size);
  }
  if (const auto known = c10::asIntArrayRefSlowOpt(size)) {
    uint64_t product = 1;
    const bool overflows = c10::safe_multiplies_u64(*known, &product);
    TORCH_CHECK_VALUE(!overflows && product <= std::numeric_limits<int64_t>::max(),
                      "unpack_codes: size must have fewer than 2^63 elements, got ", size);
  }
  return c10::multiply_integers(size);
}

auto pack_op() {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("qat::pack_codes", "")
                             .typed<decltype(pack_codes_meta)>();
  return op;
}

auto unpack_op() {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("qat::unpack_codes", "")
                             .typed<decltype(unpack_codes_meta)>();
  return op;
}

// uint8 has no gradients. But layouts other than strided have no backend that would check them.
at::Tensor pack_codes_autograd(const at::Tensor& codes, int64_t bits) {
  check("pack_codes", "codes", codes, bits);
  at::AutoDispatchBelowADInplaceOrView below_autograd;
  return pack_op().call(codes, bits);
}

at::Tensor unpack_codes_autograd(const at::Tensor& packed, int64_t bits, c10::SymIntArrayRef size) {
  check("unpack_codes", "packed", packed, bits);
  at::AutoDispatchBelowADInplaceOrView below_autograd;
  return unpack_op().call(packed, bits, size);
}

}  // namespace

at::Tensor pack_codes_meta(const at::Tensor& codes, int64_t bits) {
  check("pack_codes", "codes", codes, bits);
  return at::empty_symint({math::packed_bytes(codes.sym_numel(), bits)}, codes.options());
}

at::Tensor unpack_codes_meta(const at::Tensor& packed, int64_t bits, c10::SymIntArrayRef size) {
  check("unpack_codes", "packed", packed, bits);
  const auto bytes = math::packed_bytes(elements(size), bits);
  TORCH_CHECK_VALUE(packed.dim() == 1 && packed.sym_size(0).sym_eq(bytes).expect_true(__FILE__, __LINE__),
                    "unpack_codes: packed must have shape [", bytes, "] for ", bits, " bits and size ", size,
                    ", got shape ", packed.sym_sizes());
  return at::empty_symint(size, packed.options());
}

at::Tensor pack_codes(const at::Tensor& codes, int64_t bits) { return pack_op().call(codes, bits); }

at::Tensor unpack_codes(const at::Tensor& packed, int64_t bits, at::IntArrayRef size) {
  return unpack_op().call(packed, bits, c10::fromIntArrayRefSlow(size));
}

TORCH_LIBRARY_IMPL(qat, Autograd, m) {
  m.impl("pack_codes", pack_codes_autograd);
  m.impl("unpack_codes", unpack_codes_autograd);
}

TORCH_LIBRARY_IMPL(qat, Meta, m) {
  m.impl("pack_codes", pack_codes_meta);
  m.impl("unpack_codes", unpack_codes_meta);
}

}  // namespace torchqat
