#include "core/drawn.h"

#include "core/call.h"
#include "core/gate.h"
#include "core/seed_argument.h"

namespace fusereg {
namespace {

bool has_strides(const TensorView& view, PyObject* strides) {
  if (!PyTuple_CheckExact(strides) || PyTuple_GET_SIZE(strides) != view.ndim) return false;
  for (int d = 0; d < view.ndim; ++d) {
    PyObject* const stride = PyTuple_GET_ITEM(strides, d);
    if (!PyLong_CheckExact(stride) || PyLong_AsLongLong(stride) != view.strides[d]) return false;
  }
  return true;
}

class Drawn : public AtOnce {
 public:
  Drawn(DrawnKernel kernel, Py_ssize_t constants, DrawnKeeps keeps)
      : kernel_(kernel), constants_(constants), keeps_(keeps) {}

  PyObject* forward(PyObject* const* args, Py_ssize_t arguments) const override {
    if (arguments != 3) return nullptr;
    PyObject* const ctx = args[0];
    PyObject* const x = args[1];
    PyObject* const rest = args[2];
    const Py_ssize_t count = constants_ + 2;
    TensorView in;
    TensorView out;
    if (!PyTuple_CheckExact(rest) || PyTuple_GET_SIZE(rest) != count ||
        read_tensor(x, in) != Kind::kPlain) {
      return nullptr;
    }
    PyObject* const* const items = &PyTuple_GET_ITEM(rest, 0);
    const Keeps keeps = keeps_ == nullptr ? Keeps::kNothing : keeps_(items + 1);
    if (keeps != Keeps::kNothing && forward_mode()) return nullptr;  // which keeps it once more
    const py::object y = compute(false, x, in, nullptr, items[0], items + 1, items[count - 1], out);
    if (!y) return nullptr;
    py::tuple strides(static_cast<std::size_t>(out.ndim));
    for (int d = 0; d < out.ndim; ++d) {
      PyTuple_SET_ITEM(strides.ptr(), d, PyLong_FromLongLong(out.strides[d]));
    }
    py::tuple kept(static_cast<std::size_t>(count + 1));
    for (Py_ssize_t i = 0; i < count - 1; ++i) PyTuple_SET_ITEM(kept.ptr(), i, Py_NewRef(items[i]));
    PyTuple_SET_ITEM(kept.ptr(), count - 1, strides.release().ptr());
    PyTuple_SET_ITEM(kept.ptr(), count, Py_NewRef(items[count - 1]));
    if (!set_rest(ctx, kept)) return nullptr;
    if (keeps != Keeps::kNothing) {
      PyObject* const tensors[] = {keeps == Keeps::kInput ? x : y.ptr()};
      if (!save(ctx, tensors, 1)) return nullptr;
    }
    return Py_NewRef(y.ptr());
  }

  PyObject* backward(PyObject* ctx, PyObject* const* grads, Saved& saved) const override {
    PyObject* const grad = grads[0];
    const Py_ssize_t count = constants_ + 3;
    const py::object rest = rest_of(ctx, count);
    TensorView in;
    TensorView out;
    if (!rest || read_tensor(grad, in) != Kind::kPlain) return nullptr;
    PyObject* const* const items = &PyTuple_GET_ITEM(rest.ptr(), 0);
    if (!has_strides(in, items[count - 2])) return nullptr;
    TensorView kept;
    const bool keeps = keeps_ != nullptr && keeps_(items + 1) != Keeps::kNothing;
    if (keeps) {
      if (!PyTuple_CheckExact(items[0])) return nullptr;  // a state that is kept as a tensor
      PyObject* const* const tensors = unpack(ctx, saved, 1);
      if (tensors == nullptr || read_tensor(tensors[0], kept) != Kind::kPlain) return nullptr;
    }
    const py::object y = compute(true, grad, in, keeps ? &kept : nullptr, items[0], items + 1,
                                 items[count - 1], out);
    return y ? PyTuple_Pack(2, y.ptr(), Py_None) : nullptr;
  }

 private:
  // A new y from x; null where the kernel does not do it.
  py::object compute(bool backward, py::handle x, const TensorView& in, const TensorView* kept,
                     PyObject* state, PyObject* const* constants, PyObject* op,
                     TensorView& out) const {
    if (!PyTuple_CheckExact(state) || PyTuple_GET_SIZE(state) != 2 || !PyUnicode_Check(op))
      return {};
    const char* const name = PyUnicode_AsUTF8(op);
    py::object y = empty_like(x);
    if (name == nullptr || read_memory(y, out) != Kind::kPlain) return {};
    const auto seed = py::reinterpret_borrow<py::object>(PyTuple_GET_ITEM(state, 0));
    const auto offset = py::reinterpret_borrow<py::object>(PyTuple_GET_ITEM(state, 1));
    const SeedPair random = seed_argument(seed, offset, in.device, name);
    if (kernel_(backward, out, in, kept, random, constants, name) != kDone) return {};
    return y;
  }

  DrawnKernel kernel_;
  Py_ssize_t constants_;
  DrawnKeeps keeps_;
};

PyObject* pair_of(PyObject*, PyObject* tensor) {
  return guarded([tensor]() -> PyObject* {
    RawView view;
    if (!read_raw(tensor, view) || !view.integer || view.bytes != 8 || view.numel != 2 ||
        !view.contiguous || view.device.type != kDLCPU) {
      PyErr_SetString(PyExc_TypeError, "fusereg: two int64 numbers in CPU memory are wanted");
      return nullptr;
    }
    const auto* const numbers = static_cast<const std::int64_t*>(view.data);
    return Py_BuildValue("LL", static_cast<long long>(numbers[0]),
                         static_cast<long long>(numbers[1]));
  });
}

PyMethodDef g_drawn_methods[] = {
    {"pair_of", &pair_of, METH_O, "pair_of(tensor, /) -> tuple[int, int]"},
    {nullptr, nullptr, 0, nullptr},
};

}  // namespace

py::tuple drawn_functions(DrawnKernel kernel, int constants, const py::object& forward,
                          const py::object& backward, DrawnKeeps keeps) {
  return at_once_functions(new Drawn(kernel, constants, keeps), forward, backward);
}

void bind_drawn(py::module_& m) {
  if (PyModule_AddFunctions(m.ptr(), g_drawn_methods) != 0) throw py::error_already_set();
}

}  // namespace fusereg
