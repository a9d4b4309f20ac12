// Every public operator, forward and backward, against what the oracles computed
// (tests/write_oracle_values.py).
#include <torchqat/torchqat.h>

#include "torch_checks.h"

namespace {

using at::Tensor;

// Leaves of the same values that gather gradients.
Tensor leaf(const Tensor& t, at::ScalarType dtype) { return t.to(dtype).clone().requires_grad_(); }

std::vector<std::string> methods(int64_t bits) {
  if (bits == 2) return {"exact", "lloyd", "twn"};
  return {"exact", "lloyd"};
}

TEST(Oracles, StaircaseRelu) {
  OracleValues values("staircase_relu");
  const auto& grad = values("grad");
  for (const int64_t bits : {1, 2, 4, 8}) {
    const auto& x = values(std::to_string(bits) + ".x");
    for (const std::string kind : {"scalar", "channels"}) {
      const std::string name = c10::str(bits, ".", kind, ".");
      const auto& alpha = values(name + "alpha");
      EXPECT_TRUE(same(torchqat::staircase_codes(x, alpha, bits), values(name + "codes"))) << name;
      EXPECT_TRUE(same(torchqat::staircase_codes(x.transpose(0, 1), alpha, bits, 0).transpose(0, 1),
                       values(name + "codes")));
      for (const auto& ste : torchqat::ste_names()) {
        for (const std::string rule : {"exact", "three_valued", "min", "pact"}) {
          for (const bool save_codes : {false, true}) {
            SCOPED_TRACE(c10::str(name, ste, ".", rule, save_codes ? ".codes" : ""));
            const auto input = leaf(x, at::kFloat);
            const auto step = leaf(alpha, at::kFloat);
            const auto y = torchqat::staircase_relu(input, step, bits, ste, rule, 1, save_codes);
            EXPECT_TRUE(same(y, values(name + "y")));
            y.backward(grad);
            const auto& grad_x = values(name + ste + ".grad_x");
            EXPECT_TRUE(ste == "reverse_exponential" ? near(input.grad(), grad_x, 1e-6, 1e-7)
                                                     : same(input.grad(), grad_x));
            EXPECT_TRUE(near(step.grad(), values(name + rule + ".grad_alpha")));
          }
        }
      }
    }
  }
}

TEST(Oracles, QuantizeWeightAndItsCodes) {
  OracleValues values("quantize_weight");
  const auto& weight = values("weight");
  for (int64_t bits = 1; bits <= 8; ++bits) {
    for (const auto& method : methods(bits)) {
      for (const std::string kind : {"all", "0", "1"}) {
        SCOPED_TRACE(c10::str(bits, ".", method, ".", kind));
        const auto channel_dim = kind == "all" ? std::nullopt : std::optional<int64_t>(std::stoi(kind));
        const auto& codes = values(c10::str(bits, ".", method, ".", kind, ".codes"));
        const auto& scale = values(c10::str(bits, ".", method, ".", kind, ".scale"));
        for (const auto dtype : {at::kFloat, at::kDouble}) {
          const auto [w, s] = torchqat::quantize_weight(weight.to(dtype), bits, method, channel_dim);
          EXPECT_TRUE(near(s, scale, dtype == at::kDouble ? 1e-12 : 1e-6, 0));
          auto along = s;
          if (channel_dim) along = *channel_dim == 0 ? s.view({-1, 1, 1}) : s.view({-1, 1});
          EXPECT_TRUE(same(w, codes.to(dtype) * along));
          EXPECT_TRUE(same(torchqat::weight_codes(w, s, bits, channel_dim), codes));
          if (method == "exact") {
            EXPECT_TRUE(same(torchqat::weight_codes(weight.to(dtype), s, bits, channel_dim), codes));
          }
        }
      }
    }
  }
}

TEST(Oracles, PackedCodes) {
  OracleValues values("pack_codes");
  for (const int64_t bits : {1, 2, 4, 8}) {
    const auto& codes = values(std::to_string(bits) + ".codes");
    const auto& packed = values(std::to_string(bits) + ".packed");
    EXPECT_TRUE(same(torchqat::pack_codes(codes, bits), packed));
    EXPECT_TRUE(same(torchqat::pack_codes(codes.t().contiguous().t(), bits), packed));
    EXPECT_TRUE(same(torchqat::unpack_codes(packed, bits, codes.sizes()), codes));
  }
}

// ---- bcgd_step_ ----

struct Sgd {
  std::string name;
  double momentum = 0, dampening = 0, weight_decay = 0;
  bool nesterov = false, maximize = false;
};
const std::vector<Sgd> kSgd{
    {.name = "plain"},
    {.name = "decay", .weight_decay = 0.1},
    {.name = "momentum", .momentum = 0.9},
    {.name = "dampening", .momentum = 0.9, .dampening = 0.3, .weight_decay = 0.1, .maximize = true},
    {.name = "nesterov", .momentum = 0.9, .weight_decay = 0.1, .nesterov = true}};

// The steps of the oracle in one dtype; the gradients are given multiplied by grad_scale.
void check_bcgd(OracleValues& values, int64_t bits, const std::string& method, const std::string& kind,
                const Sgd& sgd, at::ScalarType dtype, std::optional<double> grad_scale) {
  const std::string name = c10::str(bits, ".", method, ".", kind, ".", sgd.name);
  SCOPED_TRACE(name + "." + c10::toString(dtype) + (grad_scale ? ".scaled" : ""));
  std::optional<int64_t> channel_dim;
  if (kind == "channels") channel_dim = 1;
  const auto latent = values("latent").to(dtype).clone();
  const auto [w, scale] = torchqat::quantize_weight(latent, bits, method, channel_dim);
  const auto buffer = at::full_like(latent, 7);  // overwritten by the first step
  const auto steps = at::zeros({});
  const bool momentum = sgd.momentum != 0;
  std::optional<Tensor> divisor;
  if (grad_scale) divisor = at::scalar_tensor(*grad_scale);
  for (const auto& grad : values("grads").to(dtype).unbind()) {
    torchqat::bcgd_step_({w}, {grad * grad_scale.value_or(1)}, {latent}, {scale},
                         momentum ? at::TensorList({buffer}) : at::TensorList(),
                         momentum ? at::TensorList({steps}) : at::TensorList(),
                         at::scalar_tensor(0.1, at::kDouble), bits, channel_dim, method, sgd.momentum,
                         sgd.dampening, sgd.weight_decay, sgd.nesterov,
                         /*blend=*/0.25, sgd.maximize, divisor);
  }
  EXPECT_TRUE(near(latent, values(name + ".latent")));
  EXPECT_TRUE(near(scale, values(name + ".scale")));
  const auto codes = values(name + ".codes").to(dtype);
  EXPECT_TRUE(same(w, codes * scale.view(channel_dim ? at::IntArrayRef({-1, 1}) : at::IntArrayRef({}))));
  if (momentum) {
    EXPECT_TRUE(near(buffer, values(name + ".buffer")));
    EXPECT_EQ(steps.item<float>(), 3);
  }
}

TEST(Oracles, BcgdSteps) {
  OracleValues values("bcgd_step");
  for (const int64_t bits : {1, 2, 3, 4, 8}) {
    for (const auto& method : methods(bits)) {
      for (const auto& sgd : kSgd) {
        for (const std::string kind : {"all", "channels"}) {
          if (!values.has(c10::str(bits, ".", method, ".", kind, ".", sgd.name, ".latent"))) continue;
          check_bcgd(values, bits, method, kind, sgd, at::kFloat, std::nullopt);
          check_bcgd(values, bits, method, kind, sgd, at::kDouble, std::nullopt);
          check_bcgd(values, bits, method, kind, sgd, at::kFloat, 4);
        }
      }
    }
  }
}

TEST(BcgdStep, ChangesNothingWhereAnInfinityWasFound) {
  const auto latent = at::ones({3});
  const auto w = at::ones({3});
  const auto scale = at::ones({});
  for (const float found : {1.0f, 0.0f}) {
    torchqat::bcgd_step_({w}, {at::ones({3})}, {latent}, {scale}, {}, {}, at::scalar_tensor(0.5), 1,
                         std::nullopt, "exact", 0, 0, 0, false, 0, false, std::nullopt,
                         at::scalar_tensor(found));
    EXPECT_TRUE(same(latent, at::full({3}, found ? 1.0 : 0.5)));
    EXPECT_TRUE(same(w, latent));
  }
}

// ---- feature affinity ----

TEST(Oracles, FeatureAffinity) {
  OracleValues values("feature_affinity_loss");
  for (const std::string size : {"1d", "2d"}) {
    const auto& probes = values(size + ".probes");
    for (const std::string norm : {"l1", "fro"}) {
      for (const std::string reduction : {"mean", "sum"}) {
        for (const std::string kind : {"exact", "fast"}) {
          for (const auto dtype : {at::kFloat, at::kDouble}) {
            const std::string name = c10::str(size, ".", norm, ".", reduction, ".", kind);
            SCOPED_TRACE(name + "." + c10::toString(dtype));
            const auto student = leaf(values(size + ".student"), dtype);
            const auto teacher = leaf(values(size + ".teacher"), dtype);
            const auto loss = kind == "exact"
                                  ? torchqat::feature_affinity_loss(student, teacher, norm, reduction, 0.01)
                                  : torchqat::fast_feature_affinity_loss(student, teacher, probes.to(dtype),
                                                                         norm, reduction, 0.01);
            EXPECT_TRUE(near(loss, values(name + ".loss")));
            loss.backward();
            EXPECT_TRUE(near(student.grad(), values(name + ".student_grad")));
            EXPECT_TRUE(near(teacher.grad(), values(name + ".teacher_grad")));
            const torch::NoGradGuard no_grad;  // by the way that makes no gradient
            if (kind == "exact") {
              EXPECT_TRUE(
                  near(torchqat::feature_affinity_loss(student, teacher, norm, reduction, 0.01), loss));
            }
          }
        }
      }
    }
  }
}

TEST(Operators, RecommendOneOfTheAffinityLosses) {
  EXPECT_EQ(torchqat::recommend_feature_affinity(4, 4, 4), "exact");
  EXPECT_EQ(torchqat::recommend_feature_affinity(64, 64, 4096), "fast");
}

// ---- errors ----

TEST(Operators, NameWhatIsWrong) {
  const auto x = at::ones({2, 3});
  const auto one = at::ones({});
  EXPECT_EQ(error_of([&] { torchqat::staircase_relu(x, one, 9); }),
            "staircase_relu: bits must be in 1..8, got 9");
  EXPECT_EQ(error_of([&] { torchqat::staircase_codes(x, at::ones({2}), 2); }),
            "staircase_codes: alpha must have one element, or one for each of the 3 channels of dimension 1 "
            "of x, got shape [2]");
  EXPECT_EQ(error_of([&] { torchqat::staircase_relu(x, one, 2, "soft"); }),
            "staircase_relu: unknown ste 'soft'; choose one of identity, relu, clipped_relu, "
            "log_tailed_relu, reverse_exponential");
  EXPECT_EQ(error_of([&] { torchqat::staircase_relu(x, one, 2, "relu", "none"); }),
            "staircase_relu: unknown alpha_grad 'none'; choose one of exact, three_valued, min, pact");
  EXPECT_EQ(error_of<c10::TypeError>([&] { torchqat::staircase_relu(x.to(at::kInt), one, 2); }),
            "staircase_relu: x must be float64, float32, bfloat16 or float16, got Int");
  EXPECT_EQ(error_of([&] { torchqat::quantize_weight(x, 0); }),
            "quantize_weight: bits must be in 1..8, got 0");
  EXPECT_EQ(error_of([&] { torchqat::quantize_weight(x, 4, "twn"); }),
            "quantize_weight: method 'twn' is ternary, so bits must be 2, got 4");
  EXPECT_EQ(error_of([&] { torchqat::quantize_weight(x, 4, "nearest"); }),
            "quantize_weight: unknown method 'nearest'; choose one of exact, lloyd, twn");
  EXPECT_EQ(error_of([&] { torchqat::quantize_weight(x, 4, "exact", 2); }),
            "quantize_weight: channel_dim must be a dimension of weight, which has shape [2, 3], got 2");
  EXPECT_EQ(error_of([&] { torchqat::weight_codes(x, at::ones({2}), 4); }),
            "weight_codes: scale must have shape [] for no channel_dim, got [2]");
  EXPECT_EQ(error_of([&] { torchqat::pack_codes(x.to(at::kByte), 3); }),
            "pack_codes: bits must be 1, 2, 4 or 8, got 3");
  EXPECT_EQ(error_of([&] { torchqat::pack_codes(x.to(at::kByte) * 4, 2); }),
            "pack_codes: codes must be less than 4 for bits=2, got 4");
  EXPECT_EQ(error_of<c10::TypeError>([&] { torchqat::pack_codes(x, 2); }),
            "pack_codes: codes must be uint8, got Float");
  EXPECT_EQ(error_of([&] { torchqat::unpack_codes(x.to(at::kByte).flatten(), 8, {7}); }),
            "unpack_codes: packed must have shape [7] for 8 bits and size [7], got shape [6]");
  EXPECT_EQ(error_of([&] { torchqat::bcgd_step_({x}, {}, {x}, {one}, {}, {}, one, 2); }),
            "bcgd_step_: grads must have 1 tensors, one for each of params, got 0");
  EXPECT_EQ(error_of([&] { torchqat::bcgd_step_({x}, {x}, {x + 0}, {one}, {}, {}, -one, 2); }),
            "bcgd_step_: lr must be at least 0, got -1");
  EXPECT_EQ(error_of([&] { torchqat::feature_affinity_loss(x, x); }),
            "feature_affinity_loss: student must have shape (batch, channels, *spatial), got [2, 3]");
  EXPECT_EQ(error_of([&] {
              torchqat::fast_feature_affinity_loss(x.view({1, 2, 3}), x.view({1, 2, 3}), x);
            }),
            "fast_feature_affinity_loss: probes must have shape (3, k), a row for each pixel, got [2, 3]");
  EXPECT_EQ(error_of([&] { torchqat::recommend_feature_affinity(0, 1, 1); }),
            "recommend_feature_affinity: channels, pixels and probes must be > 0, got 0, 1, 1 and 15");
}

}  // namespace
