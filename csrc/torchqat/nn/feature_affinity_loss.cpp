#include "torchqat/nn/feature_affinity_loss.h"

#include <ATen/CPUGeneratorImpl.h>
#include <ATen/ops/ones.h>
#include <ATen/ops/randint.h>
#include <ATen/ops/randn.h>
#include <c10/util/accumulate.h>

#include <utility>

#include "torchqat/ops/feature_affinity_loss.h"
#include "torchqat/ops/feature_affinity_loss_device.h"

namespace torchqat::nn {
namespace {

// As Python's state_dict names it.
constexpr const char* kGeneratorState = "_extra_state";

// The operator knows what its options may be: it is asked, rather than a second list kept.
template <typename Options>
void check(const Options& options) {
  const auto pixel = at::ones({1, 1, 1});
  feature_affinity_loss(pixel, pixel, options.norm(), options.reduction(), options.eps());
}

template <typename Options>
void print_common(std::ostream& stream, const Options& options) {
  stream << "norm=" << options.norm() << ", reduction=" << options.reduction() << ", eps=" << options.eps();
}

}  // namespace

FeatureAffinityLossImpl::FeatureAffinityLossImpl(FeatureAffinityLossOptions options)
    : options(std::move(options)) {
  check(this->options);
}

void FeatureAffinityLossImpl::reset() {}

void FeatureAffinityLossImpl::pretty_print(std::ostream& stream) const {
  stream << "torchqat::nn::FeatureAffinityLoss(";
  print_common(stream, options);
  stream << ")";
}

at::Tensor FeatureAffinityLossImpl::forward(const at::Tensor& student, const at::Tensor& teacher) {
  return feature_affinity_loss(student, teacher, options.norm(), options.reduction(), options.eps());
}

FastFeatureAffinityLossImpl::FastFeatureAffinityLossImpl(FastFeatureAffinityLossOptions options)
    : options(std::move(options)),
      generator(this->options.generator().value_or(at::detail::createCPUGenerator(/*seed_val=*/0))) {
  check(this->options);
  TORCH_CHECK_VALUE(this->options.probes() >= 1, "FastFeatureAffinityLoss: probes must be at least 1, got ",
                    this->options.probes());
  const auto& distribution = this->options.distribution();
  TORCH_CHECK_VALUE(distribution == "gaussian" || distribution == "rademacher",
                    "FastFeatureAffinityLoss: unknown distribution '", distribution,
                    "'; choose one of gaussian, rademacher");
}

void FastFeatureAffinityLossImpl::reset() {}

void FastFeatureAffinityLossImpl::pretty_print(std::ostream& stream) const {
  stream << "torchqat::nn::FastFeatureAffinityLoss(probes=" << options.probes() << ", ";
  print_common(stream, options);
  stream << ", distribution=" << options.distribution() << ")";
}

std::shared_ptr<torch::nn::Module> FastFeatureAffinityLossImpl::clone(
    const std::optional<torch::Device>& device) const {
  auto copy = Cloneable::clone(device);
  copy->as<FastFeatureAffinityLossImpl>()->generator = generator.clone();
  return copy;
}

void FastFeatureAffinityLossImpl::save(torch::serialize::OutputArchive& archive) const {
  Module::save(archive);
  archive.write(kGeneratorState, generator.get_state());
}

void FastFeatureAffinityLossImpl::load(torch::serialize::InputArchive& archive) {
  Module::load(archive);
  at::Tensor state;
  archive.read(kGeneratorState, state);
  generator.set_state(state.cpu());
}

at::Tensor FastFeatureAffinityLossImpl::draw(int64_t pixels, at::Device device, at::ScalarType dtype) {
  const auto source = generator.device();
  const bool across = source.is_cpu() && device.is_cuda();  // from pinned memory, without waiting for the GPU
  const auto where = at::TensorOptions(dtype).device(source).pinned_memory(across);
  const auto probes = options.distribution() == "gaussian"
                          ? at::randn({pixels, options.probes()}, generator, where)
                          : at::randint(2, {pixels, options.probes()}, generator, where).mul_(2).sub_(1);
  return probes.to(device, /*non_blocking=*/across);
}

at::Tensor FastFeatureAffinityLossImpl::forward(const at::Tensor& student, const at::Tensor& teacher) {
  // What is refused draws nothing.
  feature_affinity_loss_meta(student, teacher, options.norm(), options.reduction(), options.eps());
  const bool wide = student.scalar_type() == at::kDouble || teacher.scalar_type() == at::kDouble;
  const int64_t pixels = c10::multiply_integers(student.sizes().slice(2));
  const auto probes = draw(pixels, student.device(), wide ? at::kDouble : at::kFloat);
  return fast_feature_affinity_loss(student, teacher, probes, options.norm(), options.reduction(),
                                    options.eps());
}

}  // namespace torchqat::nn
