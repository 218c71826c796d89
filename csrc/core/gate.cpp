#include "core/gate.h"

#include <stdexcept>
#include <utility>
#include <vector>

#include "core/tensor.h"

namespace fusereg {
namespace {

struct Gate {
  PyObject* compiler = nullptr;  // the module's dict
  PyObject* flag = nullptr;
  std::vector<PyObject*> questions;
  PyObject* grad_enabled = nullptr;
  PyObject* empty_like = nullptr;
  PyObject* is_meta = nullptr;
};
Gate g_gate;

// Whether what was asked is true; an error counts as such.
bool is_true(PyObject* answer) {
  const bool result = answer == nullptr || PyObject_IsTrue(answer) != 0;
  Py_XDECREF(answer);
  if (PyErr_Occurred() != nullptr) PyErr_Clear();
  return result;
}

PyObject* boolean(bool value) { return Py_NewRef(value ? Py_True : Py_False); }

PyObject* direct(PyObject*, PyObject* const* tensors, Py_ssize_t count) {
  if (!nothing_traces()) return boolean(false);
  for (Py_ssize_t i = 0; i < count; ++i) {
    if (tensors[i] == Py_None) continue;
    if (!is_plain_type(tensors[i]) || is_true(PyObject_GetAttr(tensors[i], g_gate.is_meta)))
      return boolean(false);
  }
  return boolean(true);
}

PyObject* ready(PyObject*, PyObject* const* tensors, Py_ssize_t count) {
  if (!nothing_traces()) return boolean(false);
  TensorView first;
  for (Py_ssize_t i = 0; i < count; ++i) {
    TensorView view;
    if (read_memory(tensors[i], view) != Kind::kPlain) return boolean(false);
    if (i == 0) first = view;
    if (view.dtype != first.dtype || view.device != first.device || view.ndim != first.ndim)
      return boolean(false);
    for (int d = 0; d < view.ndim; ++d) {
      if (view.sizes[d] != first.sizes[d]) return boolean(false);
    }
  }
  return boolean(true);
}

PyMethodDef g_gate_methods[] = {
    {"direct", fast_function(&direct), METH_FASTCALL, "direct(*tensors) -> bool"},
    {"ready", fast_function(&ready), METH_FASTCALL, "ready(*tensors) -> bool"},
    {nullptr, nullptr, 0, nullptr},
};

}  // namespace

void bind_gate(const py::module_& compiler, const py::tuple& questions,
               const py::object& grad_enabled, const py::object& empty_like) {
  Gate gate;
  gate.flag = PyUnicode_InternFromString("_is_compiling_flag");
  gate.is_meta = PyUnicode_InternFromString("is_meta");
  gate.compiler = PyModule_GetDict(compiler.ptr());
  if (PyDict_Contains(gate.compiler, gate.flag) != 1)
    throw py::import_error("fusereg: this torch.compiler has no _is_compiling_flag");
  for (const py::handle question : questions) gate.questions.push_back(question.ptr());
  gate.grad_enabled = grad_enabled.ptr();
  gate.empty_like = empty_like.ptr();
  if (g_gate.compiler != nullptr) {
    if (g_gate.compiler == gate.compiler && g_gate.questions == gate.questions &&
        g_gate.grad_enabled == gate.grad_enabled && g_gate.empty_like == gate.empty_like) {
      return;
    }
    throw std::runtime_error("fusereg._C is bound to torch already, with other functions");
  }
  Py_INCREF(gate.compiler);
  Py_INCREF(gate.grad_enabled);
  Py_INCREF(gate.empty_like);
  for (PyObject* const question : gate.questions) Py_INCREF(question);
  g_gate = std::move(gate);
}

bool nothing_traces() {
  if (g_gate.compiler == nullptr) return false;
  PyObject* const flag = PyDict_GetItemWithError(g_gate.compiler, g_gate.flag);  // borrowed
  if (flag != Py_False && is_true(Py_XNewRef(flag))) return false;
  for (PyObject* const question : g_gate.questions) {
    if (is_true(PyObject_CallNoArgs(question))) return false;
  }
  return true;
}

bool grad_enabled() { return is_true(PyObject_CallNoArgs(g_gate.grad_enabled)); }

py::object empty_like(py::handle x) {
  PyObject* const arguments[] = {x.ptr()};
  PyObject* const y = PyObject_Vectorcall(g_gate.empty_like, arguments, 1, nullptr);
  if (y == nullptr) PyErr_Clear();
  return py::reinterpret_steal<py::object>(y);
}

void bind_gate_functions(py::module_& m) {
  using py::arg;
  m.def("bind_gate", &bind_gate, arg("compiler"), arg("questions"), arg("grad_enabled"),
        arg("empty_like"));
  if (PyModule_AddFunctions(m.ptr(), g_gate_methods) != 0) throw py::error_already_set();
}

}  // namespace fusereg
