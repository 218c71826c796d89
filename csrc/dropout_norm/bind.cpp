// fusereg._C: dropout + normalization. Contract: dropout_norm.h, _C.pyi.
#include <memory>
#include <string>
#include <vector>

#include "core/at_once.h"
#include "core/call.h"
#include "core/gate.h"
#include "core/seed_argument.h"
#include "core/tensor.h"
#include "dropout_norm/dropout_norm.h"

namespace fusereg::dropout_norm {
namespace {

bool row_major(const TensorView& t) {
  std::int64_t expected = 1;
  for (int d = t.ndim - 1; d >= 0; --d) {
    if (t.sizes[d] != 1 && t.strides[d] != expected && t.numel != 0) return false;
    expected *= t.sizes[d];
  }
  return true;
}

// Whether a group of tensors is float32 beside a 16-bit main tensor.
struct Companions {
  bool known = false;
  bool wide = false;
};

// Reads the arguments of one call: what does not fit together is Python's to prepare or explain.
class Reader {
 public:
  // The tensor that the others are compared with: dtype, device, rows.
  explicit Reader(const py::object& main) {
    fits_ = read_tensor(main, main_) == Kind::kPlain && row_major(main_) && main_.ndim > 0;
    if (!fits_) return;
    length_ = main_.sizes[main_.ndim - 1];
    rows_ = 1;
    for (int d = 0; d + 1 < main_.ndim; ++d) rows_ *= main_.sizes[d];
    compute_ = main_.dtype == DType::kFloat64 ? DType::kFloat64 : DType::kFloat32;
  }

  bool fits() const { return fits_; }
  const TensorView& main() const { return main_; }
  std::int64_t rows() const { return rows_; }
  std::int64_t length() const { return length_; }

  // A tensor or None, of so many elements and this dtype.
  void* get(const py::object& object, std::int64_t numel, DType dtype) {
    TensorView view;
    return read(object, numel, view) && expect(view.dtype == dtype) ? view.data : nullptr;
  }
  // As the main tensor, element for element.
  void* same(const py::object& object) { return get(object, main_.numel, main_.dtype); }
  // Of the main tensor's dtype or, where that has 16 bits, float32; all of a group alike.
  void* companion(const py::object& object, std::int64_t numel, Companions& group) {
    TensorView view;
    if (!read(object, numel, view)) return nullptr;
    const bool wide = view.dtype != main_.dtype;
    if (!expect(!wide || (dtype_size(main_.dtype) == 2 && view.dtype == DType::kFloat32)) ||
        !expect(!group.known || group.wide == wide)) {
      return nullptr;
    }
    group = {true, wide};
    return view.data;
  }
  void* statistics(const py::object& object, bool rms) {
    return get(object, rows_ * statistics_per_row(rms), compute_);
  }
  void* partials(const py::object& object, std::int64_t numel) {
    return get(object, numel, compute_);
  }

 private:
  bool expect(bool good) {
    fits_ = fits_ && good;
    return fits_;
  }
  bool read(const py::object& object, std::int64_t numel, TensorView& view) {
    if (object.is_none()) return false;
    return expect(read_tensor(object, view) == Kind::kPlain && row_major(view) &&
                  view.numel == numel && view.device == main_.device);
  }

  TensorView main_;
  bool fits_ = false;
  std::int64_t rows_ = 0;
  std::int64_t length_ = 0;
  DType compute_ = DType::kFloat32;
};

void set_draw(Problem& problem, double p, const char* op) {
  if (!(p >= 0.0 && p <= 1.0)) throw py::value_error(where(op, "p") + " must be within [0, 1]");
  problem.draw = p == 0.0 ? Draw{0, 0, 1.0} : make_draw(p);
}

void require(const py::object& tensor, const char* op, const char* name) {
  if (tensor.is_none()) throw py::type_error(where(op, name) + " must be a tensor, got None");
}

// 0: done; 2: Python must prepare a tensor first, and nothing has been written.
int dropout_norm_forward(const py::object& y, const py::object& sum, const py::object& statistics,
                         const py::object& x, const py::object& residual, const py::object& weight,
                         const py::object& bias, const py::object& seed, const py::object& offset,
                         double p, double eps, bool rms, const py::object& index_offset,
                         const char* op) {
  Reader in(x);
  if (!in.fits()) return kNeedsPreparation;
  const std::int64_t numel = in.main().numel;
  Forward f;
  Companions sums;
  Companions weights;
  f.rms = rms;
  f.x = in.main().data;
  f.y = in.same(y);
  f.residual = in.companion(residual, numel, sums);
  f.sum = in.companion(sum, numel, sums);
  f.statistics = in.statistics(statistics, rms);
  f.weight = in.companion(weight, in.length(), weights);
  f.bias = in.companion(bias, in.length(), weights);
  if (!in.fits()) return kNeedsPreparation;
  require(y, op, "y");
  f.dtype = in.main().dtype;
  f.wide_sum = sums.wide;
  f.wide_weight = weights.wide;
  f.rows = in.rows();
  f.length = in.length();
  f.eps = eps;
  set_draw(f, p, op);
  f.index_offset = bits_argument(index_offset, op, "index_offset");
  f.random = seed_argument(seed, offset, in.main().device, op);
  run_job(f, in.main().device, f.rows * f.length);
  return kDone;
}

// The name of a capsule with memory of this file, in the place of the tensor `partials`.
constexpr char kPartials[] = "fusereg.dropout_norm.partials";

int dropout_norm_backward(const py::object& grad_x, const py::object& grad_residual,
                          const py::object& grad_weight, const py::object& grad_bias,
                          const py::object& grad_y, const py::object& grad_sum,
                          const py::object& sum, const py::object& statistics,
                          const py::object& weight, const py::object& seed,
                          const py::object& offset, double p, bool rms,
                          const py::object& index_offset, const py::object& partials,
                          const py::object& barrier, const char* op) {
  Reader in(grad_y);
  if (!in.fits()) return kNeedsPreparation;
  const std::int64_t numel = in.main().numel;
  const std::int64_t length = in.length();
  Backward b;
  Companions sums;
  Companions weights;
  b.rms = rms;
  b.grad_y = in.main().data;
  b.grad_x = in.same(grad_x);
  b.sum = in.companion(sum, numel, sums);
  b.grad_residual = in.companion(grad_residual, numel, sums);
  b.grad_sum = in.companion(grad_sum, numel, sums);
  b.statistics = in.statistics(statistics, rms);
  b.weight = in.companion(weight, length, weights);
  b.grad_weight = in.companion(grad_weight, length, weights);
  b.grad_bias = in.companion(grad_bias, length, weights);
  const bool on_cuda = runs_cuda_kernels(in.main().device);
  const Chunks chunks = on_cuda ? cuda_chunks(in.rows()) : cpu_chunks(in.rows());
  b.partials = PyCapsule_IsValid(partials.ptr(), kPartials)
                   ? PyCapsule_GetPointer(partials.ptr(), kPartials)
                   : in.partials(partials, chunks.count * b.slots() * length);
  if (!in.fits()) return kNeedsPreparation;
  require(sum, op, "sum");
  require(statistics, op, "statistics");
  if (b.slots() > 0) require(partials, op, "partials");
  b.dtype = in.main().dtype;
  b.wide_sum = sums.wide;
  b.wide_weight = weights.wide;
  b.rows = in.rows();
  b.length = length;
  set_draw(b, p, op);
  b.index_offset = bits_argument(index_offset, op, "index_offset");
  b.random = seed_argument(seed, offset, in.main().device, op);
  unsigned* word = nullptr;
  if (on_cuda && b.slots() > 0) {
    word = static_cast<unsigned*>(
        memory_argument(barrier, sizeof(unsigned), in.main().device, op, "barrier"));
  }
  run_job(b, in.main().device, b.rows * b.length, word);
  return kDone;
}

// --- the usual call, on the CPU, without Python (core/at_once.h) ---

// Row-major as torch.empty makes it: what is allocated like this tensor has its strides.
bool exactly_row_major(const TensorView& t) {
  std::int64_t expected = 1;
  for (int d = t.ndim - 1; d >= 0; --d) {
    if (t.strides[d] != expected) return false;
    expected *= t.sizes[d];
  }
  return t.ndim > 0 && t.numel > 0;
}

bool usual(py::handle tensor, TensorView& view) {
  return read_tensor(tensor, view) == Kind::kPlain && exactly_row_major(view);
}

void set_attribute(PyObject* object, PyObject* name, py::handle value) {
  if (PyObject_SetAttr(object, name, value.ptr()) != 0) throw AtOnce::Final();
}

bool is_state(PyObject* state) { return PyTuple_CheckExact(state) && PyTuple_GET_SIZE(state) == 2; }

// It keeps what op.py keeps.
class DropoutNorm : public AtOnce {
 public:
  Py_ssize_t results() const override { return 3; }

  // x, residual, weight, bias, (state, p, eps, rms, index_offset, keep, op)
  PyObject* forward(PyObject* const* args, Py_ssize_t count) const override {
    if (count != 6 || forward_mode()) return nullptr;
    PyObject* const ctx = args[0];
    const py::handle x = args[1], residual = args[2], weight = args[3], bias = args[4];
    PyObject* const rest = args[5];
    TensorView main;
    TensorView other;
    if (!PyTuple_CheckExact(rest) || PyTuple_GET_SIZE(rest) != 7 || !usual(x, main) ||
        runs_cuda_kernels(main.device) || (!residual.is_none() && !usual(residual, other))) {
      return nullptr;
    }
    PyObject* const* const items = &PyTuple_GET_ITEM(rest, 0);
    const char* const op = PyUnicode_AsUTF8(items[6]);
    if (!is_state(items[0]) || items[5] != Py_True || op == nullptr) return nullptr;
    const double p = number_argument(items[1], op, "p");
    const bool rms = items[3] == Py_True;
    const bool sum_is_x = p == 0.0 && residual.is_none();

    py::object y = empty_like(x);
    py::object sum =
        sum_is_x ? py::object(py::none()) : empty_like(residual.is_none() ? x : residual);
    std::vector<std::int64_t> rows(main.sizes, main.sizes + main.ndim);
    rows.back() = statistics_per_row(rms);
    const bool wide = main.dtype == DType::kFloat64 || main.dtype == DType::kFloat32;
    const py::object statistics = wide ? new_like(x, rows) : new_float32(x, rows);
    const auto object = [](py::handle t) { return py::reinterpret_borrow<py::object>(t); };
    if (dropout_norm_forward(
            y, sum, statistics, object(x), object(residual), object(weight), object(bias),
            object(PyTuple_GET_ITEM(items[0], 0)), object(PyTuple_GET_ITEM(items[0], 1)), p,
            number_argument(items[2], op, "eps"), rms, object(items[4]), op) != kDone) {
      return nullptr;
    }
    static PyObject* const names[] = {
        PyUnicode_InternFromString("state"),     PyUnicode_InternFromString("kept"),
        PyUnicode_InternFromString("constants"), PyUnicode_InternFromString("op"),
        PyUnicode_InternFromString("dtype"),     PyUnicode_InternFromString("sum_is_x")};
    static PyObject* const mark = PyUnicode_InternFromString("mark_non_differentiable");
    static PyObject* const materialize = PyUnicode_InternFromString("set_materialize_grads");
    static PyObject* const dtype = PyUnicode_InternFromString("dtype");
    set_attribute(ctx, names[0], items[0]);
    set_attribute(ctx, names[1], Py_True);
    set_attribute(ctx, names[2],
                  py::make_tuple(py::handle(items[1]), py::handle(items[2]), py::handle(items[3]),
                                 py::handle(items[4])));
    set_attribute(ctx, names[3], py::make_tuple(py::handle(items[6])));
    set_attribute(ctx, names[4],
                  py::reinterpret_steal<py::object>(PyObject_GetAttr(x.ptr(), dtype)));
    set_attribute(ctx, names[5], py::bool_(sum_is_x));
    PyObject* const marked[] = {ctx, statistics.ptr()};
    PyObject* const no[] = {ctx, Py_False};
    for (PyObject* const done : {PyObject_VectorcallMethod(mark, marked, 2, nullptr),
                                 PyObject_VectorcallMethod(materialize, no, 2, nullptr)}) {
      if (done == nullptr) throw Final();
      Py_DECREF(done);
    }
    PyObject* const tensors[] = {sum_is_x ? x.ptr() : sum.ptr(), statistics.ptr(), weight.ptr()};
    if (!save(ctx, tensors, 3)) throw Final();
    return PyTuple_Pack(3, y.ptr(), sum.ptr(), statistics.ptr());
  }

  PyObject* backward(PyObject* ctx, PyObject* const* grads, Saved& saved) const override {
    static PyObject* const names[] = {
        PyUnicode_InternFromString("state"), PyUnicode_InternFromString("constants"),
        PyUnicode_InternFromString("op"), PyUnicode_InternFromString("sum_is_x"),
        PyUnicode_InternFromString("needs_input_grad")};
    py::object kept[5];
    for (int i = 0; i < 5; ++i) {
      kept[i] = py::reinterpret_steal<py::object>(PyObject_GetAttr(ctx, names[i]));
      if (!kept[i]) return nullptr;
    }
    const auto is_tuple = [](const py::object& object, Py_ssize_t least) {
      return PyTuple_Check(object.ptr()) && PyTuple_GET_SIZE(object.ptr()) >= least;
    };
    const py::handle grad = grads[0];
    const py::object sum_grad =
        py::reinterpret_borrow<py::object>(kept[3].ptr() == Py_True ? Py_None : grads[1]);
    TensorView of_y;
    TensorView of_sum;
    // Nobody used y, or the sum of a call that is differentiated by torch's operations.
    if (grad.is_none() || !usual(grad, of_y) || runs_cuda_kernels(of_y.device) ||
        (!sum_grad.is_none() && !usual(sum_grad, of_sum)) || !is_state(kept[0].ptr()) ||
        !is_tuple(kept[1], 4) || !is_tuple(kept[2], 1) || !is_tuple(kept[4], 4)) {
      return nullptr;
    }
    PyObject* const* const constants = &PyTuple_GET_ITEM(kept[1].ptr(), 0);
    const char* const op = PyUnicode_AsUTF8(PyTuple_GET_ITEM(kept[2].ptr(), 0));
    if (op == nullptr) return nullptr;
    const double p = number_argument(constants[0], op, "p");
    const auto wanted = [&kept](Py_ssize_t i) {
      return PyTuple_GET_ITEM(kept[4].ptr(), i) == Py_True;
    };

    PyObject* const* const tensors = unpack(ctx, saved, 3);
    if (tensors == nullptr) return nullptr;
    const py::handle sum = tensors[0], weight = tensors[2];
    TensorView total;
    TensorView of_weight;
    if (!usual(sum, total)) return nullptr;
    if (!weight.is_none() && !usual(weight, of_weight)) return nullptr;
    // Without dropping, the gradients of x and residual are the same.
    const bool shared = p == 0.0 && wanted(0) && wanted(1) && of_y.dtype == total.dtype;
    const auto made = [](bool want, py::handle like) {
      return want && !like.is_none() ? empty_like(like) : py::object(py::none());
    };
    const py::object grad_x = made(wanted(0), grad);
    py::object grad_residual = made(wanted(1) && !shared, sum);
    const py::object grad_weight = made(wanted(2), weight);
    const py::object grad_bias = made(wanted(3), weight);
    const std::int64_t slots = !grad_weight.is_none() + !grad_bias.is_none();
    // Float64 are enough for those of any dtype.
    std::unique_ptr<double[]> memory;
    py::object partials = py::none();
    if (slots > 0) {
      const std::int64_t length = of_y.sizes[of_y.ndim - 1];
      const std::int64_t count = cpu_chunks(of_y.numel / length).count * slots * length;
      memory.reset(new double[static_cast<std::size_t>(count)]);
      partials = py::capsule(memory.get(), kPartials);
    }
    const auto object = [](py::handle t) { return py::reinterpret_borrow<py::object>(t); };
    if (dropout_norm_backward(
            grad_x, grad_residual, grad_weight, grad_bias, object(grad), sum_grad, object(sum),
            object(tensors[1]), object(weight), object(PyTuple_GET_ITEM(kept[0].ptr(), 0)),
            object(PyTuple_GET_ITEM(kept[0].ptr(), 1)), p, constants[2] == Py_True,
            object(constants[3]), partials, py::none(), op) != kDone) {
      return nullptr;
    }
    if (shared) grad_residual = grad_x;
    return PyTuple_Pack(5, grad_x.ptr(), grad_residual.ptr(), grad_weight.ptr(), grad_bias.ptr(),
                        Py_None);
  }
};

// How many slots `partials` has for this many rows.
std::int64_t dropout_norm_chunks(std::int64_t rows, bool cuda) {
  size_argument(rows, 0, "dropout_norm_chunks", "rows");
  return (cuda ? cuda_chunks(rows) : cpu_chunks(rows)).count;
}

}  // namespace

void bind(py::module_& m) {
  using py::arg;
  m.def("dropout_norm_forward", &dropout_norm_forward, arg("y"), arg("sum"), arg("statistics"),
        arg("x"), arg("residual"), arg("weight"), arg("bias"), arg("seed"), arg("offset"), arg("p"),
        arg("eps"), arg("rms"), arg("index_offset"), op_argument());
  m.def("dropout_norm_backward", &dropout_norm_backward, arg("grad_x"), arg("grad_residual"),
        arg("grad_weight"), arg("grad_bias"), arg("grad_y"), arg("grad_sum"), arg("sum"),
        arg("statistics"), arg("weight"), arg("seed"), arg("offset"), arg("p"), arg("rms"),
        arg("index_offset"), arg("partials"), arg("barrier"), op_argument());
  m.def(
      "dropout_norm_functions",
      [](const py::object& forward, const py::object& backward) {
        return at_once_functions(new DropoutNorm(), forward, backward);
      },
      arg("forward"), arg("backward"));
  m.def("dropout_norm_chunks", &dropout_norm_chunks, arg("rows"), arg("cuda"));
}

}  // namespace fusereg::dropout_norm
