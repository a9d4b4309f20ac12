#include <ATen/Dispatch.h>
#include <ATen/OpMathType.h>
#include <ATen/Parallel.h>
#include <immintrin.h>
#include <torch/library.h>

#include <algorithm>
#include <span>
#include <type_traits>
#include <vector>

#include "torchqat/cpu/bcgd_kernels.h"
#include "torchqat/cpu/bcgd_step_slices.h"
#include "torchqat/cpu/bcgd_step_ternary.h"
#include "torchqat/math/bcgd.h"
#include "torchqat/ops/bcgd_step_device.h"

namespace torchqat {
namespace {

using math::Projection;

template <typename S>
const auto& kernels() {
  return TORCHQAT_BEST_ISA(bcgd_kernels<S, at::opmath_type<S>>());
}

// A parameter as pointers.
template <typename scalar_t>
struct Target {
  using opmath_t = at::opmath_type<scalar_t>;

  explicit Target(const BcgdItem& item)
      : w(item.param.mutable_data_ptr<scalar_t>()),
        g(item.grad.const_data_ptr<scalar_t>()),
        y(item.latent.mutable_data_ptr<opmath_t>()),
        scale(item.scale.mutable_data_ptr<opmath_t>()),
        buffer(item.buffer.defined() ? item.buffer.mutable_data_ptr<opmath_t>() : nullptr),
        steps(item.steps.defined() ? item.steps.mutable_data_ptr<float>() : nullptr),
        view(item.view),
        per_scale(item.param.numel() / item.view.channels),
        scales(item.scale.numel()) {}

  BcgdRun<scalar_t, opmath_t> run(int64_t p, int64_t count) const {
    return {w + p, g + p, y + p, buffer ? buffer + p : nullptr, count};
  }

  bool is_first() const { return steps && *steps == 0; }

  scalar_t* w;
  const scalar_t* g;
  opmath_t* y;
  opmath_t* scale;
  opmath_t* buffer;
  float* steps;
  math::ChannelView view;
  int64_t per_scale;  // weights that share a scale
  int64_t scales;
};

// Weights of a scale from which on the warm start may add up some of its sums in float32.
constexpr int64_t kMany = 512;

// One step of a few parameters of one dtype.
template <typename scalar_t>
class GroupStep {
 public:
  using opmath_t = at::opmath_type<scalar_t>;
  using Rule = math::StepRule<opmath_t>;

  GroupStep(std::span<const BcgdItem> items, const Rule& rule, Projection projection, int64_t bits,
            bool past_caches)
      : rule_(rule), projection_(projection), bits_(bits), past_caches_(past_caches) {
    for (const auto& item : items) {
      const auto channels = item.view.channels;
      for (int64_t c = 0; c < channels; ++c)
        slices_.append(targets_.size(), c, item.param.numel() / channels);
      const auto& t = targets_.emplace_back(item);
      for (int64_t c = 0; c < channels; ++c) scales_.push_back(c < t.scales ? t.scale[c] : opmath_t(0));
    }
  }

  void run() {
    if (projection_ == Projection::ternary) {
      update_ternary();
    } else if (projection_ == Projection::warm) {
      update<math::kWarmSteps>();
    } else {
      update<1>();
    }
    levels_at_ = scales_;
    if (math::refits(projection_)) refit();
    write();
    finish();
  }

 private:
  // What gives the new w of a slice their levels.
  Levels<opmath_t> levels_of(const Slice& s) const {
    const auto rule = projection_ == Projection::mean  ? LevelRule::top
                      : projection_ == Projection::twn ? LevelRule::kept
                                                       : LevelRule::nearest;
    return {rule, levels_at_[s.scale], bits_};
  }

  // Calls f(slice), which returns what it adds up, for all slices, adds the results of each scale in the
  // order of its slices, and takes to_scale(total) for the scale.
  template <typename F, typename ToScale>
  void fit(F&& f, ToScale&& to_scale) {
    std::vector<std::invoke_result_t<F, const Slice&>> sums(slices_.count());
    for_each_slice([&](const Slice& slice, int64_t i) { sums[i] = f(slice); });
    for (int64_t k = 0; k < slices_.scales(); ++k) {
      auto total = sums[slices_.first(k)];
      for (int64_t i = slices_.first(k) + 1; i < slices_.first(k + 1); ++i) total = total + sums[i];
      scales_[k] = static_cast<opmath_t>(to_scale(total));
    }
  }

  template <typename F>
  void for_each_slice(F&& f) const {
    at::parallel_for(0, slices_.count(), slices_.grain(), [&](int64_t from, int64_t to) {
      for (int64_t i = from; i < to; ++i) f(slices_[i], i);
    });
  }

  // Makes the new y, and the scales by the sums over them.
  template <size_t N>
  void update() {
    const auto sums_of_slice = [&](const Slice& slice) {
      math::StepSums<N> sums;
      if (slice.begin < slice.end) update_slice(slice, sums);
      return sums;
    };
    fit(sums_of_slice, [&](const auto& sums) { return math::scale_after_update(sums, projection_, bits_); });
  }

  template <size_t N>
  void update_slice(const Slice& slice, math::StepSums<N>& sums) const {
    const auto& t = targets_[slice.target];
    const bool first = t.is_first();
    const opmath_t before = scales_[slice.scale];
    math::WarmLevel<opmath_t> levels[math::kWarmSteps];
    for (int i = 0; i < math::kWarmSteps; ++i)
      levels[i] = {static_cast<opmath_t>(before * math::warm_share(i)), bits_};
    for_each_run(t.view, slice, [&](int64_t p, int64_t count) {
      const auto run = t.run(p, count);
      if constexpr (N > 1) {
        kernels<scalar_t>().update_warm(run, rule_, first, levels, t.per_scale < kMany, sums);
      } else if (projection_ == Projection::mean) {
        kernels<scalar_t>().update_binary(run, rule_, first, before, sums);
      } else {
        kernels<scalar_t>().update(run, rule_, first, sums);
      }
    });
  }

  void refit() {
    fit(
        [&](const Slice& slice) {
          const auto& t = targets_[slice.target];
          math::StepSums<1> sums;
          for_each_run(t.view, slice, [&](int64_t p, int64_t count) {
            kernels<scalar_t>().fit(t.y + p, count, levels_of(slice), sums.fits[0]);
          });
          return sums;
        },
        [](const auto& sums) { return sums.scale(); });
  }

  // The slices that were worked on last come first: of them the caches may still hold something.
  void write() const {
    for_each_slice([&](const Slice&, int64_t i) {
      const auto& slice = slices_[slices_.count() - 1 - i];
      const auto& t = targets_[slice.target];
      for_each_run(t.view, slice, [&](int64_t p, int64_t count) {
        kernels<scalar_t>().write(t.w + p, t.y + p, count, scales_[slice.scale], levels_of(slice),
                                  past_caches_);
      });
      if (past_caches_) _mm_sfence();
    });
  }

  void update_ternary() {
    const auto update = [&](const Slice& slice, const auto& edges, auto& sums, opmath_t** near) {
      const auto& t = targets_[slice.target];
      for_each_run(t.view, slice, [&](int64_t p, int64_t count) {
        kernels<scalar_t>().update_ternary(t.run(p, count), rule_, t.is_first(), edges, sums, near);
      });
    };
    const auto gather = [&](const Slice& slice, const auto& window, auto& above, opmath_t** kept) {
      const auto& t = targets_[slice.target];
      for_each_run(t.view, slice, [&](int64_t p, int64_t count) {
        kernels<scalar_t>().gather(t.y + p, count, window, above, kept);
      });
    };
    TernaryScales(slices_, scales_).find(update, gather);
  }

  void finish() {
    auto scale = scales_.begin();
    for (const auto& t : targets_) {
      std::copy_n(scale, t.scales, t.scale);
      scale += t.view.channels;
      if (t.steps) *t.steps += 1;
    }
  }

  std::vector<Target<scalar_t>> targets_;
  Slices slices_;
  std::vector<opmath_t> scales_;     // those before, then the new ones
  std::vector<opmath_t> levels_at_;  // what gives w their levels: the new scale, but for `lloyd` and `twn`
  const Rule rule_;
  const Projection projection_;
  const int64_t bits_;
  const bool past_caches_;
};

// Elements of parameters that are stepped together: enough to share out among threads, few enough that the
// later passes find them in the cache.
constexpr int64_t kGroup = 1 << 18;

// Elements from which on a step goes through so much memory, at least 12 bytes for each, that the caches lose
// the first parameters before its end.
constexpr int64_t kMoreThanCaches = 1 << 22;

void step(const BcgdStep& s) {
  check_bcgd_step(s);
  if (s.found_inf && s.found_inf->item<double>() != 0) return;
  const auto projection = projection_of(s.method, s.bits);
  for_each_dtype(s, [&](at::ScalarType dtype, std::span<const BcgdItem> items) {
    AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, dtype, "bcgd_step_cpu", [&] {
      const auto rule = step_rule<at::opmath_type<scalar_t>>(s);
      int64_t elements = 0;
      for (const auto& item : items) elements += item.param.numel();
      const bool past_caches = elements >= kMoreThanCaches;
      for (size_t first = 0, last = 0; first < items.size(); first = last) {
        for (int64_t n = 0; last < items.size() && n < kGroup; ++last) n += items[last].param.numel();
        GroupStep<scalar_t>(items.subspan(first, last - first), rule, projection, s.bits, past_caches).run();
      }
    });
  });
}

}  // namespace

TORCH_LIBRARY_IMPL(qat, CPU, m) { m.impl("bcgd_step_", bcgd_step_kernel<step>); }

}  // namespace torchqat
