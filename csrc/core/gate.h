// The gate between eager calls and torch.library, as python/fusereg/core/dispatch.py describes it:
// asked several times at each call, so here, where a question is not a frame of the interpreter.
#pragma once

#include <pybind11/pybind11.h>

namespace fusereg {

namespace py = pybind11;

// A function that takes its arguments as they lie on the interpreter's stack (METH_FASTCALL).
inline PyCFunction fast_function(PyObject* (*f)(PyObject*, PyObject* const*, Py_ssize_t)) noexcept {
  return reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(f));
}

// What is asked of torch, held for the life of the process. Throws RuntimeError if it was called
// with others before.
//
// compiler: the module with `_is_compiling_flag`. questions: functions without arguments that
// return 0 or None where no tracer, dispatch mode or torch.func transform is active.
void bind_gate(const py::module_& compiler, const py::tuple& questions,
               const py::object& grad_enabled, const py::object& empty_like);

// Whether no compiler, tracer, dispatch mode or transform is active. Dynamo, which does not run
// what it traces, must have been asked before. Never leaves a Python error set.
bool nothing_traces();

bool grad_enabled();

// torch.empty_like(x); null, without a Python error set, where that fails.
py::object empty_like(py::handle x);

// `direct` and `ready` (_C.pyi).
void bind_gate_functions(py::module_& m);

}  // namespace fusereg
