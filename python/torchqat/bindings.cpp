// The optional module torchqat._bindings: C++ objects for Python, by which tests compare the two. The
// operators need none of it.
#include <pybind11/stl.h>
#include <torch/csrc/utils/pybind.h>
#include <torchqat/optim/latents.h>
#include <torchqat/torchqat.h>

namespace py = pybind11;
using torchqat::optim::BCGD;
using torchqat::optim::BCGDOptions;
using torchqat::optim::BCGDParamState;
using torchqat::optim::ParamGroup;

namespace {

py::dict build_info() {
  const auto info = torchqat::build_info();
  const auto or_none = [](const std::string& text) {
    return text.empty() ? py::object(py::none()) : py::str(text);
  };
  py::dict result;
  result["torchqat"] = info.torchqat;
  result["torch"] = info.torch;
  result["cuda"] = or_none(info.cuda);
  result["cuda_architectures"] = info.cuda_architectures;
  result["compiler"] = info.compiler;
  result["commit"] = or_none(info.commit);
  result["cpu_capability"] = info.cpu_capability;
  return result;
}

// A group as torchqat.optim.param_groups makes it.
ParamGroup group_of(const py::dict& from) {
  ParamGroup group;
  for (const auto& [key, value] : from) {
    const auto name = key.cast<std::string>();
    const auto take = [&]<typename T>(const char* known, T& field) {
      if (name != known) return false;
      field = value.template cast<T>();
      return true;
    };
    const bool known =
        take("name", group.name) || take("params", group.params) || take("quant_bits", group.quant_bits) ||
        take("channel_dim", group.channel_dim) || take("method", group.method) ||
        take("min_value", group.min_value) || take("lr", group.lr) || take("momentum", group.momentum) ||
        take("dampening", group.dampening) || take("weight_decay", group.weight_decay) ||
        take("nesterov", group.nesterov) || take("blend", group.blend) || take("maximize", group.maximize);
    if (!known) throw py::value_error("BCGD: a group has no key '" + name + "'");
  }
  return group;
}

std::unique_ptr<BCGD> make_bcgd(const std::vector<py::dict>& groups, double lr, double momentum,
                                double dampening, double weight_decay, bool nesterov, double blend,
                                bool maximize) {
  std::vector<ParamGroup> converted;
  for (const auto& group : groups) converted.push_back(group_of(group));
  return std::make_unique<BCGD>(converted, BCGDOptions(lr)
                                               .momentum(momentum)
                                               .dampening(dampening)
                                               .weight_decay(weight_decay)
                                               .nesterov(nesterov)
                                               .blend(blend)
                                               .maximize(maximize));
}

py::dict state(BCGD& optimizer, const at::Tensor& param) {
  py::dict result;
  const auto found = optimizer.state().find(param.unsafeGetTensorImpl());
  if (found == optimizer.state().end()) return result;
  torchqat::optim::for_each_tensor(static_cast<const BCGDParamState&>(*found->second),
                                   [&](const char* key, const at::Tensor& value) {
                                     if (value.defined()) result[key] = value;
                                   });
  return result;
}

}  // namespace

PYBIND11_MODULE(_bindings, m) {
  m.doc() = "C++ objects of torchqat.";
  m.def("build_info", build_info, "torchqat::build_info()");
  py::class_<BCGD>(m, "BCGD", "torchqat::optim::BCGD")
      .def(py::init(&make_bcgd), py::arg("params"), py::arg("lr"), py::arg("momentum") = 0.0,
           py::arg("dampening") = 0.0, py::arg("weight_decay") = 0.0, py::arg("nesterov") = false,
           py::kw_only(), py::arg("blend") = 1e-5, py::arg("maximize") = false)
      .def(
          "step", [](BCGD& optimizer) { optimizer.step(); }, py::call_guard<py::gil_scoped_release>())
      .def("zero_grad", &BCGD::zero_grad, py::arg("set_to_none") = true)
      .def("refresh", &BCGD::refresh)
      .def("latent", &BCGD::latent, py::arg("param"))
      .def("state", &state, py::arg("param"), "What the optimizer keeps of a parameter, by name.");
}
