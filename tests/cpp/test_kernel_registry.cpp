#include <cxxabi.h>
#include <dlfcn.h>

#include <cctype>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <numeric>
#include <set>
#include <sstream>
#include <string>

#include "kernel_test.h"

// Every kernel in the files of cuda/ is launched by some test: at the end of a run of all tests, those that
// were not are named and the run fails.
namespace torchqat::cuda::testing {
namespace {

using Names = std::set<std::string>;

// The code without comments, which may speak of kernels too.
std::string without_comments(const std::string& code) {
  std::string kept;
  for (size_t i = 0; i < code.size();) {
    if (code.compare(i, 2, "//") == 0) {
      i = std::min(code.find('\n', i), code.size());
    } else if (code.compare(i, 2, "/*") == 0) {
      const size_t end = code.find("*/", i + 2);
      i = end == std::string::npos ? code.size() : end + 2;
    } else {
      kept += code[i++];
    }
  }
  return kept;
}

// The parenthesis that closes the one at `open`.
size_t closing(const std::string& code, size_t open) {
  int depth = 0;
  for (size_t i = open; i < code.size(); ++i) {
    depth += code[i] == '(' ? 1 : code[i] == ')' ? -1 : 0;
    if (depth == 0) return i;
  }
  return code.size();
}

// The functions marked __global__: of each the last word before its parameters.
Names kernels_of(const std::string& commented) {
  const std::string code = without_comments(commented);
  const std::string mark = "__global__";
  Names names;
  for (size_t at = code.find(mark); at != std::string::npos; at = code.find(mark, at)) {
    at += mark.size();
    std::string word;
    for (bool at_parameters = false; !at_parameters && at < code.size();) {
      if (std::isalnum(static_cast<unsigned char>(code[at])) || code[at] == '_') {
        word.clear();
        for (; std::isalnum(static_cast<unsigned char>(code[at])) || code[at] == '_'; ++at) word += code[at];
      } else if (code[at] == '(' && word == "__launch_bounds__") {
        at = closing(code, at) + 1;
      } else {
        at_parameters = code[at] == '(';
        ++at;
      }
    }
    names.insert(word);
  }
  return names;
}

// "a_kernel" of "void torchqat::cuda::a_kernel<float>(float*)"; nothing of kernels of the tests.
std::string kernel_of_cuda(const std::string& signature) {
  const std::string function = signature.substr(0, signature.find_first_of("<("));
  const std::string space = "torchqat::cuda::";
  const size_t at = function.find(space);
  if (at == std::string::npos) return "";
  const std::string name = function.substr(at + space.size());
  return name.find(':') == std::string::npos ? name : "";
}

std::string signature_of(const void* function) {
  Dl_info info;
  if (dladdr(function, &info) == 0 || info.dli_saddr != function || info.dli_sname == nullptr) return "";
  int status = 0;
  char* demangled = abi::__cxa_demangle(info.dli_sname, nullptr, nullptr, &status);
  const std::string signature = status == 0 ? demangled : "";
  std::free(demangled);
  return signature;
}

Names launched() {
  Names names;
  for (const void* kernel : emu::kernels) names.insert(kernel_of_cuda(signature_of(kernel)));
  return names;
}

// "file: kernel" for each kernel that is not among the launched.
std::string not_launched(const std::filesystem::path& folder, const Names& launched) {
  Names missing;
  for (const auto& entry : std::filesystem::directory_iterator(folder)) {
    const auto file = entry.path().filename().string();
    if (entry.path().extension() != ".cuh" && entry.path().extension() != ".cu") continue;
    std::stringstream code;
    code << std::ifstream(entry.path()).rdbuf();
    for (const auto& kernel : kernels_of(code.str())) {
      if (!launched.contains(kernel)) missing.insert("\n  " + file + ": " + kernel);
    }
  }
  return std::accumulate(missing.begin(), missing.end(), std::string());
}

class EveryKernelIsLaunched : public ::testing::Environment {
 public:
  void TearDown() override {
    const char* const shards = std::getenv("GTEST_TOTAL_SHARDS");
    if (GTEST_FLAG_GET(filter) != "*" || (shards != nullptr && std::string(shards) != "1")) return;
    const std::string missing = not_launched(TORCHQAT_KERNELS, launched());
    EXPECT_TRUE(missing.empty()) << "no test launches these kernels:" << missing;
  }
};
[[maybe_unused]] const auto* const environment =
    ::testing::AddGlobalTestEnvironment(new EveryKernelIsLaunched);

TEST(KernelRegistry, ReadsTheNamesOfKernels) {
  EXPECT_EQ(kernels_of(R"(
    template <typename T>
    __global__ void __launch_bounds__(kThreads, most(2))
        first_kernel(T* x);  // __global__ void in_a_comment(int)
    __global__ void second_kernel(const __grid_constant__ Batch batch) { __launch(1); }
    /* __global__ void in_another(int) */
    static __global__ __launch_bounds__(256) void third_kernel
        (int (*f)(int)) {}
    __device__ void no_kernel(int);)"),
            (Names{"first_kernel", "second_kernel", "third_kernel"}));
}

TEST(KernelRegistry, ReadsTheKernelOfASignature) {
  EXPECT_EQ(kernel_of_cuda("void torchqat::cuda::a_kernel<float, (A)1>(float*, a::b<int>)"), "a_kernel");
  EXPECT_EQ(kernel_of_cuda("torchqat::cuda::a_kernel(int)"), "a_kernel");
  EXPECT_EQ(kernel_of_cuda("torchqat::cuda::testing::a_kernel(int)"), "");
  EXPECT_EQ(kernel_of_cuda("torchqat::cuda::(anonymous namespace)::a_kernel(int)"), "");
  EXPECT_EQ(kernel_of_cuda(""), "");
}

TEST(KernelRegistry, NamesWhatNoTestLaunches) {
  const auto all = not_launched(TORCHQAT_KERNELS, {});
  EXPECT_NE(all.find("\n  pack_codes.cuh: unpack_codes_kernel"), std::string::npos) << all;
  EXPECT_NE(all.find("\n  pack_codes.cuh: pack_codes_kernel"), std::string::npos) << all;
  const auto others = not_launched(TORCHQAT_KERNELS, {"unpack_codes_kernel"});
  EXPECT_EQ(others.find("unpack_codes_kernel"), std::string::npos) << others;
  EXPECT_NE(others.find("\n  pack_codes.cuh: pack_codes_kernel"), std::string::npos) << others;
}

}  // namespace
}  // namespace torchqat::cuda::testing
