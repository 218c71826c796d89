#include "core/drawn.h"

#include <exception>

#include "core/call.h"
#include "core/gate.h"
#include "core/seed_argument.h"

namespace fusereg {
namespace {

// Lives as long as the process, as the operator does.
struct Drawn {
  DrawnKernel kernel;
  Py_ssize_t constants;
  PyObject* forward;
  PyObject* backward;
};

const char* const kDrawnName = "fusereg.drawn";

const Drawn& drawn_of(PyObject* self) {
  return *static_cast<const Drawn*>(PyCapsule_GetPointer(self, kDrawnName));
}

PyObject* rest_name() {
  static PyObject* const name = PyUnicode_InternFromString("rest");
  return name;
}

// y = m x for a new y; null where the kernel does not do it.
py::object compute(const Drawn& drawn, bool backward, py::handle x, const TensorView& in,
                   PyObject* state, PyObject* const* constants, PyObject* op, TensorView& out) {
  if (!PyTuple_CheckExact(state) || PyTuple_GET_SIZE(state) != 2 || !PyUnicode_Check(op)) return {};
  const char* const name = PyUnicode_AsUTF8(op);
  py::object y = empty_like(x);
  if (name == nullptr || !y || read_memory(y, out) != Kind::kPlain) return {};
  const auto seed = py::reinterpret_borrow<py::object>(PyTuple_GET_ITEM(state, 0));
  const auto offset = py::reinterpret_borrow<py::object>(PyTuple_GET_ITEM(state, 1));
  const SeedPair random = seed_argument(seed, offset, in.device, name);
  if (drawn.kernel(backward, out, in, random, constants, name) != kDone) return {};
  return y;
}

PyObject* try_forward(const Drawn& drawn, PyObject* ctx, PyObject* x, PyObject* rest) {
  const Py_ssize_t count = drawn.constants + 2;
  TensorView in;
  TensorView out;
  if (!PyTuple_CheckExact(rest) || PyTuple_GET_SIZE(rest) != count ||
      read_tensor(x, in) != Kind::kPlain) {
    return nullptr;
  }
  PyObject* const* const items = &PyTuple_GET_ITEM(rest, 0);
  const py::object y = compute(drawn, false, x, in, items[0], items + 1, items[count - 1], out);
  if (!y) return nullptr;
  py::tuple strides(static_cast<std::size_t>(out.ndim));
  for (int d = 0; d < out.ndim; ++d) {
    PyTuple_SET_ITEM(strides.ptr(), d, PyLong_FromLongLong(out.strides[d]));
  }
  py::tuple kept(static_cast<std::size_t>(count + 1));
  for (Py_ssize_t i = 0; i < count - 1; ++i) PyTuple_SET_ITEM(kept.ptr(), i, Py_NewRef(items[i]));
  PyTuple_SET_ITEM(kept.ptr(), count - 1, strides.release().ptr());
  PyTuple_SET_ITEM(kept.ptr(), count, Py_NewRef(items[count - 1]));
  if (PyObject_SetAttr(ctx, rest_name(), kept.ptr()) != 0) return nullptr;
  return Py_NewRef(y.ptr());
}

bool has_strides(const TensorView& view, PyObject* strides) {
  if (!PyTuple_CheckExact(strides) || PyTuple_GET_SIZE(strides) != view.ndim) return false;
  for (int d = 0; d < view.ndim; ++d) {
    PyObject* const stride = PyTuple_GET_ITEM(strides, d);
    if (!PyLong_CheckExact(stride) || PyLong_AsLongLong(stride) != view.strides[d]) return false;
  }
  return true;
}

PyObject* try_backward(const Drawn& drawn, PyObject* ctx, PyObject* grad) {
  if (grad_enabled() || !nothing_traces()) return nullptr;
  const auto rest = py::reinterpret_steal<py::object>(PyObject_GetAttr(ctx, rest_name()));
  const Py_ssize_t count = drawn.constants + 3;
  TensorView in;
  TensorView out;
  if (!rest || !PyTuple_CheckExact(rest.ptr()) || PyTuple_GET_SIZE(rest.ptr()) != count ||
      read_tensor(grad, in) != Kind::kPlain) {
    return nullptr;
  }
  PyObject* const* const items = &PyTuple_GET_ITEM(rest.ptr(), 0);
  if (!has_strides(in, items[count - 2])) return nullptr;
  const py::object y = compute(drawn, true, grad, in, items[0], items + 1, items[count - 1], out);
  return y ? PyTuple_Pack(2, y.ptr(), Py_None) : nullptr;
}

PyObject* drawn_forward(PyObject* self, PyObject* const* args, Py_ssize_t count) {
  const Drawn& drawn = drawn_of(self);
  if (count == 3) {
    PyObject* y = nullptr;
    try {
      y = try_forward(drawn, args[0], args[1], args[2]);
    } catch (const std::exception&) {
      y = nullptr;  // the general one says what is wrong
    }
    if (y != nullptr) return y;
    PyErr_Clear();
  }
  return PyObject_Vectorcall(drawn.forward, args, static_cast<std::size_t>(count), nullptr);
}

PyObject* drawn_backward(PyObject* self, PyObject* const* args, Py_ssize_t count) {
  const Drawn& drawn = drawn_of(self);
  if (count == 2) {
    PyObject* found = nullptr;
    try {
      found = try_backward(drawn, args[0], args[1]);
    } catch (const std::exception&) {
      found = nullptr;
    }
    if (found != nullptr) return found;
    PyErr_Clear();
  }
  return PyObject_Vectorcall(drawn.backward, args, static_cast<std::size_t>(count), nullptr);
}

PyMethodDef g_drawn_forward = {"forward", fast_function(&drawn_forward), METH_FASTCALL, nullptr};
PyMethodDef g_drawn_backward = {"backward", fast_function(&drawn_backward), METH_FASTCALL, nullptr};

PyObject* pair_of(PyObject*, PyObject* tensor) {
  RawView view;
  if (!read_raw(tensor, view) || !view.integer || view.bytes != 8 || view.numel != 2 ||
      !view.contiguous || view.device.type != kDLCPU) {
    PyErr_SetString(PyExc_TypeError, "fusereg: two int64 numbers in CPU memory are wanted");
    return nullptr;
  }
  const auto* const numbers = static_cast<const std::int64_t*>(view.data);
  return Py_BuildValue("LL", static_cast<long long>(numbers[0]),
                       static_cast<long long>(numbers[1]));
}

PyMethodDef g_drawn_methods[] = {
    {"pair_of", &pair_of, METH_O, "pair_of(tensor, /) -> tuple[int, int]"},
    {nullptr, nullptr, 0, nullptr},
};

}  // namespace

py::tuple drawn_functions(DrawnKernel kernel, int constants, const py::object& forward,
                          const py::object& backward) {
  auto* const drawn =
      new Drawn{kernel, constants, forward.inc_ref().ptr(), backward.inc_ref().ptr()};
  const py::capsule self(drawn, kDrawnName);
  const auto first =
      py::reinterpret_steal<py::object>(PyCFunction_New(&g_drawn_forward, self.ptr()));
  const auto second =
      py::reinterpret_steal<py::object>(PyCFunction_New(&g_drawn_backward, self.ptr()));
  // So that autograd's node, as whose method it is looked up, is the first argument.
  const auto method = py::reinterpret_steal<py::object>(PyInstanceMethod_New(second.ptr()));
  return py::make_tuple(first, method);
}

void bind_drawn(py::module_& m) {
  if (PyModule_AddFunctions(m.ptr(), g_drawn_methods) != 0) throw py::error_already_set();
}

}  // namespace fusereg
