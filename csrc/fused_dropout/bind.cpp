// fusereg._C: dropout fused with its neighbors. Contract: fused_dropout.h, _C.pyi.
#include <algorithm>
#include <memory>
#include <string>

#include "core/at_once.h"
#include "core/call.h"
#include "core/drawn.h"
#include "core/gate.h"
#include "core/seed_argument.h"
#include "core/tensor.h"
#include "fused_dropout/fused_dropout.h"

namespace fusereg::fused_dropout {
namespace {

Activation parse_activation(const std::string& name, const char* op) {
  if (name == "relu") return Activation::kRelu;
  if (name == "gelu") return Activation::kGelu;
  if (name == "gelu_tanh") return Activation::kGeluTanh;
  if (name == "silu") return Activation::kSilu;
  throw py::value_error(where(op, "activation") + " must be relu, gelu, gelu_tanh or silu, got " +
                        name);
}

void set_draw(Job& job, double p, const char* op) {
  if (!(p >= 0.0 && p <= 1.0)) throw py::value_error(where(op, "p") + " must be within [0, 1]");
  if (p == 0.0) {
    job.draw = {0, 0, 1.0};
    return;
  }
  job.draw = make_draw(p);
  job.scale = job.draw.keep == 0.0 ? 0.0 : 1.0 / job.draw.keep;
}

bool plain(const py::object& object, TensorView& view) {
  return read_tensor(object, view) == Kind::kPlain;
}

// Reads x and y into the job; false: Python must prepare them.
bool set_tensors(Job& job, const TensorView& x, const TensorView& y) {
  if (x.dtype != y.dtype || x.device != y.device || !x.same_layout(y) || !x.dense()) return false;
  job.x = x.data;
  job.y = y.data;
  job.dtype = x.dtype;
  job.numel = x.numel;
  return true;
}

bool fits(const TensorView& x, const TensorView& other) {
  return x.dtype == other.dtype && x.device == other.device && x.same_layout(other);
}

// Whether the last dimension is the one whose elements lie side by side: then the column of an
// element is its position modulo the bias's size.
bool last_is_innermost(const TensorView& x) {
  return x.ndim > 0 && (x.numel == 0 || x.sizes[x.ndim - 1] == 1 || x.strides[x.ndim - 1] == 1);
}

// A vector of x's last dimension.
bool is_vector_of(const TensorView& x, const TensorView& vector) {
  return vector.dtype == x.dtype && vector.device == x.device && vector.ndim == 1 && x.ndim > 0 &&
         vector.sizes[0] == x.sizes[x.ndim - 1] && (vector.sizes[0] < 2 || vector.strides[0] == 1);
}

// y = residual + dropout(x + bias), or with rows: whole slices of the first dimension. 0: done; 2:
// Python must prepare a tensor first, and nothing has been written.
int fused_dropout_add(const py::object& y, const py::object& x, const py::object& bias,
                      const py::object& residual, const py::object& seed, const py::object& offset,
                      double p, bool rows, const py::object& index_offset, const char* op) {
  Job job;
  set_draw(job, p, op);
  TensorView in, out, other, vector;
  if (!plain(x, in) || !plain(y, out) || !plain(residual, other) || !set_tensors(job, in, out) ||
      !fits(in, other)) {
    return kNeedsPreparation;
  }
  if (!bias.is_none()) {
    if (rows) throw py::value_error(where(op, "bias") + " does not go with rows");
    if (!plain(bias, vector) || !is_vector_of(in, vector) || !last_is_innermost(in))
      return kNeedsPreparation;
    job.bias = vector.data;
    job.columns = std::max<std::int64_t>(vector.numel, 1);
  }
  if (rows) {
    if (in.ndim == 0) throw py::value_error(where(op, "x") + " must have a dimension");
    // Each slice in one piece, one after the other.
    if (in.numel > 0 && in.sizes[0] > 1 && in.strides[0] * in.sizes[0] != in.numel)
      return kNeedsPreparation;
    job.form = Form::kRows;
    job.rows = std::max<std::int64_t>(in.sizes[0], 1);
  }
  job.other = other.data;
  job.index_offset = bits_argument(index_offset, op, "index_offset");
  job.random = seed_argument(seed, offset, in.device, op);
  run_job(job, in.device, job.numel);
  return kDone;
}

// Elements of float64 that fused_dropout_bias_backward needs for its partial sums.
std::int64_t fused_dropout_partials(std::int64_t numel, std::int64_t columns) {
  const char* const op = "fused_dropout_partials";
  if (size_argument(columns, 0, op, "columns") == 0) return 1;
  numel = std::max<std::int64_t>(size_argument(numel, 0, op, "numel"), 1);
  const Chunks cpu = make_chunks(numel, columns, kCpuRule);
  const Chunks cuda = make_chunks(numel, columns, kCudaRule);
  return std::max(cpu.width * cpu.count, cuda.width * cuda.count);
}

// The name of a capsule with memory of this file, in the place of the tensor `partials`.
constexpr char kPartials[] = "fusereg.fused_dropout.partials";

// grad_x = dropout(grad), grad_bias = its sum over all but the last dimension.
int fused_dropout_bias_backward(const py::object& grad_x, const py::object& grad_bias,
                                const py::object& grad, const py::object& partials,
                                const py::object& counters, const py::object& seed,
                                const py::object& offset, double p, const py::object& index_offset,
                                const char* op) {
  Job job;
  job.form = Form::kBiasBackward;
  set_draw(job, p, op);
  TensorView in, out, vector, slots;
  if (!plain(grad, in) || !plain(grad_x, out) || !plain(grad_bias, vector) ||
      !set_tensors(job, in, out) || !is_vector_of(in, vector) || !last_is_innermost(in)) {
    return kNeedsPreparation;
  }
  job.grad_bias = vector.data;
  job.columns = vector.numel;
  if (PyCapsule_IsValid(partials.ptr(), kPartials) != 0) {
    job.partials = static_cast<double*>(PyCapsule_GetPointer(partials.ptr(), kPartials));
  } else {
    slots = tensor_argument(partials, op, "partials");
    if (slots.dtype != DType::kFloat64 || slots.device != in.device || !slots.dense() ||
        slots.numel < fused_dropout_partials(job.numel, job.columns)) {
      throw py::value_error(where(op, "partials") +
                            " must be float64 on the gradient's device, as many as "
                            "fused_dropout_partials() says");
    }
    job.partials = static_cast<double*>(slots.data);
  }
  if (runs_cuda_kernels(in.device)) {
    job.counters =
        static_cast<unsigned*>(memory_argument(counters, 4 * kMaxTiles, in.device, op, "counters"));
  }
  job.index_offset = bits_argument(index_offset, op, "index_offset");
  job.random = seed_argument(seed, offset, in.device, op);
  run_job(job, in.device, job.numel);
  return kDone;
}

// The eager autograd function of `add` (core/at_once.h). ctx.rest is that of dropout, whose
// function gives the gradient of x where there is no bias.
class Add : public AtOnce {
 public:
  explicit Add(const py::object& gradient_of) : gradient_of_(gradient_of.inc_ref().ptr()) {}

  // x, bias, residual, (state, p, rows, index_offset, op)
  PyObject* forward(PyObject* const* args, Py_ssize_t count) const override {
    if (count != 5 || !PyTuple_CheckExact(args[4]) || PyTuple_GET_SIZE(args[4]) != 5)
      return nullptr;
    PyObject* const* const items = &PyTuple_GET_ITEM(args[4], 0);
    PyObject* const state = items[0];
    const char* const op = PyUnicode_AsUTF8(items[4]);
    if (op == nullptr || !PyTuple_CheckExact(state) || PyTuple_GET_SIZE(state) != 2) return nullptr;
    const py::object y = empty_like(args[1]);
    const auto object = [](PyObject* o) { return py::reinterpret_borrow<py::object>(o); };
    const double p = number_argument(items[1], op, "p");
    const bool rows = PyLong_AsLong(items[2]) == 1;
    TensorView out;
    if (fused_dropout_add(y, object(args[1]), object(args[2]), object(args[3]),
                          object(PyTuple_GET_ITEM(state, 0)), object(PyTuple_GET_ITEM(state, 1)), p,
                          rows, object(items[3]), op) != kDone ||
        read_memory(y, out) != Kind::kPlain) {
      return nullptr;
    }
    const py::tuple rest = py::make_tuple(object(state), object(items[1]), false, object(items[2]),
                                          object(items[3]), strides_of(out), object(items[4]));
    return set_rest(args[0], rest) ? Py_NewRef(y.ptr()) : nullptr;
  }

  PyObject* backward(PyObject* ctx, PyObject* const* grads, Saved&) const override {
    static PyObject* const needs_name = PyUnicode_InternFromString("needs_input_grad");
    const auto needs = py::reinterpret_steal<py::object>(PyObject_GetAttr(ctx, needs_name));
    const py::object rest = rest_of(ctx, 7);
    if (!rest || !needs || !PyTuple_Check(needs.ptr()) || PyTuple_GET_SIZE(needs.ptr()) < 3)
      return nullptr;
    PyObject* const* const items = &PyTuple_GET_ITEM(rest.ptr(), 0);
    const auto wanted = [&needs](Py_ssize_t i) {
      return PyTuple_GET_ITEM(needs.ptr(), i) == Py_True;
    };
    const char* const op = PyUnicode_AsUTF8(items[6]);
    const double p = number_argument(items[1], op == nullptr ? "add" : op, "p");
    // A state that is kept as a tensor; a gradient that is x's as it is.
    if (op == nullptr || !PyTuple_CheckExact(items[0]) || p == 0.0) return nullptr;
    const auto object = [](PyObject* o) { return py::reinterpret_borrow<py::object>(o); };
    const py::object grad = object(grads[0]);
    py::object grad_x = py::none();
    py::object grad_bias = py::none();
    if (wanted(1)) {
      TensorView in;
      if (!plain(grad, in) || runs_cuda_kernels(in.device) || !has_strides(in, items[5]))
        return nullptr;
      const std::int64_t columns = in.sizes[in.ndim - 1];
      grad_x = empty_like(grad);
      grad_bias = new_like(grad, {columns});
      const auto slots = static_cast<std::size_t>(fused_dropout_partials(in.numel, columns));
      const std::unique_ptr<double[]> memory(new double[slots]);
      if (fused_dropout_bias_backward(grad_x, grad_bias, grad, py::capsule(memory.get(), kPartials),
                                      py::none(), object(PyTuple_GET_ITEM(items[0], 0)),
                                      object(PyTuple_GET_ITEM(items[0], 1)), p, object(items[4]),
                                      op) != kDone) {
        return nullptr;
      }
      if (!wanted(0)) grad_x = py::none();
    } else if (wanted(0)) {
      PyObject* const arguments[] = {ctx, grad.ptr()};
      const auto found = py::reinterpret_steal<py::object>(
          PyObject_Vectorcall(gradient_of_, arguments, 2, nullptr));
      if (!found) throw Final();
      grad_x = object(PyTuple_GET_ITEM(found.ptr(), 0));
    }
    return PyTuple_Pack(4, grad_x.ptr(), grad_bias.ptr(), wanted(2) ? grad.ptr() : Py_None,
                        Py_None);
  }

 private:
  PyObject* gradient_of_;
};

// y = dropout(activation(x)), or with `saved` (x, or y for relu) y = dropout(x * activation'(saved)).
int activate(const TensorView& y, const TensorView& x, const TensorView* saved,
             Activation activation, const SeedPair& random, double p,
             const py::object& index_offset, const char* op) {
  Job job;
  job.form = saved == nullptr ? Form::kActivate : Form::kActivateBackward;
  job.activation = activation;
  set_draw(job, p, op);
  if (!set_tensors(job, x, y) || (saved != nullptr && !fits(x, *saved))) return kNeedsPreparation;
  if (saved != nullptr) job.other = saved->data;
  job.index_offset = bits_argument(index_offset, op, "index_offset");
  job.random = random;
  run_job(job, x.device, job.numel);
  return kDone;
}

int activation_dropout_forward(const py::object& y, const py::object& x,
                               const std::string& activation, const py::object& seed,
                               const py::object& offset, double p, const py::object& index_offset,
                               const char* op) {
  const Activation known = parse_activation(activation, op);
  TensorView in, out;
  if (!plain(x, in) || !plain(y, out)) return kNeedsPreparation;
  return activate(out, in, nullptr, known, seed_argument(seed, offset, in.device, op), p,
                  index_offset, op);
}

int activation_dropout_backward(const py::object& grad_x, const py::object& grad,
                                const py::object& saved, const std::string& activation,
                                const py::object& seed, const py::object& offset, double p,
                                const py::object& index_offset, const char* op) {
  const Activation known = parse_activation(activation, op);
  TensorView in, out, other;
  if (!plain(grad, in) || !plain(grad_x, out) || !plain(saved, other)) return kNeedsPreparation;
  return activate(out, in, &other, known, seed_argument(seed, offset, in.device, op), p,
                  index_offset, op);
}

// The constants of the operator's schema: p, activation, index_offset.
int activate_drawn(bool, const TensorView& y, const TensorView& x, const TensorView* saved,
                   const SeedPair& random, PyObject* const* constants, const char* op) {
  const double p = number_argument(constants[0], op, "p");
  const std::string name = py::str(constants[1]);
  return activate(y, x, saved, parse_activation(name, op), random, p,
                  py::reinterpret_borrow<py::object>(constants[2]), op);
}

Keeps kept_of_activation(PyObject* const* constants) {
  const bool relu = PyUnicode_Check(constants[1]) != 0 &&
                    PyUnicode_CompareWithASCIIString(constants[1], "relu") == 0;
  return relu ? Keeps::kResult : Keeps::kInput;
}

}  // namespace

void bind(py::module_& m) {
  using py::arg;
  m.def(
      "activation_dropout_functions",
      [](const py::object& forward, const py::object& backward) {
        return drawn_functions(&activate_drawn, 3, forward, backward, &kept_of_activation);
      },
      arg("forward"), arg("backward"));
  m.def(
      "fused_dropout_add_functions",
      [](const py::object& gradient_of, const py::object& forward, const py::object& backward) {
        return at_once_functions(new Add(gradient_of), forward, backward);
      },
      arg("gradient_of"), arg("forward"), arg("backward"));
  m.def("fused_dropout_add", &fused_dropout_add, arg("y"), arg("x"), arg("bias"), arg("residual"),
        arg("seed"), arg("offset"), arg("p"), arg("rows"), arg("index_offset"), op_argument());
  m.def("fused_dropout_partials", &fused_dropout_partials, arg("numel"), arg("columns"));
  m.def("fused_dropout_bias_backward", &fused_dropout_bias_backward, arg("grad_x"),
        arg("grad_bias"), arg("grad"), arg("partials"), arg("counters"), arg("seed"), arg("offset"),
        arg("p"), arg("index_offset"), op_argument());
  m.def("activation_dropout_forward", &activation_dropout_forward, arg("y"), arg("x"),
        arg("activation"), arg("seed"), arg("offset"), arg("p"), arg("index_offset"),
        op_argument());
  m.def("activation_dropout_backward", &activation_dropout_backward, arg("grad_x"), arg("grad"),
        arg("saved"), arg("activation"), arg("seed"), arg("offset"), arg("p"), arg("index_offset"),
        op_argument());
  m.attr("FUSED_DROPOUT_COUNTERS") = kMaxTiles;
}

}  // namespace fusereg::fused_dropout
