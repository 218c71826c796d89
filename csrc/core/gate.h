// The gate between eager calls and torch.library, as python/fusereg/core/dispatch.py describes it:
// asked several times at each call, so here, where a question is not a frame of the interpreter.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <vector>

namespace fusereg {

namespace py = pybind11;

// A function that takes its arguments as they lie on the interpreter's stack (METH_FASTCALL).
inline PyCFunction fast_function(PyObject* (*f)(PyObject*, PyObject* const*, Py_ssize_t)) noexcept {
  return reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(f));
}

// What is asked of torch, held for the life of the process. Throws RuntimeError if it was called
// with others before.
//
// compiler: the module with `_is_compiling_flag`. forward_ad: the one with `_current_level`, which
// is 0 or more where tensors may carry tangents. questions: functions without arguments that return
// 0 or None where no tracer, dispatch mode or torch.func transform is active.
void bind_gate(const py::module_& torch, const py::module_& compiler, const py::module_& forward_ad,
               const py::tuple& questions);

// Whether no compiler, tracer, dispatch mode or transform is active. Dynamo, which does not run
// what it traces, must have been asked before. Never leaves a Python error set.
bool nothing_traces();

bool grad_enabled();

// Whether tensors may carry tangents, with or without gradients.
bool forward_mode();

// torch.empty_like(x); throws its error.
py::object empty_like(py::handle x);

// torch.mul(x, factors), which autograd records; throws its error, or a hook's.
py::object product(py::handle x, py::handle factors);

// x.new_empty(sizes) of x's dtype, of float32, or of bytes; the same.
py::object new_like(py::handle x, const std::vector<std::int64_t>& sizes);
py::object new_float32(py::handle x, const std::vector<std::int64_t>& sizes);
py::object new_bytes(py::handle x, std::int64_t count);

// What is asked of torch before memory is used anew: Tensor._use_count, Tensor.untyped_storage, the
// function that counts a storage's users, and weakref.getweakrefcount; a new tensor. Absent: it
// never is.
void bind_owners(const py::object& use_count, const py::object& storage,
                 const py::object& storage_use_count, const py::object& weak_references,
                 const py::object& probe);

// A new tensor in the memory of a gradient that nobody could read any more: for an autograd
// function whose argument it is, which holds its only reference. Null if anybody else has, by
// whatever way, the tensor, a view of it or its storage, or if the memory is not torch's own (of an
// array, another process, a file).
py::object in_memory_of(PyObject* argument);

// `direct` (_C.pyi).
void bind_gate_functions(py::module_& m);

}  // namespace fusereg
