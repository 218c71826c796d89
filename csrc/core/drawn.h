// The eager autograd function of a map that a Philox state draws, compiled (at_once.h): DrawnOperator
// of python/fusereg/core/operator.py, and those that keep a tensor for backward besides.
#pragma once

#include "core/at_once.h"
#include "core/draw.h"
#include "core/tensor.h"

namespace fusereg {

// Runs the kernel on tensors that were read; y may be x. `kept`: what backward has of forward, or
// null.
// `constants`: those of the operator's schema. Anything but kDone: nothing was written. May throw.
using DrawnKernel = int (*)(bool backward, const TensorView& y, const TensorView& x,
                            const TensorView* kept, const SeedPair& random,
                            PyObject* const* constants, const char* op);

// Which tensor backward needs.
enum class Keeps { kNothing, kInput, kResult };
using DrawnKeeps = Keeps (*)(PyObject* const* constants);

// (forward, backward) of the autograd function. A call has (x, (state, *constants, op)); ctx.rest
// becomes (state, *constants, strides of the result, op), and x or the result is kept where `keeps`
// says so. The given ones are called for all else: other arguments, tensors that the kernel refuses,
// gradients that are traced or differentiated, and errors.
py::tuple drawn_functions(DrawnKernel kernel, int constants, const py::object& forward,
                          const py::object& backward, DrawnKeeps keeps = nullptr);

// A tensor's strides as a tuple, and whether it has those of such a tuple.
py::tuple strides_of(const TensorView& view);
bool has_strides(const TensorView& view, PyObject* strides);

// `bind_random`, `random_state`, `drawn_apply`, `drawn_at_once` (_C.pyi).
void bind_drawn(py::module_& m);

}  // namespace fusereg
