#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <ATen/autocast_mode.h>

#include <algorithm>

#include "torchqat/cpu/feature_affinity_kernels.h"
#include "torchqat/ops/affinity_products.h"
#include "torchqat/ops/feature_affinity_loss_device.h"

namespace torchqat {
namespace {

// A tile of S has so many rows and columns at most: it stays in the second cache.
constexpr int64_t kTile = 256;
// The gradient in unit columns is taken for so many pixels at once: enough for a product, small beside a
// block.
constexpr int64_t kPiece = 512;
// Images are taken together until their unit columns have so many elements, to make calls worth their while.
constexpr int64_t kGrain = 1 << 15;

template <typename S>
Columns<S> columns_of(const at::Tensor& features, int64_t image) {
  S* data;
  if constexpr (std::is_const_v<S>) {
    data = features.const_data_ptr<std::remove_const_t<S>>();
  } else {
    data = features.mutable_data_ptr<S>();
  }
  return {data + image * features.stride(0), features.size(1), features.size(2), features.stride(1),
          features.stride(2)};
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

// Some images: their features as columns, their values, and the gradient, undefined where none is wanted.
struct Images {
  at::Tensor student, teacher, values, gradient;
};

// The unit columns of some images, (images, student's channels, then teacher's, pixels), and the norms of
// the student's and the teacher's columns, (2, images, pixels).
struct UnitColumns {
  at::Tensor unit, norms;
};

// Every thread's memory for unit columns, used again for its next images. All of it is one block of the
// thread that calls: there the gradient that backward returns finds room next, while what another thread
// has freed stays in that thread's heap.
class Scratch {
 public:
  // For `images` of so many pixels at most.
  Scratch(int64_t threads, int64_t images, int64_t channels, int64_t pixels, at::ScalarType dtype)
      : dtype_(dtype),
        unit_bytes_(bytes(dtype, images * channels * pixels)),
        memory_(at::empty({threads, unit_bytes_ + bytes(at::kDouble, 2 * images * pixels)}, at::kByte)) {}

  UnitColumns get(int64_t images, int64_t channels, int64_t pixels) const {
    const auto mine = memory_[at::get_thread_num()];
    const auto part = [&](int64_t from, at::IntArrayRef sizes, at::ScalarType dtype) {
      const int64_t size = c10::multiply_integers(sizes) * static_cast<int64_t>(c10::elementSize(dtype));
      return mine.narrow(0, from, size).view(dtype).view(sizes);
    };
    return {part(0, {images, channels, pixels}, dtype_), part(unit_bytes_, {2, images, pixels}, at::kDouble)};
  }

 private:
  // Of whole cache lines.
  static int64_t bytes(at::ScalarType dtype, int64_t numbers) {
    return at::divup(numbers * static_cast<int64_t>(c10::elementSize(dtype)), 64) * 64;
  }

  at::ScalarType dtype_;
  int64_t unit_bytes_;
  at::Tensor memory_;
};

// The sums of |S_ij| over i != j, tile by tile of the upper triangle of S, in the dtype of `unit`.
// `gradient`, where it is defined, gets that in the student's unit columns.
template <typename W>
void l1_affinity(const at::Tensor& unit, const at::Tensor& values, const at::Tensor& gradient,
                 int64_t student_channels) {
  const int64_t images = unit.size(0);
  const int64_t pixels = unit.size(2);
  const auto a = unit.narrow(1, 0, student_channels);
  const auto b = unit.narrow(1, student_channels, unit.size(1) - student_channels);
  auto* sums = values.zero_().mutable_data_ptr<double>();
  if (gradient.defined()) gradient.zero_();
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
        sums[k] +=
            (i == j ? 1 : 2) * take_signs(s.template mutable_data_ptr<W>() + k * s.stride(0), s.stride(0));
      }
      if (!gradient.defined()) continue;
      columns(gradient, i).baddbmm_(a_j, s.mT());
      if (i != j) columns(gradient, j).baddbmm_(a_i, s);
    }
  }
}

template <typename W>
void run_l1(const Images& images, double eps, double weight, const Scratch& scratch) {
  const int64_t channels = images.student.size(1);
  const int64_t others = images.teacher.size(1);
  const auto dtype = c10::CppTypeToScalarType<W>::value;
  const int64_t count = images.student.size(0);
  const int64_t pixels = images.student.size(2);
  const auto [unit, norms] = scratch.get(count, channels + others, pixels);
  fill_unit<W>(images.student, eps, unit, norms[0]);
  fill_unit<W>(images.teacher, eps, unit.narrow(1, channels, others), norms[1]);
  at::Tensor gradient = images.gradient;
  if (gradient.defined() && !(gradient.scalar_type() == dtype && gradient.is_contiguous()))
    gradient = at::empty({count, channels, pixels}, dtype);
  l1_affinity<W>(unit, images.values, gradient, channels);
  if (gradient.defined())
    fill_gradient<W>(gradient, images.student, norms[0], eps, 2 * weight, images.gradient);
}

template <typename Products>
void run_products(const Images& images, double eps, double weight, const Scratch& scratch,
                  Products&& products) {
  const int64_t channels = images.student.size(1);
  const int64_t others = images.teacher.size(1);
  at::Tensor norms;  // of the student in the block that was made last, from pixel `made_from` on
  int64_t made_from = 0;
  AffinityColumns columns{channels, others, images.student.size(2), {}, {}, kPiece};
  columns.block = [&](int64_t first, int64_t count) {
    const auto made = scratch.get(images.student.size(0), channels + others, count);
    fill_unit<double>(images.student.narrow(2, first, count), eps, made.unit, made.norms[0]);
    fill_unit<double>(images.teacher.narrow(2, first, count), eps, made.unit.narrow(1, channels, others),
                      made.norms[1]);
    norms = made.norms[0];
    made_from = first;
    return made.unit;
  };
  if (images.gradient.defined()) {
    columns.take_gradient = [&](int64_t first, const at::Tensor& gradient) {
      const auto part = [&](const at::Tensor& t, int64_t from) {
        return t.narrow(-1, from, gradient.size(2));
      };
      fill_gradient<double>(gradient, part(images.student, first), part(norms, first - made_from), eps,
                            weight, part(images.gradient, first));
    };
  }
  images.values.copy_(products(columns));
}

// Products of float32 are computed in float32 while it lives, whatever torch.set_float32_matmul_precision
// allows: bfloat16 would leave nothing of a student close to its teacher. torch knows this for the process
// only; what other threads multiply meanwhile is more exact than asked for.
class FullPrecision {
 public:
  FullPrecision() : before_(get()) {
    if (is_reduced()) set(at::Float32Precision::IEEE);
  }
  ~FullPrecision() {
    if (!is_reduced()) return;
    set(at::Float32Precision::NONE);  // follows the setting above it
    if (get() != before_) set(before_);
  }
  FullPrecision(const FullPrecision&) = delete;
  FullPrecision& operator=(const FullPrecision&) = delete;

 private:
  static at::Float32Precision get() {
    return at::globalContext().float32Precision(at::Float32Backend::MKLDNN, at::Float32Op::MATMUL);
  }
  static void set(at::Float32Precision precision) {
    at::globalContext().setFloat32Precision(at::Float32Backend::MKLDNN, at::Float32Op::MATMUL, precision);
  }
  bool is_reduced() const {
    return before_ == at::Float32Precision::TF32 || before_ == at::Float32Precision::BF16;
  }

  at::Float32Precision before_;
};

// Calls f(Images, Scratch) for all images, some at a time, in parallel; returns their values. f asks for the
// unit columns of `block` pixels at most, in `dtype`.
template <typename F>
at::Tensor run(const at::Tensor& student, const at::Tensor& teacher, const at::Tensor& gradient,
               int64_t block, at::ScalarType dtype, F&& f) {
  const auto a = as_columns(student);
  const auto b = as_columns(teacher);
  const auto grad = gradient.defined() ? as_columns(gradient) : gradient;
  const auto values = at::empty({a.size(0)}, at::kDouble);
  const int64_t together = std::max<int64_t>(1, kGrain / ((a.size(1) + b.size(1)) * a.size(2)));
  const int64_t parts = at::divup(a.size(0), together);
  const int64_t threads = std::min<int64_t>(at::get_num_threads(), parts);
  const Scratch scratch(threads, std::min(together, a.size(0)), a.size(1) + b.size(1), block, dtype);
  const FullPrecision full_precision;
  // Never fewer than two parts: inside a parallel region a matrix product runs on one thread, and the order
  // of its sums does not depend on how many there are.
  at::parallel_for(0, std::max<int64_t>(parts, 2), 1, [&](int64_t from, int64_t to) {
    const c10::impl::ExcludeDispatchKeyGuard no_autocast(at::autocast_dispatch_keyset);
    const at::AutoDispatchBelowADInplaceOrView below_autograd;
    for (int64_t part = from; part < std::min(to, parts); ++part) {
      const auto of_part = [&](const at::Tensor& t) {
        return t.narrow(0, part * together, std::min(together, t.size(0) - part * together));
      };
      f(Images{of_part(a), of_part(b), of_part(values), grad.defined() ? of_part(grad) : grad}, scratch);
    }
  });
  if (grad.defined() && !grad.is_alias_of(gradient)) gradient.copy_(grad.view_as(gradient));
  return values;
}

at::Tensor exact(const at::Tensor& student, const at::Tensor& teacher, std::string_view norm, double eps,
                 double weight, const at::Tensor& gradient, at::ScalarType dtype) {
  const int64_t pixels = c10::multiply_integers(student.sizes().slice(2));
  if (norm == "fro") {
    const int64_t block = affinity_block(student.size(1), teacher.size(1), pixels, /*probes=*/0);
    return run(student, teacher, gradient, block, at::kDouble, [&](const auto& images, const auto& scratch) {
      run_products(images, eps, weight, scratch, frobenius_affinity);
    });
  }
  return run(student, teacher, gradient, pixels, dtype, [&](const auto& images, const auto& scratch) {
    if (dtype == at::kDouble) {
      run_l1<double>(images, eps, weight, scratch);
    } else {
      run_l1<float>(images, eps, weight, scratch);
    }
  });
}

at::Tensor fast(const at::Tensor& student, const at::Tensor& teacher, const at::Tensor& probes,
                std::string_view norm, double eps, double weight, const at::Tensor& gradient) {
  const auto wide = probes.to(at::kDouble);
  const int64_t block =
      affinity_block(student.size(1), teacher.size(1), probes.size(0), /*probes=*/probes.size(1));
  return run(student, teacher, gradient, block, at::kDouble, [&](const auto& images, const auto& scratch) {
    run_products(images, eps, weight, scratch,
                 [&](const AffinityColumns& columns) { return fast_affinity(columns, wide, norm); });
  });
}

}  // namespace

TORCH_LIBRARY_IMPL(qat, CPU, m) { register_feature_affinity<exact, fast>(m); }

}  // namespace torchqat
