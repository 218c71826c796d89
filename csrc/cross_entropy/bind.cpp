// fusereg._C: cross-entropy. Contract: cross_entropy.h, _C.pyi.
#include <cstdint>
#include <string>
#include <vector>

#include "core/at_once.h"
#include "core/call.h"
#include "core/gate.h"
#include "core/tensor.h"
#include "cross_entropy/cross_entropy.h"

namespace fusereg::cross_entropy {
namespace {

// Whether the dimensions other than `skipped` lie in row-major order, `scale` elements apart.
bool row_major(const TensorView& t, int skipped, std::int64_t scale) {
  std::int64_t expected = scale;
  for (int d = t.ndim - 1; d >= 0; --d) {
    if (d == skipped) continue;
    if (t.sizes[d] != 1 && t.strides[d] != expected) return false;
    expected *= t.sizes[d];
  }
  return true;
}

// The logits' memory order: contiguous, or with the classes last in memory and the rows in order.
bool read_logits(const py::object& x, Problem& p, TensorView& view) {
  if (read_tensor(x, view) != Kind::kPlain || view.ndim == 0) return false;
  const int dim = view.ndim == 1 ? 0 : 1;
  p.x = view.data;
  p.dtype = view.dtype;
  p.classes = view.sizes[dim];
  std::int64_t rows = 1;
  for (int d = 0; d < view.ndim; ++d) rows *= d == dim ? 1 : view.sizes[d];
  p.outer = rows;
  p.inner = 1;
  if (view.numel == 0) return true;
  if ((p.classes == 1 || view.strides[dim] == 1) && row_major(view, dim, p.classes)) return true;
  if (!row_major(view, -1, 1)) return false;
  p.outer = view.sizes[0];
  p.inner = rows / p.outer;
  return true;
}

bool read_dense(const py::object& object, std::int64_t numel, const TensorView& x,
                TensorView& view) {
  return read_tensor(object, view) == Kind::kPlain && view.device == x.device &&
         view.numel == numel && row_major(view, -1, 1);
}

template <class T>
bool read_integers(const py::object& object, std::int64_t numel, const TensorView& x,
                   const T*& data) {
  RawView view;
  if (!read_raw(object, view) || !view.integer || view.bytes != sizeof(T) ||
      view.device != x.device || view.numel != numel || !view.contiguous) {
    return false;
  }
  data = static_cast<const T*>(view.data);
  return true;
}

// Their memory: a tensor, or the bytes that the compiled call below makes, which cost less.
double* statistics_of(const py::object& object, std::int64_t count, const TensorView& x) {
  const auto bytes = count * static_cast<std::int64_t>(sizeof(double));
  if (PyBytes_CheckExact(object.ptr()) != 0 && !runs_cuda_kernels(x.device)) {
    if (PyBytes_GET_SIZE(object.ptr()) != bytes) return nullptr;
    return reinterpret_cast<double*>(PyBytes_AS_STRING(object.ptr()));
  }
  TensorView view;
  if (!read_dense(object, count, x, view) || view.dtype != DType::kFloat64) return nullptr;
  return static_cast<double*>(view.data);
}

void set_options(double smoothing, std::int64_t ignore_index, int reduction, const char* op,
                 Problem& p) {
  if (!(smoothing >= 0.0 && smoothing <= 1.0)) {
    throw py::value_error(where(op, "label_smoothing") + " must be within [0, 1]");
  }
  if (reduction < 0 || reduction > 2) {
    throw py::value_error(where(op, "reduction") + " must be 0, 1 or 2");
  }
  p.smoothing = smoothing;
  p.ignore_index = ignore_index;
  p.reduction = static_cast<Reduction>(reduction);
}

// The tensors that forward and backward have in common. False: Python must prepare one.
bool read_tensors(const py::object& x, const py::object& target, const py::object& other,
                  const py::object& share, const py::object& weight, const py::object& statistics,
                  const char* op, Problem& p, TensorView& view) {
  if (!read_logits(x, p, view)) return false;
  const DType wide = view.dtype == DType::kFloat64 ? DType::kFloat64 : DType::kFloat32;
  TensorView other_view;
  if (read_tensor(target, other_view) == Kind::kPlain) {
    if (other_view.device != view.device || !other_view.same_layout(view) ||
        other_view.numel != view.numel) {
      return false;
    }
    if (other_view.dtype != view.dtype && other_view.dtype != wide) return false;
    p.probabilities = other_view.data;
    p.wide_probabilities = other_view.dtype != view.dtype;
  } else if (!read_integers(target, p.rows(), view, p.index[0])) {
    return false;
  }
  if (!other.is_none()) {
    if (p.soft() || !read_integers(other, p.rows(), view, p.index[1])) return false;
    if (share.is_none()) throw py::type_error(where(op, "share") + " must be a tensor, got None");
    TensorView shares;
    if (read_tensor(share, shares) != Kind::kPlain || shares.dtype != DType::kFloat32 ||
        shares.device != view.device || !row_major(shares, -1, 1) || shares.numel == 0 ||
        p.rows() % shares.numel != 0) {
      if (p.rows() != 0) return false;
    } else {
      p.share = static_cast<const float*>(shares.data);
      p.rows_per_share = p.rows() / shares.numel;
    }
  }
  if (!weight.is_none()) {
    TensorView weights;
    if (!read_dense(weight, p.classes, view, weights) || weights.dtype != wide) return false;
    p.weight = weights.data;
  }
  p.statistics = statistics_of(statistics, p.rows() * (p.soft() ? 2 : 1) + kTail, view);
  if (p.statistics == nullptr) {
    throw py::value_error(where(op, "statistics") + " must be contiguous float64 of size rows * " +
                          (p.soft() ? "2" : "1") + " + 3, got " + description(statistics));
  }
  return true;
}

// Before anything is written.
void check_indices(const Forward& f, const char* op) {
  for (const std::int64_t* index : f.index) {
    for (std::int64_t row = 0; index != nullptr && row < f.rows(); ++row) {
      if (index[row] == f.ignore_index || (index[row] >= 0 && index[row] < f.classes)) continue;
      throw py::index_error(where(op, "target") + " must have class indices within [0, " +
                            std::to_string(f.classes) + ") or ignore_index, got " +
                            std::to_string(index[row]));
    }
  }
}

// 0: done; 2: Python must prepare a tensor first, and nothing has been written.
int forward(const py::object& loss, const py::object& statistics, const py::object& workspace,
            const py::object& x, const py::object& target, const py::object& other,
            const py::object& share, const py::object& weight, double smoothing,
            std::int64_t ignore_index, int reduction, const char* op) {
  Forward f;
  TensorView view;
  set_options(smoothing, ignore_index, reduction, op, f);
  if (!read_tensors(x, target, other, share, weight, statistics, op, f, view))
    return kNeedsPreparation;
  TensorView result;
  const std::int64_t numel = f.reduction == Reduction::kNone ? f.rows() : 1;
  if (!read_dense(loss, numel, view, result) ||
      (result.dtype != view.dtype &&
       (dtype_size(view.dtype) != 2 || result.dtype != DType::kFloat32))) {
    throw py::value_error(where(op, "loss") + " must be contiguous, in x's dtype or float32, got " +
                          description(loss));
  }
  f.loss = result.data;
  f.wide_loss = result.dtype != view.dtype;
  double* memory = nullptr;
#if defined(FUSEREG_CUDA)
  if (runs_cuda_kernels(view.device)) {
    memory = static_cast<double*>(
        memory_argument(workspace, kWorkspace * static_cast<std::int64_t>(sizeof(double)),
                        view.device, op, "workspace"));
    if (reinterpret_cast<std::uintptr_t>(memory) % 16 != 0) {
      throw py::value_error(where(op, "workspace") + " must begin at a multiple of 16 bytes");
    }
  }
#endif
  (void)workspace;
  if (memory == nullptr) check_indices(f, op);
  run_job(f, view.device, view.numel, memory);
  return kDone;
}

int backward(const py::object& grad_x, const py::object& grad, const py::object& x,
             const py::object& target, const py::object& other, const py::object& share,
             const py::object& weight, const py::object& statistics, double smoothing,
             std::int64_t ignore_index, int reduction, const char* op) {
  Backward b;
  TensorView view;
  set_options(smoothing, ignore_index, reduction, op, b);
  if (!read_tensors(x, target, other, share, weight, statistics, op, b, view))
    return kNeedsPreparation;
  TensorView incoming;
  TensorView result;
  if (!read_dense(grad, b.reduction == Reduction::kNone ? b.rows() : 1, view, incoming) ||
      read_tensor(grad_x, result) != Kind::kPlain || result.dtype != view.dtype ||
      result.device != view.device || !result.same_layout(view)) {
    return kNeedsPreparation;
  }
  b.grad = incoming.data;
  b.grad_dtype = incoming.dtype;
  b.grad_x = result.data;
  run_job(b, view.device, view.numel);
  return kDone;
}

// --- the usual call, on the CPU, without Python (core/at_once.h) ---

const char* const kReductions[] = {"none", "mean", "sum"};  // as torch numbers them

// -1: it is none of them.
int reduction_of(PyObject* name) {
  for (int i = 0; PyUnicode_Check(name) != 0 && i < 3; ++i) {
    if (PyUnicode_CompareWithASCIIString(name, kReductions[i]) == 0) return i;
  }
  return -1;
}

// Whether these are class indices of x's rows, as the kernels take them.
bool are_indices(PyObject* target, const TensorView& x) {
  RawView view;
  if (!read_raw(target, view) || !view.integer || view.ndim != x.ndim - 1) return false;
  for (int d = 0; d < view.ndim; ++d) {
    if (view.sizes[d] != x.sizes[d == 0 ? 0 : d + 1]) return false;
  }
  return true;
}

// A vector of this size that autograd does not want to know of.
bool is_vector(PyObject* tensor, std::int64_t size) {
  TensorView view;
  return read_tensor(tensor, view) == Kind::kPlain && view.ndim == 1 && view.numel == size &&
         !requires_grad(tensor);
}

// x, target, other, share, weight
constexpr int kTensors = 5;

// A call with class indices or mixed labels.
class Call {
 public:
  // mixed_labels: the type. False: Python must look at the arguments.
  bool compute(PyObject* mixed_labels, PyObject* x, PyObject* target, PyObject* weight,
               PyObject* ignore_index, PyObject* reduction, PyObject* smoothing) {
    TensorView view;
    // Whether 16-bit logits have a loss of float32 depends on autocast.
    if (read_tensor(x, view) != Kind::kPlain || runs_cuda_kernels(view.device) ||
        view.device.type != kDLCPU || view.numel == 0 || dtype_size(view.dtype) == 2) {
      return false;
    }
    tensors_[0] = x;
    tensors_[1] = target;
    const bool mixed = reinterpret_cast<PyObject*>(Py_TYPE(target)) == mixed_labels;
    if (mixed) {
      if (view.ndim < 2 || PyTuple_GET_SIZE(target) != 3) return false;
      for (int i = 0; i < 3; ++i) tensors_[i + 1] = PyTuple_GET_ITEM(target, i);
      if (!are_indices(tensors_[2], view) || !is_vector(tensors_[3], view.sizes[0])) return false;
    }
    if (!are_indices(tensors_[1], view)) return false;
    if (weight != Py_None && !is_vector(weight, view.sizes[view.ndim == 1 ? 0 : 1])) return false;
    tensors_[4] = weight;
    const int number = reduction_of(reduction);
    if (number < 0 || PyLong_CheckExact(ignore_index) == 0) return false;
    const long long ignored = PyLong_AsLongLong(ignore_index);
    if (ignored == -1 && PyErr_Occurred() != nullptr) return false;
    const double e = number_argument(smoothing, kOp, "label_smoothing");

    std::vector<std::int64_t> rows;
    if (number == static_cast<int>(Reduction::kNone)) {
      for (int d = 0; d < view.ndim; ++d) {
        if (d != (view.ndim == 1 ? 0 : 1)) rows.push_back(view.sizes[d]);
      }
    }
    loss_ = new_like(x, rows);
    const std::int64_t kept = view.numel / view.sizes[view.ndim == 1 ? 0 : 1] + kTail;
    statistics_ = py::reinterpret_steal<py::object>(PyBytes_FromStringAndSize(
        nullptr, static_cast<Py_ssize_t>(kept * static_cast<std::int64_t>(sizeof(double)))));
    if (!statistics_) throw py::error_already_set();
    differentiated_ = requires_grad(x) && grad_enabled();
    if (differentiated_) {
      const py::int_ how(number);
      constants_ = py::reinterpret_steal<py::object>(
          PyTuple_Pack(5, smoothing, ignore_index, how.ptr(), Py_False, statistics_.ptr()));
    }
    const auto tensor = [this](int i) { return py::reinterpret_borrow<py::object>(tensors_[i]); };
    return forward(loss_, statistics_, py::none(), tensor(0), tensor(1), tensor(2), tensor(3),
                   tensor(4), e, ignored, number, kOp) == kDone;
  }

  // Under autograd, whose function keeps what backward needs.
  py::object result(PyObject* apply) const {
    if (!differentiated_) return loss_;
    const auto rest =
        py::reinterpret_steal<py::object>(PyTuple_Pack(2, loss_.ptr(), constants_.ptr()));
    if (!rest) throw py::error_already_set();
    PyObject* const args[] = {tensors_[0], tensors_[1], tensors_[2],
                              tensors_[3], tensors_[4], rest.ptr()};
    PyObject* const loss = PyObject_Vectorcall(apply, args, std::size(args), nullptr);
    if (loss == nullptr) throw py::error_already_set();
    return py::reinterpret_steal<py::object>(loss);
  }

  static constexpr const char* kOp = "cross_entropy";

 private:
  PyObject* tensors_[kTensors] = {Py_None, Py_None, Py_None, Py_None, Py_None};
  py::object loss_;
  py::object statistics_;
  py::object constants_;  // (smoothing, ignore_index, reduction, whether to overwrite, statistics)
  bool differentiated_ = false;
};

// (apply, mixed_labels, input, target, weight, ignore_index, reduction, label_smoothing), see _C.pyi.
PyObject* cross_entropy_at_once(PyObject*, PyObject* const* args, Py_ssize_t count) {
  return guarded([&]() -> PyObject* {
    if (count != 8) throw py::type_error("fusereg: cross_entropy_at_once takes 8 arguments");
    Call call;
    const bool ready =
        nothing_traces() && !forward_mode() && attempt([&] {
          return call.compute(args[1], args[2], args[3], args[4], args[5], args[6], args[7]);
        });
    if (!ready) return Py_NewRef(Py_None);
    return call.result(args[0]).release().ptr();
  });
}

class CrossEntropy : public AtOnce {
 public:
  // The arguments are those of Call::result; others are Python's. It keeps what op.py keeps.
  PyObject* forward(PyObject* const* args, Py_ssize_t count) const override {
    if (count != 7 || !PyTuple_CheckExact(args[6]) || PyTuple_GET_SIZE(args[6]) != 2)
      return nullptr;
    PyObject* const* const rest = &PyTuple_GET_ITEM(args[6], 0);
    if (!save(args[0], args + 1, kTensors) || !set_rest(args[0], rest[1])) throw Final();
    return Py_NewRef(rest[0]);
  }

  PyObject* backward(PyObject* ctx, PyObject* const* grads, Saved& saved) const override {
    const py::object rest = rest_of(ctx, 5);
    TensorView grad;
    if (!rest || read_tensor(grads[0], grad) != Kind::kPlain) return nullptr;
    PyObject* const* const constants = &PyTuple_GET_ITEM(rest.ptr(), 0);
    PyObject* const* const tensors = unpack(ctx, saved, kTensors);
    if (tensors == nullptr) return nullptr;
    const auto tensor = [tensors](int i) { return py::reinterpret_borrow<py::object>(tensors[i]); };
    const py::object grad_x = empty_like(tensors[0]);
    if (cross_entropy::backward(
            grad_x, py::reinterpret_borrow<py::object>(grads[0]), tensor(0), tensor(1), tensor(2),
            tensor(3), tensor(4), py::reinterpret_borrow<py::object>(constants[4]),
            PyFloat_AsDouble(constants[0]), PyLong_AsLongLong(constants[1]),
            static_cast<int>(PyLong_AsLong(constants[2])), Call::kOp) != kDone) {
      return nullptr;
    }
    return PyTuple_Pack(6, grad_x.ptr(), Py_None, Py_None, Py_None, Py_None, Py_None);
  }
};

PyMethodDef g_methods[] = {
    {"cross_entropy_at_once", fast_function(&cross_entropy_at_once), METH_FASTCALL,
     "cross_entropy_at_once(apply, mixed_labels, input, target, weight, ignore_index, reduction, "
     "label_smoothing, /) -> Tensor | None"},
    {nullptr, nullptr, 0, nullptr},
};

}  // namespace

void bind(py::module_& m) {
  using py::arg;
  m.attr("CROSS_ENTROPY_WORKSPACE") = kWorkspace;
  m.def("cross_entropy_forward", &forward, arg("loss"), arg("statistics"), arg("workspace"),
        arg("x"), arg("target"), arg("other"), arg("share"), arg("weight"), arg("smoothing"),
        arg("ignore_index"), arg("reduction"), op_argument());
  m.def("cross_entropy_backward", &backward, arg("grad_x"), arg("grad"), arg("x"), arg("target"),
        arg("other"), arg("share"), arg("weight"), arg("statistics"), arg("smoothing"),
        arg("ignore_index"), arg("reduction"), op_argument());
  m.def(
      "cross_entropy_functions",
      [](const py::object& forward, const py::object& backward) {
        return at_once_functions(new CrossEntropy(), forward, backward);
      },
      arg("forward"), arg("backward"));
  if (PyModule_AddFunctions(m.ptr(), g_methods) != 0) throw py::error_already_set();
}

}  // namespace fusereg::cross_entropy
