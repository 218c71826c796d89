// fusereg._C: batch normalization. Contract: batch_norm.h, _C.pyi.
#include <algorithm>
#include <string>

#include "batch_norm/batch_norm.h"
#include "core/call.h"
#include "core/seed_argument.h"
#include "core/tensor.h"

namespace fusereg::batch_norm {

void bind_plan(py::module_& m);  // bind_plan.cpp

namespace {

// x as [outer, channels, inner], for any dense x: the dimensions whose stride is below the
// channels' are inner, the others are outer. `samples`: of a group; 0: all. plain_order: the
// dimensions but the channels' have to lie in their own order (a mask's bytes do).
bool find_layout(const TensorView& x, std::int64_t samples, bool plain_order, Layout& layout) {
  if (x.ndim < 2) return false;
  layout.channels = x.sizes[1];
  layout.inner = 1;
  layout.outer = 0;
  layout.group_rows = 0;
  if (x.numel == 0) return true;
  if (!x.dense()) return false;
  const std::int64_t n = x.sizes[0];
  const std::int64_t channels = x.sizes[1];
  if (channels > 1) {
    layout.inner = x.strides[1];
  } else {
    // Whatever is inside the samples, if these are outermost.
    const bool samples_outermost = n == 1 || x.strides[0] == x.numel / n;
    layout.inner = samples_outermost ? x.numel / n : 1;
  }
  layout.outer = x.numel / (channels * layout.inner);
  layout.group_rows = layout.outer;  // what is refused below is asked for its sizes all the same
  if (plain_order || samples > 0) {
    // From the last to the first dimension, skipping the channels, strides must grow.
    std::int64_t stride = 0;
    for (int d = x.ndim - 1; d >= 0; --d) {
      if (d == 1 || x.sizes[d] == 1) continue;
      if (x.strides[d] < stride) return false;
      stride = x.strides[d];
    }
    // A group is a run of whole samples: the channels must not lie outside of them.
    if (channels > 1 && n > 1 && x.strides[1] > x.strides[0]) return false;
  }
  if (samples > 0 && samples < n) layout.group_rows = samples * (layout.outer / n);
  return true;
}

// One call's arguments, read one by one; `ready` is false once a tensor needs preparing in Python.
class Reader {
 public:
  Reader(const py::object& x, std::int64_t samples, bool plain_order, const char* op) : op_(op) {
    ready_ = read_tensor(x, x_) == Kind::kPlain && find_layout(x_, samples, plain_order, layout_);
  }

  bool ready() const { return ready_; }
  const Layout& layout() const { return layout_; }
  const TensorView& x() const { return x_; }

  // Of x's dtype, device and layout, or null.
  void* like_x(const py::object& tensor) {
    TensorView view;
    if (!ready_ || tensor.is_none()) return nullptr;
    ready_ = read_tensor(tensor, view) == Kind::kPlain && view.dtype == x_.dtype &&
             view.device == x_.device && view.same_layout(x_);
    return view.data;
  }

  PerChannel per_channel(const py::object& tensor, const char* name) {
    if (!ready_ || tensor.is_none()) return {};
    TensorView view;
    if (read_tensor(tensor, view) != Kind::kPlain || view.device != x_.device ||
        (view.numel > 1 && view.strides[view.ndim - 1] != 1)) {
      ready_ = false;
      return {};
    }
    if (view.numel != layout_.channels || view.ndim != 1) {
      throw py::value_error(where(op_, name) + " must have shape (" +
                            std::to_string(layout_.channels) + ",), got " +
                            std::string(py::str(py::tuple(tensor.attr("shape")))));
    }
    const bool fits = view.dtype == x_.dtype || x_.numel == 0 ||
                      (view.dtype == DType::kFloat32 && x_.dtype != DType::kFloat64);
    if (!fits) {
      throw py::value_error(
          where(op_, name) + " must be " + dtype_name(x_.dtype) +
          (x_.dtype == DType::kFloat64 || x_.dtype == DType::kFloat32 ? "" : " or float32") +
          " for " + dtype_name(x_.dtype) + " x, got " + dtype_name(view.dtype));
    }
    return {view.data, view.dtype};
  }

  // Contiguous memory of `count` elements of `bytes` bytes each, or null.
  void* raw(const py::object& tensor, int bytes, std::int64_t count, const char* name) {
    if (!ready_ || tensor.is_none()) return nullptr;
    RawView view;
    if (!read_raw(tensor, view) || view.device != x_.device || !view.contiguous) {
      ready_ = false;
      return nullptr;
    }
    if (view.bytes != bytes || view.numel < count) {
      throw py::value_error(where(op_, name) + " must have " + std::to_string(count) +
                            " elements of " + std::to_string(bytes) + " bytes, got " +
                            std::to_string(view.numel) + " of " + std::to_string(view.bytes));
    }
    return view.data;
  }

  // The count of batches, or null; one of another kind is for Python to keep.
  std::int64_t* count(const py::object& tensor) {
    if (!ready_ || tensor.is_none()) return nullptr;
    RawView view;
    ready_ = read_raw(tensor, view) && view.device == x_.device && view.integer &&
             view.bytes == 8 && view.numel == 1;
    return ready_ ? static_cast<std::int64_t*>(view.data) : nullptr;
  }

  Epilogue epilogue(int activation, double slope, double p, const py::object& seed,
                    const py::object& offset, const py::object& index_offset) {
    Epilogue e;
    if (activation < 0 || activation > static_cast<int>(Activation::kGelu))
      throw py::value_error(where(op_, "activation") + " is unknown");
    if (!(p >= 0.0 && p <= 1.0))
      throw py::value_error(where(op_, "dropout") + " must be within [0, 1]");
    e.activation = static_cast<Activation>(activation);
    e.slope = slope;
    if (p > 0.0 && ready_) {
      e.dropout = true;
      e.draw = make_draw(p);
      e.random = seed_argument(seed, offset, x_.device, op_);
      e.index_offset = bits_argument(index_offset, op_, "index_offset");
    }
    return e;
  }

 private:
  const char* op_;
  TensorView x_;
  Layout layout_;
  bool ready_;
};

Statistics statistics_argument(int statistics, const char* op) {
  if (statistics < 0 || statistics > static_cast<int>(Statistics::kFixed))
    throw py::value_error(where(op, "statistics") + " is unknown");
  return static_cast<Statistics>(statistics);
}

double eps_argument(double eps, const char* op) {
  if (!(eps >= 0.0)) {
    throw py::value_error(where(op, "eps") + " must not be negative, got " + std::to_string(eps));
  }
  return eps;
}

// Whether y tells z.
bool can_invert(const Backward& job) {
  const Epilogue& e = job.epilogue;
  return job.residual == nullptr && job.bits == nullptr && !e.dropout &&
         (e.activation == Activation::kNone ||
          (e.activation == Activation::kLeakyRelu && e.slope > 0.0));
}

// Runs the job, or says how many bytes of scratch it wants (negative; nothing is written then).
template <class Job>
std::int64_t run(const Job& job, [[maybe_unused]] const py::object& scratch,
                 [[maybe_unused]] const py::object& semaphores, const Device& device,
                 [[maybe_unused]] const char* op) {
  RawView memory;
  RawView zeros;
#if defined(FUSEREG_CUDA)
  if (runs_cuda_kernels(device)) {
    const std::int64_t bytes = scratch_bytes(job, device.index);
    const bool there = read_raw(scratch, memory) && memory.device == device && memory.contiguous &&
                       memory.numel * memory.bytes >= bytes &&
                       reinterpret_cast<std::uintptr_t>(memory.data) % 16 == 0;
    if (!there) return -std::max<std::int64_t>(bytes, 16);
    if (!read_raw(semaphores, zeros) || zeros.device != device || !zeros.contiguous ||
        zeros.numel * zeros.bytes < kSemaphoreBytes) {
      throw py::value_error(where(op, "semaphores") + " must have " +
                            std::to_string(kSemaphoreBytes) + " bytes on x's device");
    }
  }
#endif
  run_job(job, device, job.layout.numel(), memory.data, zeros.data);
  return kDone;
}

std::int64_t batch_norm_forward(
    const py::object& y, const py::object& moments, const py::object& bits, const py::object& x,
    const py::object& residual, const py::object& mask, const py::object& weight,
    const py::object& bias, const py::object& running_mean, const py::object& running_var,
    const py::object& batches, const py::object& scratch, const py::object& semaphores,
    double momentum, int statistics, double eps, std::int64_t group_samples, int activation,
    double slope, double p, const py::object& seed, const py::object& offset,
    const py::object& index_offset, const char* op) {
  Reader reader(x, group_samples, !mask.is_none(), op);
  if (!reader.ready()) return kNeedsPreparation;  // sizes of the layout are divided by below
  Forward job;
  job.layout = reader.layout();
  job.dtype = reader.x().dtype;
  job.statistics = statistics_argument(statistics, op);
  job.eps = eps_argument(eps, op);
  job.momentum = momentum;
  job.x = reader.x().data;
  job.y = reader.like_x(y);
  job.residual = reader.like_x(residual);
  const Layout& l = job.layout;
  job.mask = static_cast<const std::uint8_t*>(reader.raw(mask, 1, l.outer * l.inner, "mask"));
  job.bits = static_cast<std::uint8_t*>(reader.raw(bits, 1, l.bit_bytes(), "bits"));
  job.moments = static_cast<double*>(reader.raw(moments, 8, 3 * l.statistics(), "moments"));
  job.batches = reader.count(batches);
  job.weight = reader.per_channel(weight, "weight");
  job.bias = reader.per_channel(bias, "bias");
  job.running_mean = reader.per_channel(running_mean, "running_mean");
  job.running_var = reader.per_channel(running_var, "running_var");
  job.epilogue = reader.epilogue(activation, slope, p, seed, offset, index_offset);
  if (!reader.ready()) return kNeedsPreparation;
  const bool running = job.running_mean.data != nullptr && job.running_var.data != nullptr;
  if (job.moments == nullptr && l.channels > 0 &&
      !(job.statistics == Statistics::kFixed && running)) {
    throw py::value_error(where(op, "moments") + " must be given");
  }
  return run(job, scratch, semaphores, reader.x().device, op);
}

std::int64_t batch_norm_backward(
    const py::object& grad_x, const py::object& grad_residual, const py::object& grad_weight,
    const py::object& grad_bias, const py::object& sums, const py::object& grad,
    const py::object& x, const py::object& residual, const py::object& mask, const py::object& bits,
    const py::object& moments, const py::object& weight, const py::object& bias,
    const py::object& running_mean, const py::object& running_var, const py::object& scratch,
    const py::object& semaphores, bool reduce, bool from_y, int statistics, double eps,
    std::int64_t group_samples, int activation, double slope, double p, const py::object& seed,
    const py::object& offset, const py::object& index_offset, const char* op) {
  Reader reader(x, group_samples, !mask.is_none(), op);
  if (!reader.ready()) return kNeedsPreparation;  // sizes of the layout are divided by below
  Backward job;
  job.layout = reader.layout();
  job.dtype = reader.x().dtype;
  job.statistics = statistics_argument(statistics, op);
  job.eps = eps_argument(eps, op);
  job.reduce = reduce;
  job.from_y = from_y;
  job.x = reader.x().data;
  if (grad.is_none()) throw py::type_error(where(op, "grad") + " must be a tensor, got None");
  job.grad = reader.like_x(grad);
  job.grad_x = reader.like_x(grad_x);
  job.grad_residual = reader.like_x(grad_residual);
  job.residual = reader.like_x(residual);
  const Layout& l = job.layout;
  job.mask = static_cast<const std::uint8_t*>(reader.raw(mask, 1, l.outer * l.inner, "mask"));
  job.bits = static_cast<const std::uint8_t*>(reader.raw(bits, 1, l.bit_bytes(), "bits"));
  job.moments = static_cast<const double*>(reader.raw(moments, 8, 3 * l.statistics(), "moments"));
  job.sums = static_cast<double*>(reader.raw(sums, 8, 2 * l.statistics(), "sums"));
  job.weight = reader.per_channel(weight, "weight");
  job.bias = reader.per_channel(bias, "bias");
  job.running_mean = reader.per_channel(running_mean, "running_mean");
  job.running_var = reader.per_channel(running_var, "running_var");
  job.grad_weight = reader.per_channel(grad_weight, "grad_weight");
  job.grad_bias = reader.per_channel(grad_bias, "grad_bias");
  job.epilogue = reader.epilogue(activation, slope, p, seed, offset, index_offset);
  if (from_y && !can_invert(job)) {
    throw py::value_error(where(op, "from_y") +
                          " wants no residual, no dropout, and no activation or a leaky ReLU of "
                          "positive slope");
  }
  if (!reader.ready()) return kNeedsPreparation;
  const bool running = job.running_mean.data != nullptr && job.running_var.data != nullptr;
  if (job.moments == nullptr && l.channels > 0 &&
      !(job.statistics == Statistics::kFixed && running)) {
    throw py::value_error(where(op, "moments") + " must be given");
  }
  if (!reduce && job.sums == nullptr && job.statistics != Statistics::kFixed && l.channels > 0)
    throw py::value_error(where(op, "sums") + " must be given");
  return run(job, scratch, semaphores, reader.x().device, op);
}

// The layout in which x is seen, or None where Python must prepare it, and the bytes of `bits`.
py::object batch_norm_layout(const py::object& x, std::int64_t group_samples, bool mask) {
  const Reader reader(x, group_samples, mask, "batch_norm");
  if (!reader.ready()) return py::none();
  const Layout& l = reader.layout();
  return py::make_tuple(l.outer, l.channels, l.inner, l.statistics(), l.bit_bytes());
}

// Whether x and the vectors, each of which may be None, have shapes and devices that go together,
// and no gradient of the running statistics is asked for.
// False: Python has to look for what is wrong, or for why they cannot be read.
bool batch_norm_fits(const py::object& x, const py::object& running_mean,
                     const py::object& running_var, const py::object& weight,
                     const py::object& bias) {
  TensorView view;
  if (!is_plain_type(x) || read_tensor(x, view) != Kind::kPlain || view.ndim < 2) return false;
  const auto fits = [&](const py::object& vector, bool running) {
    if (vector.is_none()) return true;
    TensorView v;
    return is_plain_type(vector) && read_tensor(vector, v) == Kind::kPlain && v.ndim == 1 &&
           v.numel == view.sizes[1] && v.device == view.device &&
           !(running && requires_grad(vector));
  };
  return fits(running_mean, true) && fits(running_var, true) && fits(weight, false) &&
         fits(bias, false);
}

}  // namespace

void bind(py::module_& m) {
  using py::arg;
  m.def("batch_norm_forward", &batch_norm_forward, arg("y"), arg("moments"), arg("bits"), arg("x"),
        arg("residual"), arg("mask"), arg("weight"), arg("bias"), arg("running_mean"),
        arg("running_var"), arg("batches"), arg("scratch"), arg("semaphores"), arg("momentum"),
        arg("statistics"), arg("eps"), arg("group_samples"), arg("activation"), arg("slope"),
        arg("p"), arg("seed"), arg("offset"), arg("index_offset"), op_argument());
  m.def("batch_norm_backward", &batch_norm_backward, arg("grad_x"), arg("grad_residual"),
        arg("grad_weight"), arg("grad_bias"), arg("sums"), arg("grad"), arg("x"), arg("residual"),
        arg("mask"), arg("bits"), arg("moments"), arg("weight"), arg("bias"), arg("running_mean"),
        arg("running_var"), arg("scratch"), arg("semaphores"), arg("reduce"), arg("from_y"),
        arg("statistics"), arg("eps"), arg("group_samples"), arg("activation"), arg("slope"),
        arg("p"), arg("seed"), arg("offset"), arg("index_offset"), op_argument());
  m.def("batch_norm_layout", &batch_norm_layout, arg("x"), arg("group_samples"), arg("mask"));
  m.def("batch_norm_fits", &batch_norm_fits, arg("x"), arg("running_mean"), arg("running_var"),
        arg("weight"), arg("bias"));
  m.attr("BATCH_NORM_SEMAPHORE_BYTES") = kSemaphoreBytes;
  bind_plan(m);
}

}  // namespace fusereg::batch_norm
