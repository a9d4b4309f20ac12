#pragma once

#include <ftw.h>
#include <gtest/gtest.h>
#include <sys/stat.h>
#include <torch/utils.h>
#include <unistd.h>

#include <cstdio>
#include <filesystem>
#include <map>
#include <set>
#include <string>
#include <vector>

#include "torchqat/safetensors.h"

// What the tests of the C++ interface share.

// The message of the error that f throws, which must be of that class.
template <typename Error = c10::ValueError, typename F>
std::string error_of(F&& f) {
  try {
    f();
  } catch (const c10::Error& error) {
    const std::string message = error.what_without_backtrace();
    if constexpr (!std::is_same_v<Error, c10::Error>) {
      if (!dynamic_cast<const Error*>(&error)) return "an error of another class: " + message;
    }
    return message;
  }
  return "no error";
}

// While it lives, what torch warns of.
class Warnings : c10::WarningHandler {
 public:
  void process(const c10::Warning& warning) override { messages.push_back(warning.msg()); }
  std::vector<std::string> messages;

 private:
  c10::WarningUtils::WarningHandlerGuard guard_{this};
};

inline ::testing::AssertionResult same(const at::Tensor& actual, const at::Tensor& expected) {
  if (!actual.defined() || !expected.defined()) {
    if (actual.defined() == expected.defined()) return ::testing::AssertionSuccess();
    return ::testing::AssertionFailure() << "only one of them is defined";
  }
  if (actual.scalar_type() == expected.scalar_type() && at::equal(actual, expected))
    return ::testing::AssertionSuccess();
  return ::testing::AssertionFailure() << actual << " differs from " << expected;
}

// Of one shape, each element within rtol of the expected one's magnitude plus atol.
inline ::testing::AssertionResult near(const at::Tensor& actual, const at::Tensor& expected, double rtol,
                                       double atol) {
  if (!actual.defined() || actual.sizes() != expected.sizes())
    return ::testing::AssertionFailure() << "undefined, or not of shape " << expected.sizes();
  const auto got = actual.detach().to(at::kDouble);
  const auto want = expected.detach().to(at::kDouble);
  if (at::allclose(got, want, rtol, atol)) return ::testing::AssertionSuccess();
  return ::testing::AssertionFailure() << "off by up to " << (got - want).abs().max().item<double>() << ":\n"
                                       << got << "\nin place of\n"
                                       << want;
}

// As float32 and float64 may be off after a few sums.
inline ::testing::AssertionResult near(const at::Tensor& actual, const at::Tensor& expected) {
  const bool wide = actual.defined() && actual.scalar_type() == at::kDouble;
  return near(actual, expected, wide ? 1e-12 : 1e-5, wide ? 1e-12 : 2e-6);
}

// A file of tests/write_oracle_values.py, or the names in it that begin with `prefix`. Each must be asked
// for.
class OracleValues {
 public:
  explicit OracleValues(const std::string& file, std::string prefix = "")
      : values_(torchqat::load_safetensors(TORCHQAT_ORACLE_VALUES "/" + file + ".safetensors").tensors),
        prefix_(std::move(prefix)) {}
  ~OracleValues() {
    for (const auto& [name, value] : values_) {
      if (name.rfind(prefix_, 0) == 0 && !asked_.count(name))
        ADD_FAILURE() << name << " is compared with nothing";
    }
  }
  // By its name after the prefix.
  const at::Tensor& operator()(const std::string& name) {
    asked_.insert(prefix_ + name);
    return values_.at(prefix_ + name);
  }
  bool has(const std::string& name) const { return values_.count(prefix_ + name); }

 private:
  std::map<std::string, at::Tensor> values_;
  std::string prefix_;
  std::set<std::string> asked_;
};

// Not std::filesystem::remove_all: libtorch.so of torch 2.11 exports one of its own, which crashes.
inline void remove_folder(const std::filesystem::path& path) {
  const auto remove_one = [](const char* file, const struct stat*, int, FTW*) { return std::remove(file); };
  nftw(path.c_str(), remove_one, /*open folders=*/16, FTW_DEPTH | FTW_PHYS);
}

// A folder for the files of one test.
class TemporaryFolder {
 public:
  TemporaryFolder()
      : path(std::filesystem::temp_directory_path() /
             ("torchqat-test-" + std::to_string(getpid()) + "-" +
              ::testing::UnitTest::GetInstance()->current_test_info()->name())) {
    remove_folder(path);
    std::filesystem::create_directories(path);
  }
  ~TemporaryFolder() { remove_folder(path); }

  const std::filesystem::path path;
};
