// CUDA kernels of the optimizers. Contract: optimizer.h.
//
// A launch takes a table of parameters in its parameters (constant memory), as many as fit. Work is
// cut into chunks that never span tensors; a block finds its chunk's tensor by binary search over
// the chunk counts. All combinations of dtypes share one loop: a thread moves kPerThread elements
// of each tensor with as many 16-byte accesses as their dtype needs, chosen by a branch that is the
// same for the whole block. The last block to finish adds the blocks' shares of the value in their
// order and counts the launch's steps up: the other blocks have read them by then.
#include <algorithm>

#include "core/cuda.cuh"
#include "optimizer/coefficients.h"
#include "optimizer/optimizer.h"
#include "optimizer/optimizer_math.h"

namespace fusereg::optimizer {
namespace {

constexpr int kThreads = 256;
// Elements that a thread moves at once; of float64 fewer, for they would take twice the registers.
template <class C>
inline constexpr int kPerThread = sizeof(C) == 8 ? 4 : 8;
constexpr std::int64_t kChunkElements = 16 * 1024;
constexpr int kMaxHypers = 8;

// Elements of a row that a warp takes alone.
constexpr std::int64_t kWarpRow = 1024;
constexpr int kWarps = kThreads / cuda::kWarpSize;

struct Scaling {
  Scalar grad_scale;
  Scalar found_inf;
  Scalar norm;
  double max_norm;
};

// Where a launch leaves its value. `total` collects it over the launches of one call.
struct Output {
  unsigned* counter;
  double* total;
  double* slots;
  void* value;
  bool value_is_float64;
  bool first;
};

constexpr int kFixedBytes = 2560;
constexpr int kMaxItems =
    static_cast<int>((cuda::kMaxKernelParamBytes - kFixedBytes) / (sizeof(Item) + 4));

// All items have rows, or none has.
struct Table {
  Output output;
  Scaling scaling;
  Hyper hypers[kMaxHypers];
  int count;
  std::uint32_t first_task[kMaxItems + 1];
  Item items[kMaxItems];
};
static_assert(sizeof(Table) <= cuda::kMaxKernelParamBytes, "the table does not fit a launch");

// --- device code ---

// The last entry whose first index is not above `index`.
__device__ int find_entry(const std::uint32_t* first, int count, std::uint32_t index) {
  int low = 0;
  int high = count;
  while (high - low > 1) {
    const int middle = (low + high) / 2;
    if (first[middle] <= index) {
      low = middle;
    } else {
      high = middle;
    }
  }
  return low;
}

__device__ void write_scalar(void* to, bool is_float64, double x) {
  if (is_float64) {
    *static_cast<double*>(to) = x;
  } else {
    *static_cast<float*>(to) = static_cast<float>(x);
  }
}

// What the last block to finish does: the value, and the step counts, which all blocks have read.
__device__ void finish(const Table& t, double value) {
  const Output& out = t.output;
  const double share = cuda::block_sum(value);
  if (threadIdx.x == 0) out.slots[blockIdx.x] = share;
  if (!cuda::is_last_block(out.counter)) return;
  if (read_scalar(t.scaling.found_inf) == 0.0) {
    for (int i = static_cast<int>(threadIdx.x); i < t.count; i += kThreads) {
      if (t.items[i].step != nullptr) *t.items[i].step += 1.0f;
    }
  }
  if (out.value == nullptr) return;
  double sum = 0.0;
  for (unsigned i = threadIdx.x; i < gridDim.x; i += kThreads) sum += out.slots[i];
  sum = cuda::block_sum(sum);
  if (threadIdx.x != 0) return;
  if (!out.first) sum += *out.total;
  *out.total = sum;
  write_scalar(out.value, out.value_is_float64, sum);
}

template <class C>
FUSEREG_DEVICE_INLINE C load_one(DType dtype, const void* x, std::int64_t at) {
  switch (dtype) {
    case DType::kFloat64:
      return static_cast<C>(static_cast<const double*>(x)[at]);
    case DType::kFloat32:
      return static_cast<C>(static_cast<const float*>(x)[at]);
    case DType::kFloat16:
      return static_cast<C>(to_float(static_cast<const Half*>(x)[at]));
    default:
      return static_cast<C>(to_float(static_cast<const BFloat16*>(x)[at]));
  }
}

template <class C>
FUSEREG_DEVICE_INLINE void store_one(DType dtype, void* x, std::int64_t at, C y) {
  switch (dtype) {
    case DType::kFloat64:
      static_cast<double*>(x)[at] = static_cast<double>(y);
      return;
    case DType::kFloat32:
      static_cast<float*>(x)[at] = static_cast<float>(y);
      return;
    case DType::kFloat16:
      static_cast<Half*>(x)[at] = to_half(static_cast<float>(y));
      return;
    default:
      static_cast<BFloat16*>(x)[at] = to_bfloat16(static_cast<float>(y));
  }
}

// A thread's elements, from a 16-byte boundary on.
template <class T, class C>
FUSEREG_DEVICE_INLINE void load_typed(const T* x, C (&y)[kPerThread<C>]) {
  constexpr int kN = cuda::kVecSize<T> < kPerThread<C> ? cuda::kVecSize<T> : kPerThread<C>;
  FUSEREG_UNROLL
  for (int i = 0; i < kPerThread<C>; i += kN) {
    const auto v = cuda::load<kN>(x + i);
    FUSEREG_UNROLL
    for (int k = 0; k < kN; ++k) y[i + k] = static_cast<C>(to_compute(v[k]));
  }
}
template <class T, class C>
FUSEREG_DEVICE_INLINE void store_typed(T* x, const C (&y)[kPerThread<C>]) {
  constexpr int kN = cuda::kVecSize<T> < kPerThread<C> ? cuda::kVecSize<T> : kPerThread<C>;
  FUSEREG_UNROLL
  for (int i = 0; i < kPerThread<C>; i += kN) {
    cuda::Vec<T, kN> v;
    FUSEREG_UNROLL
    for (int k = 0; k < kN; ++k) v[k] = from_compute<T>(static_cast<Compute<T>>(y[i + k]));
    cuda::store(x + i, v);
  }
}
template <class C>
FUSEREG_DEVICE_INLINE void load_many(DType dtype, const void* x, std::int64_t at,
                                     C (&y)[kPerThread<C>]) {
  dispatch_dtype(dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    load_typed(static_cast<const T*>(x) + at, y);
  });
}
template <class C>
FUSEREG_DEVICE_INLINE void store_many(DType dtype, void* x, std::int64_t at,
                                      const C (&y)[kPerThread<C>]) {
  dispatch_dtype(dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    store_typed(static_cast<T*>(x) + at, y);
  });
}

// What every thread of a block needs to know of its item.
template <class C>
struct Work {
  Coefficients<C> k;
  HyperValues h;
  Flags flags;
  bool skip;
  bool value;
};

template <class C>
struct Shares {
  double absolute = 0.0;
  double square = 0.0;
  FUSEREG_DEVICE_INLINE void add(C p) {
    const double x = static_cast<double>(p);
    absolute += x < 0.0 ? -x : x;
    square += x * x;
  }
};

// The coefficients take powers in float64: one thread works them out for its block.
__device__ void prepare(const Table& t, Algorithm algorithm, const Item& item,
                        Work<double>& shared) {
  __syncthreads();  // the previous chunk's readers are done
  if (threadIdx.x == 0) {
    const Hyper& hyper = t.hypers[item.hyper];
    const Scaling& s = t.scaling;
    const double gradient =
        gradient_factor(read_scalar(s.grad_scale), read_scalar(s.norm), s.max_norm);
    const double step = item.step == nullptr ? 1.0 : static_cast<double>(*item.step) + 1.0;
    shared.h = read_hyper(hyper);
    shared.flags = hyper.flags;
    shared.k = coefficients(algorithm, shared.h, hyper.flags, step, gradient, item.row, item.fresh,
                            item.p_dtype);
    shared.skip = read_scalar(s.found_inf) != 0.0;
    shared.value = t.output.value != nullptr;
  }
  __syncthreads();
}

// One element; gives the new p.
template <Algorithm algorithm, class C>
FUSEREG_DEVICE_INLINE C update_one(const Item& item, std::int64_t at, const Coefficients<C>& k,
                                   const Flags& f, int states) {
  C s[kMaxStates] = {};
  for (int j = 0; j < states; ++j) s[j] = load_one<C>(item.state_dtype, item.state[j], at);
  const C p = updated<algorithm>(load_one<C>(item.p_dtype, item.p, at),
                                 load_one<C>(item.g_dtype, item.g, at), s, k, f);
  store_one(item.p_dtype, item.p, at, p);
  if (item.copy != nullptr) store_one(item.copy_dtype, item.copy, at, p);
  for (int j = 0; j < states; ++j) store_one(item.state_dtype, item.state[j], at, s[j]);
  return p;
}

FUSEREG_DEVICE_INLINE bool aligned_at(const void* x, DType dtype, std::int64_t at) {
  const int bytes = dtype == DType::kFloat64 ? 8 : dtype == DType::kFloat32 ? 4 : 2;
  return (reinterpret_cast<std::uintptr_t>(x) + static_cast<std::uintptr_t>(at * bytes)) % 16 == 0;
}

// One chunk of one tensor by the whole block; gives the thread's shares of the sums.
template <Algorithm algorithm, class C>
__device__ Shares<C> chunk(const Item& item, const Work<double>& w, std::int64_t begin,
                           std::int64_t n) {
  constexpr int kN = kPerThread<C>;
  const Coefficients<C> k = in_type<C>(w.k);
  const Flags f = w.flags;
  const int states = w.skip ? 0 : state_count(algorithm, f);
  const bool skip = w.skip;
  const bool value = w.value;
  Shares<C> shares;
  auto one = [&](std::int64_t at) {
    if (value) shares.add(load_one<C>(item.p_dtype, item.p, at));
    if (!skip) update_one<algorithm>(item, at, k, f, states);
  };
  // Elements before p's first 16-byte boundary one by one, then whole groups, then the rest. Where
  // another tensor lies differently against that boundary, no group fits them all.
  std::int64_t head = 0;
  while (head < 8 && !aligned_at(item.p, item.p_dtype, begin + head)) ++head;
  bool together = aligned_at(item.g, item.g_dtype, begin + head) &&
                  (item.copy == nullptr || aligned_at(item.copy, item.copy_dtype, begin + head));
  for (int j = 0; j < states; ++j) {
    together = together && aligned_at(item.state[j], item.state_dtype, begin + head);
  }
  if (!together || head > n) head = n;
  const std::int64_t groups = (n - head) / kN;
  for (std::int64_t i = threadIdx.x; i < head; i += kThreads) one(begin + i);
  for (std::int64_t v = threadIdx.x; v < groups; v += kThreads) {
    const std::int64_t at = begin + head + v * kN;
    C p[kN];
    load_many(item.p_dtype, item.p, at, p);
    if (value) {
      FUSEREG_UNROLL
      for (int i = 0; i < kN; ++i) shares.add(p[i]);
    }
    if (skip) continue;
    C g[kN];
    C s[kMaxStates][kN];
    load_many(item.g_dtype, item.g, at, g);
    FUSEREG_UNROLL
    for (int j = 0; j < kMaxStates; ++j) {
      if (j < states) load_many(item.state_dtype, item.state[j], at, s[j]);
    }
    FUSEREG_UNROLL
    for (int i = 0; i < kN; ++i) {
      C own[kMaxStates] = {s[0][i], s[1][i], s[2][i]};
      p[i] = updated<algorithm>(p[i], g[i], own, k, f);
      FUSEREG_UNROLL
      for (int j = 0; j < kMaxStates; ++j) s[j][i] = own[j];
    }
    store_many(item.p_dtype, item.p, at, p);
    if (item.copy != nullptr) store_many(item.copy_dtype, item.copy, at, p);
    FUSEREG_UNROLL
    for (int j = 0; j < kMaxStates; ++j) {
      if (j < states) store_many(item.state_dtype, item.state[j], at, s[j]);
    }
  }
  for (std::int64_t i = head + groups * kN + threadIdx.x; i < n; i += kThreads) {
    one(begin + i);
  }
  return shares;
}

// Two blocks to a multiprocessor: enough loads in flight to keep the memory busy.
template <Algorithm algorithm>
__global__ void __launch_bounds__(kThreads, 2)
    optimizer_elements_kernel(FUSEREG_GRID_CONSTANT(Table, t)) {
  FUSEREG_SHARED(work, Work<double>);
  double value = 0.0;
  const std::uint32_t tasks = t.first_task[t.count];
  for (std::uint32_t task = blockIdx.x; task < tasks; task += gridDim.x) {
    const int i = find_entry(t.first_task, t.count, task);
    const Item& item = t.items[i];
    prepare(t, algorithm, item, work);
    const std::int64_t begin = static_cast<std::int64_t>(task - t.first_task[i]) * kChunkElements;
    const std::int64_t rest = item.numel - begin;
    const std::int64_t n = rest < kChunkElements ? rest : kChunkElements;
    const double l1 = item.row == 1 ? work.h.l1 + work.h.group : work.h.l1;
    auto add = [&](auto shares) {
      if (l1 != 0.0) value += l1 * shares.absolute;
      if (work.h.l2 != 0.0) value += 0.5 * work.h.l2 * shares.square;
    };
    if (item.p_dtype == DType::kFloat64) {
      add(chunk<algorithm, double>(item, work, begin, n));
    } else {
      add(chunk<algorithm, float>(item, work, begin, n));
    }
  }
  finish(t, value);
}

// One row by a warp or by a block: its norm, the update, its new norm, the proximal step.
template <Algorithm algorithm, class C>
__device__ double row_value(const Item& item, const Work<double>& w, std::int64_t row,
                            bool by_warp) {
  const unsigned thread = by_warp ? cuda::lane_id() : threadIdx.x;
  const unsigned step = by_warp ? cuda::kWarpSize : kThreads;
  const std::int64_t n = item.row;
  const std::int64_t begin = row * n;
  const bool mine = begin < item.numel;
  const bool prox = w.flags.prox != Prox::kNone;
  auto sum = [&](double (&v)[2]) {
    if (by_warp) {
      v[0] = cuda::warp_sum(v[0]);
      v[1] = cuda::warp_sum(v[1]);
    } else {
      cuda::block_sum(v);
    }
  };
  double before[2] = {0.0, 0.0};
  for (std::int64_t i = thread; mine && i < n; i += step) {
    const double x = load_one<double>(item.p_dtype, item.p, begin + i);
    before[0] += x < 0.0 ? -x : x;
    before[1] += x * x;
  }
  sum(before);
  const double norm = sqrt(before[1]);
  const double sqrt_n = sqrt(static_cast<double>(n));
  double value = w.h.group * sqrt_n * norm;
  if (w.h.l1 != 0.0) value += w.h.l1 * before[0];
  if (w.h.l2 != 0.0) value += 0.5 * w.h.l2 * before[1];
  if (!mine || thread != 0) value = 0.0;
  if (w.skip) return value;

  Coefficients<double> wide = w.k;
  if (!prox) wide.l2 += group_gradient_factor(wide.group, norm);
  const Coefficients<C> k = in_type<C>(wide);
  Flags f = w.flags;
  f.prox = Prox::kNone;  // the proximal step comes when the new norm is known
  const int states = state_count(algorithm, f);
  const C threshold = k.threshold;
  double after[2] = {0.0, 0.0};
  for (std::int64_t i = thread; mine && i < n; i += step) {
    update_one<algorithm>(item, begin + i, k, f, states);
    // As it was rounded to memory, which the proximal step will read.
    const C p = load_one<C>(item.p_dtype, item.p, begin + i);
    const double x = static_cast<double>(soft_threshold<C>(p, threshold, C(1)));
    after[0] += x < 0.0 ? -x : x;
    after[1] += x * x;
  }
  if (!prox) return value;
  sum(after);
  const C factor = static_cast<C>(group_prox_factor(wide.group, sqrt(after[1])) * wide.factor);
  for (std::int64_t i = thread; mine && i < n; i += step) {
    const C p = load_one<C>(item.p_dtype, item.p, begin + i);
    const C y = signed_or_zero((abs(p) - threshold) * factor, p, k.largest_zero);
    store_one(item.p_dtype, item.p, begin + i, y);
    if (item.copy != nullptr) store_one(item.copy_dtype, item.copy, begin + i, y);
  }
  return value;
}

FUSEREG_HD inline std::int64_t rows_per_task(std::int64_t row) {
  return row <= kWarpRow ? kWarps : 1;
}

template <Algorithm algorithm>
__global__ void __launch_bounds__(kThreads) optimizer_rows_kernel(FUSEREG_GRID_CONSTANT(Table, t)) {
  FUSEREG_SHARED(work, Work<double>);
  double value = 0.0;
  const std::uint32_t tasks = t.first_task[t.count];
  for (std::uint32_t task = blockIdx.x; task < tasks; task += gridDim.x) {
    const int i = find_entry(t.first_task, t.count, task);
    const Item& item = t.items[i];
    prepare(t, algorithm, item, work);
    const bool by_warp = item.row <= kWarpRow;
    const std::int64_t first =
        static_cast<std::int64_t>(task - t.first_task[i]) * rows_per_task(item.row);
    const std::int64_t row = by_warp ? first + cuda::warp_id() : first;
    value += item.p_dtype == DType::kFloat64
                 ? row_value<algorithm, double>(item, work, row, by_warp)
                 : row_value<algorithm, float>(item, work, row, by_warp);
  }
  finish(t, value);
}

// --- norms and clipping ---

constexpr int kMaxNormItems =
    static_cast<int>((cuda::kMaxKernelParamBytes - 256) / (sizeof(NormItem) + 4));

struct NormTable {
  Norm norm;
  Output output;  // value: the norm, from `total` in the last launch
  bool last;
  Scalar clip_norm;
  double max_norm;
  int count;
  std::uint32_t first_task[kMaxNormItems + 1];
  NormItem items[kMaxNormItems];
};
static_assert(sizeof(NormTable) <= cuda::kMaxKernelParamBytes, "the table does not fit a launch");

// Calls f(x, index) for the chunk's elements: one by one up to a 16-byte boundary, then vectors.
template <class T, class F>
FUSEREG_DEVICE_INLINE void for_each_vector(T* x, std::int64_t n, const F& f) {
  constexpr int kN = cuda::kVecSize<T>;
  const auto misalignment = reinterpret_cast<std::uintptr_t>(x) % 16;
  std::int64_t head =
      misalignment == 0 ? 0 : static_cast<std::int64_t>((16 - misalignment) / sizeof(T));
  if (head > n) head = n;
  const std::int64_t vectors = (n - head) / kN;
  for (std::int64_t i = threadIdx.x; i < head; i += kThreads)
    f(x + i, std::integral_constant<int, 1>{});
  for (std::int64_t v = threadIdx.x; v < vectors; v += kThreads) {
    f(x + head + v * kN, std::integral_constant<int, kN>{});
  }
  for (std::int64_t i = head + vectors * kN + threadIdx.x; i < n; i += kThreads) {
    f(x + i, std::integral_constant<int, 1>{});
  }
}

template <class F>
__device__ void for_each_chunk(const NormTable& t, const F& f) {
  const std::uint32_t tasks = t.first_task[t.count];
  for (std::uint32_t task = blockIdx.x; task < tasks; task += gridDim.x) {
    const int i = find_entry(t.first_task, t.count, task);
    const NormItem& item = t.items[i];
    const std::int64_t begin = static_cast<std::int64_t>(task - t.first_task[i]) * kChunkElements;
    const std::int64_t rest = item.numel - begin;
    dispatch_dtype(item.dtype, [&](auto tag) {
      using T = typename decltype(tag)::type;
      for_each_vector(static_cast<T*>(item.data) + begin,
                      rest < kChunkElements ? rest : kChunkElements, f);
    });
  }
}

__global__ void __launch_bounds__(kThreads) norm_kernel(FUSEREG_GRID_CONSTANT(NormTable, t)) {
  const Norm norm = t.norm;
  double share = 0.0;
  for_each_chunk(t, [&](auto* x, auto count) {
    constexpr int kN = decltype(count)::value;
    const auto v = cuda::load<kN>(x);
    FUSEREG_UNROLL
    for (int k = 0; k < kN; ++k) {
      const double y = static_cast<double>(to_compute(v[k]));
      const double magnitude = y < 0.0 ? -y : y;
      if (norm == Norm::kInfinity) {
        share = greater(magnitude, share);
      } else {
        share += norm == Norm::kOne ? magnitude : y * y;
      }
    }
  });
  const bool most = norm == Norm::kInfinity;
  const double block_share =
      most ? cuda::block_reduce(share, cuda::Max{}, 0.0) : cuda::block_sum(share);
  const Output& out = t.output;
  if (threadIdx.x == 0) out.slots[blockIdx.x] = block_share;
  if (!cuda::is_last_block(out.counter)) return;
  double total = 0.0;
  for (unsigned i = threadIdx.x; i < gridDim.x; i += kThreads) {
    total = most ? greater(out.slots[i], total) : total + out.slots[i];
  }
  total = most ? cuda::block_reduce(total, cuda::Max{}, 0.0) : cuda::block_sum(total);
  if (threadIdx.x != 0) return;
  if (!out.first) total = most ? greater(*out.total, total) : total + *out.total;
  *out.total = total;
  if (t.last) {
    write_scalar(out.value, out.value_is_float64, norm == Norm::kTwo ? sqrt(total) : total);
  }
}

__global__ void __launch_bounds__(kThreads) clip_kernel(FUSEREG_GRID_CONSTANT(NormTable, t)) {
  const double factor = clip_factor(read_scalar(t.clip_norm), t.max_norm);
  if (factor == 1.0) return;
  for_each_chunk(t, [&](auto* x, auto count) {
    constexpr int kN = decltype(count)::value;
    using T = std::remove_pointer_t<decltype(x)>;
    auto v = cuda::load<kN>(x);
    FUSEREG_UNROLL
    for (int k = 0; k < kN; ++k) {
      v[k] = from_compute<T>(to_compute(v[k]) * static_cast<Compute<T>>(factor));
    }
    cuda::store(x, v);
  });
}

// --- launchers ---

// Chunk indices are 32 bits wide; a launch never gets more than half of that range.
constexpr std::int64_t kMaxTasks = std::int64_t{1} << 31;

cuda::LaunchConfig config_for(std::int64_t tasks, cuda::Stream stream) {
  cuda::LaunchConfig config;
  config.grid = dim3(static_cast<unsigned>(std::clamp<std::int64_t>(tasks, 1, kMaxBlocks)));
  config.block = dim3(kThreads);
  config.stream = stream;
  return config;
}

Output output_in(void* workspace, void* value, DType dtype) {
  auto* const bytes = static_cast<char*>(workspace);
  return {reinterpret_cast<unsigned*>(bytes),
          reinterpret_cast<double*>(bytes + 8),
          reinterpret_cast<double*>(bytes + 16),
          value,
          dtype == DType::kFloat64,
          true};
}

class CudaRun {
 public:
  CudaRun(const Job& job, void* workspace, cuda::Stream stream) : job_(job), stream_(stream) {
    output_ = output_in(workspace, job.value, job.value_dtype);
  }

  void execute() {
    for (const bool rows : {false, true}) {
      table_.count = 0;
      table_.first_task[0] = 0;
      for (const Item& item : job_.items) {
        if ((item.row > 1) == rows) add(item, rows);
      }
      if (table_.count > 0) flush(rows);
    }
  }

 private:
  void add(const Item& item, bool rows) {
    const std::int64_t tasks = rows ? cuda::ceil_div(item.numel / item.row, rows_per_task(item.row))
                                    : cuda::ceil_div(item.numel, kChunkElements);
    int hyper = hyper_index(item.hyper);
    if (table_.count == kMaxItems || hyper < 0 ||
        (table_.count > 0 && table_.first_task[table_.count] + tasks > kMaxTasks)) {
      flush(rows);
      hyper = hyper_index(item.hyper);
    }
    const int i = table_.count++;
    table_.items[i] = item;
    table_.items[i].hyper = hyper;
    table_.first_task[i + 1] = table_.first_task[i] + static_cast<std::uint32_t>(tasks);
  }

  // Where the table has these hyperparameters; -1 where they do not fit any more.
  int hyper_index(std::int32_t of_job) {
    if (table_.count == 0) hypers_ = 0;
    for (int i = 0; i < hypers_; ++i) {
      if (known_[i] == of_job) return i;
    }
    if (hypers_ == kMaxHypers) return -1;
    known_[hypers_] = of_job;
    table_.hypers[hypers_] = job_.hypers[static_cast<std::size_t>(of_job)];
    return hypers_++;
  }

  void flush(bool rows) {
    table_.output = output_;
    table_.scaling = {job_.grad_scale, job_.found_inf, job_.norm, job_.max_norm};
    const cuda::LaunchConfig config = config_for(table_.first_task[table_.count], stream_);
    switch (job_.algorithm) {
      case Algorithm::kSgd:
        launch<Algorithm::kSgd>(rows, config);
        break;
      case Algorithm::kAdam:
        launch<Algorithm::kAdam>(rows, config);
        break;
      case Algorithm::kAdagrad:
        launch<Algorithm::kAdagrad>(rows, config);
        break;
      default:
        launch<Algorithm::kFtrl>(rows, config);
    }
    output_.first = false;
    table_.count = 0;
  }

  template <Algorithm algorithm>
  void launch(bool rows, const cuda::LaunchConfig& config) {
    if (rows) {
      if constexpr (algorithm != Algorithm::kFtrl) {
        cuda::launch("fusereg.optimizer", &optimizer_rows_kernel<algorithm>, config, table_);
      }
    } else {
      cuda::launch("fusereg.optimizer", &optimizer_elements_kernel<algorithm>, config, table_);
    }
  }

  const Job& job_;
  const cuda::Stream stream_;
  Output output_;
  Table table_{};
  int hypers_ = 0;
  std::int32_t known_[kMaxHypers] = {};
};

// Fills tables with the items and calls launch(table, last) for each.
template <class F>
void for_each_table(NormTable& t, const std::vector<NormItem>& items, const F& launch) {
  t.count = 0;
  t.first_task[0] = 0;
  for (const NormItem& item : items) {
    if (item.numel == 0) continue;
    const std::int64_t tasks = cuda::ceil_div(item.numel, kChunkElements);
    if (t.count == kMaxNormItems || (t.count > 0 && t.first_task[t.count] + tasks > kMaxTasks)) {
      launch(false);
      t.count = 0;
    }
    const int i = t.count++;
    t.items[i] = item;
    t.first_task[i + 1] = t.first_task[i] + static_cast<std::uint32_t>(tasks);
  }
  launch(true);
}

}  // namespace

void run_cuda(const Job& job, void* workspace, int device, void* stream) {
  const cuda::DeviceGuard guard(device);
  CudaRun(job, workspace, static_cast<cuda::Stream>(stream)).execute();
}

void run_norm_cuda(const NormJob& job, void* workspace, int device, void* stream) {
  const cuda::DeviceGuard guard(device);
  const auto on = static_cast<cuda::Stream>(stream);
  NormTable t{};
  t.norm = job.norm;
  t.output = output_in(workspace, job.out, job.out_dtype);
  for_each_table(t, job.items, [&](bool last) {
    t.last = last;
    cuda::launch("fusereg.get_total_norm", &norm_kernel, config_for(t.first_task[t.count], on), t);
    t.output.first = false;
  });
}

void run_clip_cuda(const ClipJob& job, int device, void* stream) {
  const cuda::DeviceGuard guard(device);
  const auto on = static_cast<cuda::Stream>(stream);
  NormTable t{};
  t.clip_norm = job.norm;
  t.max_norm = job.max_norm;
  for_each_table(t, job.items, [&](bool) {
    cuda::launch("fusereg.clip_grad_norm_", &clip_kernel, config_for(t.first_task[t.count], on), t);
  });
}

}  // namespace fusereg::optimizer
