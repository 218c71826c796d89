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
// Vectors that a thread has under way at once.
constexpr int kAhead = 4;

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

// --- tables ---
// A launch copies its whole table to the device: a short list has a small one.

constexpr int kSmallTable = 16;

constexpr int kElementEntryBytes = 48;
constexpr int kMaxElementEntries =
    static_cast<int>((cuda::kMaxKernelParamBytes - 256) / kElementEntryBytes);

// Elementwise: L1, L2.
template <int kEntries>
struct ElementTable {
  Output output;
  Scale scale;
  int count;
  std::uint32_t first_task[kEntries + 1];
  void* w[kEntries];
  void* g[kEntries];
  std::int64_t numel[kEntries];
  double l1[kEntries];  // kProx: the threshold
  double l2[kEntries];  // kProx: the factor
  DType dtype[kEntries];

  void copy(int to, const ElementTable<kMaxElementEntries>& t, int from) {
    w[to] = t.w[from];
    g[to] = t.g[from];
    numel[to] = t.numel[from];
    l1[to] = t.l1[from];
    l2[to] = t.l2[from];
    dtype[to] = t.dtype[from];
  }
};
static_assert(sizeof(ElementTable<kMaxElementEntries>) <= cuda::kMaxKernelParamBytes,
              "the table does not fit a launch");

// How a tensor's groups are laid over threads.
enum class GroupMode : std::uint8_t {
  kWarp,     // runs of at least a warp's width, small groups: a warp each
  kBlock,    // the same, large groups: a block each
  kColumns,  // short runs: neighboring columns side by side in a warp, rows over the warps
};
constexpr std::int64_t kWarpGroupElements = 2048;

struct GroupLayout {
  GroupMode mode = GroupMode::kWarp;
  // kColumns: threads side by side, and columns of each; at most kMaxColumns in all.
  std::uint8_t lanes = 0;
  std::uint8_t columns = 0;
  std::int64_t groups_per_task = 1;
};
constexpr int kMaxColumns = 64;
// As many blocks as a large device has at once. Columns are read by whole cache lines where that
// leaves so many, else by sectors of 32 bytes.
constexpr std::int64_t kManyTasks = 264;

GroupLayout group_layout(const Item& item) {
  const GroupShape& shape = item.shape;
  GroupLayout layout;
  if (shape.outer == 1 || shape.inner >= cuda::kWarpSize) {
    const bool small = shape.group_size() <= kWarpGroupElements;
    layout.mode = small ? GroupMode::kWarp : GroupMode::kBlock;
    layout.groups_per_task = small ? kWarps : 1;
    return layout;
  }
  layout.mode = GroupMode::kColumns;
  const std::int64_t vector = dispatch_dtype(
      item.dtype, [](auto tag) { return cuda::kVecSize<typename decltype(tag)::type>; });
  if (shape.inner == 1 && shape.groups % vector == 0 && cuda::is_aligned(item.w, 16) &&
      cuda::is_aligned(item.g, 16)) {
    std::int64_t lanes = 2;
    while (lanes < 8 && shape.groups / (2 * lanes * vector) >= kManyTasks) lanes *= 2;
    layout.lanes = static_cast<std::uint8_t>(lanes);
    layout.columns = static_cast<std::uint8_t>(vector);
    layout.groups_per_task = lanes * vector;
  } else {
    layout.lanes = cuda::kWarpSize;
    layout.columns = 1;
    layout.groups_per_task = cuda::kWarpSize / shape.inner;
  }
  return layout;
}

constexpr int kGroupEntryBytes = 88;
constexpr int kMaxGroupEntries =
    static_cast<int>((cuda::kMaxKernelParamBytes - 256) / kGroupEntryBytes);

template <int kEntries>
struct GroupTable {
  Output output;
  Scale scale;
  int count;
  std::uint32_t first_task[kEntries + 1];
  void* w[kEntries];
  void* g[kEntries];
  GroupShape shape[kEntries];
  Strengths strengths[kEntries];
  GroupLayout layout[kEntries];
  DType dtype[kEntries];

  void copy(int to, const GroupTable<kMaxGroupEntries>& t, int from) {
    w[to] = t.w[from];
    g[to] = t.g[from];
    shape[to] = t.shape[from];
    strengths[to] = t.strengths[from];
    layout[to] = t.layout[from];
    dtype[to] = t.dtype[from];
  }
};
static_assert(sizeof(GroupTable<kMaxGroupEntries>) <= cuda::kMaxKernelParamBytes,
              "the table does not fit a launch");

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

template <Op op, class Table>
__global__ void __launch_bounds__(kThreads)
    penalty_elements_kernel(FUSEREG_GRID_CONSTANT(Table, t)) {
  const double scale = read_scale(t.scale);
  double value = 0.0;
  const std::uint32_t chunks = t.first_task[t.count];
  for (std::uint32_t chunk = blockIdx.x; chunk < chunks; chunk += gridDim.x) {
    const int i = cuda::find_in_parameters(t.first_task, t.count, chunk);
    const std::int64_t offset = static_cast<std::int64_t>(chunk - t.first_task[i]) * kChunkElements;
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

// What soft-thresholding leaves of a magnitude, in two parts of the threshold: next to it, one
// would leave no digits of the difference. NaN stays.
template <class C>
struct Shrink {
  C high;
  C low;
  FUSEREG_DEVICE_INLINE explicit Shrink(double threshold)
      : high(static_cast<C>(threshold)),
        low(is_finite(high) ? static_cast<C>(threshold - static_cast<double>(high)) : C(0)) {}
  FUSEREG_DEVICE_INLINE C operator()(C magnitude) const {
    const C rest = magnitude - high - low;
    return rest <= C(0) ? C(0) : rest;
  }
};

// The sums over one thread's part of a group, of |v| and v^2 with v = w, or soft(w, l1) for kProx:
// in float32 over at most 8 terms, then in float64.
template <class C, Op op>
struct GroupSums {
  double sums[2] = {0.0, 0.0};
  C absolute = 0;
  C square = 0;

  FUSEREG_DEVICE_INLINE void add(C x, const Shrink<C>& shrink) {
    C magnitude = x < C(0) ? -x : x;
    if constexpr (op == Op::kProx) magnitude = shrink(magnitude);
    absolute += magnitude;
    square += magnitude * magnitude;
  }
  FUSEREG_DEVICE_INLINE void flush() {
    sums[0] += static_cast<double>(absolute);
    sums[1] += static_cast<double>(square);
    absolute = square = 0;
  }
  // Whether float32 squares overflowed, or lost their digits, as those of tiny weights do.
  FUSEREG_DEVICE_INLINE bool lost() const {
    if constexpr (sizeof(C) != 4) return false;
    return !is_finite(sums[0]) || !is_finite(sums[1]) || (sums[1] < 1e-28 && sums[0] > 0.0);
  }
  FUSEREG_DEVICE_INLINE void clear() { sums[0] = sums[1] = 0.0; }
  FUSEREG_DEVICE_INLINE void add_again(double x, double l1) {
    if (op == Op::kProx) x = soft_threshold<double>(x, l1, 1.0);
    sums[0] += x < 0.0 ? -x : x;
    sums[1] += x * x;
  }
};

// Calls use(p, load(p, count)) for the elements from p on, `count` at a time, by `threads` threads
// of which this is `thread`: vectors where `vectors` allows, kDeep loads ahead of their use.
template <int kDeep, class T, class Load, class Use>
FUSEREG_DEVICE_INLINE void for_run(T* p, std::int64_t n, unsigned thread, unsigned threads,
                                   bool vectors, const Load& load, const Use& use) {
  constexpr int kN = cuda::kVecSize<T>;
  constexpr std::integral_constant<int, 1> one{};
  constexpr std::integral_constant<int, kN> all{};
  const auto misalignment = reinterpret_cast<std::uintptr_t>(p) % 16;
  std::int64_t head =
      misalignment == 0 ? 0 : static_cast<std::int64_t>((16 - misalignment) / sizeof(T));
  if (!vectors || head > n) head = n;
  for (std::int64_t i = thread; i < head; i += threads) use(p + i, load(p + i, one));
  T* const from = p + head;
  const std::int64_t count = (n - head) / kN;
  std::int64_t v = thread;
  if constexpr (kDeep > 1) {
    for (; v + (kDeep - 1) * threads < count; v += kDeep * threads) {
      decltype(load(from, all)) data[kDeep];
      FUSEREG_UNROLL
      for (int u = 0; u < kDeep; ++u) data[u] = load(from + (v + u * threads) * kN, all);
      FUSEREG_UNROLL
      for (int u = 0; u < kDeep; ++u) use(from + (v + u * threads) * kN, data[u]);
    }
  }
  for (; v < count; v += threads) use(from + v * kN, load(from + v * kN, all));
  for (std::int64_t i = count * kN + thread; i < n - head; i += threads)
    use(from + i, load(from + i, one));
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

// Elements of a tensor and of its gradient (kAddGrad), and what becomes of them.
template <class T, int kN>
struct Elements {
  cuda::Vec<T, kN> x;
  cuda::Vec<T, kN> before;
};

template <class T, Op op>
struct Writer {
  using C = Compute<T>;
  T* w;
  T* g;
  C l1;
  double scale;
  bool has_l1;

  FUSEREG_DEVICE_INLINE Writer(T* w_, T* g_, double l1_, double scale_)
      : w(w_),
        g(g_),
        l1(static_cast<C>(op == Op::kProx ? l1_ : l1_ * scale_)),
        scale(op == Op::kProx ? 1.0 : scale_),
        has_l1(op == Op::kProx || l1_ != 0.0) {}
  FUSEREG_DEVICE_INLINE bool writes() const {
    return op == Op::kProx || (op != Op::kValue && g != nullptr);
  }
  FUSEREG_DEVICE_INLINE T* target() const { return op == Op::kProx ? w : g; }
  template <int kN>
  FUSEREG_DEVICE_INLINE Elements<T, kN> load(std::int64_t at) const {
    Elements<T, kN> e{};
    e.x = cuda::load<kN>(w + at);
    if constexpr (op == Op::kAddGrad) e.before = cuda::load<kN>(g + at);
    return e;
  }
  // l2_of(k): the coefficient of element k, already multiplied by the scale.
  template <int kN, class F>
  FUSEREG_DEVICE_INLINE void store(std::int64_t at, const Elements<T, kN>& e,
                                   const F& l2_of) const {
    cuda::Vec<T, kN> y;
    FUSEREG_UNROLL
    for (int k = 0; k < kN; ++k) {
      y[k] = from_compute<T>(new_element<T, op>(to_compute(e.x[k]), to_compute(e.before[k]), l1,
                                                l2_of(k), has_l1, true));
    }
    cuda::store(target() + at, y);
  }
};

template <class T, Op op>
__device__ double groups_by_runs(T* w, T* g, const GroupShape& shape, const Strengths& s,
                                 double scale, std::int64_t first, bool by_warp) {
  using C = Compute<T>;
  // A block shares one long run among its threads, or several among its warps.
  const bool one_run = !by_warp && shape.outer == 1;
  const unsigned thread = one_run ? threadIdx.x : cuda::lane_id();
  const unsigned threads = one_run ? kThreads : cuda::kWarpSize;
  const std::int64_t first_run = one_run || by_warp ? 0 : cuda::warp_id();
  const std::int64_t runs_step = one_run || by_warp ? 1 : kWarps;
  const std::int64_t group = by_warp ? first + cuda::warp_id() : first;
  const std::int64_t stride = shape.groups * shape.inner;
  const bool there = group < shape.groups;
  const auto for_runs = [&](const auto& f) {
    for (std::int64_t o = first_run; o < shape.outer; o += runs_step)
      f(group * shape.inner + o * stride);
  };
  GroupSums<C, op> own;
  if (there) {
    const Shrink<C> shrink(s.l1);
    const auto load = [](T* p, auto count) { return cuda::load<decltype(count)::value>(p); };
    for_runs([&](std::int64_t at) {
      for_run<kAhead>(w + at, shape.inner, thread, threads, true, load, [&](T*, const auto& x) {
        FUSEREG_UNROLL
        for (int k = 0; k < static_cast<int>(sizeof(x) / sizeof(T)); ++k)
          own.add(to_compute(x[k]), shrink);
        own.flush();
      });
    });
    if (own.lost()) {
      own.clear();
      for_runs([&](std::int64_t at) {
        for_run<1>(w + at, shape.inner, thread, threads, true, load, [&](T*, const auto& x) {
          for (int k = 0; k < static_cast<int>(sizeof(x) / sizeof(T)); ++k)
            own.add_again(static_cast<double>(to_compute(x[k])), s.l1);
        });
      });
    }
  }
  // All threads take part in the reductions, those of warps without a group too.
  if (by_warp) {
    own.sums[0] = cuda::warp_sum(own.sums[0]);
    own.sums[1] = cuda::warp_sum(own.sums[1]);
  } else {
    cuda::block_sum(own.sums);
  }
  if (!there) return 0.0;
  const GroupTerms t = group_terms<op>(s, shape.group_size(), own.sums);
  const Writer<T, op> writer(w, g, s.l1, scale);
  if (writer.writes()) {
    const auto l2 = static_cast<C>(t.l2 * writer.scale);
    const auto offset_of = [](const T* p) { return reinterpret_cast<std::uintptr_t>(p) % 16; };
    const bool together = offset_of(w) == offset_of(writer.target());
    for_runs([&](std::int64_t at) {
      for_run<kAhead>(
          w + at, shape.inner, thread, threads, together,
          [&](T* p, auto count) { return writer.template load<decltype(count)::value>(p - w); },
          [&](T* p, const auto& e) { writer.store(p - w, e, [&](int) { return l2; }); });
    });
  }
  return (by_warp ? cuda::lane_id() : threadIdx.x) == 0 ? t.value : 0.0;
}

// What the threads of a block tell each other about their columns.
struct ColumnSums {
  double of_warps[2][kWarps][kMaxColumns];
  double totals[2][kMaxColumns];
  double l2[kMaxColumns];  // of groups
};

// kN columns a thread, `lanes` threads side by side, the rows over the others.
template <class T, Op op, int kN>
__device__ double groups_by_columns(T* w, T* g, const GroupShape& shape, const Strengths& s,
                                    double scale, std::int64_t first, unsigned lanes,
                                    ColumnSums& shared) {
  using C = Compute<T>;
  constexpr int kDeep = 8;  // rows that are under way at once, and terms added in float32
  const auto inner = static_cast<unsigned>(shape.inner);
  const unsigned columns = lanes * kN;
  const unsigned across = threadIdx.x % lanes * kN;
  const std::int64_t width = shape.groups * shape.inner;
  const std::int64_t column = first * shape.inner + across;
  const bool mine = across < columns / inner * inner && column < width;
  const std::int64_t first_row = threadIdx.x / lanes;
  const std::int64_t rows = kThreads / lanes;
  GroupSums<C, op> own[kN];
  if (mine) {
    const Shrink<C> shrink(s.l1);
    const T* const from = w + column;
    const auto add = [&](const cuda::Vec<T, kN>& x) {
      FUSEREG_UNROLL
      for (int k = 0; k < kN; ++k) own[k].add(to_compute(x[k]), shrink);
    };
    const auto flush = [&] {
      FUSEREG_UNROLL
      for (int k = 0; k < kN; ++k) own[k].flush();
    };
    std::int64_t o = first_row;
    for (; o + (kDeep - 1) * rows < shape.outer; o += kDeep * rows) {
      cuda::Vec<T, kN> x[kDeep];
      FUSEREG_UNROLL
      for (int u = 0; u < kDeep; ++u) x[u] = cuda::load<kN>(from + (o + u * rows) * width);
      FUSEREG_UNROLL
      for (int u = 0; u < kDeep; ++u) add(x[u]);
      flush();
    }
    for (; o < shape.outer; o += rows) add(cuda::load<kN>(from + o * width));
    flush();
    bool lost = false;
    FUSEREG_UNROLL
    for (int k = 0; k < kN; ++k) lost = lost || own[k].lost();
    if (lost) {
      FUSEREG_UNROLL
      for (int k = 0; k < kN; ++k) own[k].clear();
      for (o = first_row; o < shape.outer; o += rows) {
        const auto x = cuda::load<kN>(from + o * width);
        FUSEREG_UNROLL
        for (int k = 0; k < kN; ++k) own[k].add_again(static_cast<double>(to_compute(x[k])), s.l1);
      }
    }
  }
  __syncthreads();  // the previous task's readers are done
  FUSEREG_UNROLL
  for (int k = 0; k < kN; ++k) {
    FUSEREG_UNROLL
    for (int kind = 0; kind < 2; ++kind) {
      double sum = own[k].sums[kind];
      for (unsigned offset = lanes; offset < cuda::kWarpSize; offset *= 2)
        sum += __shfl_xor_sync(cuda::kFullMask, sum, static_cast<int>(offset));
      if (cuda::lane_id() < lanes) shared.of_warps[kind][cuda::warp_id()][across + k] = sum;
    }
  }
  __syncthreads();
  if (threadIdx.x < 2 * columns) {
    const unsigned kind = threadIdx.x / columns;
    const unsigned c = threadIdx.x % columns;
    double sum = 0.0;
    for (int v = 0; v < kWarps; ++v) sum += shared.of_warps[kind][v][c];
    shared.totals[kind][c] = sum;
  }
  __syncthreads();
  double value = 0.0;
  if (threadIdx.x < columns / inner && first + threadIdx.x < shape.groups) {
    double sums[2] = {0.0, 0.0};
    for (unsigned c = threadIdx.x * inner; c < (threadIdx.x + 1) * inner; ++c) {
      sums[0] += shared.totals[0][c];
      sums[1] += shared.totals[1][c];
    }
    const GroupTerms t = group_terms<op>(s, shape.group_size(), sums);
    shared.l2[threadIdx.x] = t.l2;
    value = t.value;
  }
  const Writer<T, op> writer(w, g, s.l1, scale);
  if (!writer.writes()) return value;
  __syncthreads();
  if (mine) {
    C l2[kN];
    FUSEREG_UNROLL
    for (int k = 0; k < kN; ++k)
      l2[k] = static_cast<C>(shared.l2[(across + k) / inner] * writer.scale);
    const auto l2_of = [&](int k) { return l2[k]; };
    std::int64_t o = first_row;
    for (; o + (kAhead - 1) * rows < shape.outer; o += kAhead * rows) {
      Elements<T, kN> e[kAhead];
      FUSEREG_UNROLL
      for (int u = 0; u < kAhead; ++u)
        e[u] = writer.template load<kN>((o + u * rows) * width + column);
      FUSEREG_UNROLL
      for (int u = 0; u < kAhead; ++u) writer.store((o + u * rows) * width + column, e[u], l2_of);
    }
    for (; o < shape.outer; o += rows)
      writer.store(o * width + column, writer.template load<kN>(o * width + column), l2_of);
  }
  return value;
}

template <Op op, class Table>
__global__ void __launch_bounds__(kThreads) penalty_groups_kernel(FUSEREG_GRID_CONSTANT(Table, t)) {
  FUSEREG_SHARED(shared, ColumnSums);
  const double scale = read_scale(t.scale);
  double value = 0.0;
  const std::uint32_t tasks = t.first_task[t.count];
  for (std::uint32_t task = blockIdx.x; task < tasks; task += gridDim.x) {
    const int i = cuda::find_in_parameters(t.first_task, t.count, task);
    const GroupShape shape = t.shape[i];
    const Strengths s = t.strengths[i];
    const GroupLayout layout = t.layout[i];
    const std::int64_t first =
        static_cast<std::int64_t>(task - t.first_task[i]) * layout.groups_per_task;
    auto run = [&](auto tag) {
      using T = typename decltype(tag)::type;
      T* const w = static_cast<T*>(t.w[i]);
      T* const g = static_cast<T*>(t.g[i]);
      if (layout.mode != GroupMode::kColumns)
        return groups_by_runs<T, op>(w, g, shape, s, scale, first, layout.mode == GroupMode::kWarp);
      return layout.columns == 1
                 ? groups_by_columns<T, op, 1>(w, g, shape, s, scale, first, layout.lanes, shared)
                 : groups_by_columns<T, op, cuda::kVecSize<T>>(w, g, shape, s, scale, first,
                                                               layout.lanes, shared);
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
    // Not cleared: what lies beyond `count` is never read.
    ElementTable<kMaxElementEntries> elements;
    GroupTable<kMaxGroupEntries> groups;
    clear(elements);
    clear(groups);
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
    if (output_.value != nullptr && output_.first) flush(elements);
  }

 private:
  template <class Table>
  static void clear(Table& t) {
    t.count = 0;
    t.first_task[0] = 0;
  }

  // Gives the entry's place, behind what was there before.
  template <template <int> class Table, int kMost>
  int reserve(Table<kMost>& t, std::int64_t tasks) {
    if (t.count == kMost || (t.count > 0 && t.first_task[t.count] + tasks > cuda::kMaxTasks))
      flush(t);
    const int i = t.count++;
    t.first_task[i + 1] = t.first_task[i] + static_cast<std::uint32_t>(tasks);
    return i;
  }

  void add_elements(ElementTable<kMaxElementEntries>& t, const Item& item) {
    const int i = reserve(t, ceil_div(item.numel, kChunkElements));
    const bool prox = job_.op == Op::kProx;
    t.w[i] = item.w;
    t.g[i] = item.g;
    t.numel[i] = item.numel;
    t.l1[i] = item.strengths.l1;
    t.l2[i] = prox ? 1.0 / (1.0 + item.strengths.l2) : item.strengths.l2;
    t.dtype[i] = item.dtype;
  }

  void add_groups(GroupTable<kMaxGroupEntries>& t, const Item& item) {
    const GroupLayout layout = group_layout(item);
    const int i = reserve(t, ceil_div(item.shape.groups, layout.groups_per_task));
    t.w[i] = item.w;
    t.g[i] = item.g;
    t.shape[i] = item.shape;
    t.strengths[i] = item.strengths;
    t.layout[i] = layout;
    t.dtype[i] = item.dtype;
  }

  template <template <int> class Table, int kMost>
  void flush(Table<kMost>& t) {
    if (t.count <= kSmallTable) {
      Table<kSmallTable> small;
      small.count = t.count;
      for (int i = 0; i < t.count; ++i) small.copy(i, t, i);
      std::copy(t.first_task, t.first_task + t.count + 1, small.first_task);
      launch(small);
    } else {
      launch(t);
    }
    clear(t);
  }

  template <int kMost>
  void launch(ElementTable<kMost>& t) {
    using Table = ElementTable<kMost>;
    launch(t, &penalty_elements_kernel<Op::kValue, Table>,
           &penalty_elements_kernel<Op::kAddGrad, Table>,
           &penalty_elements_kernel<Op::kWriteGrad, Table>,
           &penalty_elements_kernel<Op::kProx, Table>);
  }

  template <int kMost>
  void launch(GroupTable<kMost>& t) {
    using Table = GroupTable<kMost>;
    launch(t, &penalty_groups_kernel<Op::kValue, Table>,
           &penalty_groups_kernel<Op::kAddGrad, Table>,
           &penalty_groups_kernel<Op::kWriteGrad, Table>, &penalty_groups_kernel<Op::kProx, Table>);
  }

  template <class Table, class Kernel>
  void launch(Table& t, Kernel value, Kernel add_grad, Kernel write_grad, Kernel prox) {
    t.output = output_;
    t.scale = scale_;
    const Kernel kernel = job_.op == Op::kValue       ? value
                          : job_.op == Op::kAddGrad   ? add_grad
                          : job_.op == Op::kWriteGrad ? write_grad
                                                      : prox;
    cuda::LaunchConfig config;
    config.grid =
        dim3(static_cast<unsigned>(std::clamp<std::int64_t>(t.first_task[t.count], 1, kMaxBlocks)));
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
