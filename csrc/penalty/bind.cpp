// fusereg._C: penalties and proximal steps over lists of tensors. Contract: penalty.h, _C.pyi.
#include <algorithm>
#include <optional>
#include <utility>

#include "core/call.h"
#include "core/tensor_list.h"
#include "penalty/bind_coupled.h"
#include "penalty/penalty.h"

namespace fusereg::penalty {
namespace {

struct Arguments {
  const char* op;
  const ObjectList& tensors;
  const PerTensor& l1;
  const PerTensor& l2;
  const PerTensor& group;
  std::int64_t dim;
};

GroupShape group_shape(const TensorView& w, std::int64_t dim, const char* op, std::size_t index) {
  const std::int64_t rank = std::max(w.ndim, 1);
  if (dim < -rank || dim >= rank) {
    throw py::value_error(std::string("fusereg.") + op + ": dim " + std::to_string(dim) +
                          " is out of range for params[" + std::to_string(index) + "] with " +
                          std::to_string(w.ndim) + " dimensions");
  }
  if (dim < 0) dim += rank;
  if (w.ndim == 0 || w.numel == 0 || w.sizes[dim] == 1) return {1, 1, w.numel};
  const std::int64_t groups = w.sizes[dim];
  const std::int64_t inner = w.strides[dim];
  return {w.numel / (groups * inner), groups, inner};
}

// Reads the tensors and, where the operation writes gradients, what it writes to.
// `grads` absent: each tensor's .grad, and none for a tensor that needs no gradient.
class JobBuilder {
 public:
  JobBuilder(Op op, const Arguments& a) : a_(a) { job_.op = op; }

  // False: Python must prepare something first.
  bool read(const std::optional<ObjectList>& grads) {
    const std::size_t count = a_.tensors.size();
    const bool writes_grad = job_.op == Op::kAddGrad || job_.op == Op::kWriteGrad;
    job_.items.reserve(count);
    WrittenRanges written;
    if (job_.op != Op::kValue) written.reserve(count);
    TensorView views[kBlock];
    py::object targets[kBlock];
    for (std::size_t begin = 0; begin < count; begin += kBlock) {
      const std::size_t end = std::min(begin + kBlock, count);
      for (std::size_t i = begin; i < end; ++i) {
        if (i + 2 * kAhead < count) prefetch_object(a_.tensors[i + 2 * kAhead].ptr());
        if (i + kAhead < count) prefetch_tensor(a_.tensors[i + kAhead].ptr());
        if (!read_item(i, views[i - begin])) return false;
        if (!writes_grad) continue;
        // Read when its memory has come, with those of the block.
        if (!find_target(i, grads, targets[i - begin])) return false;
        prefetch_tensor(targets[i - begin].ptr());
      }
      for (std::size_t i = begin; i < end; ++i) {
        const TensorView& w = views[i - begin];
        Item& item = job_.items[i];
        if (writes_grad && !read_target(std::move(targets[i - begin]), w, item)) return false;
        void* const target = writes_grad ? item.g : item.w;
        if (job_.op != Op::kValue && target != nullptr)
          written.add(target, w.numel * dtype_size(w.dtype));
      }
    }
    // Python says which of them share memory.
    return !written.overlap();
  }

  // Where the value goes; kNeedsFloat64Value if it cannot hold it.
  ListStatus set_value(py::handle value) {
    const TensorView v = tensor_argument(value, a_.op, "value");
    if (any_float64_ && v.dtype != DType::kFloat64) return ListStatus::kNeedsFloat64Value;
    check_scalar(v, "value");
    if (v.dtype != DType::kFloat32 && v.dtype != DType::kFloat64) {
      throw py::value_error(std::string("fusereg.") + a_.op +
                            ": value must be float32 or float64, got " + dtype_name(v.dtype));
    }
    job_.value = v.data;
    job_.value_dtype = v.dtype;
    return ListStatus::kDone;
  }

  void set_scale(const py::object& scale) {
    if (scale.is_none()) return;
    if (is_number(scale)) {
      job_.host_scale = number_argument(scale, a_.op, "scale");
      return;
    }
    const TensorView v = tensor_argument(scale, a_.op, "scale");
    check_scalar(v, "scale");
    job_.scale = v.data;
    job_.scale_dtype = v.dtype;
  }

  // Autograd is told before anything is written: if it refuses, nothing has changed.
  ListStatus run(const py::object& workspace) {
    void* const memory = runs_cuda_kernels(device_) ? memory_argument(workspace, kWorkspaceBytes,
                                                                      device_, a_.op, "workspace")
                                                    : nullptr;
    if (py::len(written_) != 0 && !increment_version(written_))
      return ListStatus::kNeedsPreparation;
    run_job(job_, device_, numel_, memory);
    return ListStatus::kDone;
  }

  void mark_written(py::handle tensor) { written_.append(tensor); }

 private:
  static constexpr std::size_t kAhead = 8;  // tensors
  static constexpr std::size_t kBlock = 32;

  bool read_item(std::size_t i, TensorView& w) {
    if (read_tensor(a_.tensors[i], w) != Kind::kPlain || !w.dense()) return false;
    if (i == 0) device_ = w.device;
    if (w.device != device_) return false;
    Item item;
    item.w = w.data;
    item.numel = w.numel;
    item.dtype = w.dtype;
    item.strengths = {a_.l1[i], a_.l2[i], a_.group[i]};
    if (item.strengths.group != 0.0) {
      item.shape = group_shape(w, a_.dim, a_.op, i);
      if (item.shape.group_size() == 1) {
        item.strengths.l1 += item.strengths.group;  // sqrt(1) * |w|
        item.strengths.group = 0.0;
      }
    }
    any_float64_ = any_float64_ || w.dtype == DType::kFloat64;
    numel_ += w.numel;
    job_.items.push_back(item);
    return true;
  }

  // What is written for a tensor; null: nothing.
  bool find_target(std::size_t i, const std::optional<ObjectList>& grads, py::object& target) {
    target = py::object();
    if (grads) {
      target = py::reinterpret_borrow<py::object>((*grads)[i]);
    } else {
      if (!requires_grad(a_.tensors[i])) return true;
      if (!is_leaf(a_.tensors[i])) return false;
      target = grad_of(a_.tensors[i]);
    }
    if (!target.is_none()) return true;
    if (job_.op == Op::kWriteGrad) {
      throw py::type_error(std::string("fusereg.") + a_.op + ": grads[" + std::to_string(i) +
                           "] must be a tensor, got None");
    }
    target = py::object();
    return grads.has_value();
  }

  bool read_target(py::object grad, const TensorView& w, Item& item) {
    if (!grad) return true;
    TensorView g;
    if (read_gradient(grad, g) != Kind::kPlain || g.device != w.device || g.dtype != w.dtype ||
        !w.same_layout(g))
      return false;
    item.g = g.data;
    written_.append(std::move(grad));
    return true;
  }

  void check_scalar(const TensorView& v, const char* name) const {
    if (v.numel == 1 && v.device == device_) return;
    throw py::value_error(std::string("fusereg.") + a_.op + ": " + name +
                          " must be one element on " + device_.name() + ", got " +
                          std::to_string(v.numel) + " on " + v.device.name());
  }

  const Arguments& a_;
  Job job_;
  Device device_;
  bool any_float64_ = false;
  std::int64_t numel_ = 0;
  py::list written_;  // also keeps the gradients alive while the kernel runs
};

int penalty_forward(const py::object& params, const py::object& value, const py::object& l1,
                    const py::object& l2, const py::object& group, std::int64_t dim,
                    const py::object& workspace, const char* op) {
  const ObjectList tensors(params, op, "params");
  const PerTensor l1s(l1, tensors.size(), op, "l1");
  const PerTensor l2s(l2, tensors.size(), op, "l2");
  const PerTensor groups(group, tensors.size(), op, "group");
  const Arguments a{op, tensors, l1s, l2s, groups, dim};
  JobBuilder job(Op::kValue, a);
  if (!job.read(std::nullopt)) return static_cast<int>(ListStatus::kNeedsPreparation);
  ListStatus status = job.set_value(value);
  if (status == ListStatus::kDone) status = job.run(workspace);
  return static_cast<int>(status);
}

int penalty_backward(const py::object& params, const py::object& grads, const py::object& scale,
                     const py::object& l1, const py::object& l2, const py::object& group,
                     std::int64_t dim, const py::object& workspace, const char* op) {
  const ObjectList tensors(params, op, "params");
  const ObjectList targets(grads, op, "grads");
  if (targets.size() != tensors.size())
    throw py::value_error("fusereg: as many grads as params are wanted");
  const PerTensor l1s(l1, tensors.size(), op, "l1");
  const PerTensor l2s(l2, tensors.size(), op, "l2");
  const PerTensor groups(group, tensors.size(), op, "group");
  const Arguments a{op, tensors, l1s, l2s, groups, dim};
  JobBuilder job(Op::kWriteGrad, a);
  if (!job.read(targets)) return static_cast<int>(ListStatus::kNeedsPreparation);
  job.set_scale(scale);
  return static_cast<int>(job.run(workspace));
}

int penalty_add_grad_(const py::object& params, const py::object& grads, const py::object& value,
                      const py::object& scale, const py::object& l1, const py::object& l2,
                      const py::object& group, std::int64_t dim, const py::object& workspace,
                      const char* op) {
  const ObjectList tensors(params, op, "params");
  std::optional<ObjectList> targets;
  if (!grads.is_none()) targets.emplace(grads, op, "grads");
  if (targets && targets->size() != tensors.size()) {
    throw py::value_error("fusereg: as many grads as params are wanted");
  }
  const PerTensor l1s(l1, tensors.size(), op, "l1");
  const PerTensor l2s(l2, tensors.size(), op, "l2");
  const PerTensor groups(group, tensors.size(), op, "group");
  const Arguments a{op, tensors, l1s, l2s, groups, dim};
  JobBuilder job(Op::kAddGrad, a);
  if (!job.read(targets)) return static_cast<int>(ListStatus::kNeedsPreparation);
  job.set_scale(scale);
  ListStatus status = job.set_value(value);
  if (status == ListStatus::kDone) status = job.run(workspace);
  return static_cast<int>(status);
}

int prox_(const py::object& params, const py::object& l1, const py::object& l2,
          const py::object& group, std::int64_t dim, const py::object& workspace, const char* op) {
  const ObjectList tensors(params, op, "params");
  const PerTensor l1s(l1, tensors.size(), op, "l1");
  const PerTensor l2s(l2, tensors.size(), op, "l2");
  const PerTensor groups(group, tensors.size(), op, "group");
  const Arguments a{op, tensors, l1s, l2s, groups, dim};
  JobBuilder job(Op::kProx, a);
  if (!job.read(std::nullopt)) return static_cast<int>(ListStatus::kNeedsPreparation);
  for (std::size_t i = 0; i < tensors.size(); ++i) job.mark_written(tensors[i]);
  return static_cast<int>(job.run(workspace));
}

}  // namespace

void bind(py::module_& m) {
  using py::arg;
  m.def("penalty_forward", &penalty_forward, arg("params"), arg("value"), arg("l1"), arg("l2"),
        arg("group"), arg("dim"), arg("workspace"), op_argument());
  m.def("penalty_backward", &penalty_backward, arg("params"), arg("grads"), arg("scale"), arg("l1"),
        arg("l2"), arg("group"), arg("dim"), arg("workspace"), op_argument());
  m.def("penalty_add_grad_", &penalty_add_grad_, arg("params"), arg("grads"), arg("value"),
        arg("scale"), arg("l1"), arg("l2"), arg("group"), arg("dim"), arg("workspace"),
        op_argument());
  m.def("prox_", &prox_, arg("params"), arg("l1"), arg("l2"), arg("group"), arg("dim"),
        arg("workspace"), op_argument());
  bind_coupled(m);
  m.attr("PENALTY_WORKSPACE_BYTES") = kWorkspaceBytes;
}

}  // namespace fusereg::penalty
