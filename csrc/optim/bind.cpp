// fusereg._C: optimizer steps, norms of gradients and clipping. Contract: optim.h, _C.pyi.
#include <optional>

#include "core/call.h"
#include "core/ceil_div.h"
#include "core/launch_tables_python.h"
#include "core/tensor_list.h"
#include "optim/coefficients.h"
#include "optim/optim.h"
#include "optim/optim_math.h"

namespace fusereg::optim {
namespace {

// In addition to ListStatus: a parameter with a gradient has no state yet.
constexpr int kNeedsState = 3;

// A dict's value under an interned key; null where there is none.
py::object lookup(py::handle dict, py::handle key) {
  PyObject* const found = PyDict_GetItemWithError(dict.ptr(), key.ptr());
  if (found == nullptr && PyErr_Occurred() != nullptr) PyErr_Clear();
  return found == Py_None ? py::object() : py::reinterpret_borrow<py::object>(found);
}

// An int argument that stands for one of `count` enumerators.
template <class Enum>
Enum choice(int value, int count, const char* op, const char* name) {
  if (value < 0 || value >= count)
    throw py::value_error(where(op, name) + " is unknown: " + std::to_string(value));
  return static_cast<Enum>(value);
}

// A tuple of indices or counts.
std::vector<std::size_t> counts_argument(const py::tuple& tuple, const char* op, const char* name) {
  std::vector<std::size_t> counts;
  counts.reserve(tuple.size());
  for (const py::handle item : tuple) {
    const std::size_t count = PyLong_Check(item.ptr()) ? PyLong_AsSize_t(item.ptr()) : SIZE_MAX;
    if (count > static_cast<std::size_t>(kMostElements)) {
      PyErr_Clear();
      throw py::value_error(where(op, name) + " must hold integers that are not negative");
    }
    counts.push_back(count);
  }
  return counts;
}

// The names of an algorithm's states, as torch has them.
struct Keys {
  py::object state[kMaxStates];
  py::object step;
  py::object product;
  py::object master;
  py::object average;
};

Keys keys_of(Algorithm algorithm) {
  static const char* const kNames[kAlgorithms][kMaxStates] = {
      {"momentum_buffer", "", ""},
      {"exp_avg", "exp_avg_sq", "max_exp_avg_sq"},
      {"sum", "", ""},
      {"linear", "sum", ""},
      {"square_avg", "momentum_buffer", "grad_avg"},
      {"exp_avg", "exp_avg_sq", ""},
      {"exp_avg", "", ""},
      {"exp_avg", "exp_avg_sq", ""},
      {"exp_avg", "exp_avg_sq", ""}};
  const auto intern = [](const char* name) {
    return py::reinterpret_steal<py::object>(PyUnicode_InternFromString(name));
  };
  Keys keys;
  for (int i = 0; i < kMaxStates; ++i) {
    keys.state[i] = intern(kNames[static_cast<int>(algorithm)][i]);
  }
  keys.step = intern(algorithm == Algorithm::kFtrl ? "last" : "step");
  keys.master = intern("master_param");
  keys.average = intern("ema_param");
  keys.product = intern("mu_product");
  return keys;
}

bool has_step(Algorithm algorithm) { return algorithm != Algorithm::kSgd; }

// A Python number, or a tensor of one element: the CPU's is read now, the device's by the kernel.
Scalar read_number(py::handle value, const Device& device, const char* op, const char* name) {
  if (is_number(value)) return {number_argument(value, op, name)};
  TensorView v;
  if (read_tensor(value, v) == Kind::kNotTensor) {
    throw py::type_error(std::string("fusereg.") + op + ": " + name +
                         " must be a number or a tensor of one, got " + type_name(value));
  }
  v = tensor_argument(value, op, name);
  if (v.numel != 1 || (v.device != device && v.device.type != kDLCPU)) {
    throw py::value_error(std::string("fusereg.") + op + ": " + name + " must be one element on " +
                          device.name() + ", got " + std::to_string(v.numel) + " on " +
                          v.device.name());
  }
  if (v.device == device) return {0.0, v.data, v.dtype};
  return {dispatch_dtype(v.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    return static_cast<double>(to_compute(*static_cast<const T*>(v.data)));
  })};
}

// A tuple of (lr, first, second, eps, weight_decay, l1, l2, group, ema_decay, third, prox,
// maximize, amsgrad, nesterov, decoupled_decay, momentum, master_weights, average, centered,
// group_dim).
struct HyperTuple {
  py::tuple values;
  Flags flags;
  bool master = false;
  bool average = false;
  bool by_rows = true;  // group_dim is 0

  HyperTuple(py::handle tuple, const char* op) {
    constexpr std::size_t kSize = 20;
    if (!PyTuple_Check(tuple.ptr()) || py::len(tuple) != kSize)
      throw py::type_error(where(op, "hypers") + " must hold tuples of 20");
    values = py::reinterpret_borrow<py::tuple>(tuple);
    flags.prox = choice<Prox>(values[10].cast<int>(), 4, op, "prox");
    flags.maximize = values[11].cast<bool>();
    flags.amsgrad = values[12].cast<bool>();
    flags.nesterov = values[13].cast<bool>();
    flags.decoupled_decay = values[14].cast<bool>();
    flags.momentum = values[15].cast<bool>();
    master = values[16].cast<bool>();
    average = values[17].cast<bool>();
    flags.centered = values[18].cast<bool>();
    by_rows = values[19].cast<int>() == 0;
  }

  Hyper read(const Device& device, const char* op) const {
    const char* const names[10] = {"lr", "first", "second", "eps",       "weight_decay",
                                   "l1", "l2",    "group",  "ema_decay", "third"};
    Hyper h;
    Scalar* const scalars[10] = {&h.lr, &h.first, &h.second, &h.eps,       &h.weight_decay,
                                 &h.l1, &h.l2,    &h.group,  &h.ema_decay, &h.third};
    for (std::size_t i = 0; i < 10; ++i) *scalars[i] = read_number(values[i], device, op, names[i]);
    h.flags = flags;
    return h;
  }
};

// What belongs to one parameter; null where it is absent. The references are its own: another
// thread may put other tensors into the state while a kernel writes to these.
struct Objects {
  PyObject* parameter = nullptr;  // the list's
  py::object state[kMaxStates];
  py::object step;
  py::object product;
  py::object master;
  py::object average;
};

void prefetch_objects(const Objects& o, bool tensors) {
  const auto f = [tensors](PyObject* object) {
    if (tensors) {
      prefetch_tensor(object);
    } else {
      prefetch_object(object);
    }
  };
  f(o.parameter);
  for (const py::object& s : o.state) f(s.ptr());
  f(o.step.ptr());
  f(o.master.ptr());
  f(o.average.ptr());
}

bool is_zero(const Scalar& s) { return s.device == nullptr && s.host == 0.0; }

class JobBuilder {
  static constexpr std::size_t kAhead = 4;  // parameters

 public:
  JobBuilder(Algorithm algorithm, const char* op) : op_(op), keys_(keys_of(algorithm)) {
    job_.algorithm = algorithm;
  }

  // `counts`: how many of the parameters belong to each group of hyperparameters.
  // `grads` absent: each parameter's .grad. Parameters without a gradient are left out.
  int read(const ObjectList& params, const std::optional<ObjectList>& grads,
           const ObjectList& states, const py::tuple& counts, const py::tuple& hypers,
           const py::tuple& fresh) {
    const std::size_t count = params.size();
    for (const py::handle h : hypers) tuples_.emplace_back(h, op_);
    const std::vector<std::size_t> sizes = counts_argument(counts, op_, "counts");
    const std::vector<std::size_t> fresh_ones = counts_argument(fresh, op_, "fresh");
    check_counts(count, grads, states, sizes);
    objects_ = gather(params, states, sizes);
    job_.items.reserve(count);
    written_.reserve(count);
    grads_.reserve(count);
    std::size_t group = 0;
    std::size_t group_end = 0;
    std::size_t next_fresh = 0;
    for (std::size_t i = 0; i < count; ++i) {
      while (i == group_end) group_end += sizes[group++];
      if (i + 2 * kAhead < count) prefetch_objects(objects_[i + 2 * kAhead], false);
      if (i + kAhead < count) prefetch_objects(objects_[i + kAhead], true);
      py::object grad =
          grads ? py::reinterpret_borrow<py::object>((*grads)[i]) : grad_of(params[i]);
      if (grad.is_none()) continue;
      TensorView p;
      TensorView g;
      if (read_tensor(params[i], p) != Kind::kPlain || read_gradient(grad, g) != Kind::kPlain)
        return refused();
      if (job_.items.empty()) {
        device_ = p.device;
        for (const HyperTuple& h : tuples_) job_.hypers.push_back(h.read(device_, op_));
      }
      if (p.device != device_ || g.device != device_ || !p.dense() || !p.same_layout(g))
        return refused();
      Item item;
      item.hyper = static_cast<std::int32_t>(group - 1);
      item.p = p.data;
      item.p_dtype = p.dtype;
      item.g = g.data;
      item.g_dtype = g.dtype;
      item.numel = p.numel;
      while (next_fresh < fresh_ones.size() && fresh_ones[next_fresh] < i) ++next_fresh;
      // Told to nobody else: a table in memory would have to be written again for the next step.
      item.fresh = job_.algorithm == Algorithm::kSgd && next_fresh < fresh_ones.size() &&
                   fresh_ones[next_fresh] == i;
      const int status = read_state(objects_[i], p, item);
      if (status != 0) return status;
      if (!read_rows(p, item)) return refused();
      written_.add(p.data, p.numel * dtype_size(p.dtype));
      changed_.append(params[i]);
      grads_.push_back(std::move(grad));
      numel_ += p.numel;
      job_.items.push_back(item);
    }
    return written_.overlap() ? refused() : 0;
  }

  int set_value(py::handle value) {
    if (value.is_none()) return 0;
    const TensorView v = tensor_argument(value, op_, "value");
    // The list begins with a parameter without a gradient, on another device.
    if (v.device != device_) return refused();
    if (v.numel != 1 || (v.dtype != DType::kFloat32 && v.dtype != DType::kFloat64)) {
      throw py::value_error(std::string("fusereg.") + op_ +
                            ": value must be one float32 or float64 element on " + device_.name());
    }
    job_.value = v.data;
    job_.value_dtype = v.dtype;
    return 0;
  }

  void set_scaling(py::handle grad_scale, py::handle found_inf, py::handle norm, double max_norm) {
    if (!grad_scale.is_none())
      job_.grad_scale = read_number(grad_scale, device_, op_, "grad_scale");
    if (!found_inf.is_none()) job_.found_inf = read_number(found_inf, device_, op_, "found_inf");
    if (norm.is_none()) return;
    job_.norm = read_number(norm, device_, op_, "norm");
    job_.max_norm = max_norm;
  }

  // LAMB's memory for norms.
  void set_norms(const py::object& norms) {
    if (job_.algorithm != Algorithm::kLamb && is_whole(job_.algorithm)) return;
    auto count = static_cast<std::int64_t>(job_.items.size());
    for (const Item& item : job_.items) count += ceil_div(item.numel, kChunk);
    job_.norms = static_cast<double*>(
        memory_argument(norms, 2 * count * dtype_size(DType::kFloat64), device_, op_, "norms"));
  }

  bool empty() const { return job_.items.empty(); }

  // Autograd is told before anything is written: if it refuses, nothing has changed.
  int run(const py::object& workspace, const py::object& tables) {
    LaunchTables* const long_tables = launch_tables_argument(tables, op_, "tables");
    void* const memory = runs_cuda_kernels(device_) ? memory_argument(workspace, kWorkspaceBytes,
                                                                      device_, op_, "workspace")
                                                    : nullptr;
    if (!increment_version(changed_)) return refused();
    run_job(job_, device_, numel_, memory, long_tables);
    return 0;
  }

 private:
  // The dtype in which p is updated.
  static DType widest(const TensorView& p) {
    return p.dtype == DType::kFloat64 ? DType::kFloat64 : DType::kFloat32;
  }

  static int refused() { return static_cast<int>(ListStatus::kNeedsPreparation); }

  void check_counts(std::size_t count, const std::optional<ObjectList>& grads,
                    const ObjectList& states, const std::vector<std::size_t>& sizes) const {
    std::size_t sum = 0;
    for (const std::size_t size : sizes) sum += size;
    if (states.size() != count || (grads && grads->size() != count) || sum != count ||
        sizes.size() != tuples_.size()) {
      throw py::value_error(std::string("fusereg.") + op_ +
                            ": params, grads, states, counts and hypers do not go together");
    }
    for (std::size_t i = 0; i < count; ++i) {
      if (!PyDict_Check(states[i].ptr()))
        throw py::type_error(where(op_, "states") + " must hold dicts, got " +
                             type_name(states[i]));
    }
  }

  // RMSprop without momentum has its mean where the buffer would be.
  const py::object& key_of(int k, const Flags& f) const {
    const bool mean = job_.algorithm == Algorithm::kRmsprop && k == 1 && !f.momentum;
    return keys_.state[mean ? 2 : k];
  }

  std::vector<Objects> gather(const ObjectList& params, const ObjectList& states,
                              const std::vector<std::size_t>& sizes) const {
    std::vector<Objects> found(params.size());
    std::size_t i = 0;
    for (std::size_t group = 0; group < sizes.size(); ++group) {
      const int wanted = state_count(job_.algorithm, tuples_[group].flags);
      const std::size_t end = i + sizes[group];
      for (; i < end; ++i) {
        if (i + 2 * kAhead < params.size()) prefetch_object(states[i + 2 * kAhead].ptr());
        if (i + kAhead < params.size()) prefetch_tensor(states[i + kAhead].ptr());
        Objects& o = found[i];
        o.parameter = params[i].ptr();
        for (int k = 0; k < wanted; ++k) {
          o.state[k] = lookup(states[i], key_of(k, tuples_[group].flags));
        }
        if (job_.algorithm == Algorithm::kNadam) o.product = lookup(states[i], keys_.product);
        if (has_step(job_.algorithm)) o.step = lookup(states[i], keys_.step);
        o.master = lookup(states[i], keys_.master);
        if (tuples_[group].average) o.average = lookup(states[i], keys_.average);
      }
    }
    return found;
  }

  int read_state(const Objects& objects, const TensorView& p, Item& item) {
    const Flags& flags = job_.hypers[static_cast<std::size_t>(item.hyper)].flags;
    const int count = state_count(job_.algorithm, flags);
    for (int k = 0; k < count; ++k) {
      const py::object& tensor = objects.state[k];
      if (!tensor) return kNeedsState;
      TensorView s;
      if (read_gradient(tensor, s) != Kind::kPlain || s.device != device_ || !p.same_layout(s) ||
          (k > 0 && s.dtype != item.state_dtype))
        return refused();
      item.state[k] = s.data;
      item.state_dtype = s.dtype;
    }
    if (has_step(job_.algorithm)) {
      const py::object& tensor = objects.step;
      if (!tensor) return kNeedsState;
      TensorView s;
      const bool numbers = job_.algorithm == Algorithm::kFtrl;  // a LastStep
      if (read_gradient(tensor, s) != Kind::kPlain || s.device != device_ ||
          s.numel != (numbers ? 4 : 1) || !s.dense() ||
          (numbers ? s.dtype != widest(p)
                   : s.dtype != DType::kFloat32 && s.dtype != DType::kFloat64))
        return refused();
      item.step = s.data;
      __builtin_prefetch(s.data);  // the launcher looks at it before the kernels at the rest
      item.step_dtype = numbers ? DType::kFloat32 : s.dtype;
    }
    if (job_.algorithm == Algorithm::kNadam) {
      if (!objects.product) return kNeedsState;
      TensorView s;
      if (read_tensor(objects.product, s) != Kind::kPlain || s.device != device_ || s.numel != 1 ||
          s.dtype != item.step_dtype)
        return refused();
      item.state[2] = s.data;
    }
    if (tuples_[static_cast<std::size_t>(item.hyper)].average) {
      if (!objects.average) return kNeedsState;
      TensorView a;
      if (read_gradient(objects.average, a) != Kind::kPlain || a.device != device_ ||
          !p.same_layout(a) || a.dtype != widest(p))
        return refused();
      item.average = a.data;
    }
    if (p.dtype != DType::kFloat16 && p.dtype != DType::kBFloat16) return 0;
    const py::object& master = objects.master;
    if (!master) {
      return tuples_[static_cast<std::size_t>(item.hyper)].master ? kNeedsState : 0;
    }
    TensorView m;
    if (read_gradient(master, m) != Kind::kPlain || m.device != device_ || !p.same_layout(m) ||
        m.dtype != DType::kFloat32)
      return refused();
    item.copy = item.p;
    item.copy_dtype = item.p_dtype;
    item.p = m.data;
    item.p_dtype = DType::kFloat32;
    return 0;
  }

  // False: the rows of dimension 0 do not lie one after the other.
  bool read_rows(const TensorView& p, Item& item) const {
    if (is_zero(job_.hypers[static_cast<std::size_t>(item.hyper)].group) || p.numel == 0)
      return true;
    if (!tuples_[static_cast<std::size_t>(item.hyper)].by_rows && p.ndim > 1) return false;
    item.row = p.ndim == 0 ? 1 : p.numel / p.sizes[0];
    return item.row == 1 || p.sizes[0] == 1 || p.strides[0] == item.row;
  }

  const char* op_;
  Keys keys_;
  Job job_;
  std::vector<HyperTuple> tuples_;
  Device device_;
  WrittenRanges written_;
  std::vector<Objects> objects_;   // these and
  std::vector<py::object> grads_;  // those are alive while the kernel runs
  py::list changed_;
  std::int64_t numel_ = 0;
};

int optimizer_step(int algorithm, const py::object& params, const py::object& grads,
                   const py::object& states, const py::tuple& counts, const py::tuple& hypers,
                   const py::tuple& fresh, const py::object& value, const py::object& grad_scale,
                   const py::object& found_inf, const py::object& norm, double max_norm,
                   const py::object& workspace, const py::object& tables, const char* op,
                   const py::object& norms) {
  const ObjectList param_list(params, op, "params");
  const ObjectList state_list(states, op, "states");
  std::optional<ObjectList> grad_list;
  if (!grads.is_none()) grad_list.emplace(grads, op, "grads");
  JobBuilder job(choice<Algorithm>(algorithm, kAlgorithms, op, "algorithm"), op);
  const int status = job.read(param_list, grad_list, state_list, counts, hypers, fresh);
  if (status != 0) return status;
  if (job.empty()) return 0;
  const int refused = job.set_value(value);
  if (refused != 0) return refused;
  job.set_scaling(grad_scale, found_inf, norm, max_norm);
  job.set_norms(norms);
  return job.run(workspace, tables);
}

// Reads a list of gradients (or, of parameters, their .grad); absent ones are left out.
class NormList {
 public:
  bool read(const ObjectList& tensors, bool of_params) {
    items.reserve(tensors.size());
    for (std::size_t i = 0; i < tensors.size(); ++i) {
      py::object grad =
          of_params ? grad_of(tensors[i]) : py::reinterpret_borrow<py::object>(tensors[i]);
      if (grad.is_none()) continue;
      TensorView g;
      if (read_gradient(grad, g) != Kind::kPlain || !g.dense()) return false;
      if (items.empty()) device = g.device;
      if (g.device != device) return false;
      items.push_back({g.data, g.numel, g.dtype});
      any_float64 = any_float64 || g.dtype == DType::kFloat64;
      numel += g.numel;
      kept.append(std::move(grad));
    }
    return true;
  }
  std::vector<NormItem> items;
  Device device;
  std::int64_t numel = 0;
  bool any_float64 = false;
  py::list kept;
};

// clip < 0: the norm alone.
int grad_norm(const py::object& tensors, bool of_params, const py::object& out, int norm,
              double clip, const py::object& workspace, const py::object& tables, const char* op) {
  const ObjectList list(tensors, op, of_params ? "parameters" : "tensors");
  NormList grads;
  if (!grads.read(list, of_params)) return static_cast<int>(ListStatus::kNeedsPreparation);
  if (grads.items.empty()) grads.device = tensor_argument(out, op, "out").device;
  const TensorView to = tensor_argument(out, op, "out");
  if (to.numel != 1 || (to.dtype != DType::kFloat32 && to.dtype != DType::kFloat64))
    throw py::value_error(where(op, "out") + " must be one float32 or float64 element");
  if (to.device != grads.device) return static_cast<int>(ListStatus::kNeedsPreparation);
  if (grads.any_float64 && to.dtype != DType::kFloat64)
    return static_cast<int>(ListStatus::kNeedsFloat64Value);
  NormJob job;
  job.norm = choice<Norm>(norm, 3, op, "norm");
  LaunchTables* const long_tables = launch_tables_argument(tables, op, "tables");
  void* const memory =
      runs_cuda_kernels(grads.device)
          ? memory_argument(workspace, kWorkspaceBytes, grads.device, op, "workspace")
          : nullptr;
  job.items = std::move(grads.items);
  job.out = to.data;
  job.out_dtype = to.dtype;
  ClipJob clipping;
  if (clip >= 0.0) {
    WrittenRanges written;
    written.reserve(job.items.size());
    for (const NormItem& item : job.items)
      written.add(item.data, item.numel * dtype_size(item.dtype));
    if (written.overlap() || !increment_version(grads.kept))
      return static_cast<int>(ListStatus::kNeedsPreparation);
    clipping.items = job.items;
    clipping.norm = {0.0, to.data, to.dtype};
    clipping.max_norm = clip;
  }
  run_job(job, grads.device, grads.numel, memory, long_tables);
  if (clip >= 0.0) run_job(clipping, grads.device, grads.numel, long_tables);
  return 0;
}

// Clips each element of each parameter's gradient to +-limit.
int clip_values(const py::object& params, double limit, const py::object& tables, const char* op) {
  const ObjectList list(params, op, "params");
  NormList grads;
  if (!grads.read(list, true)) return static_cast<int>(ListStatus::kNeedsPreparation);
  LaunchTables* const long_tables = launch_tables_argument(tables, op, "tables");
  WrittenRanges written;
  written.reserve(grads.items.size());
  for (const NormItem& item : grads.items)
    written.add(item.data, item.numel * dtype_size(item.dtype));
  if (written.overlap() || !increment_version(grads.kept))
    return static_cast<int>(ListStatus::kNeedsPreparation);
  if (grads.items.empty()) return 0;
  ClipJob job;
  job.items = std::move(grads.items);
  job.limit = limit;
  run_job(job, grads.device, grads.numel, long_tables);
  return 0;
}

// Clips each parameter's gradient row by row of dimension 0; a vector is one row.
int clip_rows(const py::object& params, double factor, double eps, const py::object& tables,
              const char* op) {
  const ObjectList list(params, op, "params");
  LaunchTables* const long_tables = launch_tables_argument(tables, op, "tables");
  AdaptiveJob job;
  job.factor = factor;
  job.eps = eps;
  Device device;
  std::int64_t numel = 0;
  py::list kept;
  WrittenRanges written;
  written.reserve(list.size());
  for (std::size_t i = 0; i < list.size(); ++i) {
    py::object grad = grad_of(list[i]);
    if (grad.is_none()) continue;
    TensorView p;
    TensorView g;
    if (read_tensor(list[i], p) != Kind::kPlain || read_gradient(grad, g) != Kind::kPlain ||
        !p.dense() || !p.same_layout(g))
      return static_cast<int>(ListStatus::kNeedsPreparation);
    if (job.items.empty()) device = p.device;
    const std::int64_t row = p.numel == 0 ? 1 : p.ndim <= 1 ? p.numel : p.numel / p.sizes[0];
    const bool in_order = p.ndim <= 1 || p.sizes[0] <= 1 || p.numel == 0 || p.strides[0] == row;
    if (p.device != device || g.device != device || !in_order)
      return static_cast<int>(ListStatus::kNeedsPreparation);
    AdaptiveItem item;
    item.p = p.data;
    item.numel = p.numel;
    item.row = row;
    item.p_dtype = p.dtype;
    item.g_dtype = g.dtype;
    job.items.push_back(item);
    job.grads.push_back(g.data);
    written.add(g.data, g.numel * dtype_size(g.dtype));
    numel += p.numel;
    kept.append(std::move(grad));
  }
  if (written.overlap() || !increment_version(kept))
    return static_cast<int>(ListStatus::kNeedsPreparation);
  if (!job.items.empty()) run_job(job, device, numel, long_tables);
  return 0;
}

}  // namespace

void bind(py::module_& m) {
  using py::arg;
  m.def("clip_values", &clip_values, arg("params"), arg("limit"), arg("tables"), op_argument());
  m.def("clip_rows", &clip_rows, arg("params"), arg("factor"), arg("eps"), arg("tables"),
        op_argument());
  m.def("optimizer_step", &optimizer_step, arg("algorithm"), arg("params"), arg("grads"),
        arg("states"), arg("counts"), arg("hypers"), arg("fresh"), arg("value"), arg("grad_scale"),
        arg("found_inf"), arg("norm"), arg("max_norm"), arg("workspace"), arg("tables"),
        op_argument(), arg("norms") = py::none());
  m.def("grad_norm", &grad_norm, arg("tensors"), arg("of_params"), arg("out"), arg("norm"),
        arg("clip"), arg("workspace"), arg("tables"), op_argument());
}

}  // namespace fusereg::optim
