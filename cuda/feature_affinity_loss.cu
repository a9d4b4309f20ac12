#include <ATen/Dispatch.h>
#include <ATen/OpMathType.h>
#include <ATen/autocast_mode.h>
#include <ATen/cuda/CUDAContext.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>

#include <algorithm>
#include <functional>

#include "feature_affinity_loss.cuh"
#include "torchqat/ops/affinity_products.h"
#include "torchqat/ops/feature_affinity_loss_device.h"

namespace torchqat {
namespace {

// Some images: (images, channels, pixels), and where they are wanted the gradient, else undefined.
struct Images {
  at::Tensor student, teacher, values, gradient;
  double weight;  // of the values in the loss

  bool differentiate() const { return gradient.defined(); }
  int64_t count() const { return student.size(0); }
  int64_t pixels() const { return student.size(2); }
};

cudaStream_t current_stream() { return at::cuda::getCurrentCUDAStream(); }

at::Tensor empty(at::IntArrayRef size, const at::Tensor& like, at::ScalarType dtype) {
  return at::empty(size, like.options().dtype(dtype));
}

template <typename S>
cuda::Features<S> features_of(const at::Tensor& t) {
  const auto at = [&](auto* data) -> cuda::Features<S> {
    return {static_cast<S*>(data), t.size(1), t.size(2), t.stride(0), t.stride(1), t.stride(2)};
  };
  if constexpr (std::is_const_v<S>) {
    return at(t.const_data_ptr());
  } else {
    return at(t.mutable_data_ptr());
  }
}

// Calls f(a value of the dtype's type), for the dtypes that columns of W are made of.
template <typename W, typename F>
void for_dtype(at::ScalarType dtype, F&& f) {
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, dtype, "feature_affinity_cuda", [&] {
    if constexpr (!(std::is_same_v<scalar_t, double> && std::is_same_v<W, float>)) f(scalar_t{});
  });
}

// The unit columns into `unit`, (images, channels, pixels or more), and the norms where they are wanted.
template <typename W>
void fill_unit(const at::Tensor& features, double eps, const at::Tensor& unit, W* norms) {
  const cuda::UnitColumns<W> to{unit.mutable_data_ptr<W>(), unit.size(1), unit.stride(1), unit.stride(0)};
  for_dtype<W>(features.scalar_type(), [&]<typename S>(S) {
    C10_CUDA_CHECK(cuda::launch_unit_columns(features_of<const S>(features), features.size(0), eps, to, norms,
                                             current_stream()));
  });
}

// The gradient of the loss in the student's features from that of the values over `factor` in its unit
// columns, (images, channels, pixels) in any order.
template <typename W>
void fill_gradient(const Images& images, const cuda::Features<const W>& grad, const W* norms, double eps,
                   double factor) {
  for_dtype<W>(images.student.scalar_type(), [&]<typename S>(S) {
    C10_CUDA_CHECK(cuda::launch_unit_columns_backward(
        grad, features_of<const S>(images.student), images.count(), norms, eps, factor * images.weight,
        features_of<at::opmath_type<S>>(images.gradient), current_stream()));
  });
}

template <typename Tiles>
void run_tiles(const Tiles& tiles, const Images& images) {
  const int64_t partials = cuda::affinity_partials(images.count(), images.pixels(), images.differentiate());
  const auto partial = empty({images.count() * partials}, images.values, at::kDouble);
  C10_CUDA_CHECK(cuda::launch_l1_affinity(tiles, images.count(), images.differentiate(),
                                          partial.mutable_data_ptr<double>(),
                                          images.values.mutable_data_ptr<double>(), current_stream()));
}

// A form of the loss: runs on some images, and says how much memory it takes for each.
struct Form {
  std::function<void(const Images&, double eps)> run;
  int64_t bytes_per_image;
};

// Of features: the student's channels, the teacher's, and the pixels of both.
struct Sizes {
  int64_t student, teacher, pixels;
};

// l1 with columns and S in W.
template <typename W>
Form l1_in(const Sizes& sizes) {
  const int64_t row = cuda::round_up(sizes.pixels, cuda::kRowMultiple);
  const auto run = [=](const Images& images, double eps) {
    const auto dtype = c10::CppTypeToScalarType<W>::value;
    const auto a = empty({images.count(), sizes.student, row}, images.student, dtype);
    const auto b = empty({images.count(), sizes.teacher, row}, images.student, dtype);
    const auto norms = empty({images.count(), sizes.pixels}, images.student, dtype);
    fill_unit<W>(images.student, eps, a, norms.template mutable_data_ptr<W>());
    fill_unit<W>(images.teacher, eps, b, nullptr);
    const auto columns = [](const at::Tensor& t) -> cuda::UnitColumns<const W> {
      return {t.const_data_ptr<W>(), t.size(1), t.stride(1), t.stride(0)};
    };
    cuda::FmaTiles<W> tiles{columns(a), columns(b), {}, sizes.pixels};
    if (!images.differentiate()) return run_tiles(tiles, images);
    const auto grad = at::empty_like(a);
    tiles.grad = {grad.template mutable_data_ptr<W>(), sizes.student, row, grad.stride(0)};
    run_tiles(tiles, images);
    fill_gradient<W>(images, features_of<const W>(grad.narrow(2, 0, sizes.pixels)),
                     norms.template const_data_ptr<W>(), eps, 2);
  };
  const int64_t elements = row * (2 * sizes.student + sizes.teacher) + sizes.pixels;
  return {run, elements * static_cast<int64_t>(sizeof(W))};
}

// l1 of half-precision features by tensor cores.
template <typename half_t>
Form l1_by_tensor_cores(const Sizes& sizes) {
  const int64_t pixels = cuda::round_up(sizes.pixels, cuda::kFragment);
  const int64_t student = cuda::round_up(sizes.student, cuda::kFragment);
  const int64_t teacher = cuda::round_up(sizes.teacher, cuda::kFragment);
  const auto run = [=](const Images& images, double eps) {
    const auto u = empty({images.count(), pixels, student}, images.student, images.student.scalar_type());
    const auto v = empty({images.count(), pixels, teacher}, images.student, images.student.scalar_type());
    const auto scales = empty({2, images.count(), pixels}, images.student, at::kFloat);
    const auto norms = empty({images.count(), sizes.pixels}, images.student, at::kFloat);
    const auto scaled = [&](const at::Tensor& features, const at::Tensor& to, const at::Tensor& scale,
                            float* lengths) -> cuda::ScaledColumns<const half_t> {
      auto* data = static_cast<half_t*>(to.mutable_data_ptr());
      auto* factor = scale.mutable_data_ptr<float>();
      C10_CUDA_CHECK(cuda::launch_scaled_columns(
          features_of<const half_t>(features), images.count(), eps,
          cuda::ScaledColumns<half_t>{data, factor, to.size(2), pixels}, lengths, current_stream()));
      return {data, factor, to.size(2), pixels};
    };
    cuda::TensorTiles<half_t> tiles{
        scaled(images.student, u, scales[0], norms.template mutable_data_ptr<float>()),
        scaled(images.teacher, v, scales[1], nullptr), nullptr, sizes.pixels};
    if (!images.differentiate()) return run_tiles(tiles, images);
    const auto grad = empty(u.sizes(), images.student, at::kFloat);
    tiles.grad = grad.template mutable_data_ptr<float>();
    run_tiles(tiles, images);
    const auto of_features = grad.mT().narrow(1, 0, sizes.student).narrow(2, 0, sizes.pixels);
    fill_gradient<float>(images, features_of<const float>(of_features),
                         norms.template const_data_ptr<float>(), eps,
                         2.0 / cuda::TensorTiles<half_t>::kSignScale);
  };
  return {run, pixels * (6 * student + 2 * teacher + 12)};
}

using Products = std::function<at::Tensor(const AffinityColumns& columns)>;

// By matrix products of unit columns in float64, which hold `scratch` numbers for an image.
Form by_products(const Sizes& sizes, int64_t scratch, const Products& products) {
  const auto run = [=](const Images& images, double eps) {
    at::Tensor norms;  // of the block that was made last
    // Gradients come for whole blocks, the pixels of `norms`: pieces would be more launches.
    AffinityColumns columns{sizes.student, sizes.teacher, sizes.pixels, {}, {}, /*piece=*/sizes.pixels};
    columns.block = [&](int64_t first, int64_t count) {
      const auto unit =
          empty({images.count(), sizes.student + sizes.teacher, count}, images.student, at::kDouble);
      norms = empty({images.count(), count}, images.student, at::kDouble);
      fill_unit<double>(images.student.narrow(2, first, count), eps, unit.narrow(1, 0, sizes.student),
                        norms.mutable_data_ptr<double>());
      fill_unit<double>(images.teacher.narrow(2, first, count), eps,
                        unit.narrow(1, sizes.student, sizes.teacher), nullptr);
      return unit;
    };
    if (images.differentiate()) {
      columns.take_gradient = [&](int64_t first, const at::Tensor& gradient) {
        const auto block = [&](const at::Tensor& t) { return t.narrow(2, first, gradient.size(2)); };
        const Images part{block(images.student), images.teacher, images.values, block(images.gradient),
                          images.weight};
        fill_gradient<double>(part, features_of<const double>(gradient), norms.const_data_ptr<double>(), eps,
                              1);
      };
    }
    images.values.copy_(products(columns));
  };
  return {run, 8 * scratch};
}

// The values of all images, and the gradient in the student's features where `gradient` is defined. So many
// images are taken together, one at least, that all this, with the gradient, needs no more memory than twice
// the features.
at::Tensor run(const at::Tensor& student, const at::Tensor& teacher, double eps, double weight,
               const at::Tensor& gradient, const Form& form) {
  const c10::cuda::CUDAGuard device(student.device());
  const c10::impl::ExcludeDispatchKeyGuard no_autocast(at::autocast_dispatch_keyset);
  const at::AutoDispatchBelowADInplaceOrView below_autograd;
  const auto grad = gradient.defined() ? as_columns(gradient) : gradient;
  const Images all{as_columns(student), as_columns(teacher), empty({student.size(0)}, student, at::kDouble),
                   grad, weight};
  const size_t kept = gradient.defined() ? gradient.nbytes() : 0;
  const auto bytes = static_cast<int64_t>(2 * (student.nbytes() + teacher.nbytes()) - kept);
  const int64_t together = std::max<int64_t>(1, bytes / form.bytes_per_image);
  for (int64_t first = 0; first < all.count(); first += together) {
    const int64_t images = std::min(together, all.count() - first);
    const auto part = [&](const at::Tensor& t) { return t.defined() ? t.narrow(0, first, images) : t; };
    form.run({part(all.student), part(all.teacher), part(all.values), part(all.gradient), weight}, eps);
  }
  if (grad.defined() && !grad.is_alias_of(gradient)) gradient.copy_(grad.view_as(gradient));
  return all.values;
}

Sizes sizes_of(const at::Tensor& student, const at::Tensor& teacher) {
  return {student.size(1), teacher.size(1), c10::multiply_integers(student.sizes().slice(2))};
}

at::Tensor exact(const at::Tensor& student, const at::Tensor& teacher, std::string_view norm, double eps,
                 double weight, const at::Tensor& gradient, at::ScalarType dtype) {
  const Sizes sizes = sizes_of(student, teacher);
  const auto form = [&] {
    if (norm == "fro") {
      const int64_t scratch = affinity_scratch(sizes.student, sizes.teacher, sizes.pixels, /*probes=*/0);
      return by_products(sizes, scratch, frobenius_affinity);
    }
    if (dtype == at::kDouble) return l1_in<double>(sizes);
    // Tensor cores take one of the two half precisions; else the columns are in float.
    const bool same = student.scalar_type() == teacher.scalar_type();
    if (same && student.scalar_type() == at::kHalf) return l1_by_tensor_cores<__half>(sizes);
    if (same && student.scalar_type() == at::kBFloat16) return l1_by_tensor_cores<__nv_bfloat16>(sizes);
    return l1_in<float>(sizes);
  };
  return run(student, teacher, eps, weight, gradient, form());
}

at::Tensor fast(const at::Tensor& student, const at::Tensor& teacher, const at::Tensor& probes,
                std::string_view norm, double eps, double weight, const at::Tensor& gradient) {
  const c10::cuda::CUDAGuard device(student.device());
  const auto wide = probes.to(at::kDouble);
  const Sizes sizes = sizes_of(student, teacher);
  const int64_t scratch = affinity_scratch(sizes.student, sizes.teacher, sizes.pixels, probes.size(1));
  const auto products = [&](const AffinityColumns& columns) { return fast_affinity(columns, wide, norm); };
  return run(student, teacher, eps, weight, gradient, by_products(sizes, scratch, products));
}

}  // namespace

TORCH_LIBRARY_IMPL(qat, CUDA, m) { register_feature_affinity<exact, fast>(m); }

}  // namespace torchqat
