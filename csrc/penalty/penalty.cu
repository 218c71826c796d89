// CUDA kernels of the penalties. Contract: penalty.h.
//
// A launch takes a table of tensors in its parameters (constant memory), as many as fit. Work is
// cut into chunks that never span tensors; a block finds its chunk's tensor by binary search over
// the chunk counts, so the number of tensors and of blocks do not limit each other. Each block adds
// its share of the value in float64 and leaves it in its own slot; the last block to finish adds
// the slots in their order.
#include <algorithm>
#include <cmath>

#include "core/launch_table.cuh"
#include "core/soft_threshold.h"
#include "penalty/penalty.h"

namespace fusereg::penalty {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / cuda::kWarpSize;
constexpr std::int64_t kChunkElements = 8192;

// Where a launch leaves its value. `total` collects it over the launches of one call.
struct Output {
  unsigned* counter;
  double* total;
  double* slots;
  void* value;
  bool value_is_float64;
  bool first;
};

struct Scale {
  const void* device;
  DType dtype;
  double host;
};

// --- elementwise: L1, L2 ---

constexpr int kElementEntryBytes = 48;
constexpr int kMaxElementEntries =
    static_cast<int>((cuda::kMaxKernelParamBytes - 256) / kElementEntryBytes);

struct ElementTable {
  Output output;
  Scale scale;
  int count;
  std::uint32_t first_chunk[kMaxElementEntries + 1];
  void* w[kMaxElementEntries];
  void* g[kMaxElementEntries];
  std::int64_t numel[kMaxElementEntries];
  double l1[kMaxElementEntries];  // kProx: the threshold
  double l2[kMaxElementEntries];  // kProx: the factor
  DType dtype[kMaxElementEntries];
};
static_assert(sizeof(ElementTable) <= cuda::kMaxKernelParamBytes,
              "the table does not fit a launch");

// --- groups ---

constexpr int kGroupEntryBytes = 72;
constexpr int kMaxGroupEntries =
    static_cast<int>((cuda::kMaxKernelParamBytes - 256) / kGroupEntryBytes);

struct GroupTable {
  Output output;
  Scale scale;
  int count;
  std::uint32_t first_task[kMaxGroupEntries + 1];
  void* w[kMaxGroupEntries];
  void* g[kMaxGroupEntries];
  GroupShape shape[kMaxGroupEntries];
  Strengths strengths[kMaxGroupEntries];
  DType dtype[kMaxGroupEntries];
};
static_assert(sizeof(GroupTable) <= cuda::kMaxKernelParamBytes, "the table does not fit a launch");

// How a tensor's groups are laid over threads.
enum class GroupMode {
  kWarp,     // runs of at least a warp's width, small groups: a warp each
  kBlock,    // the same, large groups: a block each
  kColumns,  // short runs: neighboring columns side by side in a warp, rows over the warps
};
constexpr std::int64_t kWarpGroupElements = 2048;

FUSEREG_HD inline GroupMode group_mode(const GroupShape& shape) {
  if (shape.outer > 1 && shape.inner < cuda::kWarpSize) return GroupMode::kColumns;
  return shape.group_size() <= kWarpGroupElements ? GroupMode::kWarp : GroupMode::kBlock;
}

FUSEREG_HD inline std::int64_t groups_per_task(const GroupShape& shape) {
  switch (group_mode(shape)) {
    case GroupMode::kWarp:
      return kWarps;
    case GroupMode::kBlock:
      return 1;
    default:
      return cuda::kWarpSize / shape.inner;
  }
}

// --- device code ---

__device__ double read_scale(const Scale& s) {
  if (s.device == nullptr) return s.host;
  switch (s.dtype) {
    case DType::kFloat64:
      return s.host * *static_cast<const double*>(s.device);
    case DType::kFloat32:
      return s.host * *static_cast<const float*>(s.device);
    case DType::kFloat16:
      return s.host * to_float(*static_cast<const Half*>(s.device));
    default:
      return s.host * to_float(*static_cast<const BFloat16*>(s.device));
  }
}

__device__ void finish_value(const Output& out, double value) {
  const double block_value = cuda::block_sum(value);
  if (threadIdx.x == 0) out.slots[blockIdx.x] = block_value;
  if (!cuda::is_last_block(out.counter)) return;
  double sum = 0.0;
  for (unsigned i = threadIdx.x; i < gridDim.x; i += kThreads) sum += out.slots[i];
  sum = cuda::block_sum(sum);
  if (threadIdx.x != 0) return;
  if (!out.first) sum += *out.total;
  *out.total = sum;
  if (out.value_is_float64) {
    *static_cast<double*>(out.value) = sum;
  } else {
    *static_cast<float*>(out.value) = static_cast<float>(sum);
  }
}

FUSEREG_DEVICE_INLINE bool is_finite(double x) { return x - x == 0.0; }

template <Op op>
inline constexpr bool kGivesValue = op == Op::kValue || op == Op::kAddGrad;

// What becomes of one element: its new gradient or, for kProx, its new value.
template <class T, Op op, class C = Compute<T>>
FUSEREG_DEVICE_INLINE C new_element(C w, C before, C l1, C l2, bool has_l1, bool has_l2) {
  if constexpr (op == Op::kProx) {
    return soft_threshold<T>(w, l1, l2);
  } else {
    C d = op == Op::kAddGrad ? before : C(0);
    if (has_l1) d += l1 * sign(w);
    if (has_l2) d += l2 * w;
    return d;
  }
}

// One chunk of one tensor by the whole block; gives the thread's share of the value.
template <class T, Op op>
__device__ double chunk_value(T* w, T* g, std::int64_t n, double l1, double l2, double scale) {
  using C = Compute<T>;
  constexpr int kN = cuda::kVecSize<T>;
  constexpr bool kWrites = op != Op::kValue;
  const bool has_l1 = l1 != 0.0 || op == Op::kProx;
  const bool has_l2 = l2 != 0.0;
  const bool writes = op == Op::kProx || (kWrites && g != nullptr);
  const C c1 = static_cast<C>(op == Op::kProx ? l1 : l1 * scale);
  const C c2 = static_cast<C>(op == Op::kProx ? l2 : l2 * scale);
  T* const out = op == Op::kProx ? w : g;
  double absolute_sum = 0.0;
  double square_sum = 0.0;
  C absolute = 0;  // of the elements at hand, a vector's at most
  C square = 0;
  auto flush = [&] {
    if constexpr (kGivesValue<op>) {
      absolute_sum += static_cast<double>(absolute);
      square_sum += static_cast<double>(square);
      absolute = square = 0;
    }
  };

  auto add = [&](C x) {
    if constexpr (kGivesValue<op>) {
      absolute += x < C(0) ? -x : x;
      square += x * x;
    }
  };
  auto one = [&](std::int64_t i) {
    const C x = to_compute(w[i]);
    add(x);
    flush();
    if (!writes) return;
    const C before = op == Op::kAddGrad ? to_compute(g[i]) : C(0);
    out[i] = from_compute<T>(new_element<T, op>(x, before, c1, c2, has_l1, has_l2));
  };

  // Elements before the first 16-byte boundary one by one, then whole vectors, then the rest. Where
  // w and g lie differently against that boundary, no vector fits both.
  const auto misalignment = reinterpret_cast<std::uintptr_t>(w) % 16;
  const bool together = !writes || reinterpret_cast<std::uintptr_t>(out) % 16 == misalignment;
  std::int64_t head =
      misalignment == 0 ? 0 : static_cast<std::int64_t>((16 - misalignment) / sizeof(T));
  if (!together || head > n) head = n;
  const std::int64_t vectors = (n - head) / kN;
  for (std::int64_t i = threadIdx.x; i < head; i += kThreads) one(i);
#if !defined(FUSEREG_CUDA_ON_HOST)
#pragma unroll 2
#endif
  for (std::int64_t v = threadIdx.x; v < vectors; v += kThreads) {
    const std::int64_t at = head + v * kN;
    const auto x = cuda::load<kN>(w + at);
    cuda::Vec<T, kN> y{};
    if constexpr (op == Op::kAddGrad) {
      if (writes) y = cuda::load<kN>(g + at);
    }
    FUSEREG_UNROLL
    for (int k = 0; k < kN; ++k) {
      const C element = to_compute(x[k]);
      add(element);
      if constexpr (kWrites) {
        y[k] =
            from_compute<T>(new_element<T, op>(element, to_compute(y[k]), c1, c2, has_l1, has_l2));
      }
    }
    flush();
    if constexpr (kWrites) {
      if (writes) cuda::store(out + at, y);
    }
  }
  for (std::int64_t i = head + vectors * kN + threadIdx.x; i < n; i += kThreads) one(i);

  if constexpr (!kGivesValue<op>) return 0.0;
  if (sizeof(C) == 4 && !(is_finite(absolute_sum) && is_finite(square_sum))) {
    // float32 squares overflow from 1.8e19 on although the value may not: this thread's elements
    // again.
    absolute_sum = square_sum = 0.0;
    auto again = [&](std::int64_t i) {
      const double x = to_compute(w[i]);
      absolute_sum += x < 0.0 ? -x : x;
      square_sum += x * x;
    };
    for (std::int64_t i = threadIdx.x; i < head; i += kThreads) again(i);
    for (std::int64_t v = threadIdx.x; v < vectors; v += kThreads) {
      for (int k = 0; k < kN; ++k) again(head + v * kN + k);
    }
    for (std::int64_t i = head + vectors * kN + threadIdx.x; i < n; i += kThreads) again(i);
  }
  double value = 0.0;
  if (has_l1) value += l1 * absolute_sum;
  if (has_l2) value += 0.5 * l2 * square_sum;
  return value;
}

template <Op op>
__global__ void __launch_bounds__(kThreads)
    penalty_elements_kernel(FUSEREG_GRID_CONSTANT(ElementTable, t)) {
  const double scale = read_scale(t.scale);
  double value = 0.0;
  const std::uint32_t chunks = t.first_chunk[t.count];
  for (std::uint32_t chunk = blockIdx.x; chunk < chunks; chunk += gridDim.x) {
    const int i = cuda::find_in_parameters(t.first_chunk, t.count, chunk);
    const std::int64_t offset =
        static_cast<std::int64_t>(chunk - t.first_chunk[i]) * kChunkElements;
    const std::int64_t rest = t.numel[i] - offset;
    const std::int64_t n = rest < kChunkElements ? rest : kChunkElements;
    auto run = [&](auto tag) {
      using T = typename decltype(tag)::type;
      T* const w = static_cast<T*>(t.w[i]) + offset;
      T* const g = t.g[i] == nullptr ? nullptr : static_cast<T*>(t.g[i]) + offset;
      return chunk_value<T, op>(w, g, n, t.l1[i], t.l2[i], scale);
    };
    value += dispatch_dtype(t.dtype[i], run);
  }
  if constexpr (kGivesValue<op>) finish_value(t.output, value);
}

// Sums over one group, by a warp or a block, walking its runs; `step` threads take part.
template <class T, bool kThresholded>
__device__ void add_group(const T* w, const GroupShape& shape, std::int64_t group, unsigned thread,
                          unsigned step, double threshold, double (&sums)[2]) {
  for (std::int64_t k = thread; k < shape.group_size(); k += step) {
    const std::int64_t at =
        (k / shape.inner * shape.groups + group) * shape.inner + k % shape.inner;
    double x = to_compute(w[at]);
    if (kThresholded) x = soft_threshold<double>(x, threshold, 1.0);
    sums[0] += x < 0.0 ? -x : x;
    sums[1] += x * x;
  }
}

struct GroupTerms {
  double value;
  double l2;  // kProx: the factor
};

template <Op op>
__device__ GroupTerms group_terms(const Strengths& s, std::int64_t size, const double (&sums)[2]) {
  const double group_sqrt_n = s.group * sqrt(static_cast<double>(size));
  const double norm = sqrt(sums[1]);
  GroupTerms t;
  t.value = group_sqrt_n * norm;
  if (s.l1 != 0.0) t.value += s.l1 * sums[0];
  if (s.l2 != 0.0) t.value += 0.5 * s.l2 * sums[1];
  t.l2 = op == Op::kProx ? group_prox_factor(group_sqrt_n, norm) / (1.0 + s.l2)
                         : s.l2 + group_gradient_factor(group_sqrt_n, norm);
  return t;
}

template <class T, Op op>
FUSEREG_DEVICE_INLINE void write_element(T* w, T* g, std::int64_t at, double l1, double l2,
                                         double scale) {
  using C = Compute<T>;
  const C x = to_compute(w[at]);
  if constexpr (op == Op::kProx) {
    w[at] = from_compute<T>(
        new_element<T, op>(x, C(0), static_cast<C>(l1), static_cast<C>(l2), true, true));
  } else {
    const C before = op == Op::kAddGrad ? to_compute(g[at]) : C(0);
    g[at] = from_compute<T>(new_element<T, op>(x, before, static_cast<C>(l1 * scale),
                                               static_cast<C>(l2 * scale), l1 != 0.0, true));
  }
}

template <class T, Op op>
__device__ double groups_by_runs(T* w, T* g, const GroupShape& shape, const Strengths& s,
                                 double scale, std::int64_t first, bool by_warp) {
  const unsigned thread = by_warp ? cuda::lane_id() : threadIdx.x;
  const unsigned step = by_warp ? cuda::kWarpSize : kThreads;
  const std::int64_t group = by_warp ? first + cuda::warp_id() : first;
  double sums[2] = {0.0, 0.0};
  if (group < shape.groups) {
    if (op == Op::kProx && s.l1 != 0.0) {
      add_group<T, true>(w, shape, group, thread, step, s.l1, sums);
    } else {
      add_group<T, false>(w, shape, group, thread, step, 0.0, sums);
    }
  }
  // All threads take part in the reductions, those of warps without a group too.
  if (by_warp) {
    sums[0] = cuda::warp_sum(sums[0]);
    sums[1] = cuda::warp_sum(sums[1]);
  } else {
    cuda::block_sum(sums);
  }
  if (group >= shape.groups) return 0.0;
  const GroupTerms t = group_terms<op>(s, shape.group_size(), sums);
  if (op == Op::kProx || (op != Op::kValue && g != nullptr)) {
    for (std::int64_t k = thread; k < shape.group_size(); k += step) {
      const std::int64_t at =
          (k / shape.inner * shape.groups + group) * shape.inner + k % shape.inner;
      write_element<T, op>(w, g, at, s.l1, t.l2, scale);
    }
  }
  return thread == 0 ? t.value : 0.0;
}

template <class T, Op op>
__device__ double groups_by_columns(T* w, T* g, const GroupShape& shape, const Strengths& s,
                                    double scale, std::int64_t first) {
  FUSEREG_SHARED(partial, double[2][kWarps][cuda::kWarpSize]);
  const auto inner = static_cast<unsigned>(shape.inner);
  const unsigned lane = cuda::lane_id();
  const unsigned warp = cuda::warp_id();
  const std::int64_t column = first * inner + lane;
  const std::int64_t width = shape.groups * inner;
  const bool mine = lane < cuda::kWarpSize / inner * inner && column < width;
  double sums[2] = {0.0, 0.0};
  for (std::int64_t o = warp; mine && o < shape.outer; o += kWarps) {
    double x = to_compute(w[o * width + column]);
    if (op == Op::kProx) x = soft_threshold<double>(x, s.l1, 1.0);
    sums[0] += x < 0.0 ? -x : x;
    sums[1] += x * x;
  }
  __syncthreads();  // the previous task's readers are done
  partial[0][warp][lane] = sums[0];
  partial[1][warp][lane] = sums[1];
  __syncthreads();
  double value = 0.0;
  if (mine) {
    const unsigned start = lane / inner * inner;
    sums[0] = sums[1] = 0.0;
    for (unsigned c = start; c < start + inner; ++c) {
      for (int v = 0; v < kWarps; ++v) {
        sums[0] += partial[0][v][c];
        sums[1] += partial[1][v][c];
      }
    }
    const GroupTerms t = group_terms<op>(s, shape.group_size(), sums);
    if (warp == 0 && lane == start) value = t.value;
    if (op == Op::kProx || (op != Op::kValue && g != nullptr)) {
      for (std::int64_t o = warp; o < shape.outer; o += kWarps) {
        write_element<T, op>(w, g, o * width + column, s.l1, t.l2, scale);
      }
    }
  }
  return value;
}

template <Op op>
__global__ void __launch_bounds__(kThreads)
    penalty_groups_kernel(FUSEREG_GRID_CONSTANT(GroupTable, t)) {
  const double scale = read_scale(t.scale);
  double value = 0.0;
  const std::uint32_t tasks = t.first_task[t.count];
  for (std::uint32_t task = blockIdx.x; task < tasks; task += gridDim.x) {
    const int i = cuda::find_in_parameters(t.first_task, t.count, task);
    const GroupShape shape = t.shape[i];
    const Strengths s = t.strengths[i];
    const std::int64_t first =
        static_cast<std::int64_t>(task - t.first_task[i]) * groups_per_task(shape);
    auto run = [&](auto tag) {
      using T = typename decltype(tag)::type;
      T* const w = static_cast<T*>(t.w[i]);
      T* const g = static_cast<T*>(t.g[i]);
      const GroupMode mode = group_mode(shape);
      if (mode == GroupMode::kColumns)
        return groups_by_columns<T, op>(w, g, shape, s, scale, first);
      return groups_by_runs<T, op>(w, g, shape, s, scale, first, mode == GroupMode::kWarp);
    };
    value += dispatch_dtype(t.dtype[i], run);
  }
  if constexpr (kGivesValue<op>) finish_value(t.output, value);
}

// --- launcher ---

class CudaRun {
 public:
  CudaRun(const Job& job, void* workspace, cuda::Stream stream) : job_(job), stream_(stream) {
    auto* const bytes = static_cast<char*>(workspace);
    output_ = {reinterpret_cast<unsigned*>(bytes),    reinterpret_cast<double*>(bytes + 8),
               reinterpret_cast<double*>(bytes + 16), job.value,
               job.value_dtype == DType::kFloat64,    true};
    scale_ = {job.scale, job.scale_dtype, job.host_scale};
  }

  void execute() {
    ElementTable elements{};
    GroupTable groups{};
    for (const Item& item : job_.items) {
      if (item.numel == 0) continue;
      const Strengths& s = item.strengths;
      if (s.group != 0.0) {
        add_groups(groups, item);
      } else if (s.l1 != 0.0 || s.l2 != 0.0 || job_.op == Op::kWriteGrad) {
        add_elements(elements, item);
      }
    }
    if (elements.count > 0) flush(elements);
    if (groups.count > 0) flush(groups);
    // No work at all still owes a value of 0: an empty table gives it.
    if (output_.value != nullptr && output_.first) {
      elements = ElementTable{};
      flush(elements);
    }
  }

 private:
  void add_elements(ElementTable& t, const Item& item) {
    const std::int64_t chunks = ceil_div(item.numel, kChunkElements);
    if (t.count == kMaxElementEntries ||
        (t.count > 0 && t.first_chunk[t.count] + chunks > cuda::kMaxTasks))
      flush(t);
    const int i = t.count++;
    const bool prox = job_.op == Op::kProx;
    t.w[i] = item.w;
    t.g[i] = item.g;
    t.numel[i] = item.numel;
    t.l1[i] = item.strengths.l1;
    t.l2[i] = prox ? 1.0 / (1.0 + item.strengths.l2) : item.strengths.l2;
    t.dtype[i] = item.dtype;
    t.first_chunk[i + 1] = t.first_chunk[i] + static_cast<std::uint32_t>(chunks);
  }

  void add_groups(GroupTable& t, const Item& item) {
    const std::int64_t per_task = groups_per_task(item.shape);
    const std::int64_t tasks = ceil_div(item.shape.groups, per_task);
    if (t.count == kMaxGroupEntries ||
        (t.count > 0 && t.first_task[t.count] + tasks > cuda::kMaxTasks))
      flush(t);
    const int i = t.count++;
    t.w[i] = item.w;
    t.g[i] = item.g;
    t.shape[i] = item.shape;
    t.strengths[i] = item.strengths;
    t.dtype[i] = item.dtype;
    t.first_task[i + 1] = t.first_task[i] + static_cast<std::uint32_t>(tasks);
  }

  void flush(ElementTable& t) {
    launch(t, t.first_chunk[t.count], &penalty_elements_kernel<Op::kValue>,
           &penalty_elements_kernel<Op::kAddGrad>, &penalty_elements_kernel<Op::kWriteGrad>,
           &penalty_elements_kernel<Op::kProx>);
    t.count = 0;
  }

  void flush(GroupTable& t) {
    launch(t, t.first_task[t.count], &penalty_groups_kernel<Op::kValue>,
           &penalty_groups_kernel<Op::kAddGrad>, &penalty_groups_kernel<Op::kWriteGrad>,
           &penalty_groups_kernel<Op::kProx>);
    t.count = 0;
  }

  template <class Table, class Kernel>
  void launch(Table& t, std::uint32_t tasks, Kernel value, Kernel add_grad, Kernel write_grad,
              Kernel prox) {
    t.output = output_;
    t.scale = scale_;
    const Kernel kernel = job_.op == Op::kValue       ? value
                          : job_.op == Op::kAddGrad   ? add_grad
                          : job_.op == Op::kWriteGrad ? write_grad
                                                      : prox;
    cuda::LaunchConfig config;
    config.grid = dim3(static_cast<unsigned>(std::clamp<std::int64_t>(tasks, 1, kMaxBlocks)));
    config.block = dim3(kThreads);
    config.stream = stream_;
    cuda::launch(job_.op == Op::kProx ? "fusereg.prox" : "fusereg.penalty", kernel, config, t);
    output_.first = false;
  }

  const Job& job_;
  const cuda::Stream stream_;
  Output output_;
  Scale scale_;
};

}  // namespace

void run_cuda(const Job& job, void* workspace, int device, void* stream) {
  const cuda::DeviceGuard guard(device);
  CudaRun(job, workspace, static_cast<cuda::Stream>(stream)).execute();
}

}  // namespace fusereg::penalty
