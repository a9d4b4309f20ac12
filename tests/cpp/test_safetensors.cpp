// Files of tensors. tests/test_checkpoint.py compares them with the safetensors package, and damages them.
#include <fcntl.h>
#include <linux/filter.h>
#include <linux/seccomp.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <torch/torch.h>
#include <unistd.h>

#include <cerrno>
#include <csignal>
#include <cstddef>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <limits>
#include <random>
#include <string>
#include <thread>

#include "torch_checks.h"
#include "torchqat/torchqat.h"

namespace {

namespace fs = std::filesystem;
using torchqat::load_safetensors;
using torchqat::save_safetensors;
using torchqat::TensorFile;

struct Safetensors : ::testing::Test {
  void SetUp() override {
    at::manual_seed(0);
    folder = fs::temp_directory_path() / ("torchqat-test-" + std::to_string(getpid()) + "-" +
                                          ::testing::UnitTest::GetInstance()->current_test_info()->name());
    remove_folder(folder);
    fs::create_directories(folder);
    path = folder / "model.safetensors";
  }
  void TearDown() override { remove_folder(folder); }

  TensorFile there_and_back(const TensorFile& file) const {
    save_safetensors(path, file);
    return load_safetensors(path);
  }

  std::string content() const {
    std::ifstream in(path, std::ios::binary);
    return {std::istreambuf_iterator<char>(in), {}};
  }

  void write(const std::string& bytes) const { std::ofstream(path, std::ios::binary) << bytes; }

  void write(const std::string& header, const std::string& data) const {
    const uint64_t length = header.size();
    write(std::string(reinterpret_cast<const char*>(&length), 8) + header + data);
  }

  std::string refused() const {
    return error_of([&] { load_safetensors(path); });
  }

  size_t files() const { return std::distance(fs::directory_iterator(folder), fs::directory_iterator()); }

  fs::path folder;
  std::string path;
};

TEST_F(Safetensors, EveryDtypeAndShapeComesBack) {
  TensorFile file;
  for (const auto dtype : {at::kDouble, at::kFloat, at::kHalf, at::kBFloat16, at::kLong, at::kInt, at::kShort,
                           at::kChar, at::kByte, at::kBool}) {
    for (const auto& shape : std::vector<std::vector<int64_t>>{{}, {3}, {0, 4}, {2, 3, 4}}) {
      file.tensors[c10::str(dtype, at::IntArrayRef(shape))] = (at::randn(shape) * 3).to(dtype);
    }
  }
  const auto back = there_and_back(file);
  ASSERT_EQ(back.tensors.size(), file.tensors.size());
  EXPECT_TRUE(back.metadata.empty());
  for (const auto& [name, tensor] : file.tensors) {
    const auto& other = back.tensors.at(name);
    EXPECT_EQ(other.scalar_type(), tensor.scalar_type()) << name;
    EXPECT_TRUE(at::equal(other, tensor)) << name;
  }
}

TEST_F(Safetensors, LayoutsAreWrittenRowByRow) {
  const auto base = at::arange(24, at::kFloat).view({4, 6});
  const auto nan = at::full({2}, std::numeric_limits<double>::quiet_NaN());
  const auto back = there_and_back({{{"transposed", base.t()},
                                     {"sliced", base.slice(1, 1, 6, 2)},
                                     {"expanded", at::ones({}).expand({3, 2})},
                                     {"parameter", base.clone().requires_grad_()},
                                     {"nan", nan}},
                                    {}});
  EXPECT_TRUE(at::equal(back.tensors.at("transposed"), base.t()));
  EXPECT_TRUE(at::equal(back.tensors.at("sliced"), base.slice(1, 1, 6, 2)));
  EXPECT_TRUE(at::equal(back.tensors.at("expanded"), at::ones({3, 2})));
  EXPECT_TRUE(at::equal(back.tensors.at("parameter"), base));
  EXPECT_TRUE(back.tensors.at("nan").isnan().all().item<bool>());
  for (const auto& [name, tensor] : back.tensors) {
    EXPECT_TRUE(tensor.is_contiguous() && !tensor.requires_grad()) << name;
  }
}

TEST_F(Safetensors, StrangeNamesAndMetadataComeBack) {
  TensorFile file;
  for (const std::string& name : {std::string(), std::string("a.b"), std::string("\"\\/{}[]:,"),
                                  std::string("\0\n\t\x1f\x7f", 5), std::string("\u00fc\u20ac\U0001f600")}) {
    file.tensors[name] = at::full({1}, static_cast<double>(name.size()));
    file.metadata[name] = name;
  }
  const auto back = there_and_back(file);
  EXPECT_EQ(back.metadata, file.metadata);
  ASSERT_EQ(back.tensors.size(), file.tensors.size());
  for (const auto& [name, tensor] : file.tensors) EXPECT_TRUE(at::equal(back.tensors.at(name), tensor));
}

TEST_F(Safetensors, TheBytesAreThoseOfTheFormat) {
  save_safetensors(path, {{{"b", at::ones({2}, at::kFloat)}, {"a", at::ones({}, at::kByte)}}, {{"k", "v"}}});
  const std::string header =
      R"({"__metadata__":{"k":"v"},"b":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},)"
      R"("a":{"dtype":"U8","shape":[],"data_offsets":[8,9]}})";
  const std::string padded = header + std::string((8 - header.size() % 8) % 8, ' ');
  const std::string bytes = content();
  EXPECT_EQ(bytes.substr(8, padded.size()), padded);
  EXPECT_EQ(bytes.substr(8 + padded.size()), std::string("\0\0\x80\x3f\0\0\x80\x3f\x01", 9));
}

TEST_F(Safetensors, WhatCannotBeWrittenIsNamed) {
  const auto error = [&](const TensorFile& file) {
    return error_of<c10::Error>([&] { save_safetensors(path, file); });
  };
  EXPECT_EQ(error({{{"z", at::zeros({2}, at::kComplexFloat)}}, {}}),
            "save_safetensors: tensor 'z' has the dtype ComplexFloat, which is not written");
  EXPECT_EQ(error({{{"u", at::Tensor()}}, {}}), "save_safetensors: tensor 'u' must be defined");
  EXPECT_EQ(error({{{"s", at::eye(2).to_sparse()}}, {}}),
            "save_safetensors: tensor 's' must be dense and have values, got layout Sparse on cpu");
  EXPECT_EQ(error({{{"__metadata__", at::ones({})}}, {}}),
            "save_safetensors: a name must be UTF-8 and not __metadata__, got '__metadata__'");
  EXPECT_NE(error({{{"\xff", at::ones({})}}, {}}).find("a name must be UTF-8"), std::string::npos);
  EXPECT_NE(error({{}, {{"k", "\xed\xa0\x80"}}}).find("metadata must be UTF-8"), std::string::npos);
  EXPECT_EQ(files(), 0u);
}

TEST_F(Safetensors, TheSystemsReasonIsGiven) {
  const std::string nowhere = folder / "no" / "where";
  EXPECT_EQ(error_of<c10::Error>([&] { save_safetensors(nowhere, {}); }),
            "save_safetensors: " + nowhere + ": No such file or directory");
  EXPECT_EQ(error_of<c10::Error>([&] { load_safetensors(nowhere); }),
            "load_safetensors: " + nowhere + ": No such file or directory");
  EXPECT_EQ(error_of<c10::Error>([&] { save_safetensors(folder, {}); }),
            "save_safetensors: " + folder.string() + ": Is a directory");
  EXPECT_EQ(error_of<c10::Error>([&] { load_safetensors(folder); }),
            "load_safetensors: " + folder.string() + ": Is a directory");
  EXPECT_EQ(error_of<c10::Error>([&] { save_safetensors("/dev/full", {}); }),
            "save_safetensors: /dev/full: not a regular file");
  EXPECT_EQ(files(), 0u);
}

TEST_F(Safetensors, AWriteThatFailsLeavesTheOldFile) {
  save_safetensors(path, {{{"a", at::ones({3})}}, {}});
  const std::string before = content();
  rlimit old{};
  getrlimit(RLIMIT_FSIZE, &old);
  const rlimit small{1000, old.rlim_max};
  const auto handler = std::signal(SIGXFSZ, SIG_IGN);
  setrlimit(RLIMIT_FSIZE, &small);
  const std::string error = error_of<c10::Error>([&] {
    save_safetensors(path, {{{"a", at::ones({1000})}}, {}});
  });
  setrlimit(RLIMIT_FSIZE, &old);
  std::signal(SIGXFSZ, handler);
  EXPECT_EQ(error, "save_safetensors: " + path + ": File too large");
  EXPECT_EQ(content(), before);
  EXPECT_EQ(files(), 1u);
}

// ---- processes that end while they write ----

// From here on no file of this process may be larger.
void bound_files(rlim_t bytes, void (*on_signal)(int)) {
  const rlimit small{bytes, bytes}, none{0, 0};
  setrlimit(RLIMIT_FSIZE, &small);
  setrlimit(RLIMIT_CORE, &none);
  std::signal(SIGXFSZ, on_signal);
}

// From here on the system refuses files without names, as some file systems do.
bool refuse_unnamed_files() {
  const unsigned flags = offsetof(seccomp_data, args) + 2 * sizeof(uint64_t);
  sock_filter filter[] = {
      BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(seccomp_data, nr)),
      BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, SYS_openat, 0, 3),
      BPF_STMT(BPF_LD | BPF_W | BPF_ABS, flags),
      BPF_JUMP(BPF_JMP | BPF_JSET | BPF_K, O_TMPFILE & ~O_DIRECTORY, 0, 1),
      BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ERRNO | EOPNOTSUPP),
      BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW),
  };
  const sock_fprog program{std::size(filter), filter};
  return prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) == 0 &&
         prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, &program) == 0;
}

constexpr int kCannot = 77;

// What wait() says of a process that does this.
int status_of(const std::function<void()>& f) {
  const pid_t child = fork();
  if (child == 0) {
    std::thread(f).join();  // of which nobody catches: gtest does
    _exit(0);
  }
  int status = -1;
  waitpid(child, &status, 0);
  return status;
}

bool has_unnamed_files(const fs::path& folder) {
  const int file = open(folder.c_str(), O_WRONLY | O_TMPFILE, 0666);
  return file >= 0 && close(file) == 0;
}

// The default of SIGXFSZ ends a process where SIGKILL would: in the middle of a write.
TEST_F(Safetensors, AProcessThatIsKilledLeavesTheOldFileAlone) {
  if (!has_unnamed_files(folder)) GTEST_SKIP() << "no files without names in " << folder;
  save_safetensors(path, {{{"a", at::ones({3})}}, {}});
  const std::string before = content();
  const TensorFile large{{{"a", at::ones({100'000})}}, {}};
  const int status = status_of([&] {
    bound_files(1000, SIG_DFL);
    save_safetensors(path, large);
  });
  EXPECT_TRUE(WIFSIGNALED(status) && WTERMSIG(status) == SIGXFSZ) << status;
  EXPECT_EQ(content(), before);
  EXPECT_EQ(files(), 1u);
}

TEST_F(Safetensors, AnErrorThatNobodyCatchesLeavesTheOldFileAlone) {
  save_safetensors(path, {{{"a", at::ones({3})}}, {}});
  const std::string before = content();
  const TensorFile large{{{"a", at::ones({100'000})}}, {}};
  for (const bool named : {false, true}) {
    const int status = status_of([&] {
      if (named && !refuse_unnamed_files()) _exit(kCannot);
      bound_files(1000, SIG_IGN);
      save_safetensors(path, large);
    });
    if (WIFEXITED(status) && WEXITSTATUS(status) == kCannot) GTEST_SKIP() << "no seccomp";
    EXPECT_TRUE(WIFSIGNALED(status) && WTERMSIG(status) == SIGABRT) << status;
    EXPECT_EQ(content(), before);
    EXPECT_EQ(files(), 1u);
  }
}

TEST_F(Safetensors, FoldersThatRefuseFilesWithoutNamesDo) {
  for (int repeat = 0; repeat < 2; ++repeat) {  // a new file, and one that is there
    const auto a = at::full({3}, repeat);
    const int status = status_of([&] {
      if (!refuse_unnamed_files() || has_unnamed_files(folder)) _exit(kCannot);
      save_safetensors(path, {{{"a", a}}, {}});
    });
    if (WIFEXITED(status) && WEXITSTATUS(status) == kCannot) GTEST_SKIP() << "no seccomp";
    EXPECT_EQ(status, 0);
    EXPECT_TRUE(at::equal(load_safetensors(path).tensors.at("a"), a));
    EXPECT_EQ(files(), 1u);
  }
}

TEST_F(Safetensors, TheUsersMaskSaysWhoReads) {
  const auto old = umask(027);
  save_safetensors(path, {});
  umask(old);
  EXPECT_EQ(fs::status(path).permissions(), fs::perms(0640));
}

TEST_F(Safetensors, DamagedFilesAreRefused) {
  const auto begin = "load_safetensors: " + path + ": ";
  write("");
  EXPECT_EQ(refused(), begin + "must have 8 bytes for a length, has 0; the file may have been cut short");
  write(std::string(8, '\xff'));
  EXPECT_EQ(refused(), begin + "the header must be within 0 bytes, got a length of 18446744073709551615");
  write(R"({"a":{"dtype":"F8_E4M3","shape":[1],"data_offsets":[0,1]}})", "1");
  EXPECT_EQ(refused(), begin + "tensor 'a' has the dtype 'F8_E4M3', which torchqat does not read");
  write(R"({"a":{"dtype":"U8","shape":[2],"data_offsets":[0,1]}})", "1");
  EXPECT_EQ(refused(), begin + "tensor 'a' must have 2 bytes, Byte of shape [2], got data_offsets 0 to 1");
  write(R"({"a":{"dtype":"U8","shape":[4611686018427387904,4],"data_offsets":[0,1]}})", "1");
  EXPECT_EQ(refused(), begin + "the shape of tensor 'a' overflows: [4611686018427387904, 4]");
  write(R"({"a":{"dtype":"BOOL","shape":[1],"data_offsets":[0,1]}})", "2");
  EXPECT_EQ(refused(), begin + "tensor 'a' is BOOL and must have bytes 0 and 1 only");
  write(R"({"a":})", "");
  EXPECT_EQ(refused(), begin + "the header must have '{' at byte 5");
}

TEST_F(Safetensors, AFileThatWasCutShortIsCalledSo) {
  save_safetensors(path, {{{"a", at::ones({3})}, {"b", at::ones({3})}}, {}});
  const auto whole = content();
  for (const size_t left : {size_t{3}, size_t{20}, whole.size() - 20, whole.size() - 1}) {
    write(whole.substr(0, left));
    EXPECT_TRUE(refused().ends_with("; the file may have been cut short")) << refused();
  }
  write(whole + "1");
  EXPECT_FALSE(refused().ends_with("cut short"));
}

// Under the sanitizers this is what looks for reads out of bounds.
TEST_F(Safetensors, RandomDamageLoadsOrIsRefused) {
  save_safetensors(path,
                   {{{"a\n", at::ones({2})}, {"b", at::zeros({3}, at::kBool)}, {"\u00fc", at::empty({0, 2})}},
                    {{"key", "\U0001f600 value"}}});
  const std::string whole = content();
  const auto tries = [&](const std::string& bytes) {
    write(bytes);
    const std::string error = refused();
    EXPECT_TRUE(error == "no error" || error.starts_with("load_safetensors: " + path + ": ")) << error;
    return error == "no error";
  };
  EXPECT_TRUE(tries(whole));
  for (size_t length = 0; length < whole.size(); ++length) EXPECT_FALSE(tries(whole.substr(0, length)));
  std::mt19937 random(0);
  const std::string signs = "{}[]\",:\\u0918eE-. \xff";
  for (int repeat = 0; repeat < 5000; ++repeat) {
    std::string bytes = whole;
    for (unsigned edits = 1 + random() % 3; edits > 0; --edits) {
      const size_t at = random() % bytes.size();
      const char c = random() % 2 ? signs[random() % signs.size()] : static_cast<char>(random());
      switch (random() % 3) {
        case 0:
          bytes[at] = c;
          break;
        case 1:
          bytes.insert(at, 1, c);
          break;
        default:
          bytes.erase(at, 1 + random() % 3);
      }
    }
    tries(bytes);
  }
}

// Escape sequences must not reach a terminal, nor megabytes a log.
TEST_F(Safetensors, WhatAFileSaysIsQuotedInMessages) {
  const std::string wrong = R"(":{"dtype":"F32","shape":[2],"data_offsets":[0,4]}})";
  const std::string end = "' must have 8 bytes, Float of shape [2], got data_offsets 0 to 4";
  const auto begin = "load_safetensors: " + path + ": tensor '";
  write("{\"a\\u001b[2J\\n\x7f\xc2\x85\u20ac" + wrong, "1234");
  EXPECT_EQ(refused(), begin + R"(a\u001b[2J\u000a\u007f\u0085)" + "\u20ac" + end);
  write("{\"" + std::string(99, 'x') + "\u20acyz" + wrong, "1234");
  EXPECT_EQ(refused(), begin + std::string(99, 'x') + "\u20ac..." + end);
  write("{\"" + std::string(100, 'x') + wrong, "1234");
  EXPECT_EQ(refused(), begin + std::string(100, 'x') + end);
  std::string sizes = "1";
  for (int i = 0; i < 1000; ++i) sizes += ",1";
  write(R"({"a":{"dtype":"F32","shape":[)" + sizes + R"(],"data_offsets":[0,2]}})", "12");
  EXPECT_LT(refused().size(), begin.size() + 250);
  write(R"({"a":{"dtype":")" + std::string(1000, 'F') + R"(","shape":[],"data_offsets":[0,2]}})", "12");
  EXPECT_LT(refused().size(), begin.size() + 250);
}

TEST_F(Safetensors, WhatAFileSaysIsQuotedInMessagesOfCheckpoints) {
  torch::nn::Linear model(1, 1);
  const std::string bad = "\x1b" + std::string(1000, 'x');
  const auto refused = [&](const TensorFile& file) {
    const auto error = error_of([&] { torchqat::restore_checkpoint(file, *model); });
    EXPECT_EQ(error.find('\x1b'), std::string::npos);
    EXPECT_NE(error.find("\\u001bxxx"), std::string::npos) << error;
    EXPECT_LT(error.size(), 300u);
  };
  const TensorFile plain{{{"weight", at::ones({1, 1})}, {"bias", at::ones({1})}}, {}};
  auto file = plain;
  file.tensors[bad] = at::ones({});
  refused(file);
  file = plain;
  file.metadata["format"] = "torchqat checkpoint " + bad;
  refused(file);
  file.metadata["format"] = "torchqat checkpoint 1";
  file.metadata["staircase_relu." + bad] = "";
  refused(file);
  torchqat::nn::StaircaseReLU staircase(2);
  file = torchqat::checkpoint_of(*staircase);
  file.metadata["staircase_relu."] = bad;
  EXPECT_NE(error_of([&] { torchqat::restore_checkpoint(file, *staircase); }).find("\\u001bxxx"),
            std::string::npos);
}

}  // namespace
