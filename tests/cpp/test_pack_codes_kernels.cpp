#include <random>
#include <string>

#include "kernel_test.h"
#include "pack_codes.cuh"

// The kernels of pack_codes and unpack_codes, against the place of each bit by the definition.
namespace torchqat::cuda::testing {
namespace {

template <int width>
using Width = std::integral_constant<int, width>;

template <typename Bits>
class PackCodesKernels : public ::testing::Test {
 public:
  static constexpr int bits = Bits::value;

  // Of all eight bits: the kernel takes the low ones.
  static std::vector<uint8_t> codes(int64_t n) {
    std::mt19937 random(static_cast<unsigned>(n));
    std::vector<uint8_t> all(n);
    for (auto& code : all) code = static_cast<uint8_t>(random());
    return all;
  }
  static std::vector<uint8_t> packed(const std::vector<uint8_t>& codes) {
    const auto n = static_cast<int64_t>(codes.size());
    std::vector<uint8_t> bytes((n * bits + 7) / 8, 0);
    for (int64_t bit = 0; bit < n * bits; ++bit) {
      const int is_set = codes[bit / bits] >> (bit % bits) & 1;
      bytes[bit / 8] |= static_cast<uint8_t>(is_set << (bit % 8));
    }
    return bytes;
  }

  // Packs and unpacks; `blocks` 0 leaves the grid to the launch functions.
  static void expect_round_trip(int64_t n, int64_t shift, unsigned blocks = 0) {
    SCOPED_TRACE(std::to_string(n) + " codes, shift " + std::to_string(shift));
    const auto values = codes(n);
    const auto bytes = packed(values);
    const auto result = in_every_world([&] {
      Buffer<uint8_t> codes(values, shift), to_pack(bytes.size()), from_pack(bytes, shift), again(n);
      if (blocks == 0) {
        expect_success(launch_pack_codes<bits>(codes.data(), to_pack.data(), n, nullptr));
        expect_success(launch_unpack_codes<bits>(from_pack.data(), again.data(), n, nullptr));
      } else {
        const bool aligned = shift == 0;
        expect_success(
            launch(pack_codes_kernel<bits>, blocks, nullptr, codes.data(), to_pack.data(), n, aligned));
        expect_success(
            launch(unpack_codes_kernel<bits>, blocks, nullptr, from_pack.data(), again.data(), n, aligned));
      }
      return std::tuple(to_pack.contents(), again.contents());
    });
    EXPECT_EQ(std::get<0>(result), bytes) << "the bits past the last code are 0";
    for (int64_t i = 0; i < n; ++i) ASSERT_EQ(std::get<1>(result)[i], values[i] % (1 << bits)) << i;
  }
};

struct WidthName {
  template <typename Bits>
  static std::string GetName(int) {
    return std::to_string(Bits::value) + "bits";
  }
};
using Widths = ::testing::Types<Width<1>, Width<2>, Width<4>, Width<8>>;
TYPED_TEST_SUITE(PackCodesKernels, Widths, WidthName);

TYPED_TEST(PackCodesKernels, EverySize) {
  for (const int64_t n : kSizes) TestFixture::expect_round_trip(n, 0);
  for (int64_t n = 1; n <= 67; ++n) TestFixture::expect_round_trip(n, 0);
  // Around what a block takes.
  for (const int64_t more : {-1, 0, 1}) TestFixture::expect_round_trip(kThreads * 32 + more, 0);
}

TYPED_TEST(PackCodesKernels, UnalignedPointers) {
  for (const int64_t shift : {1, 2, 3, 4, 8, 15}) {
    for (const int64_t n : {31, 32, 33, 5003}) TestFixture::expect_round_trip(n, shift);
  }
}

TYPED_TEST(PackCodesKernels, MoreCodesThanTheGridTakesAtOnce) {
  for (const int64_t shift : {0, 1}) TestFixture::expect_round_trip(3 * kThreads * 32 + 5, shift, 1);
}

}  // namespace
}  // namespace torchqat::cuda::testing
