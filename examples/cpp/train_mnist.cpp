// Trains a LeNet-5 on MNIST in float, then one with 1-bit weights and 2-bit activations that learns from it, without
// Python: the staircase ReLU, BCGD, calibration and distillation by fast feature affinity (FFA).
//
//   train_mnist                     the data in $TORCHQAT_DATA/mnist, everything else as documented by --help
//   train_mnist --resume            goes on from the last whole epoch, to the same numbers
//
// To --out go a checkpoint per epoch and, at the end, both networks: float.safetensors, quantized.safetensors.
#include <torch/optim/schedulers/lr_scheduler.h>
#include <torch/utils.h>
#include <unistd.h>

#include <CLI/CLI.hpp>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <filesystem>
#include <iostream>
#include <numbers>
#include <string>

#include "lenet5.h"
#include "mnist.h"

namespace {

namespace fs = std::filesystem;
using torch::nn::Sequential;
using torchqat::optim::BCGD;
using torchqat::optim::BCGDOptions;

struct Options {
  std::string data_dir;
  std::string out = "runs/train_mnist";
  int64_t float_epochs = 4, epochs = 8, batch_size = 128, subset = 60000;
  double float_lr = 0.05, lr = 0.02, momentum = 0.9, weight_decay = 1e-4, width = 1;
  double lambda_kd = 1, lambda_fa = 10, lambda_label = 0.3, temperature = 4;
  int64_t probes = 15;
  uint64_t seed = 0;
  int threads = at::get_num_threads();
  bool resume = false, overwrite = false;
};

// What decides the numbers of a run, as text.
std::string settings_of(const Options& o) {
  return c10::str("float_epochs=", o.float_epochs, " epochs=", o.epochs, " batch_size=", o.batch_size,
                  " subset=", o.subset, " float_lr=", o.float_lr, " lr=", o.lr, " momentum=", o.momentum,
                  " weight_decay=", o.weight_decay, " width=", o.width, " lambda_kd=", o.lambda_kd,
                  " lambda_fa=", o.lambda_fa, " lambda_label=", o.lambda_label, " temperature=", o.temperature,
                  " probes=", o.probes, " seed=", o.seed);
}

// From the first rate to 0 along half a cosine, epoch by epoch.
class CosineLR : public torch::optim::LRScheduler {
 public:
  CosineLR(torch::optim::Optimizer& optimizer, int64_t epochs)
      : LRScheduler(optimizer), first_(get_current_lrs()), epochs_(epochs) {}

 protected:
  std::vector<double> get_lrs() override {
    auto rates = first_;
    for (auto& rate : rates)
      rate *= (1 + std::cos(std::numbers::pi * double(step_count_) / double(epochs_))) / 2;
    return rates;
  }

 private:
  std::vector<double> first_;
  int64_t epochs_;
};

// All that a checkpoint holds: both networks, the random numbers, and how far the run is.
struct RunImpl : torch::nn::Module {
  RunImpl(const Options& o)
      : teacher(register_module("teacher", lenet5(std::nullopt, o.width))),
        student(register_module("student", lenet5(/*act_bits=*/2, o.width))),
        affinity(register_module("affinity", torchqat::nn::FastFeatureAffinityLoss(
                                                 torchqat::nn::FastFeatureAffinityLossOptions().probes(o.probes)))),
        random(register_buffer("random", generator.get_state())),
        epochs_done(register_buffer("epochs_done", at::zeros({2}, at::kLong))) {
    for (auto& net : {teacher, student}) {  // the convolutions take most of the time, and less in this layout
      for (auto p : net->parameters()) {
        if (p.dim() == 4) p.set_data(p.contiguous(at::MemoryFormat::ChannelsLast));
      }
    }
  }

  at::Generator generator = at::globalContext().defaultGenerator(at::kCPU);
  Sequential teacher, student;
  torchqat::nn::FastFeatureAffinityLoss affinity;
  at::Tensor random, epochs_done;  // of the teacher, of the student
};
TORCH_MODULE(Run);

class Trainer {
 public:
  explicit Trainer(const Options& options)
      : o_(options), checkpoint_(fs::path(options.out) / "checkpoint.safetensors"), data_(load()), run_(o_) {
    const auto pixels = data_.images.to(at::kDouble);
    mean_ = pixels.mean().item<float>();
    std_ = pixels.std().item<float>();
  }

  void train() {
    const auto begin = std::chrono::steady_clock::now();
    train_teacher();
    train_student();
    torchqat::save_checkpoint(fs::path(o_.out) / "float.safetensors", *run_->teacher);
    torchqat::save_checkpoint(fs::path(o_.out) / "quantized.safetensors", *run_->student);
    const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - begin;
    std::printf("%.1f s on %d threads; float %.2f %%, quantized %.2f %%; everything is in %s\n", seconds.count(),
                at::get_num_threads(), accuracy(run_->teacher), accuracy(run_->student), o_.out.c_str());
  }

 private:
  Mnist load() const {
    auto data = load_mnist(o_.data_dir);
    data.images = data.images.slice(0, 0, o_.subset);
    data.labels = data.labels.slice(0, 0, o_.subset);
    return data;
  }

  BCGDOptions bcgd_options(double lr) const {
    return BCGDOptions(lr).momentum(o_.momentum).weight_decay(o_.weight_decay);
  }

  void train_teacher() {
    // A group without quant_bits: the steps of torch::optim::SGD.
    BCGD optimizer({{.name = "float", .params = run_->teacher->parameters()}}, bcgd_options(o_.float_lr));
    train_stage(0, "float", optimizer, o_.float_epochs, run_->teacher,
                [&](const at::Tensor& images, const at::Tensor& labels) {
                  return at::cross_entropy_loss(run_->teacher->forward(images), labels);
                });
  }

  void train_student() {
    if (run_->epochs_done[1].item<int64_t>() == 0 && !resumes_at(1)) start_student();
    BCGD optimizer(torchqat::optim::param_groups(*run_->student, /*weight_bits=*/1), bcgd_options(o_.lr));
    const auto criterion = torchqat::distill::FAQDLossOptions()
                               .lambda_kd(o_.lambda_kd)
                               .lambda_fa(o_.lambda_fa)
                               .lambda_label(o_.lambda_label)
                               .kd("kl")
                               .temperature(o_.temperature)
                               .fa(run_->affinity);
    run_->teacher->eval();
    train_stage(1, "quantized", optimizer, o_.epochs, run_->student,
                [&](const at::Tensor& images, const at::Tensor& labels) {
                  Seen taught;
                  {
                    const torch::NoGradGuard no_grad;
                    taught = look(run_->teacher, images);
                  }
                  const auto seen = look(run_->student, images);
                  return torchqat::distill::faqd_loss(seen.logits, taught.logits, {{seen.map, taught.map}}, labels,
                                                      criterion)
                      .loss;
                });
  }

  // The student begins with the teacher's weights, and step sizes that fit its first activations.
  void start_student() {
    const torch::NoGradGuard no_grad;
    auto from = run_->teacher->named_parameters();
    for (auto& item : run_->teacher->named_buffers()) from.insert(item.key(), item.value());
    auto to = run_->student->named_parameters();
    for (auto& item : run_->student->named_buffers()) to.insert(item.key(), item.value());
    for (auto& item : from) to[item.key()].copy_(item.value());
    torchqat::calibrate(run_->student, std::vector{normalized(data_.images.slice(0, 0, 1000))});
  }

  // Whether the checkpoint to go on from was written in this stage.
  bool resumes_at(int64_t stage) const { return resumed_ && resumed_->metadata.at("train_mnist.stage") == std::to_string(stage); }

  template <typename Loss>
  void train_stage(int64_t stage, const char* name, BCGD& optimizer, int64_t epochs, Sequential& net, Loss&& loss) {
    if (stage == 0 && o_.resume) read_checkpoint();
    if (resumed_ && !resumes_at(stage)) return;  // it is behind us
    CosineLR schedule(optimizer, std::max<int64_t>(epochs, 1));
    auto done = run_->epochs_done[stage];
    if (resumed_) {
      torchqat::restore_checkpoint(*resumed_, *run_, &optimizer, checkpoint_.string());
      run_->generator.set_state(run_->random);
      for (int64_t epoch = 0; epoch < done.item<int64_t>(); ++epoch) schedule.step();
      resumed_.reset();
    } else {
      end_epoch(stage, name, epochs, optimizer, net, std::nullopt);
    }
    while (done.item<int64_t>() < epochs) {
      const double mean_loss = train_epoch(name, done.item<int64_t>() + 1, epochs, optimizer, net, loss);
      schedule.step();
      done += 1;
      end_epoch(stage, name, epochs, optimizer, net, mean_loss);
    }
  }

  template <typename Loss>
  double train_epoch(const char* name, int64_t epoch, int64_t epochs, BCGD& optimizer, Sequential& net, Loss&& loss) {
    net->train();
    const auto batches = at::randperm(data_.images.size(0))
                             .tensor_split(std::max<int64_t>((data_.images.size(0) + o_.batch_size - 1) / o_.batch_size, 1));
    auto total = at::zeros({});
    for (size_t i = 0; i < batches.size(); ++i) {
      const auto value = loss(normalized(data_.images.index({batches[i]})), data_.labels.index({batches[i]}));
      optimizer.zero_grad();
      value.backward();
      optimizer.step();  // y <- (1 - rho) y + rho w - lr * coarse gradient at w, then w <- Proj(y)
      total += value.detach() * batches[i].numel();
      if (isatty(STDERR_FILENO) && (i % 10 == 9 || i + 1 == batches.size()))
        std::fprintf(stderr, "\r%s %ld/%ld  %zu/%zu  loss %.4f ", name, long(epoch), long(epochs), i + 1,
                     batches.size(), value.template item<double>());
    }
    if (isatty(STDERR_FILENO)) std::fprintf(stderr, "\r%60s\r", "");
    return total.item<double>() / double(data_.images.size(0));
  }

  // Tests, writes the checkpoint, and says so.
  void end_epoch(int64_t stage, const char* name, int64_t epochs, BCGD& optimizer, Sequential& net,
                 std::optional<double> loss) {
    const double tested = accuracy(net);
    if (loss && !std::isfinite(*loss))
      throw std::runtime_error(c10::str(name, " training diverged (loss ", *loss, "): lower ", stage ? "--lr" : "--float-lr"));
    run_->random.copy_(run_->generator.get_state());
    auto file = torchqat::checkpoint_of(*run_, &optimizer);
    file.metadata["train_mnist.stage"] = std::to_string(stage);
    file.metadata["train_mnist.settings"] = settings_of(o_);
    torchqat::save_safetensors(checkpoint_, file);
    std::printf("%-9s epoch %2ld/%ld  %stest accuracy %.2f %%\n", name, long(run_->epochs_done[stage].item<int64_t>()),
                long(epochs), loss ? c10::str("loss ", std::to_string(*loss).substr(0, 6), "  ").c_str() : "", tested);
    std::fflush(stdout);
  }

  void read_checkpoint() {
    if (!fs::exists(checkpoint_)) return;
    auto file = torchqat::load_safetensors(checkpoint_);
    const auto settings = file.metadata.find("train_mnist.settings");
    if (settings == file.metadata.end() || !file.metadata.count("train_mnist.stage"))
      throw std::runtime_error(checkpoint_.string() + " is not a checkpoint of this program");
    if (settings->second != settings_of(o_))
      throw std::runtime_error(checkpoint_.string() + " was made with other options: " + settings->second + "; not " +
                               settings_of(o_));
    resumed_ = std::move(file);
  }

  at::Tensor normalized(const at::Tensor& images) const {
    return ((images.to(at::kFloat) - mean_) / std_).contiguous(at::MemoryFormat::ChannelsLast);
  }

  double accuracy(Sequential& net) {
    const torch::NoGradGuard no_grad;
    const bool training = net->is_training();
    net->eval();
    int64_t hits = 0;
    for (int64_t i = 0; i < data_.test_images.size(0); i += 1000) {
      const auto scores = net->forward(normalized(data_.test_images.slice(0, i, i + 1000)));
      hits += scores.argmax(1).eq(data_.test_labels.slice(0, i, i + 1000)).sum().item<int64_t>();
    }
    net->train(training);
    return 100.0 * double(hits) / double(data_.test_images.size(0));
  }

  Options o_;
  fs::path checkpoint_;
  Mnist data_;
  Run run_;
  double mean_ = 0, std_ = 1;
  std::optional<torchqat::TensorFile> resumed_;  // until its stage has taken it
};

// Makes the folder, and keeps what is there already.
void claim(const Options& o) {
  std::error_code error;
  fs::create_directories(o.out, error);
  if (error) throw std::runtime_error("cannot write to --out " + o.out + ": " + error.message());
  if (access(o.out.c_str(), W_OK) != 0) throw std::runtime_error("cannot write to --out " + o.out);
  const auto checkpoint = fs::path(o.out) / "checkpoint.safetensors";
  if (!o.resume && !o.overwrite && fs::exists(checkpoint))
    throw std::runtime_error(checkpoint.string() + " is there already: --resume goes on from it, --overwrite begins anew");
}

void add_options(CLI::App& app, Options& o) {
  app.add_option("--data-dir", o.data_dir,
                 "folder of MNIST's four idx files, .gz or plain (default: mnist in the folder that TORCHQAT_DATA names)");
  app.add_option("--out", o.out, "folder of all results");
  app.add_option("--float-epochs", o.float_epochs, "epochs of the float teacher")->check(CLI::Range(0, 100000));
  app.add_option("--epochs", o.epochs, "epochs of the quantized student")->check(CLI::Range(0, 100000));
  app.add_option("--batch-size", o.batch_size, "images per step")->check(CLI::Range(2, 60000));
  app.add_option("--subset", o.subset, "training images, the first")->check(CLI::Range(2, 60000));
  app.add_option("--float-lr", o.float_lr, "learning rate of the teacher, to 0 by cosine")->check(CLI::NonNegativeNumber);
  app.add_option("--lr", o.lr, "learning rate of the student, to 0 by cosine")->check(CLI::NonNegativeNumber);
  app.add_option("--momentum", o.momentum, "of both")->check(CLI::Range(0.0, 1.0));
  app.add_option("--weight-decay", o.weight_decay, "of both")->check(CLI::NonNegativeNumber);
  app.add_option("--width", o.width, "multiplies the numbers of channels")->check(CLI::Range(0.05, 100.0));
  app.add_option("--lambda-kd", o.lambda_kd, "weight of the teacher's logits")->check(CLI::NonNegativeNumber);
  app.add_option("--lambda-fa", o.lambda_fa, "weight of the feature affinity")->check(CLI::NonNegativeNumber);
  app.add_option("--lambda-label", o.lambda_label, "weight of the labels")->check(CLI::NonNegativeNumber);
  app.add_option("--temperature", o.temperature, "of the logits")->check(CLI::Range(0.01, 100.0));
  app.add_option("--probes", o.probes, "of the feature affinity")->check(CLI::Range(1, 10000));
  app.add_option("--seed", o.seed, "of all random numbers");
  app.add_option("--threads", o.threads, "threads of torch")->check(CLI::Range(1, 1024));
  auto* resume = app.add_flag("--resume", o.resume, "go on from the checkpoint in --out, with the same options");
  app.add_flag("--overwrite", o.overwrite, "begin anew where --out has a checkpoint")->excludes(resume);
  for (auto* option : app.get_options()) {
    if (option->get_expected_min() > 0 && option->get_name() != "--data-dir") option->capture_default_str();
  }
}

}  // namespace

int main(int argc, char** argv) {
  CLI::App app("Trains a LeNet-5 with 1-bit weights and 2-bit activations on MNIST, taught by a float one.");
  Options options;
  add_options(app, options);
  CLI11_PARSE(app, argc, argv);
  try {
    if (options.data_dir.empty()) {
      const char* root = std::getenv("TORCHQAT_DATA");
      if (!root) throw std::runtime_error("where is MNIST? Give --data-dir, or set TORCHQAT_DATA");
      options.data_dir = fs::path(root) / "mnist";
    }
    claim(options);
    at::set_num_threads(options.threads);
    at::manual_seed(options.seed);
    Trainer(options).train();
  } catch (const c10::Error& error) {
    std::cerr << "train_mnist: " << error.what_without_backtrace() << std::endl;
    return 1;
  } catch (const std::exception& error) {
    std::cerr << "train_mnist: " << error.what() << std::endl;
    return 1;
  }
}
