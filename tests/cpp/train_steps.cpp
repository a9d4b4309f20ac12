// Takes the training steps that tests/test_cpp_training.py takes in Python, for it to compare them bit by
// bit:
//   train_steps IN.safetensors OUT.safetensors
// IN has images (steps, batch, 1, 28, 28), labels (steps, batch), and the states of both networks under
// `teacher.` and `student.`; OUT gets a checkpoint of the student, OUT.losses the loss of each step.
#include <torch/utils.h>

#include <iostream>

#include "lenet5.h"

namespace {

torchqat::TensorFile part(const torchqat::TensorFile& file, const std::string& prefix) {
  torchqat::TensorFile result;
  for (const auto& [name, tensor] : file.tensors) {
    if (name.rfind(prefix, 0) == 0) result.tensors[name.substr(prefix.size())] = tensor;
  }
  return result;
}

}  // namespace

int main(int argc, char** argv) try {
  TORCH_CHECK_VALUE(argc == 3, "usage: train_steps IN.safetensors OUT.safetensors");
  at::set_num_threads(1);
  const auto in = torchqat::load_safetensors(argv[1]);
  auto teacher = lenet5();
  auto student = lenet5(/*act_bits=*/2);
  torchqat::restore_checkpoint(part(in, "teacher."), *teacher);
  torchqat::restore_checkpoint(part(in, "student."), *student);
  teacher->eval();
  const auto& images = in.tensors.at("images");
  const auto& labels = in.tensors.at("labels");
  torchqat::calibrate(student, std::vector{images[0]});

  torchqat::optim::BCGD optimizer(torchqat::optim::param_groups(*student, /*weight_bits=*/1),
                                  torchqat::optim::BCGDOptions(0.05).momentum(0.9).weight_decay(1e-4));
  const auto criterion = torchqat::distill::FAQDLossOptions().fa(torchqat::nn::FastFeatureAffinityLoss());
  std::vector<at::Tensor> losses;
  for (int64_t step = 0; step < images.size(0); ++step) {
    Seen taught;
    {
      const torch::NoGradGuard no_grad;
      taught = look(teacher, images[step]);
    }
    const auto seen = look(student, images[step]);
    const auto loss = torchqat::distill::faqd_loss(seen.logits, taught.logits, {{seen.map, taught.map}},
                                                   labels[step], criterion)
                          .loss;
    optimizer.zero_grad();
    loss.backward();
    optimizer.step();
    losses.push_back(loss.detach());
  }
  torchqat::save_checkpoint(argv[2], *student, &optimizer);
  torchqat::save_safetensors(std::string(argv[2]) + ".losses", {{{"losses", at::stack(losses)}}, {}});
} catch (const c10::Error& error) {
  std::cerr << error.what_without_backtrace() << std::endl;
  return 1;
}
