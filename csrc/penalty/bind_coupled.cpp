// fusereg._C: the group lasso of coupled channels. Contract: coupled.h, _C.pyi.
#include "penalty/bind_coupled.h"

#include "core/call.h"
#include "core/tensor_list.h"
#include "penalty/coupled.h"

namespace fusereg::penalty {
namespace {

[[noreturn]] void refuse(const char* op, const char* name, const std::string& text) {
  throw py::value_error(where(op, name) + " must be " + text);
}

class CoupledBuilder {
 public:
  CoupledBuilder(CoupledJob::Pass pass, const py::object& params, const py::object& dims,
                 const char* op)
      : tensors_(params, op, "params"), dims_(dims, op, "dims"), op_(op) {
    job_.pass = pass;
    if (dims_.size() != tensors_.size())
      refuse(op, "dims", "as many as params, got " + std::to_string(dims_.size()));
  }

  // False: Python must prepare something first. `grads` null: the tensors themselves are written
  // to, but by kSums.
  bool read(const ObjectList* grads) {
    WrittenRanges written;
    for (std::size_t i = 0; i < tensors_.size(); ++i) {
      TensorView w;
      if (read_tensor(tensors_[i], w) != Kind::kPlain || !w.dense()) return false;
      if (i == 0) device_ = w.device;
      if (w.device != device_) return false;
      Item item;
      item.w = w.data;
      item.numel = w.numel;
      item.dtype = w.dtype;
      item.shape = shape_of(w, i);
      if (grads != nullptr) {
        TensorView g;
        if (read_gradient((*grads)[i], g) != Kind::kPlain || g.device != w.device ||
            g.dtype != w.dtype || !w.same_layout(g))
          return false;
        item.g = g.data;
        written.add(g.data, w.numel * dtype_size(w.dtype));
      } else if (job_.pass != CoupledJob::Pass::kSums) {
        written.add(w.data, w.numel * dtype_size(w.dtype));
        written_.append(tensors_[i]);
      }
      job_.items.push_back(item);
      job_.first.push_back(job_.entries);
      job_.entries += item.shape.groups;
      numel_ += w.numel;
    }
    return !written.overlap();
  }

  CoupledJob& job() { return job_; }

  const std::int32_t* indices(const py::object& t, std::int64_t count, const char* name) const {
    RawView view;
    if (!read_raw(t, view) || view.bytes != 4 || !view.integer || !view.contiguous ||
        view.numel != count || !(view.device == device_)) {
      refuse(op_, name,
             std::to_string(count) + " contiguous int32 on " + device_.name() + ", got " +
                 description(t));
    }
    return static_cast<const std::int32_t*>(view.data);
  }

  double* numbers(const py::object& t, std::int64_t count, const char* name) const {
    const TensorView v = tensor_argument(t, op_, name);
    if (v.dtype != DType::kFloat64 || v.numel != count || !(v.device == device_) || !v.dense()) {
      refuse(op_, name,
             std::to_string(count) + " dense float64 on " + device_.name() + ", got " +
                 description(t));
    }
    return static_cast<double*>(v.data);
  }
  std::int64_t count_of(const py::object& t, const char* name) const {
    return tensor_argument(t, op_, name).numel;
  }

  int run() {
    if (py::len(written_) != 0 && !increment_version(written_)) return kNeedsPreparation;
    run_job(job_, device_, numel_);
    return kDone;
  }

 private:
  GroupShape shape_of(const TensorView& w, std::size_t i) const {
    const long dim = PyLong_AsLong(dims_[i].ptr());
    if (dim == -1 && PyErr_Occurred() != nullptr) throw py::error_already_set();
    if (dim < 0 || dim >= w.ndim) {
      refuse(op_, ("dims[" + std::to_string(i) + "]").c_str(),
             "a dimension of a tensor with " + std::to_string(w.ndim) + ", got " +
                 std::to_string(dim));
    }
    const std::int64_t groups = w.sizes[dim];
    if (w.numel == 0) return {0, groups, 0};
    if (groups == 1) return {1, 1, w.numel};
    const std::int64_t inner = w.strides[dim];
    return {w.numel / (groups * inner), groups, inner};
  }

  const ObjectList tensors_;
  const ObjectList dims_;
  const char* op_;
  CoupledJob job_;
  Device device_;
  std::int64_t numel_ = 0;
  py::list written_;
};

// With `thresholds`, the proximal step as well.
int coupled_sums(const py::object& params, const py::object& dims, const py::object& slot_of,
                 const py::object& starts, const py::object& order, const py::object& partial,
                 const py::object& sums, double l1, bool thresholded, const py::object& thresholds,
                 const char* op) {
  const bool steps = !thresholds.is_none();
  CoupledBuilder b(steps ? CoupledJob::Pass::kStep : CoupledJob::Pass::kSums, params, dims, op);
  if (!b.read(nullptr)) return kNeedsPreparation;
  CoupledJob& job = b.job();
  const std::int64_t numbers = b.count_of(sums, "sums");
  job.slots = numbers / 2;
  job.sums = b.numbers(sums, 2 * job.slots, "sums");
  job.partial = b.numbers(partial, 2 * job.entries, "partial");
  if (reinterpret_cast<std::uintptr_t>(job.partial) % 16 != 0) {
    refuse(op, "partial", "memory that begins at a multiple of 16 bytes");
  }
  job.slot_of = b.indices(slot_of, job.entries, "slot_of");
  job.starts = b.indices(starts, job.slots + 1, "starts");
  job.order = b.indices(order, job.entries, "order");
  job.l1 = l1;
  job.thresholded = thresholded;
  job.squares = job.sums + job.slots;
  if (steps) job.factors = b.numbers(thresholds, job.slots, "thresholds");
  return b.run();
}

int coupled_backward(const py::object& params, const py::object& grads, const py::object& dims,
                     const py::object& slot_of, const py::object& first, const py::object& factors,
                     const char* op) {
  CoupledBuilder b(CoupledJob::Pass::kGrad, params, dims, op);
  const ObjectList targets(grads, op, "grads");
  if (targets.size() != py::len(params)) refuse(op, "grads", "as many as params");
  if (!b.read(&targets)) return kNeedsPreparation;
  CoupledJob& job = b.job();
  job.slots = b.count_of(factors, "factors");
  job.factors = b.numbers(factors, job.slots, "factors");
  job.slot_of = b.indices(slot_of, job.entries, "slot_of");
  if (!first.is_none()) job.first_factor = b.numbers(first, 1, "first");
  return b.run();
}

int coupled_prox_(const py::object& params, const py::object& dims, const py::object& slot_of,
                  double l1, const py::object& thresholds, const py::object& squares,
                  const char* op) {
  CoupledBuilder b(CoupledJob::Pass::kProx, params, dims, op);
  if (!b.read(nullptr)) return kNeedsPreparation;
  CoupledJob& job = b.job();
  job.slots = b.count_of(thresholds, "thresholds");
  job.factors = b.numbers(thresholds, job.slots, "thresholds");
  job.squares = b.numbers(squares, job.slots, "squares");
  job.slot_of = b.indices(slot_of, job.entries, "slot_of");
  job.l1 = l1;
  return b.run();
}

}  // namespace

void bind_coupled(py::module_& m) {
  using py::arg;
  m.def("coupled_sums", &coupled_sums, arg("params"), arg("dims"), arg("slot_of"), arg("starts"),
        arg("order"), arg("partial"), arg("sums"), arg("l1"), arg("thresholded"), arg("thresholds"),
        op_argument());
  m.def("coupled_backward", &coupled_backward, arg("params"), arg("grads"), arg("dims"),
        arg("slot_of"), arg("first"), arg("factors"), op_argument());
  m.def("coupled_prox_", &coupled_prox_, arg("params"), arg("dims"), arg("slot_of"), arg("l1"),
        arg("thresholds"), arg("squares"), op_argument());
}

}  // namespace fusereg::penalty
