#include "core/at_once.h"

#include <vector>

#include "core/gate.h"
#include "core/tensor.h"

namespace fusereg {
namespace {

struct Functions {
  const AtOnce* at_once;
  PyObject* forward;
  PyObject* backward;
};

const char* const kName = "fusereg.at_once";

const Functions& functions_of(PyObject* self) {
  return *static_cast<const Functions*>(PyCapsule_GetPointer(self, kName));
}

PyObject* interned(const char* name) { return PyUnicode_InternFromString(name); }

PyObject* rest_name() {
  static PyObject* const name = interned("rest");
  return name;
}

PyObject* forward(PyObject* self, PyObject* const* args, Py_ssize_t count) {
  return guarded([&] {
    const Functions& functions = functions_of(self);
    PyObject* const y = attempt([&] { return functions.at_once->forward(args, count); });
    if (y != nullptr) return y;
    return PyObject_Vectorcall(functions.forward, args, static_cast<std::size_t>(count), nullptr);
  });
}

// Makes gradients on the CPU contiguous that are not dense: a sum's is one number, expanded. Whether
// there was any.
bool make_dense(std::vector<PyObject*>& gradients, std::vector<py::object>& made) {
  static PyObject* const contiguous = interned("contiguous");
  for (PyObject*& gradient : gradients) {
    TensorView view;
    if (read_tensor(gradient, view) != Kind::kPlain || view.dense() || view.device.type != kDLCPU)
      continue;
    made.push_back(py::reinterpret_steal<py::object>(
        PyObject_VectorcallMethod(contiguous, &gradient, 1, nullptr)));
    if (!made.back()) throw py::error_already_set();
    gradient = made.back().ptr();
  }
  return !made.empty();
}

PyObject* backward(PyObject* self, PyObject* const* args, Py_ssize_t count) {
  return guarded([&] {
    const Functions& functions = functions_of(self);
    PyObject* found = nullptr;
    Saved saved;
    std::vector<py::object> made;
    std::vector<PyObject*> dense;
    // An operator of one result may have others, which are nothing to differentiate.
    if (count == 1 + functions.at_once->results()) {
      found = attempt([&]() -> PyObject* {
        if (grad_enabled() || forward_mode() || !nothing_traces()) return nullptr;
        PyObject* const done = functions.at_once->backward(args[0], args + 1, saved);
        if (done != nullptr || PyErr_Occurred() != nullptr) return done;
        dense.assign(args + 1, args + count);
        if (!make_dense(dense, made)) return nullptr;
        return functions.at_once->backward(args[0], dense.data(), saved);
      });
    }
    if (found != nullptr) return found;
    if (!saved.tensors) {
      return PyObject_Vectorcall(functions.backward, args, static_cast<std::size_t>(count),
                                 nullptr);
    }
    std::vector<PyObject*> more(args, args + count);
    more.push_back(saved.tensors.ptr());
    return PyObject_Vectorcall(functions.backward, more.data(), more.size(), nullptr);
  });
}

PyMethodDef g_forward = {"forward", fast_function(&forward), METH_FASTCALL, nullptr};
PyMethodDef g_backward = {"backward", fast_function(&backward), METH_FASTCALL, nullptr};

}  // namespace

py::tuple at_once_functions(const AtOnce* functions, const py::object& forward,
                            const py::object& backward) {
  auto* const kept = new Functions{functions, forward.inc_ref().ptr(), backward.inc_ref().ptr()};
  const py::capsule self(kept, kName);
  const auto first = py::reinterpret_steal<py::object>(PyCFunction_New(&g_forward, self.ptr()));
  const auto second = py::reinterpret_steal<py::object>(PyCFunction_New(&g_backward, self.ptr()));
  // So that autograd's node, as whose method it is looked up, is the first argument.
  const auto method = py::reinterpret_steal<py::object>(PyInstanceMethod_New(second.ptr()));
  return py::make_tuple(first, method);
}

const AtOnce* at_once_of(py::handle forward) {
  if (!PyCFunction_CheckExact(forward.ptr())) return nullptr;
  PyObject* const self = PyCFunction_GET_SELF(forward.ptr());
  return PyCapsule_IsValid(self, kName) != 0 ? functions_of(self).at_once : nullptr;
}

PyObject* const* unpack(PyObject* ctx, Saved& saved, Py_ssize_t count) {
  static PyObject* const name = interned("saved_tensors");
  if (!saved.tensors)
    saved.tensors = py::reinterpret_steal<py::object>(PyObject_GetAttr(ctx, name));
  if (!saved.tensors) throw AtOnce::Final();  // written to since, freed, or a hook's own error
  if (!PyTuple_CheckExact(saved.tensors.ptr()) || PyTuple_GET_SIZE(saved.tensors.ptr()) != count)
    return nullptr;
  return &PyTuple_GET_ITEM(saved.tensors.ptr(), 0);
}

bool save(PyObject* ctx, PyObject* const* tensors, std::size_t count) {
  static PyObject* const name = interned("save_for_backward");
  std::vector<PyObject*> args{ctx};
  args.insert(args.end(), tensors, tensors + count);
  PyObject* const done = PyObject_VectorcallMethod(name, args.data(), args.size(), nullptr);
  Py_XDECREF(done);
  return done != nullptr;
}

bool set_rest(PyObject* ctx, py::handle rest) {
  return PyObject_SetAttr(ctx, rest_name(), rest.ptr()) == 0;
}

py::object rest_of(PyObject* ctx, Py_ssize_t count) {
  auto rest = py::reinterpret_steal<py::object>(PyObject_GetAttr(ctx, rest_name()));
  if (!rest || !PyTuple_CheckExact(rest.ptr()) || PyTuple_GET_SIZE(rest.ptr()) != count) return {};
  return rest;
}

}  // namespace fusereg
