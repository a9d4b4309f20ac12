#include <ATen/Dispatch.h>
#include <ATen/OpMathType.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <mutex>
#include <span>
#include <vector>

#include "torchqat/cpu/bcgd_step_slices.h"
#include "torchqat/math/bcgd.h"
#include "torchqat/math/ternary_scale.h"
#include "torchqat/ops/bcgd_step.h"

namespace torchqat {
namespace {

using math::Projection;
using math::StepSums;

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
        scales(item.scale.numel()) {}

  scalar_t* w;
  const scalar_t* g;
  opmath_t* y;
  opmath_t* scale;
  opmath_t* buffer;
  float* steps;
  math::ChannelView view;
  int64_t scales;
};

// One step of a few parameters of one dtype.
template <typename scalar_t>
class GroupStep {
 public:
  using opmath_t = at::opmath_type<scalar_t>;
  using Rule = math::StepRule<opmath_t>;

  GroupStep(std::span<const BcgdItem> items, const Rule& rule, Projection projection, int64_t bits)
      : rule_(rule), projection_(projection), bits_(bits) {
    for (const auto& item : items) {
      const auto channels = item.view.channels;
      for (int64_t c = 0; c < channels; ++c)
        slices_.append(targets_.size(), c, item.param.numel() / channels);
      targets_.emplace_back(item);
    }
    sums_.resize(slices_.count());
    scales_.resize(slices_.scales());
  }

  void run() {
    for_each_slice([&](const Slice& s) { return update(s); });
    fit([&](const StepSums& sums) { return math::scale_after_update(sums, projection_, bits_); });
    if (projection_ == Projection::ternary) fit_ternary();
    levels_at_ = scales_;
    if (math::needs_second_sums(projection_)) {
      for_each_slice(
          [&](const Slice& s) { return with_level(s, [&](auto level) { return sum(s, level); }); });
      fit([](const StepSums& sums) { return sums.scale(); });
    }
    for_each_slice(
        [&](const Slice& s) { return with_level(s, [&](auto level) { return write(s, level); }); });
    finish();
  }

 private:
  // Calls f, which returns the sums of a slice.
  template <typename F>
  void for_each_slice(F&& f) {
    at::parallel_for(0, slices_.count(), 1, [&](int64_t from, int64_t to) {
      for (int64_t i = from; i < to; ++i) sums_[i] = f(slices_[i]);
    });
  }

  // Calls f with the rule that gives the new w their levels.
  template <typename F>
  StepSums with_level(const Slice& slice, F&& f) const {
    const opmath_t at = levels_at_[slice.scale];
    if (projection_ == Projection::mean) return f(math::TopLevel<opmath_t>{});
    if (projection_ == Projection::twn) return f(math::KeptLevel<opmath_t>{at});
    return f(math::NearestLevel<opmath_t>{at, bits_});
  }

  StepSums update(const Slice& slice) {
    if (projection_ != Projection::warm_lloyd || slice.begin == slice.end) {
      return update(slice, math::TopLevel<opmath_t>{});
    }
    return update(slice, math::NearestLevel<opmath_t>{targets_[slice.target].scale[slice.channel], bits_});
  }

  template <typename Level>
  StepSums update(const Slice& slice, const Level& level) {
    const auto& t = targets_[slice.target];
    const bool first = t.steps && *t.steps == 0;
    LaneSums<opmath_t> sums;
    for_each_run(t.view, slice, [&](int64_t p, int64_t count) {
      const auto step = [rule = rule_, w = t.w + p, g = t.g + p, y = t.y + p](int64_t i, auto&&... momentum) {
        return std::abs(y[i] = rule(y[i], opmath_t(w[i]), opmath_t(g[i]), momentum...));
      };
      if (t.buffer) {
        sums.add(count, level,
                 [step, buffer = t.buffer + p, first](int64_t i) { return step(i, buffer[i], first); });
      } else {
        sums.add(count, level, step);
      }
    });
    return sums.total();
  }

  template <typename Level>
  StepSums sum(const Slice& slice, const Level& level) const {
    const auto& t = targets_[slice.target];
    LaneSums<opmath_t> sums;
    for_each_run(t.view, slice, [&](int64_t p, int64_t count) {
      sums.add(count, level, [y = t.y + p](int64_t i) { return std::abs(y[i]); });
    });
    return sums.total();
  }

  template <typename Level>
  StepSums write(const Slice& slice, const Level& level) {
    const auto& t = targets_[slice.target];
    const opmath_t scale = scales_[slice.scale];
    for_each_run(t.view, slice, [&](int64_t p, int64_t count) {
      for (int64_t i = p; i < p + count; ++i) {
        t.w[i] = static_cast<scalar_t>(scale * math::signed_level(t.y[i], level));
      }
    });
    return {};
  }

  // Adds the sums of each scale in the order of its slices; f of the total is the scale.
  template <typename F>
  void fit(F&& f) {
    for (int64_t k = 0; k < slices_.scales(); ++k) {
      StepSums total;
      for (int64_t i = slices_.first(k); i < slices_.first(k + 1); ++i) total = total + sums_[i];
      scales_[k] = static_cast<opmath_t>(f(total));
    }
  }

  // Scales of many slices one after the other, each by all threads; then the others, shared out among the
  // threads.
  void fit_ternary() {
    const auto is_small = [&](int64_t k) { return slices_.first(k + 1) - slices_.first(k) == 1; };
    for (int64_t k = 0; k < slices_.scales(); ++k) {
      if (!is_small(k)) scales_[k] = large_ternary_scale(slices_.first(k), slices_.first(k + 1));
    }
    at::parallel_for(0, slices_.scales(), 1, [&](int64_t from, int64_t to) {
      std::vector<opmath_t> values, kept;
      for (int64_t k = from; k < to; ++k) {
        if (!is_small(k)) continue;
        values.clear();
        for_each_value(slices_[slices_.first(k)], [&](opmath_t y) { values.push_back(y); });
        scales_[k] = math::exact_ternary_scale(values.data(), values.size(), kept);
      }
    });
  }

  opmath_t large_ternary_scale(int64_t first, int64_t last) const {
    math::MagnitudeHistogram<opmath_t> histogram;
    std::mutex merging;  // in any order: what is merged are integers
    at::parallel_for(first, last, 1, [&](int64_t from, int64_t to) {
      math::MagnitudeHistogram<opmath_t> part;
      for (int64_t i = from; i < to; ++i) for_each_value(slices_[i], [&](opmath_t y) { part.add(y); });
      const std::lock_guard lock(merging);
      histogram.merge(part);
    });
    std::vector<opmath_t> kept;
    return math::exact_ternary_scale(histogram, kept, [&](const auto& search, opmath_t* out) {
      std::vector<std::vector<opmath_t>> found(last - first);
      at::parallel_for(first, last, 1, [&](int64_t from, int64_t to) {
        for (int64_t i = from; i < to; ++i) {
          for_each_value(slices_[i], [&, &mine = found[i - first]](opmath_t y) {
            if (search.holds(y)) mine.push_back(std::abs(y));
          });
        }
      });
      for (const auto& part : found) out = std::copy(part.begin(), part.end(), out);
    });
  }

  template <typename F>
  void for_each_value(const Slice& slice, F&& f) const {
    const auto& t = targets_[slice.target];
    for_each_run(t.view, slice, [&](int64_t p, int64_t count) { std::for_each_n(t.y + p, count, f); });
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
  std::vector<StepSums> sums_;       // of each slice
  std::vector<opmath_t> scales_;     // the new ones
  std::vector<opmath_t> levels_at_;  // what gives w their levels: the new scale, but for `lloyd` and `twn`
  const Rule rule_;
  const Projection projection_;
  const int64_t bits_;
};

// Elements of parameters that are stepped together: enough to share out among threads, few enough that the
// later passes find them in the cache.
constexpr int64_t kGroup = 1 << 18;

void step(const BcgdStep& s) {
  check_bcgd_step(s);
  if (s.found_inf && s.found_inf->item<double>() != 0) return;
  const auto projection = projection_of(s.method, s.bits);
  for_each_dtype(s, [&](at::ScalarType dtype, std::span<const BcgdItem> items) {
    AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, dtype, "bcgd_step_cpu", [&] {
      const auto rule = step_rule<at::opmath_type<scalar_t>>(s);
      for (size_t first = 0, last = 0; first < items.size(); first = last) {
        for (int64_t n = 0; last < items.size() && n < kGroup; ++last) n += items[last].param.numel();
        GroupStep<scalar_t>(items.subspan(first, last - first), rule, projection, s.bits).run();
      }
    });
  });
}

}  // namespace

TORCH_LIBRARY_IMPL(qat, CPU, m) { m.impl("bcgd_step_", bcgd_step_kernel<step>); }

}  // namespace torchqat
