#include "core/gate.h"

#include <stdexcept>
#include <utility>
#include <vector>

#include "core/tensor.h"

namespace fusereg {
namespace {

// References held for the life of the process.
struct Gate {
  PyObject* compiler = nullptr;  // the module's dict
  PyObject* flag = nullptr;
  PyObject* forward_ad = nullptr;  // the same
  PyObject* level = nullptr;
  std::vector<PyObject*> questions;
  PyObject* grad_enabled = nullptr;
  PyObject* empty_like = nullptr;
  PyObject* new_empty = nullptr;
  PyObject* float64 = nullptr;
  PyObject* uint8 = nullptr;
  PyObject* is_meta = nullptr;
  PyObject* dtype_only = nullptr;  // ("dtype",)
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

void bind_gate(const py::module_& torch, const py::module_& compiler, const py::module_& forward_ad,
               const py::tuple& questions) {
  Gate gate;
  gate.flag = PyUnicode_InternFromString("_is_compiling_flag");
  gate.level = PyUnicode_InternFromString("_current_level");
  gate.is_meta = PyUnicode_InternFromString("is_meta");
  gate.compiler = PyModule_GetDict(compiler.ptr());
  gate.forward_ad = PyModule_GetDict(forward_ad.ptr());
  if (PyDict_Contains(gate.compiler, gate.flag) != 1)
    throw py::import_error("fusereg: this torch.compiler has no _is_compiling_flag");
  if (PyDict_Contains(gate.forward_ad, gate.level) != 1)
    throw py::import_error("fusereg: this torch.autograd.forward_ad has no _current_level");
  for (const py::handle question : questions) gate.questions.push_back(question.ptr());
  if (g_gate.compiler != nullptr) {
    if (g_gate.compiler == gate.compiler && g_gate.forward_ad == gate.forward_ad &&
        g_gate.questions == gate.questions) {
      return;
    }
    throw std::runtime_error("fusereg._C is bound to torch already, with other functions");
  }
  gate.grad_enabled = py::object(torch.attr("is_grad_enabled")).release().ptr();
  gate.empty_like = py::object(torch.attr("empty_like")).release().ptr();
  gate.new_empty = py::object(torch.attr("Tensor").attr("new_empty")).release().ptr();
  gate.float64 = py::object(torch.attr("float64")).release().ptr();
  gate.uint8 = py::object(torch.attr("uint8")).release().ptr();
  gate.dtype_only = py::make_tuple("dtype").release().ptr();
  Py_INCREF(gate.compiler);
  Py_INCREF(gate.forward_ad);
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

bool forward_mode() {
  PyObject* const level = PyDict_GetItemWithError(g_gate.forward_ad, g_gate.level);  // borrowed
  if (level == nullptr || !PyLong_Check(level)) {
    PyErr_Clear();
    return true;  // as far as anybody knows
  }
  return PyLong_AsLong(level) >= 0;
}

py::object empty_like(py::handle x) {
  PyObject* const arguments[] = {x.ptr()};
  PyObject* const y = PyObject_Vectorcall(g_gate.empty_like, arguments, 1, nullptr);
  if (y == nullptr) throw py::error_already_set();
  return py::reinterpret_steal<py::object>(y);
}

namespace {

py::object new_empty(py::handle x, const py::object& sizes, PyObject* dtype) {
  PyObject* const arguments[] = {x.ptr(), sizes.ptr(), dtype};
  PyObject* const y = PyObject_Vectorcall(g_gate.new_empty, arguments, 2, g_gate.dtype_only);
  if (y == nullptr) throw py::error_already_set();
  return py::reinterpret_steal<py::object>(y);
}

}  // namespace

py::object new_float64(py::handle x, std::initializer_list<std::int64_t> sizes) {
  py::tuple items(sizes.size());
  std::size_t i = 0;
  for (const std::int64_t size : sizes) items[i++] = size;
  return new_empty(x, items, g_gate.float64);
}

py::object new_bytes(py::handle x, std::int64_t count) {
  return new_empty(x, py::make_tuple(count), g_gate.uint8);
}

void bind_gate_functions(py::module_& m) {
  using py::arg;
  m.def("bind_gate", &bind_gate, arg("torch"), arg("compiler"), arg("forward_ad"),
        arg("questions"));
  if (PyModule_AddFunctions(m.ptr(), g_gate_methods) != 0) throw py::error_already_set();
}

}  // namespace fusereg
