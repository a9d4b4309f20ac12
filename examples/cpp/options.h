#pragma once

#include <cstdint>
#include <map>
#include <optional>
#include <string>

// The command line of train_mnist. The defaults are the recipe.
struct Options {
  std::string data_dir, out = "runs/train_mnist";
  int64_t float_epochs = 4, epochs = 8, batch_size = 128, subset = 60000, probes = 15, threads = 1;
  double float_lr = 0.05, lr = 0.02, momentum = 0.9, weight_decay = 1e-4, width = 1;
  double lambda_kd = 1, lambda_fa = 10, lambda_label = 0.3, temperature = 4;
  uint64_t seed = 0;
  bool resume = false, overwrite = false;

  // What decides the numbers of a run: the options that must be the same when it is resumed, as text.
  std::map<std::string, std::string> settings;
};

// Reads the command line into `options`. Where the program is to end at once, after --help or a mistake, it
// has been said, and the exit code is returned.
std::optional<int> parse(int argc, char** argv, Options& options);
