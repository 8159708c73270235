// The one door between Python and the native core.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#ifdef _OPENMP
#include <omp.h>
#endif

#include <string>

#include "cpu/operations.h"
#include "cpu/vector_level.h"
#include "cuda/operations.h"
#include "plan.h"

namespace py = pybind11;
using ewc_fast::OperandSpec;
using ewc_fast::Plan;
using ewc_fast::Role;
using ewc_fast::TensorReader;

namespace {

Role role_of(const std::string& name) {
  if (name == "param") return Role::parameter;
  if (name == "state") return Role::state;
  if (name == "residual") return Role::residual;
  throw std::invalid_argument("role must be 'param', 'state' or 'residual', got '" + name + "'");
}

// name, role, written, stacked, pinned
using SpecTuple = std::tuple<std::string, std::string, bool, bool, bool>;

std::vector<OperandSpec> specs_of(const std::vector<SpecTuple>& specs) {
  std::vector<OperandSpec> converted;
  for (const auto& [name, role, written, stacked, pinned] : specs)
    converted.push_back({name, role_of(role), written, stacked, pinned});
  if (converted.size() > ewc_fast::kMaxOperands) throw std::invalid_argument("too many operands");
  return converted;
}

std::vector<std::string> level_names() {
  std::vector<std::string> names;
  for (const auto* kernels : ewc_fast::cpu::runnable_levels()) names.push_back(kernels->level);
  return names;
}

// The gradients of all parameters, or None where one is frozen or has no gradient. Asked before
// every step, and several times faster here than a loop in Python.
py::object gradients_of(const py::list& params) {
  static PyObject* const grad_name = PyUnicode_InternFromString("grad");
  static PyObject* const requires_grad_name = PyUnicode_InternFromString("requires_grad");
  py::list grads(params.size());
  for (std::size_t i = 0; i < params.size(); ++i) {
    PyObject* param = PyList_GET_ITEM(params.ptr(), static_cast<Py_ssize_t>(i));
    const auto moves =
        py::reinterpret_steal<py::object>(PyObject_GetAttr(param, requires_grad_name));
    auto grad = py::reinterpret_steal<py::object>(PyObject_GetAttr(param, grad_name));
    if (!moves || !grad) throw py::error_already_set();
    if (moves.ptr() != Py_True || grad.is_none()) return py::none();
    PyList_SET_ITEM(grads.ptr(), static_cast<Py_ssize_t>(i), grad.release().ptr());
  }
  return std::move(grads);
}

// Binds a CPU operation: it runs over the plan's table without the interpreter lock.
template <class Operation>
auto on_cpu(Operation operation) {
  return [operation](const Plan& plan, double coefficient, int threads, std::size_t level) {
    for (const auto& row : plan.table().rows)
      if (row.device >= 0) throw std::invalid_argument("a CPU operation was given a CUDA tensor");
    const auto& kernels = *ewc_fast::cpu::runnable_levels().at(level);
    const py::gil_scoped_release unlocked;
    return operation(plan.table(), ewc_fast::cpu::Run{kernels, threads}, coefficient);
  };
}

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
      .def(py::init([](const TensorReader& reader, const std::vector<SpecTuple>& specs) {
             return Plan(reader, specs_of(specs));
           }),
           py::arg("reader"), py::arg("specs"), py::keep_alive<1, 2>())
      .def("refresh", &Plan::refresh)
      .def("accepts", &Plan::accepts)
      .def("adopt", &Plan::adopt);

  m.def("gradients_of", gradients_of, py::arg("params"));

  const auto def = [&m](const char* name, auto operation) {
    m.def(name, on_cpu(operation), py::arg("plan"), py::arg("coefficient"), py::arg("threads"),
          py::arg("level") = 0);
  };
  def("add_penalty_grad", ewc_fast::cpu::add_penalty_grad);
  def("penalty", ewc_fast::cpu::penalty);
  def("penalty_grad", ewc_fast::cpu::penalty_grad);
  def("accumulate_square", ewc_fast::cpu::accumulate_square);
  def("merge", ewc_fast::cpu::merge);
  def("merge_online", ewc_fast::cpu::merge_online);
  def("proximal_step", ewc_fast::cpu::proximal_step);

#ifdef EWC_FAST_CUDA_BUILT
  m.def("cuda_workspace", [](const Plan& plan) { return ewc_fast::cuda::workspace(plan.table()); });
  m.def(
      "cuda_add_penalty_grad",
      [](const Plan& plan, double ewc_lambda, std::uintptr_t value, std::uintptr_t workspace,
         std::uintptr_t stream) {
        ewc_fast::cuda::add_penalty_grad(plan.table(), ewc_lambda, reinterpret_cast<double*>(value),
                                         reinterpret_cast<double*>(workspace),
                                         reinterpret_cast<void*>(stream));
      },
      py::arg("plan"), py::arg("ewc_lambda"), py::arg("value"), py::arg("workspace"),
      py::arg("stream"));
#endif
}
