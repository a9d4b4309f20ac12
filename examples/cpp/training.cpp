#include "training.h"

#include <fcntl.h>
#include <sys/file.h>
#include <torch/optim/schedulers/lr_scheduler.h>
#include <torch/utils.h>
#include <unistd.h>

#include <cerrno>
#include <chrono>
#include <cmath>
#include <csignal>
#include <cstdio>
#include <cstring>
#include <numbers>
#include <stdexcept>
#include <vector>

namespace {

namespace fs = std::filesystem;

const std::string kOurs = "train_mnist.";  // begins our keys in the metadata of a checkpoint

// ------------------------------------------------------------------------------------------------ signals

volatile std::sig_atomic_t stopped_by = 0;

void stop(int number) {
  stopped_by = number;
  std::signal(number, SIG_DFL);  // a second one does not wait
}

// --------------------------------------------------------------------------------------------- the folder

// Makes a folder, sees that it can be written to, and keeps other runs out of it while the result lives.
std::shared_ptr<void> claimed(const fs::path& folder) {
  const auto refuse = [&](const std::string& why) {
    throw std::runtime_error("cannot write to --out " + folder.string() + ": " + why);
  };
  std::error_code error;
  fs::create_directories(folder, error);
  if (error) refuse(error.message());
  const int number = open(folder.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC);
  if (number < 0) refuse(std::strerror(errno));
  std::shared_ptr<void> lock(nullptr, [number](void*) { close(number); });
  if (flock(number, LOCK_EX | LOCK_NB) != 0) {
    if (errno == EWOULDBLOCK) throw std::runtime_error("another run is writing to " + folder.string());
    refuse(std::strerror(errno));
  }
  auto trial = (folder / ".trial-XXXXXX").string();
  const int written = mkstemp(trial.data());
  if (written < 0) refuse(std::strerror(errno));
  close(written);
  unlink(trial.c_str());
  return lock;
}

// Reads a checkpoint that was made with these options.
torchqat::TensorFile load(const std::string& path, const Options& options) {
  auto file = torchqat::load_safetensors(path);
  bool ours = file.metadata.count(kOurs + "stage");
  std::string differ;
  for (const auto& [name, value] : options.settings) {
    const auto& saved = file.metadata[kOurs + name];
    ours = ours && !saved.empty();
    if (saved != value) differ += (differ.empty() ? "" : "; ") + name + " " + saved + ", not " + value;
  }
  if (!ours) throw std::runtime_error(path + " is not a checkpoint of this program");
  if (!differ.empty()) throw std::runtime_error(path + " was made with other options: " + differ);
  return file;
}

// ----------------------------------------------------------------------------------------------- training

// From the first rate to 0 along half a cosine, epoch by epoch; in the steps of Python's CosineAnnealingLR,
// which give its bits.
class CosineLR : public torch::optim::LRScheduler {
 public:
  CosineLR(torch::optim::Optimizer& optimizer, int64_t epochs)
      : LRScheduler(optimizer), epochs_(double(epochs)) {}

 protected:
  std::vector<double> get_lrs() override {
    auto rates = get_current_lrs();
    const auto height = [&](double epoch) { return 1 + std::cos(std::numbers::pi * epoch / epochs_); };
    for (auto& rate : rates)
      rate *= height(step_count_ + 1.0) / height(step_count_);  // it counts the steps before this one
    return rates;
  }

 private:
  double epochs_;
};

// A line on stderr, where that is a terminal, which goes away in the end.
class ProgressLine {
 public:
  ~ProgressLine() {
    if (on_) std::fputs("\r\x1b[K", stderr);
  }
  template <typename... Parts>
  void show(const char* format, Parts... parts) {
    if (!on_) return;
    std::fprintf(stderr, format, parts...);
    std::fputs("\x1b[K\r", stderr);
    std::fflush(stderr);
  }
  bool on() const { return on_; }

 private:
  bool on_ = isatty(STDERR_FILENO);
};

}  // namespace

Training::Training(const Options& options, const Mnist& data, torch::nn::Module& networks)
    : options_(options),
      data_(data),
      networks_(networks),
      checkpoint_((fs::path(options.out) / "checkpoint.safetensors").string()),
      generator_(at::globalContext().defaultGenerator(at::kCPU)),
      random_(networks.register_buffer("random", generator_.get_state())),
      epoch_(networks.register_buffer("epoch", at::zeros({}, at::kLong))) {
  std::error_code none;
  if (options.resume && !fs::exists(checkpoint_, none))
    throw std::runtime_error("--resume: there is no checkpoint in " + options.out);
  lock_ = claimed(options.out);
  if (options.resume) {
    saved_ = load(checkpoint_, options);
    seconds_ = std::strtod(saved_->metadata[kOurs + "seconds"].c_str(), nullptr);
  } else if (options.overwrite) {
    for (const auto* name : {"checkpoint.safetensors", "float.safetensors", "quantized.safetensors"})
      fs::remove(fs::path(options.out) / name);
  } else if (fs::exists(checkpoint_)) {
    throw std::runtime_error(checkpoint_ + " is there already: give --resume, --overwrite or another --out");
  }
}

bool Training::has_passed(const std::string& stage) const {
  return saved_ && saved_->metadata.at(kOurs + "stage") != stage;
}

void Training::train(Stage stage) {
  for (const int number : {SIGINT, SIGTERM}) std::signal(number, stop);
  CosineLR schedule(stage.optimizer, stage.epochs);
  if (saved_) {
    restore(stage);
  } else {
    epoch_.zero_();
    end_epoch(stage, std::nullopt);
  }
  const int64_t done = epoch_.item<int64_t>();
  for (int64_t epoch = 1; epoch <= stage.epochs; ++epoch) {
    if (epoch <= done) {
      schedule.step();
      continue;
    }
    const auto began = std::chrono::steady_clock::now();
    const double loss = train_epoch(stage, epoch);
    schedule.step();
    seconds_ += std::chrono::duration<double>(std::chrono::steady_clock::now() - began).count();
    epoch_.fill_(epoch);
    end_epoch(stage, loss);
  }
}

void Training::restore(const Stage& stage) {
  torchqat::restore_checkpoint(*saved_, networks_, &stage.optimizer, checkpoint_);
  generator_.set_state(random_);
  const auto done = epoch_.item<int64_t>();
  if (has_passed(stage.name) || done < 0 || done > stage.epochs)
    throw std::runtime_error(checkpoint_ + " is damaged: it is of no epoch of this run");
  saved_.reset();
}

// The mean loss of one epoch.
double Training::train_epoch(Stage& stage, int64_t epoch) {
  stage.net->train();
  ProgressLine line;
  auto total = at::zeros({});
  const auto batches = data_.batches(options_.batch_size);
  for (size_t i = 0; i < batches.size(); ++i) {
    if (stopped_by) throw Stopped{stopped_by};
    const auto images = data_.normalized(data_.images.index({batches[i]}));
    const auto loss = stage.loss(images, data_.labels.index({batches[i]}));
    stage.optimizer.zero_grad();
    loss.backward();
    stage.optimizer.step();  // BCGD: y <- (1 - rho) y + rho w - lr * coarse gradient at w, then w <- Proj(y)
    total += loss.detach() * images.size(0);
    if (line.on())
      line.show("%s %ld/%ld: batch %zu/%zu, loss %.4f", stage.name.c_str(), long(epoch), long(stage.epochs),
                i + 1, batches.size(), loss.item<double>());
  }
  return total.item<double>() / double(data_.images.size(0));
}

// Tests the network, writes the checkpoint, and says so. What has diverged is kept out of the checkpoint.
void Training::end_epoch(Stage& stage, std::optional<double> loss) {
  const auto scored = scores(stage.net);
  const auto epoch = epoch_.item<int64_t>();
  const bool lost = loss && !std::isfinite(*loss);
  if (lost || !scored.isfinite().all().item<bool>()) {
    const auto what = lost ? "loss " + std::to_string(std::abs(*loss)) : "outputs not finite";
    throw std::runtime_error(c10::str(stage.name, " training diverged at epoch ", epoch, " (", what,
                                      "): lower ", stage.name == "float" ? "--float-lr" : "--lr"));
  }
  random_.copy_(generator_.get_state());
  auto file = torchqat::checkpoint_of(networks_, &stage.optimizer);
  for (const auto& [name, value] : options_.settings) file.metadata[kOurs + name] = value;
  file.metadata[kOurs + "stage"] = stage.name;
  file.metadata[kOurs + "seconds"] = std::to_string(seconds_);
  torchqat::save_safetensors(checkpoint_, file);
  std::printf("%-9s epoch %3ld/%ld  ", stage.name.c_str(), long(epoch), long(stage.epochs));
  if (loss) std::printf("loss %.4f  ", *loss);
  std::printf("test accuracy %.2f %%\n", accuracy_of(scored));
  std::fflush(stdout);
}

// The outputs for the test images, in eval mode.
at::Tensor Training::scores(torch::nn::Sequential& net) const {
  const torch::NoGradGuard no_grad;
  net->eval();
  std::vector<at::Tensor> parts;
  for (const auto& images : data_.test_images.split(1000))
    parts.push_back(net->forward(data_.normalized(images)));
  return at::cat(parts);
}

double Training::accuracy_of(const at::Tensor& scores) const {
  return 100 * scores.argmax(1).eq(data_.test_labels).to(at::kDouble).mean().item<double>();
}
