#include "torchqat/nn/staircase_relu.h"

#include <ATen/ATen.h>

#include <algorithm>
#include <cmath>
#include <map>
#include <vector>

#include "torchqat/ops/layers.h"
#include "torchqat/ops/staircase_relu.h"
#include "torchqat/ops/staircase_relu_device.h"

namespace torchqat::nn {
namespace {

constexpr const char* kSettings = "staircase_relu";  // in a saved module

// By bits; the tables of python/torchqat/nn/staircase_relu.py, whose tests recompute them.
const std::map<int64_t, double> kOptimalAlpha{{1, 0.797885},  {2, 0.486570},  {3, 0.289310},  {4, 0.166641},
                                              {5, 0.0938287}, {6, 0.0519708}, {7, 0.0284185}, {8, 0.0153773}};
const std::map<int64_t, double> kPapersAlpha{{1, 1.2221}, {2, 0.6511}, {4, 0.1946}};

double initial_alpha(const StaircaseReLUOptions& options) {
  if (const auto* alpha = std::get_if<double>(&options.alpha_init())) {
    TORCH_CHECK_VALUE(*alpha > 0 && std::isfinite(*alpha),
                      "StaircaseReLU: alpha_init must be a finite number > 0, got ", *alpha);
    return *alpha;
  }
  const auto& name = std::get<std::string>(options.alpha_init());
  TORCH_CHECK_VALUE(name == "optimal" || name == "papers",
                    "StaircaseReLU: alpha_init must be 'optimal', 'papers' or a number, got '", name, "'");
  const auto& table = name == "optimal" ? kOptimalAlpha : kPapersAlpha;
  TORCH_CHECK_VALUE(table.count(options.bits()), "StaircaseReLU: the papers give no alpha_init for ",
                    options.bits(), " bits, only for 1, 2, 4");
  return table.at(options.bits());
}

void check(const StaircaseReLUOptions& options) {
  TORCH_CHECK_VALUE(options.bits() >= 1 && options.bits() <= 8, "StaircaseReLU: bits must be in 1..8, got ",
                    options.bits());
  TORCH_CHECK_VALUE(options.channels().value_or(1) >= 1,
                    "StaircaseReLU: channels must be none or at least 1, got ", *options.channels());
  TORCH_CHECK_VALUE(options.alpha_grad_clip() > 0, "StaircaseReLU: alpha_grad_clip must be > 0, got ",
                    options.alpha_grad_clip());
  TORCH_CHECK_VALUE(options.alpha_min() > 0 && std::isfinite(options.alpha_min()),
                    "StaircaseReLU: alpha_min must be a finite number > 0, got ", options.alpha_min());
  TORCH_CHECK_VALUE(std::isfinite(options.alpha_grad_scale()),
                    "StaircaseReLU: alpha_grad_scale must be finite, got ", options.alpha_grad_scale());
  // The operator knows what the rest may be: it is asked, rather than a second list kept.
  staircase_relu(at::empty({0}), at::ones({}), options.bits(), options.ste(), options.alpha_grad());
}

}  // namespace

StaircaseReLUImpl::StaircaseReLUImpl(StaircaseReLUOptions options) : options(std::move(options)) {
  check(this->options);
  StaircaseReLUImpl::reset();
}

void StaircaseReLUImpl::reset() {
  const double start = std::max(initial_alpha(options), options.alpha_min());
  std::vector<int64_t> shape;
  if (options.channels()) shape.push_back(*options.channels());
  alpha = register_parameter("alpha", at::full(shape, start, at::kFloat));
  observer = nullptr;
}

void StaircaseReLUImpl::pretty_print(std::ostream& stream) const {
  stream << "torchqat::nn::StaircaseReLU(" << settings();
  if (options.channels()) stream << ", channels=" << *options.channels();
  stream << ")";
}

std::string StaircaseReLUImpl::settings() const {
  return c10::str("bits=", options.bits(), ", ste=", options.ste(), ", alpha_grad=", options.alpha_grad());
}

void StaircaseReLUImpl::save(torch::serialize::OutputArchive& archive) const {
  Module::save(archive);
  archive.write(kSettings, c10::IValue(settings()));
}

void StaircaseReLUImpl::load(torch::serialize::InputArchive& archive) {
  c10::IValue saved;
  if (archive.try_read(kSettings, saved)) {
    TORCH_CHECK_VALUE(saved.isString() && saved.toStringRef() == settings(),
                      "StaircaseReLU: the state must be of ", settings(), ", got ", saved);
  }
  at::Tensor saved_alpha;
  if (archive.try_read("alpha", saved_alpha)) {
    TORCH_CHECK_VALUE(saved_alpha.sizes() == alpha.sizes(),
                      "StaircaseReLU: alpha of the state must have shape ", alpha.sizes(), ", got ",
                      saved_alpha.sizes());
  }
  Module::load(archive);
}

at::Tensor StaircaseReLUImpl::step_size() const {
  return bounded_alpha(alpha, options.alpha_min(), options.alpha_grad_scale(), options.alpha_grad_clip());
}

at::Tensor StaircaseReLUImpl::forward(const at::Tensor& x) {
  if (observer) {
    staircase_relu_meta(x, alpha, options.bits(), options.ste(), options.alpha_grad(), /*channel_dim=*/1,
                        options.save_codes());  // refuses what the operator would
    observer(x);
    return at::relu(x);
  }
  return staircase_relu(x, step_size(), options.bits(), options.ste(), options.alpha_grad(),
                        /*channel_dim=*/1, options.save_codes());
}

}  // namespace torchqat::nn
