// The one door between Python and the native core.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#ifdef _OPENMP
#include <omp.h>
#endif

#include <algorithm>
#include <optional>
#include <string>

#include "cpu/operations.h"
#include "cpu/optimizer.h"
#include "cpu/vector_level.h"
#include "cuda/operations.h"
#include "plan.h"
#include "products.h"

namespace py = pybind11;
using ewc_fast::OperandSpec;
using ewc_fast::Plan;
using ewc_fast::Role;
using ewc_fast::TensorReader;

namespace {

Role role_of(const std::string& name) {
  if (name == "param") return Role::parameter;
  if (name == "state") return Role::state;
  if (name == "fisher") return Role::fisher;
  if (name == "residual") return Role::residual;
  if (name == "moment") return Role::moment;
  if (name == "count") return Role::count;
  if (name == "codes") return Role::codes;
  if (name == "scales") return Role::scales;
  throw std::invalid_argument(
      "role must be 'param', 'state', 'fisher', 'residual', 'moment', 'count', 'codes' or "
      "'scales', got '" +
      name + "'");
}

// name, role, written, stacked, pinned
using SpecTuple = std::tuple<std::string, std::string, bool, bool, bool>;

// Where no slots are given, operands stand in their order.
std::vector<OperandSpec> specs_of(const std::vector<SpecTuple>& specs,
                                  const std::vector<int>& slots) {
  std::vector<OperandSpec> converted;
  for (const auto& [name, role, written, stacked, pinned] : specs) {
    const std::size_t place = converted.size();
    const int slot = slots.empty() ? static_cast<int>(place) : slots.at(place);
    if (slot < 0 || slot >= ewc_fast::kMaxOperands) throw std::invalid_argument("no such slot");
    converted.push_back({name, role_of(role), written, stacked, pinned, slot});
  }
  return converted;
}

std::vector<std::string> level_names() {
  std::vector<std::string> names;
  for (const auto* kernels : ewc_fast::cpu::runnable_levels()) names.push_back(kernels->level);
  return names;
}

// A property of PyTorch's tensors, asked of its C getter directly: looking its name up for every
// parameter at every step takes longer than the small kernels.
class Property {
 public:
  Property(const py::type& tensor, const char* name)
      : descriptor_(tensor.attr(name)), getset_(py::isinstance(descriptor_, getset_type())) {}

  py::object of(PyObject* object) const {
    const auto* getset = reinterpret_cast<PyGetSetDescrObject*>(descriptor_.ptr());
    if (getset_ && PyObject_TypeCheck(object, PyDescr_TYPE(getset)))
      return checked(getset->d_getset->get(object, getset->d_getset->closure));
    return checked(PyObject_CallMethod(descriptor_.ptr(), "__get__", "O", object));
  }

 private:
  static py::handle getset_type() { return reinterpret_cast<PyObject*>(&PyGetSetDescr_Type); }
  static py::object checked(PyObject* result) {
    if (result == nullptr) throw py::error_already_set();
    return py::reinterpret_steal<py::object>(result);
  }

  py::object descriptor_;
  bool getset_;
};

class GradientReader {
 public:
  explicit GradientReader(const py::type& tensor)
      : grad_(tensor, "grad"), requires_grad_(tensor, "requires_grad") {}

  // The gradients of all parameters, or None where one is frozen or has no gradient.
  py::object read(const py::list& params) const {
    py::list grads(params.size());
    for (std::size_t i = 0; i < params.size(); ++i) {
      const auto index = static_cast<Py_ssize_t>(i);
      PyObject* param = PyList_GET_ITEM(params.ptr(), index);
      py::object grad = grad_.of(param);
      if (grad.is_none() || requires_grad_.of(param).ptr() != Py_True) return py::none();
      PyList_SET_ITEM(grads.ptr(), index, grad.release().ptr());
    }
    return std::move(grads);
  }

 private:
  Property grad_, requires_grad_;
};

// The addresses of every row's operands.
std::vector<std::vector<std::uintptr_t>> addresses_of(const Plan& plan) {
  std::vector<std::vector<std::uintptr_t>> addresses;
  for (const auto& row : plan.table().rows) {
    auto& operands = addresses.emplace_back();
    for (const OperandSpec& spec : plan.specs())
      operands.push_back(reinterpret_cast<std::uintptr_t>(row.data[spec.slot]));
  }
  return addresses;
}

ewc_fast::cpu::Run cpu_run(const Plan& plan, int threads, std::size_t level) {
  for (const auto& row : plan.table().rows)
    if (row.device >= 0) throw std::invalid_argument("a CPU operation was given a CUDA tensor");
  return {*ewc_fast::cpu::runnable_levels().at(level), threads};
}

// Binds a CPU operation: it runs over the plan's table without the interpreter lock.
template <class Operation>
auto on_cpu(Operation operation) {
  return [operation](const Plan& plan, double coefficient, int threads, std::size_t level) {
    const auto run = cpu_run(plan, threads, level);
    const py::gil_scoped_release unlocked;
    return operation(plan.table(), run, coefficient);
  };
}

// The same for one that writes a Fisher, which it rounds by this seed where it is bfloat16.
template <class Operation>
auto rounding_on_cpu(Operation operation) {
  return [operation](const Plan& plan, double coefficient, int threads, std::size_t level,
                     std::uint32_t seed) {
    const auto run = cpu_run(plan, threads, level);
    const py::gil_scoped_release unlocked;
    return operation(plan.table(), run, coefficient, seed);
  };
}

// What options of all optimizers come first, in the order of reference_steps.py.
template <class Options>
Options step_options(double lr, double weight_decay, double ewc_lambda, bool maximize,
                     bool proximal, std::optional<std::uint32_t> rounding_seed) {
  Options options;
  options.lr = lr;
  options.weight_decay = weight_decay;
  options.ewc_lambda = ewc_lambda;
  options.maximize = maximize;
  options.proximal = proximal;
  options.by_chance = rounding_seed.has_value();
  options.seed = rounding_seed.value_or(0);
  return options;
}

void def_steps(py::module_& m) {
  using ewc_fast::AdamOptions;
  using ewc_fast::SgdOptions;
  py::class_<AdamOptions>(m, "AdamOptions")
      .def(py::init([](double lr, double weight_decay, double ewc_lambda, bool maximize,
                       bool proximal, std::optional<std::uint32_t> rounding_seed, double beta1,
                       double beta2, double eps, bool decoupled) {
        auto options = step_options<AdamOptions>(lr, weight_decay, ewc_lambda, maximize, proximal,
                                                 rounding_seed);
        options.beta1 = beta1;
        options.beta2 = beta2;
        options.eps = eps;
        options.decoupled = decoupled;
        return options;
      }));
  py::class_<SgdOptions>(m, "SgdOptions")
      .def(py::init([](double lr, double weight_decay, double ewc_lambda, bool maximize,
                       bool proximal, std::optional<std::uint32_t> rounding_seed, double momentum,
                       double dampening, bool nesterov, bool first) {
        auto options = step_options<SgdOptions>(lr, weight_decay, ewc_lambda, maximize, proximal,
                                                rounding_seed);
        options.momentum = momentum;
        options.dampening = dampening;
        options.nesterov = nesterov;
        options.first = first;
        return options;
      }));
  const auto def = [&m](const char* name, auto step, auto options_type) {
    using Options = decltype(options_type);
    m.def(
        name,
        [step](const Plan& plan, const Options& options, int threads, std::size_t level) {
          const auto run = cpu_run(plan, threads, level);
          const py::gil_scoped_release unlocked;
          return step(plan.table(), run, options);
        },
        py::arg("plan"), py::arg("options"), py::arg("threads"), py::arg("level") = 0);
  };
  def("adam_step", ewc_fast::cpu::adam_step, AdamOptions{});
  def("sgd_step", ewc_fast::cpu::sgd_step, SgdOptions{});
}

#ifdef EWC_FAST_CUDA_BUILT
// Binds a CUDA operation: launched on PyTorch's current stream, without the interpreter lock, since
// a launch waits where too many are queued.
template <class Operation>
auto on_cuda(Operation operation) {
  return [operation](const Plan& plan, double coefficient, std::uintptr_t memory,
                     std::uint32_t seed) {
    const ewc_fast::cuda::Run run{plan.current_stream(), reinterpret_cast<double*>(memory), seed};
    const py::gil_scoped_release unlocked;
    operation(plan.table(), run, coefficient);
  };
}

// The same for the optimizers' steps. `lr` is the address of a learning rate on the device, or 0.
void def_cuda_steps(py::module_& m) {
  const auto def = [&m](const char* name, auto step, auto options_type) {
    using Options = decltype(options_type);
    m.def(
        name,
        [step](const Plan& plan, const Options& options, std::uintptr_t memory, std::uintptr_t lr,
               bool lr_is_double) {
          const ewc_fast::cuda::Run run{plan.current_stream(), reinterpret_cast<double*>(memory)};
          const ewc_fast::cuda::DeviceNumber there{
              reinterpret_cast<const void*>(lr),
              lr_is_double ? ewc_fast::DType::float64 : ewc_fast::DType::float32};
          const py::gil_scoped_release unlocked;
          step(plan.table(), run, options, there);
        },
        py::arg("plan"), py::arg("options"), py::arg("memory"), py::arg("lr") = 0,
        py::arg("lr_is_double") = false);
  };
  def("cuda_adam_step", ewc_fast::cuda::adam_step, ewc_fast::AdamOptions{});
  def("cuda_sgd_step", ewc_fast::cuda::sgd_step, ewc_fast::SgdOptions{});
  m.def("cuda_step_memory_needed",
        [](const Plan& plan) { return ewc_fast::cuda::step_memory_needed(plan.table()); });
}
#endif

}  // namespace

PYBIND11_MODULE(_core, m) {
  m.doc() = "Native core of ewc_fast: loops over raw pointers. Use ewc_fast.functional instead.";
  m.attr("version") = EWC_FAST_VERSION;
#ifdef _OPENMP
  m.attr("openmp") = _OPENMP;
#else
  m.attr("openmp") = 0;
#endif
#ifdef __SANITIZE_ADDRESS__
  m.attr("sanitized") = true;
#else
  m.attr("sanitized") = false;
#endif
  m.attr("vector_levels") = level_names();
  m.attr("cuda_architectures") = ewc_fast::cuda::kArchitectures;

  py::class_<TensorReader>(m, "TensorReader")
      .def(py::init<py::object>(), py::arg("exchange"))
      .def_property_readonly("uses_exchange", &TensorReader::uses_exchange);

  py::class_<Plan>(m, "Plan")
      .def(py::init(
               [](const TensorReader& reader, const std::vector<SpecTuple>& specs,
                  const std::vector<int>& slots) { return Plan(reader, specs_of(specs, slots)); }),
           py::arg("reader"), py::arg("specs"), py::arg("slots") = std::vector<int>{},
           py::keep_alive<1, 2>())
      .def_property_readonly("moves", &Plan::moves)
      .def("addresses", &addresses_of)
      .def("refresh", &Plan::refresh)
      .def("accepts", &Plan::accepts)
      .def("adopt", &Plan::adopt, py::arg("ordinals") = std::vector<std::int64_t>{})
      .def_property_readonly("has_bfloat16_fisher", &Plan::has_bfloat16_fisher);

  py::class_<GradientReader>(m, "GradientReader")
      .def(py::init<py::type>(), py::arg("tensor_type"))
      .def("__call__", &GradientReader::read, py::arg("params"));

  const auto def = [&m](const char* name, auto operation) {
    m.def(name, on_cpu(operation), py::arg("plan"), py::arg("coefficient"), py::arg("threads"),
          py::arg("level") = 0);
  };
  def("add_penalty_grad", ewc_fast::cpu::add_penalty_grad);
  def("penalty", ewc_fast::cpu::penalty);
  def("penalty_grad", ewc_fast::cpu::penalty_grad);
  def("proximal_step", ewc_fast::cpu::proximal_step);
  const auto def_rounding = [&m](const char* name, auto operation) {
    m.def(name, rounding_on_cpu(operation), py::arg("plan"), py::arg("coefficient"),
          py::arg("threads"), py::arg("level") = 0, py::arg("seed") = 0);
  };
  def_rounding("accumulate_square", ewc_fast::cpu::accumulate_square);
  def_rounding("merge", ewc_fast::cpu::merge);
  def_rounding("merge_online", ewc_fast::cpu::merge_online);
  def_steps(m);

  m.def(
      "squared_product",
      [](const TensorReader& reader, py::handle total, py::handle grads, py::handle inputs,
         py::handle bias_total, int threads, std::size_t level) {
        const auto& kernels = *ewc_fast::cpu::runnable_levels().at(level);
        ewc_fast::squared_product(reader, total, grads, inputs, bias_total, {kernels, threads});
      },
      py::arg("reader"), py::arg("total"), py::arg("grads"), py::arg("inputs"),
      py::arg("bias_total"), py::arg("threads"), py::arg("level") = 0);
  m.def(
      "squared_convolution",
      [](const TensorReader& reader, py::handle total, py::handle grads, py::handle inputs,
         py::handle bias_total, const std::array<std::int64_t, 3>& stride,
         const std::array<std::int64_t, 3>& padding, const std::array<std::int64_t, 3>& dilation,
         bool depthwise, int threads, std::size_t level) {
        const auto& kernels = *ewc_fast::cpu::runnable_levels().at(level);
        ewc_fast::squared_convolution(reader, total, grads, inputs, bias_total,
                                      {stride, padding, dilation, depthwise}, {kernels, threads});
      },
      py::arg("reader"), py::arg("total"), py::arg("grads"), py::arg("inputs"),
      py::arg("bias_total"), py::arg("stride"), py::arg("padding"), py::arg("dilation"),
      py::arg("depthwise"), py::arg("threads"), py::arg("level") = 0);

#ifdef EWC_FAST_CUDA_BUILT
  m.def("cuda_memory_needed",
        [](const Plan& plan) { return ewc_fast::cuda::memory_needed(plan.table()); });
  const auto cuda_def = [&m](const char* name, auto operation) {
    m.def(name, on_cuda(operation), py::arg("plan"), py::arg("coefficient"), py::arg("memory") = 0,
          py::arg("seed") = 0);
  };
  cuda_def("cuda_add_penalty_grad", ewc_fast::cuda::add_penalty_grad);
  cuda_def("cuda_penalty", ewc_fast::cuda::penalty);
  cuda_def("cuda_penalty_grad", ewc_fast::cuda::penalty_grad);
  cuda_def("cuda_accumulate_square", ewc_fast::cuda::accumulate_square);
  cuda_def("cuda_merge", ewc_fast::cuda::merge);
  cuda_def("cuda_merge_online", ewc_fast::cuda::merge_online);
  cuda_def("cuda_proximal_step", ewc_fast::cuda::proximal_step);
  def_cuda_steps(m);
#endif
}
