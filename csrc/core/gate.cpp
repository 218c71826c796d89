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
  PyObject* mul = nullptr;
  PyObject* new_empty = nullptr;
  PyObject* float32 = nullptr;
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

PyMethodDef g_gate_methods[] = {
    {"direct", fast_function(&direct), METH_FASTCALL, "direct(*tensors) -> bool"},
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
  gate.mul = py::object(torch.attr("mul")).release().ptr();
  gate.new_empty = py::object(torch.attr("Tensor").attr("new_empty")).release().ptr();
  gate.float32 = py::object(torch.attr("float32")).release().ptr();
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

py::object product(py::handle x, py::handle factors) {
  PyObject* const arguments[] = {x.ptr(), factors.ptr()};
  PyObject* const y = PyObject_Vectorcall(g_gate.mul, arguments, 2, nullptr);
  if (y == nullptr) throw py::error_already_set();
  return py::reinterpret_steal<py::object>(y);
}

namespace {

// dtype null: that of x.
py::object new_empty(py::handle x, const py::object& sizes, PyObject* dtype) {
  PyObject* const arguments[] = {x.ptr(), sizes.ptr(), dtype};
  PyObject* const names = dtype == nullptr ? nullptr : g_gate.dtype_only;
  PyObject* const y = PyObject_Vectorcall(g_gate.new_empty, arguments, 2, names);
  if (y == nullptr) throw py::error_already_set();
  return py::reinterpret_steal<py::object>(y);
}

py::tuple tuple_of(const std::vector<std::int64_t>& sizes) {
  py::tuple items(sizes.size());
  for (std::size_t i = 0; i < sizes.size(); ++i) items[i] = sizes[i];
  return items;
}

}  // namespace

py::object new_like(py::handle x, const std::vector<std::int64_t>& sizes) {
  return new_empty(x, tuple_of(sizes), nullptr);
}

py::object new_float32(py::handle x, const std::vector<std::int64_t>& sizes) {
  return new_empty(x, tuple_of(sizes), g_gate.float32);
}

py::object new_bytes(py::handle x, std::int64_t count) {
  return new_empty(x, py::make_tuple(count), g_gate.uint8);
}

namespace {

// References held for the life of the process.
struct Owners {
  PyObject* use_count = nullptr;
  PyObject* storage = nullptr;
  PyObject* storage_use_count = nullptr;
  PyObject* weak_references = nullptr;
  Py_ssize_t storage_references = 0;  // to the object of a storage that one tensor has, while asked
};
Owners g_owners;

// Whether a call gives this number, or this bool.
bool gives(PyObject* function, py::handle argument, long expected) {
  PyObject* const found = PyObject_CallOneArg(function, argument.ptr());
  const bool equal = found != nullptr && PyLong_Check(found) && PyLong_AsLong(found) == expected;
  Py_XDECREF(found);
  if (PyErr_Occurred() != nullptr) PyErr_Clear();
  return equal;
}

}  // namespace

void bind_owners(const py::object& use_count, const py::object& storage,
                 const py::object& storage_use_count, const py::object& weak_references,
                 const py::object& probe) {
  // Some releases of torch have one object for each storage, which refers to it as well.
  const py::object of_probe = storage(probe);
  g_owners = {use_count.inc_ref().ptr(), storage.inc_ref().ptr(), storage_use_count.inc_ref().ptr(),
              weak_references.inc_ref().ptr(), Py_REFCNT(of_probe.ptr())};
}

py::object in_memory_of(PyObject* argument) {
  // The object's reference is that of the tuple of arguments; a tensor's one is the object's.
  constexpr Py_ssize_t kOfArguments = 1;
  if (g_owners.use_count == nullptr || Py_REFCNT(argument) != kOfArguments ||
      !gives(g_owners.use_count, argument, 1) || !gives(g_owners.weak_references, argument, 0)) {
    return {};
  }
  const auto storage =
      py::reinterpret_steal<py::object>(PyObject_CallOneArg(g_owners.storage, argument));
  if (!storage) throw py::error_already_set();
  // The tensor's and that of the object that was just made.
  const bool sole = Py_REFCNT(storage.ptr()) == g_owners.storage_references &&
                    gives(g_owners.storage_use_count, storage.attr("_cdata"), 2) &&
                    gives(g_owners.weak_references, storage, 0) &&
                    storage.attr("resizable")().ptr() == Py_True &&
                    storage.attr("is_shared")().ptr() == Py_False;
  if (!sole) return {};
  return py::handle(argument).attr("detach")();
}

void bind_gate_functions(py::module_& m) {
  using py::arg;
  m.def("bind_owners", &bind_owners, arg("use_count"), arg("storage"), arg("storage_use_count"),
        arg("weak_references"), arg("probe"));
  m.def("bind_gate", &bind_gate, arg("torch"), arg("compiler"), arg("forward_ad"),
        arg("questions"));
  if (PyModule_AddFunctions(m.ptr(), g_gate_methods) != 0) throw py::error_already_set();
}

}  // namespace fusereg
