// The eager autograd function of a linear map that a Philox state draws (DrawnOperator of
// python/fusereg/core/operator.py): what its Python does for plain tensors, without frames of the
// interpreter. Most of what a call on a small tensor costs is outside the kernels.
#pragma once

#include <pybind11/pybind11.h>

#include "core/draw.h"
#include "core/tensor.h"

namespace fusereg {

// Runs the kernel on tensors that were read. `constants`: those of the operator's schema. Anything
// but kDone: nothing was written. May throw.
using DrawnKernel = int (*)(bool backward, const TensorView& y, const TensorView& x,
                            const SeedPair& random, PyObject* const* constants, const char* op);

// (forward, backward) of the autograd function, as `function.forward` and `_backward_cls.apply`
// take them. A call has (x, (state, *constants, op)); ctx.rest becomes (state, *constants, strides
// of the result, op). The given ones are called for all else: other arguments, tensors that the
// kernel refuses, gradients that are traced or differentiated, and errors.
py::tuple drawn_functions(DrawnKernel kernel, int constants, const py::object& forward,
                          const py::object& backward);

// `pair_of` (_C.pyi).
void bind_drawn(py::module_& m);

}  // namespace fusereg
