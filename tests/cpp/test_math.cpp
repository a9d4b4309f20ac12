#include <gtest/gtest.h>

#include "torchqat/math/staircase.h"

TEST(Staircase, TopIsTwoToTheBitsMinusOne) {
  for (int bits = 1; bits <= 8; ++bits) EXPECT_EQ(torchqat::math::staircase_top(bits), std::exp2(bits) - 1);
}
