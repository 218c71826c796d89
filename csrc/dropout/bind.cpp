// fusereg._C: dropout in all its kinds. Contract: dropout.h, _C.pyi.
#include <pybind11/stl.h>

#include <string>
#include <vector>

#include "core/call.h"
#include "core/drawn.h"
#include "core/philox.h"
#include "core/seed_argument.h"
#include "core/tensor.h"
#include "dropout/dropout.h"

namespace fusereg::dropout {
namespace {

// Memory order of the draws: one for each index of the first `row_dims` dimensions (0: one an
// element). False: the elements of a row do not lie as the kernels want them.
bool find_rows(const TensorView& x, int row_dims, Rows& rows) {
  if (row_dims == 0 || x.numel == 0) {
    rows = {x.numel, 1, 1};
    return x.dense();
  }
  std::int64_t draws = 1;
  for (int d = 0; d < row_dims; ++d) draws *= x.sizes[d];
  // Contiguous from dimension `first` on, with `last` put behind all others (-1: none).
  auto contiguous = [&x](int last) {
    std::int64_t expected = 1;
    auto fits = [&](int d) {
      if (x.sizes[d] == 1) return true;
      const bool good = x.strides[d] == expected;
      expected *= x.sizes[d];
      return good;
    };
    if (last >= 0 && !fits(last)) return false;
    for (int d = x.ndim - 1; d >= 0; --d) {
      if (d != last && !fits(d)) return false;
    }
    return true;
  };
  if (contiguous(-1)) {
    rows = {draws, x.numel / draws, 1};
  } else if (row_dims == 2 && contiguous(1)) {  // channels_last
    rows = {x.sizes[0], x.numel / draws, x.sizes[1]};
  } else if (row_dims == 1 && contiguous(1)) {  // a sample's elements lie together, in any order
    rows = {draws, x.numel / draws, 1};
  } else {
    return false;
  }
  return true;
}

Kind kind_of(bool alpha, bool backward) {
  if (!alpha) return Kind::kDropout;
  return backward ? Kind::kAlphaBackward : Kind::kAlpha;
}

// Forward and backward are one kernel, on x or on the gradient. 0: done; 2: Python must prepare a
// tensor first, and nothing has been written.
int apply(Kind kind, const TensorView& out, const TensorView& in, const SeedPair& random, double p,
          int row_dims, const py::object& index_offset, const char* op) {
  Job job;
  if (in.dtype != out.dtype || in.device != out.device || !in.same_layout(out))
    return kNeedsPreparation;
  if (row_dims < 0 || row_dims > in.ndim)
    throw py::value_error(where(op, "row_dims") + " is out of range");
  if (!find_rows(in, row_dims, job.rows)) return kNeedsPreparation;
  job.x = in.data;
  job.y = out.data;
  job.dtype = in.dtype;
  job.numel = in.numel;
  job.index_offset = bits_argument(index_offset, op, "index_offset");
  job.random = random;
  job.draw = make_draw(p);
  job.affine = make_affine(kind, job.draw);
  run_job(job, in.device, job.numel);
  return kDone;
}

template <bool kBackward>
int dropout(const py::object& y, const py::object& x, const py::object& seed,
            const py::object& offset, double p, bool alpha, int row_dims,
            const py::object& index_offset, const char* op) {
  if (!(p > 0.0 && p <= 1.0))
    throw py::value_error(where(op, "p") + " must be within (0, 1] for the kernel");
  TensorView in;
  TensorView out;
  if (read_tensor(x, in) != ::fusereg::Kind::kPlain ||
      read_tensor(y, out) != ::fusereg::Kind::kPlain) {
    return kNeedsPreparation;
  }
  const SeedPair random = seed_argument(seed, offset, in.device, op);
  return apply(kind_of(alpha, kBackward), out, in, random, p, row_dims, index_offset, op);
}

// The constants of the operator's schema: p, alpha, row_dims, index_offset.
int apply_drawn(bool backward, const TensorView& y, const TensorView& x, const TensorView*,
                const SeedPair& random, PyObject* const* constants, const char* op) {
  const double p = number_argument(constants[0], op, "p");
  const bool alpha = constants[1] == Py_True;
  const long row_dims = PyLong_AsLong(constants[2]);
  if (!(p > 0.0 && p <= 1.0) || row_dims < 0 || row_dims > x.ndim) return kNeedsPreparation;
  return apply(kind_of(alpha, backward), y, x, random, p, static_cast<int>(row_dims),
               py::reinterpret_borrow<py::object>(constants[3]), op);
}

// (bits, threshold, keep, a, b, c) of dropout.h for 0 < p <= 1.
py::tuple dropout_constants(double p, bool alpha) {
  if (!(p > 0.0 && p <= 1.0))
    throw py::value_error("fusereg.dropout_constants: p must be within (0, 1]");
  const Draw draw = make_draw(p);
  const Affine f = make_affine(alpha ? Kind::kAlpha : Kind::kDropout, draw);
  return py::make_tuple(draw.bits, draw.threshold, draw.keep, f.a, f.b, f.c);
}

// The words of the counters (low, high), (low, high + 1), ...: one by the scalar code, or as many
// as a vector of the chosen instruction set gives.
std::vector<std::uint32_t> philox_words(const py::object& key, const py::object& low,
                                        const py::object& high, bool vector, int rounds) {
  const char* const op = "philox_words";
  if (rounds != kMaskRounds && rounds != kNumberRounds)
    throw py::value_error(where(op, "rounds") + " must be 7 or 10, got " + std::to_string(rounds));
  const std::uint64_t k = bits_argument(key, op, "key");
  const std::uint64_t l = bits_argument(low, op, "low");
  const std::uint64_t h = bits_argument(high, op, "high");
#if !defined(FUSEREG_HOST_IS_DEVICE)  // which has no CPU kernels
  if (vector) {
    std::uint32_t words[kMaxWords];
    const int chunks = cpu_kernels().words(rounds, k, l, h, words);
    return {words, words + 4 * chunks};
  }
#endif
  (void)vector;
  const PhiloxWords w =
      rounds == kMaskRounds ? philox<kMaskRounds>(k, l, h) : philox<kNumberRounds>(k, l, h);
  return {w.word, w.word + 4};
}

}  // namespace

void bind(py::module_& m) {
  using py::arg;
  m.def("dropout_forward", &dropout<false>, arg("y"), arg("x"), arg("seed"), arg("offset"),
        arg("p"), arg("alpha"), arg("row_dims"), arg("index_offset"), op_argument());
  m.def("dropout_backward", &dropout<true>, arg("grad_x"), arg("grad_y"), arg("seed"),
        arg("offset"), arg("p"), arg("alpha"), arg("row_dims"), arg("index_offset"), op_argument());
  m.def(
      "dropout_functions",
      [](const py::object& forward, const py::object& backward) {
        return drawn_functions(&apply_drawn, 4, forward, backward);
      },
      arg("forward"), arg("backward"));
  m.def("dropout_constants", &dropout_constants, arg("p"), arg("alpha"));
  m.def("philox_words", &philox_words, arg("key"), arg("low"), arg("high"), arg("vector"),
        arg("rounds"));
}

}  // namespace fusereg::dropout
