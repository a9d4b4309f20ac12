#include "torchqat/ops/affinity_products.h"

#include "torchqat/math/feature_affinity.h"

namespace torchqat {
namespace {

// The sum of the products of two matrices' elements, for each image.
at::Tensor product_sum(const at::Tensor& a, const at::Tensor& b) {
  return at::bmm(a.flatten(1).unsqueeze(1), b.flatten(1).unsqueeze(2)).view({a.size(0)});
}

Affinity by_pixels(const at::Tensor& a, const at::Tensor& b, bool differentiate) {
  auto s = at::bmm(a.mT(), a);
  s.baddbmm_(b.mT(), b, /*beta=*/1, /*alpha=*/-1);
  Affinity result{product_sum(s, s), {}};
  if (differentiate) result.gradient = at::bmm(a, s).mul_(4);
  return result;
}

Affinity by_channels(const at::Tensor& unit, const at::Tensor& a, const at::Tensor& b, bool differentiate) {
  const auto grams = at::bmm(a, unit.mT());  // [AA', AB']
  const auto own = grams.narrow(2, 0, a.size(1));
  const auto cross = grams.narrow(2, a.size(1), b.size(1));
  const auto teachers = at::bmm(b, b.mT());
  Affinity result{product_sum(own, own) + product_sum(teachers, teachers) - 2 * product_sum(cross, cross),
                  {}};
  if (differentiate) {  // 4 [(AA')A - (AB')B]
    own.mul_(4);
    cross.mul_(-4);
    result.gradient = at::bmm(grams, unit);
  }
  return result;
}

}  // namespace

Affinity frobenius_affinity(const at::Tensor& unit, int64_t student_channels, bool differentiate) {
  const int64_t teacher_channels = unit.size(1) - student_channels;
  const auto a = unit.narrow(1, 0, student_channels);
  const auto b = unit.narrow(1, student_channels, teacher_channels);
  const auto flops = math::affinity_flops(student_channels, teacher_channels, unit.size(2), /*probes=*/0);
  return flops.direct <= flops.gram ? by_pixels(a, b, differentiate) : by_channels(unit, a, b, differentiate);
}

Affinity fast_affinity(const at::Tensor& unit, int64_t student_channels, const at::Tensor& probes,
                       std::string_view norm, bool differentiate) {
  const auto a = unit.narrow(1, 0, student_channels);
  const auto b = unit.narrow(1, student_channels, unit.size(1) - student_channels);
  const auto v = probes.unsqueeze(0).expand({unit.size(0), -1, -1});
  const auto av = at::bmm(a, v);
  auto r = at::bmm(a.mT(), av);  // SV
  r.baddbmm_(b.mT(), at::bmm(b, v), /*beta=*/1, /*alpha=*/-1);
  const double weight = 1.0 / probes.size(1);
  Affinity result{(norm == "l1" ? r.abs().sum({1, 2}) : product_sum(r, r)).mul_(weight), {}};
  if (differentiate) {  // [(AR)V' + (AV)R'] of R = dvalue/d(SV)
    norm == "l1" ? r.sgn_().mul_(weight) : r.mul_(2 * weight);
    result.gradient = at::bmm(at::bmm(a, r), v.mT());
    result.gradient.baddbmm_(av, r.mT());
  }
  return result;
}

}  // namespace torchqat
