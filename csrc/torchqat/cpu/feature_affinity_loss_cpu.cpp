#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <ATen/autocast_mode.h>

#include <algorithm>
#include <functional>

#include "torchqat/cpu/feature_affinity_kernels.h"
#include "torchqat/ops/affinity_products.h"
#include "torchqat/ops/feature_affinity_device.h"

namespace torchqat {
namespace {

// A tile of S has so many rows and columns at most: it stays in the second cache.
constexpr int64_t kTile = 256;
// Images are taken together until their unit columns have so many elements, to make calls worth their while.
constexpr int64_t kGrain = 1 << 16;

// The sum of |S_ij| over i != j, tile by tile of the upper triangle of S, in the dtype of `unit`.
template <typename W>
Affinity l1_affinity(const at::Tensor& unit, int64_t student_channels, bool differentiate) {
  const int64_t images = unit.size(0);
  const int64_t pixels = unit.size(2);
  const auto a = unit.narrow(1, 0, student_channels);
  const auto b = unit.narrow(1, student_channels, unit.size(1) - student_channels);
  Affinity result{at::zeros({images}, at::kDouble), {}};
  if (differentiate) result.gradient = at::zeros_like(a, at::MemoryFormat::Contiguous);
  auto* values = result.value.mutable_data_ptr<double>();
  const auto take_signs = TORCHQAT_BEST_ISA(take_signs<W>);
  const auto columns = [](const at::Tensor& t, int64_t from) {
    return t.narrow(2, from, std::min(kTile, t.size(2) - from));
  };
  for (int64_t i = 0; i < pixels; i += kTile) {
    const auto a_i = columns(a, i);
    const auto b_i = columns(b, i).mT();
    for (int64_t j = i; j < pixels; j += kTile) {
      const auto a_j = columns(a, j);
      auto s = at::bmm(a_i.mT(), a_j);
      s.baddbmm_(b_i, columns(b, j), /*beta=*/1, /*alpha=*/-1);
      if (i == j) s.diagonal(0, 1, 2).zero_();  // rounding noise
      for (int64_t k = 0; k < images; ++k) {
        values[k] +=
            (i == j ? 1 : 2) * take_signs(s.template mutable_data_ptr<W>() + k * s.stride(0), s.stride(0));
      }
      if (!differentiate) continue;
      columns(result.gradient, i).baddbmm_(a_j, s.mT());
      if (i != j) columns(result.gradient, j).baddbmm_(a_i, s);
    }
  }
  if (differentiate) result.gradient.mul_(2);
  return result;
}

template <typename S>
Columns<S> columns_of(const at::Tensor& features, int64_t image) {
  return {static_cast<S*>(features.data_ptr()) + image * features.stride(0), features.size(1),
          features.size(2), features.stride(1), features.stride(2)};
}

// The unit columns of images, and their norms, into `unit` and `norms`.
template <typename W>
void fill_unit(const at::Tensor& features, double eps, const at::Tensor& unit, const at::Tensor& norms) {
  AT_DISPATCH_FLOATING_TYPES_AND2(
      at::kHalf, at::kBFloat16, features.scalar_type(), "feature_affinity_cpu", [&] {
        if constexpr (!(std::is_same_v<scalar_t, double> && std::is_same_v<W, float>)) {
          const auto& kernels = TORCHQAT_BEST_ISA(column_kernels<scalar_t, W>());
          for (int64_t k = 0; k < features.size(0); ++k) {
            kernels.unit(columns_of<const scalar_t>(features, k), eps,
                         unit.template mutable_data_ptr<W>() + k * unit.stride(0),
                         norms.mutable_data_ptr<double>() + k * norms.stride(0));
          }
        }
      });
}

// The gradient in the features of images from that in their unit columns.
template <typename W>
void fill_gradient(const at::Tensor& grad, const at::Tensor& features, const at::Tensor& norms, double eps,
                   double factor, const at::Tensor& grad_features) {
  AT_DISPATCH_FLOATING_TYPES_AND2(
      at::kHalf, at::kBFloat16, features.scalar_type(), "feature_affinity_cpu", [&] {
        if constexpr (!(std::is_same_v<scalar_t, double> && std::is_same_v<W, float>)) {
          const auto& kernels = TORCHQAT_BEST_ISA(column_kernels<scalar_t, W>());
          for (int64_t k = 0; k < features.size(0); ++k) {
            kernels.gradient(grad.const_data_ptr<W>() + k * grad.stride(0),
                             columns_of<const scalar_t>(features, k),
                             norms.const_data_ptr<double>() + k * norms.stride(0), eps, factor,
                             columns_of<at::opmath_type<scalar_t>>(grad_features, k));
          }
        }
      });
}

using Products = std::function<Affinity(const at::Tensor& unit, bool differentiate)>;

// The values of all images, and the gradient in the student's features where `gradient` is defined. W is what
// `products` compute with.
template <typename W>
at::Tensor run(const at::Tensor& student, const at::Tensor& teacher, double eps, double weight,
               const at::Tensor& gradient, const Products& products) {
  const auto a = as_columns(student);
  const auto b = as_columns(teacher);
  const auto grad = gradient.defined() ? as_columns(gradient) : gradient;
  const auto values = at::empty({a.size(0)}, at::kDouble);
  const int64_t channels = a.size(1) + b.size(1);
  const int64_t together = std::max<int64_t>(1, kGrain / (channels * a.size(2)));
  const int64_t parts = at::divup(a.size(0), together);
  // Never fewer than two parts: inside a parallel region a matrix product runs on one thread, and the order
  // of its sums does not depend on how many there are.
  at::parallel_for(0, std::max<int64_t>(parts, 2), 1, [&](int64_t from, int64_t to) {
    const c10::impl::ExcludeDispatchKeyGuard no_autocast(at::autocast_dispatch_keyset);
    const at::AutoDispatchBelowADInplaceOrView below_autograd;
    for (int64_t part = from; part < std::min(to, parts); ++part) {
      const auto of_part = [&](const at::Tensor& t) {
        return t.narrow(0, part * together, std::min(together, t.size(0) - part * together));
      };
      const auto students = of_part(a);
      const auto options = at::TensorOptions(c10::CppTypeToScalarType<W>::value);
      const auto unit = at::empty({students.size(0), channels, a.size(2)}, options);
      const auto norms = at::empty({2, students.size(0), a.size(2)}, at::kDouble);
      fill_unit<W>(students, eps, unit, norms[0]);
      fill_unit<W>(of_part(b), eps, unit.narrow(1, a.size(1), b.size(1)), norms[1]);
      const auto affinity = products(unit, grad.defined());
      of_part(values).copy_(affinity.value);
      if (grad.defined()) fill_gradient<W>(affinity.gradient, students, norms[0], eps, weight, of_part(grad));
    }
  });
  if (grad.defined() && !grad.is_alias_of(gradient)) gradient.copy_(grad.view_as(gradient));
  return values;
}

at::Tensor exact(const at::Tensor& student, const at::Tensor& teacher, std::string_view norm, double eps,
                 double weight, const at::Tensor& gradient, at::ScalarType dtype) {
  const int64_t channels = student.size(1);
  if (norm == "fro") {
    return run<double>(student, teacher, eps, weight, gradient,
                       [=](const at::Tensor& unit, bool d) { return frobenius_affinity(unit, channels, d); });
  }
  return AT_DISPATCH_FLOATING_TYPES(dtype, "feature_affinity_cpu", [&] {
    return run<scalar_t>(student, teacher, eps, weight, gradient, [=](const at::Tensor& unit, bool d) {
      return l1_affinity<scalar_t>(unit, channels, d);
    });
  });
}

at::Tensor fast(const at::Tensor& student, const at::Tensor& teacher, const at::Tensor& probes,
                std::string_view norm, double eps, double weight, const at::Tensor& gradient) {
  const auto columns = probes.to(at::kDouble);
  return run<double>(student, teacher, eps, weight, gradient, [&](const at::Tensor& unit, bool d) {
    return fast_affinity(unit, student.size(1), columns, norm, d);
  });
}

}  // namespace

TORCH_LIBRARY_IMPL(qat, CPU, m) { register_feature_affinity<exact, fast>(m); }

}  // namespace torchqat
