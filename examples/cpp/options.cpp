#include "options.h"

#include <CLI/CLI.hpp>
#include <charconv>
#include <cstdlib>
#include <filesystem>
#include <functional>
#include <iostream>
#include <vector>

namespace {

// Shortest, and exact.
template <typename T>
std::string text_of(T value) {
  char buffer[32];
  return {buffer, std::to_chars(buffer, buffer + sizeof buffer, value).ptr};
}

// A check of numbers; NaN is in no range.
template <typename T>
CLI::Validator within(T low, T high) {
  const auto range = text_of(low) + " to " + text_of(high);
  return {[=](const std::string& text) {
            T value{};
            const bool fits = CLI::detail::lexical_cast(text, value) && value >= low && value <= high;
            return fits ? std::string() : "must be " + range + ", got " + text;
          },
          range};
}

class CommandLine {
 public:
  explicit CommandLine(Options& o)
      : app("Trains a LeNet-5 with 1-bit weights and 2-bit activations on MNIST, taught by a float one.",
            "train_mnist") {
    app.add_option("--data-dir", o.data_dir,
                   "folder of MNIST's four idx files, .gz or plain [$TORCHQAT_DATA/mnist]")
        ->take_last();
    app.add_option("--out", o.out, "folder of all results")->take_last()->capture_default_str();
    setting<int64_t>("--float-epochs", o.float_epochs, 0, 100000, "epochs of the float teacher");
    setting<int64_t>("--epochs", o.epochs, 0, 100000, "epochs of the quantized student");
    setting<int64_t>("--batch-size", o.batch_size, 2, 60000, "images per step");
    setting<int64_t>("--subset", o.subset, 2, 60000,
                     "use so many training and test images only, for a quick try");
    setting<double>("--float-lr", o.float_lr, 0, 1e30,
                    "learning rate of the teacher, to 0 by cosine, epoch by epoch");
    setting<double>("--lr", o.lr, 0, 1e30, "learning rate of the student, to 0 by cosine, epoch by epoch");
    setting<double>("--momentum", o.momentum, 0, 1, "of both trainings");
    setting<double>("--weight-decay", o.weight_decay, 0, 1e30, "of both trainings");
    setting<double>("--width", o.width, 0.05, 10, "multiplies the numbers of channels");
    setting<double>("--lambda-kd", o.lambda_kd, 0, 1e6, "weight of the teacher's logits");
    setting<double>("--lambda-fa", o.lambda_fa, 0, 1e6, "weight of the feature affinity");
    setting<double>("--lambda-label", o.lambda_label, 0, 1e6, "weight of the labels");
    setting<double>("--temperature", o.temperature, 0.01, 100, "of the logits");
    setting<int64_t>("--probes", o.probes, 1, 10000, "of the feature affinity");
    setting<uint64_t>("--seed", o.seed, 0, (uint64_t{1} << 63) - 1, "of all random numbers");
    number<int64_t>("--threads", o.threads, 1, 1024, "threads of torch");
    auto* resume =
        app.add_flag("--resume", o.resume, "go on from the checkpoint in --out, with the same options");
    app.add_flag("--overwrite", o.overwrite, "delete the results in --out, and begin anew")->excludes(resume);
  }

  CLI::App app;
  std::vector<std::function<std::pair<std::string, std::string>()>> settings;

 private:
  template <typename T>
  void number(const char* name, T& value, T low, T high, const char* what) {
    app.add_option(name, value, what)->check(within(low, high))->take_last()->capture_default_str();
  }
  template <typename T>
  void setting(const char* name, T& value, T low, T high, const char* what) {
    number(name, value, low, high, what);
    settings.push_back([name, &value] { return std::pair<std::string, std::string>(name, text_of(value)); });
  }
};

std::string problem_of(Options& o) {
  if (o.out.empty()) return "--out is empty: name a folder for the results";
  if (!(o.lambda_kd || o.lambda_fa || o.lambda_label))
    return "one of --lambda-kd, --lambda-fa and --lambda-label must be above 0";
  if (!o.data_dir.empty()) return "";
  const char* root = std::getenv("TORCHQAT_DATA");
  if (!root || !*root) return "where is MNIST? Give --data-dir, or set TORCHQAT_DATA";
  o.data_dir = std::filesystem::path(root) / "mnist";
  return "";
}

}  // namespace

std::optional<int> parse(int argc, char** argv, Options& options) {
  CommandLine line(options);
  std::string problem;
  try {
    line.app.parse(argc, argv);
    problem = problem_of(options);
  } catch (const CLI::ParseError& error) {
    if (error.get_exit_code() == 0) return line.app.exit(error);  // --help
    problem = error.what();
  }
  if (!problem.empty()) {
    std::cerr << "train_mnist: error: " << problem << " (--help lists the options)" << std::endl;
    return 2;
  }
  for (const auto& setting : line.settings) options.settings.insert(setting());
  return std::nullopt;
}
