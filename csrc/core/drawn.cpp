#include "core/drawn.h"

#include <algorithm>
#include <cstring>
#include <stdexcept>
#include <vector>

#include "core/call.h"
#include "core/gate.h"
#include "core/seed_argument.h"

namespace fusereg {
namespace {

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
    const py::object y = result_like(x, out);
    if (!y || !run(false, out, in, nullptr, items[0], items + 1, items[count - 1])) return nullptr;
    py::tuple kept(static_cast<std::size_t>(count + 1));
    for (Py_ssize_t i = 0; i < count - 1; ++i) PyTuple_SET_ITEM(kept.ptr(), i, Py_NewRef(items[i]));
    PyTuple_SET_ITEM(kept.ptr(), count - 1, strides_of(out).release().ptr());
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
    const bool fits = has_strides(in, items[count - 2]);
    if (!fits && !few_equal(in)) return nullptr;
    const py::object y = result_like(grad, out);
    if (!y) return nullptr;
    if (!fits) {
      if (!has_strides(out, items[count - 2])) return nullptr;
      fill(out, in.data);  // on which the kernel works in place
      in = out;
    }
    TensorView kept;
    const bool keeps = keeps_ != nullptr && keeps_(items + 1) != Keeps::kNothing;
    if (keeps) {
      if (!PyTuple_CheckExact(items[0])) return nullptr;  // a state that is kept as a tensor
      PyObject* const* const tensors = unpack(ctx, saved, 1);
      if (tensors == nullptr || read_tensor(tensors[0], kept) != Kind::kPlain) return nullptr;
    }
    return run(true, out, in, keeps ? &kept : nullptr, items[0], items + 1, items[count - 1])
               ? PyTuple_Pack(2, y.ptr(), Py_None)
               : nullptr;
  }

  // y = x times factors, by torch: autograd records a node of its own, which keeps the factors and
  // calls no Python. For few elements, whose kernels take no time. The kernel then writes y again,
  // because it makes 0 of a dropped inf or NaN. Null, without an error, for all other calls; what
  // torch.mul or a hook raises is thrown.
  py::object by_factors(PyObject* const* args, Py_ssize_t arguments) const {
    // Calls on more are faster than torch's as it is, and their factors would take memory.
    constexpr std::int64_t kFew = 1 << 10;
    const Py_ssize_t count = constants_ + 2;
    TensorView in;
    if (arguments != 2 || read_tensor(args[0], in) != Kind::kPlain ||
        runs_cuda_kernels(in.device) || in.numel == 0 || in.numel > kFew ||
        dtype_size(in.dtype) < 4 || !in.dense() || !PyTuple_CheckExact(args[1]) ||
        PyTuple_GET_SIZE(args[1]) != count) {
      return {};
    }
    PyObject* const* const items = &PyTuple_GET_ITEM(args[1], 0);
    const auto draw = [&](bool backward, const TensorView& out, const TensorView& x) {
      return attempt(
          [&] { return run(backward, out, x, nullptr, items[0], items + 1, items[count - 1]); });
    };
    TensorView out;
    const py::object factors = result_like(args[0], out);
    if (!factors) return {};
    fill(out, nullptr);
    if (!draw(true, out, out)) return {};
    const py::object y = product(args[0], factors);
    return read_memory(y, out) == Kind::kPlain && draw(false, out, in) ? y : py::object();
  }

 private:
  // A new tensor like x; null where kernels cannot write to it.
  static py::object result_like(py::handle x, TensorView& out) {
    py::object y = empty_like(x);
    if (read_memory(y, out) != Kind::kPlain) return {};
    return y;
  }

  // Whether a tensor on the CPU is one number, expanded, as the gradient of a sum is, to no more
  // elements than one thread writes in no time.
  static bool few_equal(const TensorView& view) {
    constexpr std::int64_t kFew = 1 << 14;
    if (view.device.type != kDLCPU || view.numel > kFew) return false;
    for (int d = 0; d < view.ndim; ++d) {
      if (view.strides[d] != 0 && view.sizes[d] != 1) return false;
    }
    return true;
  }

  // Null: with ones.
  static void fill(const TensorView& out, const void* number) {
    dispatch_dtype(out.dtype, [&](auto tag) {
      using T = typename decltype(tag)::type;
      if (out.numel == 0) return;
      const T value = number == nullptr ? from_compute<T>(1) : *static_cast<const T*>(number);
      std::fill_n(static_cast<T*>(out.data), out.numel, value);
    });
  }

  // Whether the kernel has written out.
  bool run(bool backward, const TensorView& out, const TensorView& in, const TensorView* kept,
           PyObject* state, PyObject* const* constants, PyObject* op) const {
    if (!PyTuple_CheckExact(state) || PyTuple_GET_SIZE(state) != 2 || !PyUnicode_Check(op))
      return false;
    const char* const name = PyUnicode_AsUTF8(op);
    if (name == nullptr) return false;
    const auto seed = py::reinterpret_borrow<py::object>(PyTuple_GET_ITEM(state, 0));
    const auto offset = py::reinterpret_borrow<py::object>(PyTuple_GET_ITEM(state, 1));
    const SeedPair random = seed_argument(seed, offset, in.device, name);
    return kernel_(backward, out, in, kept, random, constants, name) == kDone;
  }

  DrawnKernel kernel_;
  Py_ssize_t constants_;
  DrawnKeeps keeps_;
};

// --- the function of few elements ---

struct Apply {
  const Drawn* drawn;
  PyObject* general;  // both live as long as the process
};

const char* const kApply = "fusereg.drawn_apply";

PyObject* apply(PyObject* self, PyObject* const* args, Py_ssize_t count) {
  return guarded([&] {
    const auto& functions = *static_cast<const Apply*>(PyCapsule_GetPointer(self, kApply));
    py::object y = functions.drawn->by_factors(args, count);
    if (y) return y.release().ptr();
    return PyObject_Vectorcall(functions.general, args, static_cast<std::size_t>(count), nullptr);
  });
}

PyMethodDef g_apply = {"apply", fast_function(&apply), METH_FASTCALL, nullptr};

py::object drawn_apply(const py::object& forward, const py::object& general) {
  const auto* const drawn = dynamic_cast<const Drawn*>(at_once_of(forward));
  if (drawn == nullptr || PyCallable_Check(general.ptr()) == 0)
    throw py::type_error("fusereg: drawn_apply needs a drawn map's forward");
  const py::capsule self(new Apply{drawn, general.inc_ref().ptr()}, kApply);
  return py::reinterpret_steal<py::object>(PyCFunction_New(&g_apply, self.ptr()));
}

// --- Philox states ---

// python/fusereg/core/random.py: makes a thread's memory of two numbers; a new state for a tensor
// that is not on the CPU. Held for the life of the process.
struct RandomSource {
  PyObject* make_numbers = nullptr;
  PyObject* state_of_device = nullptr;
};
RandomSource g_random;

void bind_random(const py::object& make_numbers, const py::object& state_of_device) {
  g_random = {make_numbers.inc_ref().ptr(), state_of_device.inc_ref().ptr()};
}

// This thread's tensor of two numbers, borrowed; it goes with the thread.
PyObject* numbers_of_thread() {
  static PyObject* const name = PyUnicode_InternFromString("fusereg.numbers");
  PyObject* const kept = PyThreadState_GetDict();
  if (kept == nullptr || g_random.make_numbers == nullptr)
    throw std::runtime_error("fusereg._C is used through the package fusereg");
  PyObject* found = PyDict_GetItemWithError(kept, name);
  if (found != nullptr) return found;
  if (PyErr_Occurred() != nullptr) throw py::error_already_set();
  const auto made = py::reinterpret_steal<py::object>(PyObject_CallNoArgs(g_random.make_numbers));
  if (!made || PyDict_SetItem(kept, name, made.ptr()) != 0) throw py::error_already_set();
  return made.ptr();
}

// (seed, offset): two numbers from a generator of the CPU, None for torch's default one.
py::object random_state(py::handle generator) {
  static PyObject* const random = PyUnicode_InternFromString("random_");
  static PyObject* const names = py::make_tuple("generator").release().ptr();
  PyObject* const arguments[] = {numbers_of_thread(), generator.ptr()};
  const auto filled = py::reinterpret_steal<py::object>(
      PyObject_VectorcallMethod(random, arguments, 1, generator.is_none() ? nullptr : names));
  RawView view;
  if (!filled) throw py::error_already_set();
  if (!read_raw(filled, view) || !view.integer || view.bytes != 8 || view.numel != 2 ||
      !view.contiguous || view.device.type != kDLCPU) {
    throw std::runtime_error("fusereg: torch's random_() has returned another tensor");
  }
  const auto* const numbers = static_cast<const std::int64_t*>(view.data);
  return py::make_tuple(numbers[0], numbers[1]);
}

PyObject* python_random_state(PyObject*, PyObject* generator) {
  return guarded([generator] { return random_state(generator).release().ptr(); });
}

// --- the usual call ---

// Whether kernels can take these tensors as they are: one dtype and device; "x" in `roles` is of
// the first one's shape, "v" a vector of its last dimension. Those after the first may be None.
bool fit(PyObject* const* tensors, Py_ssize_t count, const char* roles, TensorView& first) {
  if (read_memory(tensors[0], first) != Kind::kPlain) return false;
  if (count > 1 && first.ndim == 0) return false;
  for (Py_ssize_t i = 1; i < count; ++i) {
    if (tensors[i] == Py_None) continue;
    TensorView view;
    if (read_memory(tensors[i], view) != Kind::kPlain || view.dtype != first.dtype ||
        view.device != first.device) {
      return false;
    }
    const int skipped = roles[i] == 'v' ? first.ndim - 1 : 0;
    if (view.ndim != first.ndim - skipped) return false;
    for (int d = 0; d < view.ndim; ++d) {
      if (view.sizes[d] != first.sizes[skipped + d]) return false;
    }
  }
  return true;
}

PyObject* drawn_at_once(PyObject*, PyObject* const* args, Py_ssize_t count) {
  return guarded([&]() -> PyObject* {
    constexpr Py_ssize_t kTensors = 4;
    const char* const roles = count > kTensors ? PyUnicode_AsUTF8(args[2]) : nullptr;
    PyObject* const constants = roles == nullptr ? nullptr : args[3];
    const Py_ssize_t tensors = count - kTensors;
    if (roles == nullptr || static_cast<Py_ssize_t>(std::strlen(roles)) != tensors ||
        !PyTuple_CheckExact(constants) || PyTuple_GET_SIZE(constants) == 0) {
      PyErr_Clear();
      throw py::type_error("fusereg: drawn_at_once was called with other arguments");
    }
    PyObject* const* const given = args + kTensors;
    TensorView x;
    if (!nothing_traces() || forward_mode() || !fit(given, tensors, roles, x))
      return Py_NewRef(Py_None);
    bool derived = false;
    if (grad_enabled()) {
      for (Py_ssize_t i = 0; i < tensors; ++i)
        derived = derived || (given[i] != Py_None && requires_grad(given[i]));
    }
    PyObject* const function = derived ? args[0] : args[1];
    if (function == Py_None) return Py_NewRef(Py_None);

    py::object state;
    if (PyFloat_AsDouble(PyTuple_GET_ITEM(constants, 0)) == 0.0) {
      state = py::make_tuple(0, 0);
    } else if (x.device.type == kDLCPU) {
      state = random_state(py::none());
    } else {
      state = py::reinterpret_steal<py::object>(
          PyObject_CallOneArg(g_random.state_of_device, given[0]));
    }
    if (!state || PyErr_Occurred() != nullptr) throw py::error_already_set();
    // Autograd looks at no argument but the tensors: the others are one.
    std::vector<PyObject*> arguments(given, given + tensors);
    const Py_ssize_t numbers = PyTuple_GET_SIZE(constants);
    py::tuple rest(static_cast<std::size_t>(numbers + 1));
    PyTuple_SET_ITEM(rest.ptr(), 0, Py_NewRef(state.ptr()));
    for (Py_ssize_t i = 0; i < numbers; ++i)
      PyTuple_SET_ITEM(rest.ptr(), i + 1, Py_NewRef(PyTuple_GET_ITEM(constants, i)));
    if (derived) {
      arguments.push_back(rest.ptr());
    } else {
      for (Py_ssize_t i = 0; i <= numbers; ++i)
        arguments.push_back(PyTuple_GET_ITEM(rest.ptr(), i));
    }
    return PyObject_Vectorcall(function, arguments.data(), arguments.size(), nullptr);
  });
}

PyMethodDef g_drawn_methods[] = {
    {"random_state", &python_random_state, METH_O, "random_state(generator, /) -> tuple[int, int]"},
    {"drawn_at_once", fast_function(&drawn_at_once), METH_FASTCALL,
     "drawn_at_once(apply, kernel, roles, constants, x, /, *tensors) -> Tensor | None"},
    {nullptr, nullptr, 0, nullptr},
};

}  // namespace

py::tuple strides_of(const TensorView& view) {
  py::tuple strides(static_cast<std::size_t>(view.ndim));
  for (int d = 0; d < view.ndim; ++d)
    PyTuple_SET_ITEM(strides.ptr(), d, PyLong_FromLongLong(view.strides[d]));
  return strides;
}

bool has_strides(const TensorView& view, PyObject* strides) {
  if (!PyTuple_CheckExact(strides) || PyTuple_GET_SIZE(strides) != view.ndim) return false;
  for (int d = 0; d < view.ndim; ++d) {
    PyObject* const stride = PyTuple_GET_ITEM(strides, d);
    if (!PyLong_CheckExact(stride) || PyLong_AsLongLong(stride) != view.strides[d]) return false;
  }
  return true;
}

py::tuple drawn_functions(DrawnKernel kernel, int constants, const py::object& forward,
                          const py::object& backward, DrawnKeeps keeps) {
  return at_once_functions(new Drawn(kernel, constants, keeps), forward, backward);
}

void bind_drawn(py::module_& m) {
  m.def("bind_random", &bind_random, py::arg("make_numbers"), py::arg("state_of_device"));
  m.def("drawn_apply", &drawn_apply, py::arg("forward"), py::arg("general"));
  if (PyModule_AddFunctions(m.ptr(), g_drawn_methods) != 0) throw py::error_already_set();
}

}  // namespace fusereg
