#include <torch/library.h>

#include <string>

// Compiled instead of cuda/ in a CPU-only build: says so when an operator gets a CUDA tensor.
namespace torchqat {
namespace {

// Every operator that has a kernel per device; a test compares the list with the library.
constexpr const char* kOperators[] = {
    "staircase_relu",
    "staircase_codes",
    "quantize_weight",
    "weight_codes",
    "pack_codes",
    "unpack_codes",
    "bcgd_step_",
    "_staircase_relu_forward",
    "_staircase_relu_rebuild",
    "_staircase_relu_backward",
    "feature_affinity_loss",
    "fast_feature_affinity_loss",
    "_feature_affinity_loss",
    "_fast_feature_affinity_loss",
};

void refuse_cuda(const c10::OperatorHandle& op, torch::jit::Stack* /*stack*/) {
  const std::string& name = op.schema().operator_name().name;
  TORCH_CHECK_NOT_IMPLEMENTED(false, name.substr(name.find("::") + 2),
                              ": got a CUDA tensor, but this torchqat is a CPU-only build. Rebuild it where "
                              "the CUDA compiler nvcc is "
                              "installed (in its checkout: TORCHQAT_CUDA=on pip install --no-build-isolation "
                              ".), or move the tensor to the CPU");
}

}  // namespace

TORCH_LIBRARY_IMPL(qat, CUDA, m) {
  for (const char* op : kOperators) m.impl(op, torch::CppFunction::makeFromBoxedFunction<&refuse_cuda>());
}

}  // namespace torchqat
