// The eager autograd function of an operation, compiled: what its Python does for plain tensors,
// without frames of the interpreter. Most of what a call on a small tensor costs is outside the
// kernels.
#pragma once

#include <pybind11/pybind11.h>

#include <exception>

namespace fusereg {

namespace py = pybind11;

// The saved tensors of an autograd function. Activation checkpointing lets them be asked for once.
struct Saved {
  py::object tensors;  // null: not asked for yet
};

// One operation's functions; lives as long as the process, as the operator does. Each returns null
// where it does not do the work, with or without a Python error, or throws: nothing was written
// then, and the general function is called, which says what is wrong. Only an error of what it has
// called last, of which there is no second time, is thrown as Final.
class AtOnce {
 public:
  struct Final : std::exception {};  // a Python error is set, and stays

  AtOnce() = default;
  AtOnce(const AtOnce&) = delete;
  AtOnce& operator=(const AtOnce&) = delete;
  virtual ~AtOnce() = default;

  // The arguments of autograd's forward: ctx first.
  virtual PyObject* forward(PyObject* const* args, Py_ssize_t count) const = 0;
  // Of gradients, one for each result, that are neither traced nor differentiated.
  virtual PyObject* backward(PyObject* ctx, PyObject* const* grads, Saved& saved) const = 0;
  virtual Py_ssize_t results() const { return 1; }
};

// (forward, backward) as `function.forward` and `_backward_cls.apply` take them. The given ones are
// called for all else; the backward then has the saved tensors as its last argument, a tuple, if
// they were asked for.
py::tuple at_once_functions(const AtOnce* functions, const py::object& forward,
                            const py::object& backward);

// The AtOnce of which at_once_functions made this `forward`; null of anything else.
const AtOnce* at_once_of(py::handle forward);

// ctx.saved_tensors, a tuple of `count`; null if there are others.
PyObject* const* unpack(PyObject* ctx, Saved& saved, Py_ssize_t count);

// Whether ctx.save_for_backward and ctx.rest could be set.
bool save(PyObject* ctx, PyObject* const* tensors, std::size_t count);
bool set_rest(PyObject* ctx, py::handle rest);
// ctx.rest, a tuple of `count`; null if it is something else.
py::object rest_of(PyObject* ctx, Py_ssize_t count);

// What `compute` returns; null, without an error, where it returned null or failed: the general
// function is to be called, which says what is wrong. What is no Exception (Ctrl-C) is thrown on.
template <class F>
auto attempt(const F& compute) -> decltype(compute()) {
  try {
    const auto found = compute();
    if (!found && PyErr_Occurred() != nullptr) throw py::error_already_set();
    return found;
  } catch (const AtOnce::Final&) {
    throw;
  } catch (py::error_already_set& error) {
    if (!error.matches(PyExc_Exception)) throw;
    return {};
  } catch (const std::exception&) {
    return {};
  }
}

// A function that Python calls as it stands: what it throws becomes Python's error.
template <class F>
PyObject* guarded(const F& function) {
  try {
    return function();
  } catch (py::error_already_set& error) {
    error.restore();
  } catch (const AtOnce::Final&) {
    return nullptr;
  } catch (const py::builtin_exception& error) {
    error.set_error();
  } catch (const std::exception& error) {
    PyErr_SetString(PyExc_RuntimeError, error.what());
  }
  return nullptr;
}

}  // namespace fusereg
