#include "torchqat/ops/affinity_products.h"

#include <algorithm>

#include "torchqat/math/feature_affinity.h"

namespace torchqat {
namespace {

// Numbers in the unit columns of a block of an image, 4 MiB: small beside the features of images that are
// larger.
constexpr int64_t kBlockNumbers = 1 << 19;

int64_t pixels_of_block(int64_t channels, int64_t pixels) {
  return std::clamp<int64_t>(kBlockNumbers / channels, 1, pixels);
}

// Whether it is S itself that is taken. Where there are probes (0 for frobenius_affinity) it never is.
bool takes_pixels(int64_t student_channels, int64_t teacher_channels, int64_t pixels, int64_t probes) {
  if (probes > 0) return false;
  const auto flops = math::affinity_flops(student_channels, teacher_channels, pixels, /*probes=*/0);
  return flops.direct <= flops.gram;
}

// A block of pixels, and the student's and the teacher's part of its columns.
struct Block {
  int64_t first;
  at::Tensor unit, student, teacher;
};

// Calls f(block) for all blocks in turn. A block that has all pixels is made once only.
class Blocks {
 public:
  explicit Blocks(const AffinityColumns& columns)
      : columns_(columns),
        count_(pixels_of_block(columns.student_channels + columns.teacher_channels, columns.pixels)) {}

  bool is_one() const { return count_ == columns_.pixels; }
  template <typename F>
  void for_each(F&& f) {
    for (int64_t first = 0; first < columns_.pixels; first += count_) {
      if (!all_.defined() || !is_one())
        all_ = columns_.block(first, std::min(count_, columns_.pixels - first));
      f(Block{first, all_, all_.narrow(1, 0, columns_.student_channels),
              all_.narrow(1, columns_.student_channels, columns_.teacher_channels)});
    }
  }

 private:
  const AffinityColumns& columns_;
  int64_t count_;
  at::Tensor all_;
};

// sum += a b, where `sum` is undefined at first.
void add_product(at::Tensor& sum, const at::Tensor& a, const at::Tensor& b) {
  sum.defined() ? sum.baddbmm_(a, b) : sum = at::bmm(a, b);
}

// Hands over the gradient in `count` columns from pixel `first` on piece by piece: gradient(part) is that of
// one, for whose pixels part(t) narrows the last dimension of t.
template <typename F>
void hand_over(const AffinityColumns& columns, int64_t first, int64_t count, F&& gradient) {
  for (int64_t from = 0; from < count; from += columns.piece) {
    const auto part = [&](const at::Tensor& t) {
      return t.narrow(-1, from, std::min(columns.piece, count - from));
    };
    columns.take_gradient(first + from, gradient(part));
  }
}

// The sum of the squares of a matrix's elements, for each image.
at::Tensor square_sum(const at::Tensor& a) {
  const auto all = a.flatten(1);
  return at::bmm(all.unsqueeze(1), all.unsqueeze(2)).view({a.size(0)});
}

// S seen through probes V: SV = A'(AV) - B'(BV).
class Probed {
 public:
  Probed(Blocks& blocks, const at::Tensor& probes) : probes_(probes) {
    blocks.for_each([&](const Block& block) {
      add_product(av_, block.student, this->probes(block));
      add_product(bv_, block.teacher, this->probes(block));
    });
  }

  // V at the block's pixels, for each image.
  at::Tensor probes(const Block& block) const {
    const auto rows = probes_.narrow(0, block.first, block.unit.size(2));
    return rows.unsqueeze(0).expand({block.unit.size(0), -1, -1});
  }
  // SV at the block's pixels.
  at::Tensor rows(const Block& block) const {
    auto sv = at::bmm(block.student.mT(), av_);
    return sv.baddbmm_(block.teacher.mT(), bv_, /*beta=*/1, /*alpha=*/-1);
  }
  const at::Tensor& av() const { return av_; }

 private:
  const at::Tensor& probes_;
  at::Tensor av_, bv_;
};

at::Tensor by_pixels(const AffinityColumns& columns) {
  const auto unit = columns.block(0, columns.pixels);
  const auto a = unit.narrow(1, 0, columns.student_channels);
  const auto b = unit.narrow(1, columns.student_channels, columns.teacher_channels);
  auto s = at::bmm(a.mT(), a);
  s.baddbmm_(b.mT(), b, /*beta=*/1, /*alpha=*/-1);
  if (columns.take_gradient) {
    hand_over(columns, 0, columns.pixels, [&](const auto& part) { return at::bmm(a, part(s)).mul_(4); });
  }
  return square_sum(s);
}

at::Tensor by_channels(const AffinityColumns& columns) {
  at::Tensor own;    // AA'
  at::Tensor cross;  // AB'
  at::Tensor teachers;
  Blocks blocks(columns);
  blocks.for_each([&](const Block& block) {
    add_product(own, block.student, block.student.mT());
    add_product(cross, block.student, block.teacher.mT());
    add_product(teachers, block.teacher, block.teacher.mT());
  });
  const auto values = square_sum(own) + square_sum(teachers) - 2 * square_sum(cross);
  if (columns.take_gradient) {  // 4 [(AA')A - (AB')B]
    blocks.for_each([&](const Block& block) {
      hand_over(columns, block.first, block.unit.size(2), [&](const auto& part) {
        auto gradient = at::bmm(own, part(block.student));
        return gradient.baddbmm_(cross, part(block.teacher), /*beta=*/4, /*alpha=*/-4);
      });
    });
  }
  return values;
}

}  // namespace

at::Tensor frobenius_affinity(const AffinityColumns& columns) {
  const bool direct =
      takes_pixels(columns.student_channels, columns.teacher_channels, columns.pixels, /*probes=*/0);
  return direct ? by_pixels(columns) : by_channels(columns);
}

at::Tensor fast_affinity(const AffinityColumns& columns, const at::Tensor& probes, std::string_view norm) {
  const double weight = 1.0 / static_cast<double>(probes.size(1));
  // The derivative of the value in SV, in its place.
  const auto derivative = [&](const at::Tensor& sv) {
    return norm == "l1" ? sv.sgn_().mul_(weight) : sv.mul_(2 * weight);
  };
  Blocks blocks(columns);
  const Probed probed(blocks, probes);
  at::Tensor values;
  at::Tensor ar;
  at::Tensor of_all;  // the derivative, where one block has all pixels
  blocks.for_each([&](const Block& block) {
    const auto sv = probed.rows(block);
    const auto value = norm == "l1" ? sv.abs().sum({1, 2}) : square_sum(sv);
    values.defined() ? values.add_(value) : values = value;
    if (!columns.take_gradient) return;
    of_all = derivative(sv);
    add_product(ar, block.student, of_all);
  });
  if (columns.take_gradient) {  // (AR)V' + (AV)R'
    blocks.for_each([&](const Block& block) {
      const auto r = blocks.is_one() ? of_all : derivative(probed.rows(block));
      hand_over(columns, block.first, block.unit.size(2), [&](const auto& part) {
        auto gradient = at::bmm(ar, part(probed.probes(block).mT()));
        return gradient.baddbmm_(probed.av(), part(r.mT()));
      });
    });
  }
  return values.mul_(weight);
}

int64_t affinity_block(int64_t student_channels, int64_t teacher_channels, int64_t pixels, int64_t probes) {
  const bool direct = takes_pixels(student_channels, teacher_channels, pixels, probes);
  return direct ? pixels : pixels_of_block(student_channels + teacher_channels, pixels);
}

int64_t affinity_scratch(int64_t student_channels, int64_t teacher_channels, int64_t pixels, int64_t probes) {
  const int64_t both = student_channels + teacher_channels;
  const bool direct = takes_pixels(student_channels, teacher_channels, pixels, probes);
  const int64_t block = affinity_block(student_channels, teacher_channels, pixels, probes);
  const int64_t products = direct        ? pixels * pixels
                           : probes == 0 ? both * both
                                         : probes * (2 * both + 2 * block);
  return block * (both + student_channels + 2) + products;
}

}  // namespace torchqat
