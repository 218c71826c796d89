// fusereg._C: batch normalization. Contract: batch_norm.h, _C.pyi.
#include <algorithm>
#include <iterator>
#include <string>

#include "batch_norm/batch_norm.h"
#include "core/at_once.h"
#include "core/call.h"
#include "core/gate.h"
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
  Reader(py::handle x, std::int64_t samples, bool plain_order, const char* op) : op_(op) {
    ready_ = read_tensor(x, x_) == Kind::kPlain && find_layout(x_, samples, plain_order, layout_);
  }

  bool ready() const { return ready_; }
  const Layout& layout() const { return layout_; }
  const TensorView& x() const { return x_; }

  // Of x's dtype, device and layout, or null. `read`: one of tensor.h's.
  void* like_x(py::handle tensor, Kind (*read)(py::handle, TensorView&) = &read_tensor) {
    TensorView view;
    if (!ready_ || absent(tensor)) return nullptr;
    ready_ = read(tensor, view) == Kind::kPlain && view.dtype == x_.dtype &&
             view.device == x_.device && view.same_layout(x_);
    return view.data;
  }

  PerChannel per_channel(py::handle tensor, const char* name,
                         Kind (*read)(py::handle, TensorView&) = &read_tensor) {
    if (!ready_ || absent(tensor)) return {};
    TensorView view;
    if (read(tensor, view) != Kind::kPlain || view.device != x_.device ||
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
  void* raw(py::handle tensor, int bytes, std::int64_t count, const char* name) {
    if (!ready_ || absent(tensor)) return nullptr;
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
  std::int64_t* count(py::handle tensor) {
    if (!ready_ || absent(tensor)) return nullptr;
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
  static bool absent(py::handle tensor) { return !tensor || tensor.is_none(); }

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

// What forward and backward read alike; what is absent is None or null.
struct Inputs {
  py::handle residual, mask, bits, moments, weight, bias, running_mean, running_var;
};

template <class Job>
void read_inputs(Reader& reader, const Inputs& t, Job& job) {
  job.layout = reader.layout();
  job.dtype = reader.x().dtype;
  job.x = reader.x().data;
  job.residual = reader.like_x(t.residual);
  const Layout& l = job.layout;
  job.mask = static_cast<const std::uint8_t*>(reader.raw(t.mask, 1, l.outer * l.inner, "mask"));
  job.bits = static_cast<decltype(job.bits)>(reader.raw(t.bits, 1, l.bit_bytes(), "bits"));
  job.moments =
      static_cast<decltype(job.moments)>(reader.raw(t.moments, 8, 3 * l.statistics(), "moments"));
  job.weight = reader.per_channel(t.weight, "weight");
  job.bias = reader.per_channel(t.bias, "bias");
  job.running_mean = reader.per_channel(t.running_mean, "running_mean");
  job.running_var = reader.per_channel(t.running_var, "running_var");
}

template <class Job>
void check_moments(const Job& job, const char* op) {
  const bool running = job.running_mean.data != nullptr && job.running_var.data != nullptr;
  if (job.moments == nullptr && job.layout.channels > 0 &&
      !(job.statistics == Statistics::kFixed && running)) {
    throw py::value_error(where(op, "moments") + " must be given");
  }
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
  job.statistics = statistics_argument(statistics, op);
  job.eps = eps_argument(eps, op);
  job.momentum = momentum;
  job.y = reader.like_x(y);
  job.batches = reader.count(batches);
  read_inputs(reader, {residual, mask, bits, moments, weight, bias, running_mean, running_var},
              job);
  job.epilogue = reader.epilogue(activation, slope, p, seed, offset, index_offset);
  if (!reader.ready()) return kNeedsPreparation;
  check_moments(job, op);
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
  job.statistics = statistics_argument(statistics, op);
  job.eps = eps_argument(eps, op);
  job.reduce = reduce;
  job.from_y = from_y;
  if (grad.is_none()) throw py::type_error(where(op, "grad") + " must be a tensor, got None");
  job.grad = reader.like_x(grad);
  job.grad_x = reader.like_x(grad_x);
  job.grad_residual = reader.like_x(grad_residual);
  read_inputs(reader, {residual, mask, bits, moments, weight, bias, running_mean, running_var},
              job);
  job.sums = static_cast<double*>(reader.raw(sums, 8, 2 * job.layout.statistics(), "sums"));
  job.grad_weight = reader.per_channel(grad_weight, "grad_weight");
  job.grad_bias = reader.per_channel(grad_bias, "grad_bias");
  job.epilogue = reader.epilogue(activation, slope, p, seed, offset, index_offset);
  if (from_y && !can_invert(job)) {
    throw py::value_error(where(op, "from_y") +
                          " wants no residual, no dropout, and no activation or a leaky ReLU of "
                          "positive slope");
  }
  if (!reader.ready()) return kNeedsPreparation;
  check_moments(job, op);
  if (!reduce && job.sums == nullptr && job.statistics != Statistics::kFixed &&
      job.layout.channels > 0)
    throw py::value_error(where(op, "sums") + " must be given");
  return run(job, scratch, semaphores, reader.x().device, op);
}

// --- the usual call, on the CPU, without Python (core/at_once.h) ---

const char* const kActivations[] = {nullptr, "relu", "leaky_relu", "silu", "gelu"};

bool is_rectifier(int activation) { return activation == 1 || activation == 2; }

// -1: it is none of them.
int activation_of(py::handle name) {
  if (name.is_none()) return 0;
  if (PyUnicode_Check(name.ptr()) == 0) return -1;
  for (int i = 1; i < static_cast<int>(std::size(kActivations)); ++i) {
    if (PyUnicode_CompareWithASCIIString(name.ptr(), kActivations[i]) == 0) return i;
  }
  return -1;
}

// Whether torch's own result, contiguous or channels_last, has x's strides.
bool keeps_strides(const TensorView& x) {
  std::int64_t expected = 1;
  const auto follows = [&](int d, bool exactly) {
    if (x.strides[d] != expected && (exactly || x.sizes[d] != 1)) return false;
    expected *= x.sizes[d];
    return true;
  };
  const auto contiguous = [&](bool exactly) {
    expected = 1;
    for (int d = x.ndim - 1; d >= 0; --d) {
      if (!follows(d, exactly)) return false;
    }
    return true;
  };
  if (contiguous(true)) return true;
  if ((x.ndim != 4 && x.ndim != 5) || contiguous(false)) return false;
  expected = 1;
  if (!follows(1, true)) return false;
  for (int d = x.ndim - 1; d >= 2; --d) {
    if (!follows(d, true)) return false;
  }
  return follows(0, true);
}

bool same_strides(const TensorView& a, const TensorView& b) {
  return a.dtype == b.dtype && a.ndim == b.ndim && std::equal(a.sizes, a.sizes + a.ndim, b.sizes) &&
         std::equal(a.strides, a.strides + a.ndim, b.strides);
}

// An attribute of the settings, which are a layer or a tuple with names.
enum Setting {
  kTraining,
  kUpdateStats,
  kActivation,
  kEps,
  kNegativeSlope,
  kDropout,
  kVirtualBatchSize,
  kInplace,
  kMomentum,
  kSettings
};
py::object setting(py::handle settings, Setting which) {
  static PyObject* const* const names = [] {
    static const char* const kTexts[kSettings] = {
        "training", "update_stats",       "activation", "eps",     "negative_slope",
        "dropout",  "virtual_batch_size", "inplace",    "momentum"};
    static PyObject* made[kSettings];
    for (int i = 0; i < kSettings; ++i) made[i] = PyUnicode_InternFromString(kTexts[i]);
    return made;
  }();
  auto value = py::reinterpret_steal<py::object>(PyObject_GetAttr(settings.ptr(), names[which]));
  if (!value) throw py::error_already_set();
  return value;
}

// The moments of an eager call: bytes that only backward reads, which cost less than a tensor.
double* moments_in(PyObject* bytes) {
  return reinterpret_cast<double*>(PyByteArray_AS_STRING(bytes));
}

// A bool as it is; -1 for other objects.
int exact_bool(const py::object& value) {
  return value.ptr() == Py_True ? 1 : value.ptr() == Py_False ? 0 : -1;
}

// A call as Python prepares it (functional.py), of arguments that need not be looked at there.
class Call {
 public:
  // False: Python is to prepare it. Nothing was written.
  bool read(py::handle inputs, py::handle batches, py::handle settings, py::handle draw,
            const char* op) {
    if (!PyTuple_Check(inputs.ptr()) || PyTuple_GET_SIZE(inputs.ptr()) != 9) return false;
    PyObject* const* const items = &PyTuple_GET_ITEM(inputs.ptr(), 0);
    x_ = items[0];
    inputs_ = {items[1], {}, {}, {}, items[3], items[4], items[6], items[7]};
    for (const int unusual : {2, 5, 8}) {  // mask, moments, seed
      if (items[unusual] != Py_None) return false;
    }
    const int training = exact_bool(setting(settings, kTraining));
    const int updates = exact_bool(setting(settings, kUpdateStats));
    activation_ = activation_of(setting(settings, kActivation));
    eps_ = setting(settings, kEps);
    slope_ = setting(settings, kNegativeSlope);
    const py::object dropout = setting(settings, kDropout);
    if (training < 0 || updates < 0 || activation_ < 0 || !is_number(eps_) || !is_number(slope_) ||
        !is_number(dropout) || !setting(settings, kVirtualBatchSize).is_none() ||
        exact_bool(setting(settings, kInplace)) != 0) {
      return false;
    }
    Reader reader(x_, 0, false, op);
    const TensorView& x = reader.x();
    if (!reader.ready() || runs_cuda_kernels(x.device) || !keeps_strides(x)) return false;
    const std::int64_t channels = x.sizes[1];
    if (inputs_.running_mean.is_none() != inputs_.running_var.is_none()) return false;
    const bool of_batch = training == 1 || inputs_.running_mean.is_none();
    if (x.numel == 0 || (of_batch && x.numel == channels)) return false;
    for (const py::handle running : {inputs_.running_mean, inputs_.running_var}) {
      if (!running.is_none() && (!is_plain_type(running) || requires_grad(running))) return false;
    }
    job_.statistics = of_batch ? Statistics::kCompute : Statistics::kFixed;
    job_.eps = number_argument(eps_, op, "eps");
    if (!(job_.eps > 0.0) && (training == 1 || job_.eps != 0.0)) return false;
    p_ = number_argument(dropout, op, "dropout");
    if (!(p_ >= 0.0 && p_ <= 1.0)) return false;
    if (training == 0) p_ = 0.0;
    if (training == 1 && updates == 1) {
      const py::object momentum = setting(settings, kMomentum);
      if (!momentum.is_none() && !is_number(momentum)) return false;
      job_.momentum = momentum.is_none() ? kCumulative : number_argument(momentum, op, "momentum");
      if (!momentum.is_none() && !(job_.momentum > kCumulative)) return false;
      job_.batches = reader.count(batches);
      for (const py::handle t : {inputs_.running_mean, inputs_.running_var, batches}) {
        if (!t.is_none()) updated_.append(t);
      }
    } else if (of_batch) {
      inputs_.running_mean = inputs_.running_var = {};
    }
    derived_ = grad_enabled() && asks_for_gradient();
    if (derived_ && !inputs_.residual.is_none() && is_rectifier(activation_))
      inputs_.bits = bits_ = new_bytes(x_, reader.layout().bit_bytes());
    y_ = empty_like(x_);
    job_.y = reader.like_x(y_, &read_memory);
    read_inputs(reader, inputs_, job_);
    if (!reader.ready()) return false;
    if (of_batch) {
      const auto size = static_cast<Py_ssize_t>(3 * sizeof(double)) * channels;
      moments_ = py::reinterpret_steal<py::object>(PyByteArray_FromStringAndSize(nullptr, size));
      if (!moments_) throw py::error_already_set();
      job_.moments = moments_in(moments_.ptr());
    }
    py::object seed = py::int_(0);
    py::object offset = seed;
    if (p_ > 0.0) {  // last, for nothing else changes when this fails
      state_ = py::reinterpret_steal<py::object>(PyObject_CallOneArg(draw.ptr(), x_.ptr()));
      if (!state_) throw py::error_already_set();
      if (!PyTuple_CheckExact(state_.ptr()) || PyTuple_GET_SIZE(state_.ptr()) != 2) return false;
      seed = state_[py::int_(0)];
      offset = state_[py::int_(1)];
    }
    const double slope = number_argument(slope_, op, "negative_slope");
    job_.epilogue = reader.epilogue(activation_, slope, p_, seed, offset, py::int_(0));
    device_ = x.device;
    return reader.ready();
  }

  // False: autograd refuses that the running statistics are written; nothing was.
  bool compute(const char* op) {
    if (py::len(updated_) != 0 && !increment_version(updated_)) return false;
    run(job_, py::none(), py::none(), device_, op);
    return true;
  }

  py::object result(py::handle apply, py::handle op) const {
    if (!derived_) return y_;
    const bool fixed = job_.statistics == Statistics::kFixed;
    const auto or_none = [](py::handle t) { return t ? t : py::handle(Py_None); };
    const py::tuple constants =
        py::make_tuple(static_cast<int>(job_.statistics), eps_, 0, activation_, slope_, p_, 0);
    const py::tuple rest =
        py::make_tuple(y_, or_none(moments_), or_none(fixed ? inputs_.running_mean : py::handle()),
                       or_none(fixed ? inputs_.running_var : py::handle()), or_none(bits_),
                       constants, op, or_none(state_));
    return apply(x_, inputs_.residual, py::none(), inputs_.weight, inputs_.bias, rest);
  }

 private:
  bool asks_for_gradient() const {
    for (const py::handle t : {x_, inputs_.residual, inputs_.weight, inputs_.bias}) {
      if (!t.is_none() && requires_grad(t)) return true;
    }
    return false;
  }

  Forward job_;
  Device device_;
  py::handle x_;
  Inputs inputs_;
  int activation_ = 0;
  double p_ = 0.0;
  bool derived_ = false;
  py::object eps_, slope_, state_, y_, moments_, bits_;
  py::list updated_;
};

// (apply, draw, inputs, batches, settings, op), see _C.pyi.
PyObject* batch_norm_at_once(PyObject*, PyObject* const* args, Py_ssize_t count) {
  return guarded([&]() -> PyObject* {
    if (count != 6) throw py::type_error("fusereg: batch_norm_at_once takes 6 arguments");
    const char* const op = "batch_norm";
    Call call;
    const bool ready =
        nothing_traces() && !forward_mode() && attempt([&] {
          return call.read(args[2], args[3], args[4], args[1], op) && call.compute(op);
        });
    if (!ready) return Py_NewRef(Py_None);
    return call.result(args[0], args[5]).release().ptr();
  });
}

// What batch norm's autograd function keeps for backward; op.py keeps the same.
enum Kept { kX, kResidual, kMask, kWeight, kBias, kMoments, kMean, kVar, kSeed, kBits, kKept };
// Constants, op, whether there was a residual, the Philox state, the moments if they are no tensor.
constexpr Py_ssize_t kRest = 5;

class BatchNorm : public AtOnce {
 public:
  // The arguments are those of Call::result; others are Python's.
  PyObject* forward(PyObject* const* args, Py_ssize_t count) const override {
    if (count != 7 || !PyTuple_CheckExact(args[6]) || PyTuple_GET_SIZE(args[6]) != 8)
      return nullptr;
    PyObject* const* const rest = &PyTuple_GET_ITEM(args[6], 0);
    PyObject* const constants = rest[5];
    const long activation = PyLong_AsLong(PyTuple_GET_ITEM(constants, 3));
    const bool keeps_residual = activation != 0 && !is_rectifier(static_cast<int>(activation));
    PyObject* const kept[kKept] = {args[1], keeps_residual ? args[2] : Py_None,
                                   Py_None, args[4],
                                   args[5], Py_None,
                                   rest[2], rest[3],
                                   Py_None, rest[4]};
    if (!save(args[0], kept, kKept) ||
        !set_rest(args[0],
                  py::make_tuple(py::handle(constants), py::handle(rest[6]), args[2] != Py_None,
                                 py::handle(rest[7]), py::handle(rest[1])))) {
      throw Final();
    }
    return Py_NewRef(rest[0]);
  }

  PyObject* backward(PyObject* ctx, PyObject* const* grads, Saved& saved) const override {
    PyObject* const grad = grads[0];
    TensorView of_y;
    const py::object rest = rest_of(ctx, kRest);
    if (!rest || read_tensor(grad, of_y) != Kind::kPlain || runs_cuda_kernels(of_y.device))
      return nullptr;
    PyObject* const* const items = &PyTuple_GET_ITEM(rest.ptr(), 0);
    PyObject* const constants = items[0];
    const char* const op = PyUnicode_AsUTF8(items[1]);
    if (op == nullptr || !PyTuple_Check(constants) || PyTuple_GET_SIZE(constants) != 7)
      return nullptr;
    PyObject* const* const numbers = &PyTuple_GET_ITEM(constants, 0);
    Backward job;
    job.statistics = statistics_argument(static_cast<int>(PyLong_AsLong(numbers[0])), op);
    job.eps = number_argument(numbers[1], op, "eps");
    const auto activation = static_cast<int>(PyLong_AsLong(numbers[3]));
    const double slope = number_argument(numbers[4], op, "negative_slope");
    const double p = number_argument(numbers[5], op, "dropout");
    const bool has_state = PyTuple_CheckExact(items[3]) && PyTuple_GET_SIZE(items[3]) == 2;
    if (PyLong_AsLong(numbers[2]) != 0 || (p > 0.0 && !has_state)) return nullptr;
    static PyObject* const needs_name = PyUnicode_InternFromString("needs_input_grad");
    const auto needs = py::reinterpret_steal<py::object>(PyObject_GetAttr(ctx, needs_name));
    if (!needs || !PyTuple_Check(needs.ptr()) || PyTuple_GET_SIZE(needs.ptr()) < 5) return nullptr;

    PyObject* const* const kept = unpack(ctx, saved, kKept);
    if (kept == nullptr || kept[kMask] != Py_None) return nullptr;
    const bool keeps_residual = activation != 0 && !is_rectifier(activation);
    if (kept[kResidual] != Py_None && !keeps_residual) return nullptr;  // the result, by operators
    Reader reader(kept[kX], 0, false, op);
    if (!reader.ready()) return nullptr;
    const auto wanted = [&needs](Py_ssize_t i) {
      return PyTuple_GET_ITEM(needs.ptr(), i) == Py_True;
    };
    const auto made = [&wanted](Py_ssize_t i, py::handle like) {
      py::object result = py::none();
      if (wanted(i) && !like.is_none()) result = empty_like(like);
      return result;
    };
    // A large gradient that nobody else has is written over: its pages are there. (The kernels read
    // an element before they write it.)
    py::object grad_x;
    constexpr std::int64_t kWorthUsingAnew = std::int64_t{1} << 20;  // bytes
    if (wanted(0) && items[2] != Py_True && same_strides(of_y, reader.x()) &&
        of_y.numel * dtype_size(of_y.dtype) >= kWorthUsingAnew) {
      grad_x = in_memory_of(grad);
    }
    if (!grad_x) grad_x = made(0, kept[kX]);
    const py::object grad_residual =
        items[2] == Py_True ? made(1, kept[kX]) : py::object(py::none());
    const py::object grad_weight = made(3, kept[kWeight]);
    const py::object grad_bias = made(4, kept[kBias]);
    job.grad = reader.like_x(grad, &read_memory);  // asked above
    job.grad_x = reader.like_x(grad_x, &read_memory);
    job.grad_residual = reader.like_x(grad_residual, &read_memory);
    read_inputs(reader,
                {kept[kResidual],
                 {},
                 kept[kBits],
                 kept[kMoments],
                 kept[kWeight],
                 kept[kBias],
                 kept[kMean],
                 kept[kVar]},
                job);
    if (items[4] != Py_None) job.moments = moments_in(items[4]);
    job.grad_weight = reader.per_channel(grad_weight, "grad_weight", &read_memory);
    job.grad_bias = reader.per_channel(grad_bias, "grad_bias", &read_memory);
    job.reduce =
        job.statistics != Statistics::kFixed || !grad_weight.is_none() || !grad_bias.is_none();
    const auto number = [&](Py_ssize_t i) {
      return has_state ? py::reinterpret_borrow<py::object>(PyTuple_GET_ITEM(items[3], i))
                       : py::object(py::int_(0));
    };
    job.epilogue = reader.epilogue(activation, slope, p, number(0), number(1),
                                   py::reinterpret_borrow<py::object>(numbers[6]));
    if (!reader.ready()) return nullptr;
    check_moments(job, op);
    run(job, py::none(), py::none(), reader.x().device, op);
    // Of general calls' nine tensors and their rest; torch takes more than there are arguments.
    return PyTuple_Pack(10, grad_x.ptr(), grad_residual.ptr(), Py_None, grad_weight.ptr(),
                        grad_bias.ptr(), Py_None, Py_None, Py_None, Py_None, Py_None);
  }
};

PyMethodDef g_methods[] = {
    {"batch_norm_at_once", fast_function(&batch_norm_at_once), METH_FASTCALL,
     "batch_norm_at_once(apply, draw, inputs, batches, settings, op, /) -> Tensor | None"},
    {nullptr, nullptr, 0, nullptr},
};

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
  m.def(
      "batch_norm_functions",
      [](const py::object& forward, const py::object& backward) {
        return at_once_functions(new BatchNorm(), forward, backward);
      },
      arg("forward"), arg("backward"));
  if (PyModule_AddFunctions(m.ptr(), g_methods) != 0) throw py::error_already_set();
  m.def("batch_norm_layout", &batch_norm_layout, arg("x"), arg("group_samples"), arg("mask"));
  m.def("batch_norm_fits", &batch_norm_fits, arg("x"), arg("running_mean"), arg("running_var"),
        arg("weight"), arg("bias"));
  m.attr("BATCH_NORM_SEMAPHORE_BYTES") = kSemaphoreBytes;
  bind_plan(m);
}

}  // namespace fusereg::batch_norm
