// Trains a LeNet-5 on MNIST in float, then one with 1-bit weights and 2-bit activations that learns from it,
// without Python: the staircase ReLU, BCGD, calibration and distillation by fast feature affinity (FFA).
//
//   train_mnist --data-dir FOLDER    the four files of MNIST; --help lists the options
//   train_mnist ... --resume         goes on from the last whole epoch, to the same numbers
//
// To --out go a checkpoint per epoch and, in the end, both networks: float.safetensors and
// quantized.safetensors. The numbers are those of
//
//   python examples/distill_classifier.py --dataset mnist --model lenet5 --start teacher --warm-up 0
//     --shift 0 --teacher-model lenet5 --teacher-width 1 --float-epochs 4 --epochs 8 --lr 0.02 --arms kd+ffa
#include <ATen/Parallel.h>
#include <torch/utils.h>

#include <cstdio>
#include <filesystem>
#include <iostream>
#include <string>

#include "lenet5.h"
#include "mnist.h"
#include "options.h"
#include "training.h"

namespace {

using torch::nn::Sequential;
using torchqat::optim::BCGD;
using torchqat::optim::BCGDOptions;

// Teacher and student, and the loss whose random numbers a checkpoint must hold.
struct Networks : torch::nn::Module {
  explicit Networks(const Options& o) {
    using torchqat::nn::FastFeatureAffinityLoss;
    using torchqat::nn::FastFeatureAffinityLossOptions;
    student = register_module("student", lenet5(/*act_bits=*/2, o.width));
    at::manual_seed(o.seed);  // here, so that the teacher is the one of the Python program
    teacher = register_module("teacher", lenet5(/*act_bits=*/std::nullopt, o.width));
    affinity = register_module("affinity",
                               FastFeatureAffinityLoss(FastFeatureAffinityLossOptions().probes(o.probes)));
    // The convolutions take most of the time, and less of it in this layout.
    for (auto parameter : parameters()) {
      if (parameter.dim() == 4) parameter.set_data(parameter.detach().clone(at::MemoryFormat::ChannelsLast));
    }
  }

  Sequential teacher{nullptr}, student{nullptr};
  torchqat::nn::FastFeatureAffinityLoss affinity{nullptr};
};

BCGDOptions optimizer_options(const Options& o, double lr) {
  return BCGDOptions(lr).momentum(o.momentum).weight_decay(o.weight_decay);
}

void train_teacher(const Options& o, Networks& networks, Training& training) {
  // A group without quant_bits: the steps of torch::optim::SGD.
  BCGD optimizer({{.name = "float", .params = networks.teacher->parameters()}},
                 optimizer_options(o, o.float_lr));
  const auto loss = [&](const at::Tensor& images, const at::Tensor& labels) {
    return at::cross_entropy_loss(networks.teacher->forward(images), labels);
  };
  training.train({"float", networks.teacher, optimizer, o.float_epochs, loss});
}

// The student begins with the teacher's weights, and step sizes that fit its first activations.
void start_student(const Options& o, Networks& networks, const Mnist& data) {
  const torch::NoGradGuard no_grad;
  auto weights = networks.student->named_parameters(), buffers = networks.student->named_buffers();
  for (const auto& item : networks.teacher->named_parameters()) weights[item.key()].copy_(item.value());
  for (const auto& item : networks.teacher->named_buffers()) buffers[item.key()].copy_(item.value());
  torchqat::calibrate(networks.student, std::vector{data.normalized(data.images.slice(0, 0, 1000))});
  at::manual_seed(o.seed);
}

void train_student(const Options& o, Networks& networks, Training& training) {
  BCGD optimizer(torchqat::optim::param_groups(*networks.student, /*weight_bits=*/1),
                 optimizer_options(o, o.lr));
  const auto criterion = torchqat::distill::FAQDLossOptions()
                             .lambda_kd(o.lambda_kd)
                             .lambda_fa(o.lambda_fa)
                             .lambda_label(o.lambda_label)
                             .kd("kl")
                             .temperature(o.temperature)
                             .fa(networks.affinity);
  networks.teacher->eval();
  const auto loss = [&](const at::Tensor& images, const at::Tensor& labels) {
    Seen taught;
    {
      const torch::NoGradGuard no_grad;
      taught = look(networks.teacher, images);
    }
    const auto seen = look(networks.student, images);
    return torchqat::distill::faqd_loss(seen.logits, taught.logits, {{seen.map, taught.map}}, labels,
                                        criterion)
        .loss;
  };
  training.train({"quantized", networks.student, optimizer, o.epochs, loss});
}

void run(const Options& o) {
  at::set_num_threads(static_cast<int>(o.threads));
  const auto data = load_mnist(o.data_dir, o.subset);
  Networks networks(o);
  Training training(o, data, networks);
  if (!training.has_passed("float")) train_teacher(o, networks, training);
  if (!training.is_to_resume()) start_student(o, networks, data);
  train_student(o, networks, training);

  const std::filesystem::path out = o.out;
  torchqat::save_checkpoint((out / "float.safetensors").string(), *networks.teacher);
  torchqat::save_checkpoint((out / "quantized.safetensors").string(), *networks.student);
  std::printf("test accuracy: float %.2f %%, quantized %.2f %%\n", training.accuracy(networks.teacher),
              training.accuracy(networks.student));
  std::printf("%.1f s of training on %d threads; everything is in %s\n", training.seconds(),
              at::get_num_threads(), o.out.c_str());
  if (std::fflush(stdout) != 0 || std::ferror(stdout) != 0)
    throw std::runtime_error("the standard output could not be written; everything is in " + o.out);
}

int fail(const std::string& message) {
  std::cerr << "train_mnist: error: " << message.substr(0, message.find('\n')) << std::endl;
  return 2;
}

}  // namespace

int main(int argc, char** argv) {
  Options options;
  options.threads = at::get_num_threads();
  if (const auto exit_code = parse(argc, argv, options)) return *exit_code;
  try {
    run(options);
  } catch (const Stopped& stopped) {
    const auto* how = options.overwrite ? "--resume in place of --overwrite" : "--resume";
    std::printf("\nstopped. %s has the last whole epoch; the same command with %s goes on there\n",
                options.out.c_str(), how);
    return 128 + stopped.signal;
  } catch (const c10::Error& error) {
    return fail(error.what_without_backtrace());
  } catch (const std::bad_alloc&) {
    return fail("out of memory");
  } catch (const std::exception& error) {
    return fail(error.what());
  }
}
