// fusereg._C: Gaussian dropout. Contract: gaussian_dropout.h, _C.pyi.
#include <cmath>
#include <string>

#include "core/call.h"
#include "core/drawn.h"
#include "core/seed_argument.h"
#include "core/tensor.h"
#include "gaussian_dropout/gaussian_dropout.h"

namespace fusereg::gaussian_dropout {
namespace {

// Forward and backward are one kernel, on x or on the gradient. 0: done; 2: Python must prepare a
// tensor first, and nothing has been written.
int run(const TensorView& out, const TensorView& in, const SeedPair& random, double p,
        const py::object& index_offset, const char* op) {
  if (in.dtype != out.dtype || in.device != out.device || !in.same_layout(out) || !in.dense()) {
    return kNeedsPreparation;
  }
  Job job;
  job.x = in.data;
  job.y = out.data;
  job.dtype = in.dtype;
  job.numel = in.numel;
  job.index_offset = bits_argument(index_offset, op, "index_offset");
  job.random = random;
  job.strength = std::sqrt(p / (1.0 - p));
  run_job(job, in.device, job.numel);
  return kDone;
}

int apply(const py::object& y, const py::object& x, const py::object& seed,
          const py::object& offset, double p, const py::object& index_offset, const char* op) {
  if (!(p > 0.0 && p < 1.0)) {
    throw py::value_error(where(op, "p") + " must be within (0, 1) for the kernel");
  }
  TensorView in;
  TensorView out;
  if (read_tensor(x, in) != Kind::kPlain || read_tensor(y, out) != Kind::kPlain)
    return kNeedsPreparation;
  const SeedPair random = seed_argument(seed, offset, in.device, op);
  return run(out, in, random, p, index_offset, op);
}

// The constants of the operator's schema: p, index_offset.
int apply_drawn(bool, const TensorView& y, const TensorView& x, const TensorView*,
                const SeedPair& random, PyObject* const* constants, const char* op) {
  const double p = number_argument(constants[0], op, "p");
  if (!(p > 0.0 && p < 1.0)) return kNeedsPreparation;
  return run(y, x, random, p, py::reinterpret_borrow<py::object>(constants[1]), op);
}

}  // namespace

void bind(py::module_& m) {
  using py::arg;
  m.def("gaussian_dropout_forward", &apply, arg("y"), arg("x"), arg("seed"), arg("offset"),
        arg("p"), arg("index_offset"), op_argument());
  m.def(
      "gaussian_dropout_functions",
      [](const py::object& forward, const py::object& backward) {
        return drawn_functions(&apply_drawn, 2, forward, backward);
      },
      arg("forward"), arg("backward"));
  m.def("gaussian_dropout_backward", &apply, arg("grad_x"), arg("grad_y"), arg("seed"),
        arg("offset"), arg("p"), arg("index_offset"), op_argument());
}

}  // namespace fusereg::gaussian_dropout
