// fusereg._C: cross-entropy. Contract: cross_entropy.h, _C.pyi.
#include <cstdint>
#include <string>

#include "core/call.h"
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
  TensorView kept;
  if (!read_dense(statistics, p.rows() * (p.soft() ? 2 : 1) + kTail, view, kept) ||
      kept.dtype != DType::kFloat64) {
    throw py::value_error(where(op, "statistics") + " must be contiguous float64 of size rows * " +
                          (p.soft() ? "2" : "1") + " + 3, got " + description(statistics));
  }
  p.statistics = static_cast<double*>(kept.data);
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
}

}  // namespace fusereg::cross_entropy
