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

// How a tensor's groups are laid over threads.
enum class GroupMode : std::uint8_t {
  kWarp,           // runs of at least a warp's width, small groups: a warp each
  kBlock,          // the same, large groups: a block each
  kColumns,        // short runs: neighboring columns side by side in a warp, rows over the warps
  kVectorColumns,  // the same where 16-byte vectors fit: few columns a block, as many rows as may be
};
constexpr std::int64_t kWarpGroupElements = 2048;

template <class T>
GroupMode group_mode(const GroupShape& shape, const void* w, const void* g) {
  if (shape.outer > 1 && shape.inner < cuda::kWarpSize) {
    const bool vectors = shape.groups * shape.inner % cuda::kVecSize<T> == 0 &&
                         cuda::is_aligned(w, 16) && cuda::is_aligned(g, 16);
    return vectors ? GroupMode::kVectorColumns : GroupMode::kColumns;
  }
  return shape.group_size() <= kWarpGroupElements ? GroupMode::kWarp : GroupMode::kBlock;
}

template <class T>
FUSEREG_HD inline std::int64_t groups_per_task(const GroupShape& shape, GroupMode mode) {
  switch (mode) {
    case GroupMode::kWarp:
      return kWarps;
    case GroupMode::kBlock:
      return 1;
    case GroupMode::kVectorColumns: {
      // Whole vectors, at least 32 bytes: what memory gives at once.
      std::int64_t groups = 1;
      while (groups * shape.inner % cuda::kVecSize<T> != 0) groups *= 2;
      return groups * shape.inner == cuda::kVecSize<T> ? 2 * groups : groups;
    }
    default:
      return cuda::kWarpSize / shape.inner;
  }
}

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
  GroupMode mode[kMaxGroupEntries];
};
static_assert(sizeof(GroupTable) <= cuda::kMaxKernelParamBytes, "the table does not fit a launch");

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

// n neighboring elements, of which a thread has its own: those before the first 16-byte boundary one
// by one, then whole vectors, then the rest. Where w and `out` lie differently against that
// boundary, no vector fits both.
template <class T>
class Span {
 public:
  static constexpr int kN = cuda::kVecSize<T>;
  FUSEREG_DEVICE_INLINE Span(const T* w, const T* out, std::int64_t n, unsigned thread,
                             unsigned threads)
      : n_(n), head_(0), thread_(thread), threads_(threads) {
    const auto misalignment = reinterpret_cast<std::uintptr_t>(w) % 16;
    if (misalignment != 0) head_ = static_cast<std::int64_t>((16 - misalignment) / sizeof(T));
    if (reinterpret_cast<std::uintptr_t>(out) % 16 != misalignment || head_ > n) head_ = n;
  }
  // Calls one(index), and many(index, count) for `count` vectors of which the first is at the index
  // and the others follow stride() apart.
  template <class One, class Many>
  FUSEREG_DEVICE_INLINE void walk(const One& one, const Many& many) const {
    const std::int64_t vectors = (n_ - head_) / kN;
    FUSEREG_NO_UNROLL
    for (std::int64_t i = thread_; i < head_; i += threads_) one(i);
    std::int64_t v = thread_;
    for (; v + (kAhead - 1) * static_cast<std::int64_t>(threads_) < vectors;
         v += kAhead * threads_) {
      many(head_ + v * kN, std::integral_constant<int, kAhead>{});
    }
    FUSEREG_NO_UNROLL
    for (; v < vectors; v += threads_) many(head_ + v * kN, std::integral_constant<int, 1>{});
    FUSEREG_NO_UNROLL
    for (std::int64_t i = head_ + vectors * kN + thread_; i < n_; i += threads_) one(i);
  }
  FUSEREG_DEVICE_INLINE std::int64_t stride() const { return std::int64_t{threads_} * kN; }

 private:
  std::int64_t n_, head_;
  unsigned thread_, threads_;
};

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

  using Raw = cuda::Raw<T, kN>;
  auto load_before = [&](Raw& y, std::int64_t at) {
    if constexpr (op == Op::kAddGrad) {
      if (writes) {
        y.load(g + at);
      } else {
        y.clear();
      }
      y.join();
    }
  };
  auto many = [&](std::int64_t at, const Raw& x, const Raw& y) {
    FUSEREG_UNROLL
    for (int k = 0; k < kN; ++k) add(to_compute(x[k]));
    flush();
    if constexpr (kWrites) {
      if (!writes) return;
      cuda::store(out + at, cuda::rounded_to<T, kN>([&](int k) {
                    const C before = op == Op::kAddGrad ? to_compute(y[k]) : C(0);
                    return new_element<T, op>(to_compute(x[k]), before, c1, c2, has_l1, has_l2);
                  }));
    }
  };
  const Span<T> span(w, writes ? out : w, n, threadIdx.x, kThreads);
  span.walk(one, [&](std::int64_t first, auto count) {
    constexpr int kCount = decltype(count)::value;
    Raw x[kCount];
    Raw y[kCount];
    FUSEREG_UNROLL
    for (int u = 0; u < kCount; ++u) {
      const std::int64_t at = first + u * span.stride();
      x[u].load(w + at);
      load_before(y[u], at);
    }
    FUSEREG_UNROLL
    for (int u = 0; u < kCount; ++u) many(first + u * span.stride(), x[u], y[u]);
  });

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
    span.walk(again, [&](std::int64_t first, auto count) {
      for (int u = 0; u < decltype(count)::value; ++u) {
        for (int k = 0; k < kN; ++k) again(first + u * span.stride() + k);
      }
    });
  }
  double value = 0.0;
  if (has_l1) value += l1 * absolute_sum;
  if (has_l2) value += 0.5 * l2 * square_sum;
  return value;
}

template <Op op>
__global__ void __launch_bounds__(kThreads, 3)
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

// What becomes of the elements of a group.
template <class T, Op op>
struct NewElements {
  using C = Compute<T>;
  C c1, c2;
  bool has_l1;
  FUSEREG_DEVICE_INLINE NewElements(double l1, double l2, double scale)
      : c1(static_cast<C>(op == Op::kProx ? l1 : l1 * scale)),
        c2(static_cast<C>(op == Op::kProx ? l2 : l2 * scale)),
        has_l1(op == Op::kProx || l1 != 0.0) {}
  FUSEREG_DEVICE_INLINE C value(T w, T before) const {
    return new_element<T, op>(to_compute(w), op == Op::kAddGrad ? to_compute(before) : C(0), c1, c2,
                              has_l1, true);
  }
  FUSEREG_DEVICE_INLINE T one(T w, const T& before) const {
    return from_compute<T>(value(w, before));
  }
};

// The square of a norm that is to be taken again, in float64: float32 squares overflow or lose
// their bits, and a group of tiny weights must not look like an all-zero one.
template <class C>
FUSEREG_DEVICE_INLINE bool inaccurate(double square) {
  return sizeof(C) == 4 && (square < 1e-28 || !is_finite(square));
}

// The sums of a group, or of columns. Terms are added in A, a vector's at a time, then in float64.
template <class T, class A>
struct GroupSums {
  double threshold;  // of the proximal step's first part, 0: none
  double absolute = 0.0;
  double square = 0.0;
  A part_absolute = 0;
  A part_square = 0;

  FUSEREG_DEVICE_INLINE explicit GroupSums(double threshold_of_prox)
      : threshold(threshold_of_prox) {}
  FUSEREG_DEVICE_INLINE void add(T w) {
    if (threshold != 0.0) {
      const double x = soft_threshold<double>(static_cast<double>(to_compute(w)), threshold, 1.0);
      absolute += x < 0.0 ? -x : x;
      square += x * x;
      return;
    }
    const A x = to_compute(w);
    part_absolute += x < A(0) ? -x : x;
    part_square += x * x;
  }
  FUSEREG_DEVICE_INLINE void flush() {
    absolute += static_cast<double>(part_absolute);
    square += static_cast<double>(part_square);
    part_absolute = part_square = 0;
  }
};

// A group of neighboring elements, or one whose runs of `inner` elements lie apart; by a warp or a
// block.
template <class T>
struct RunsOfGroup {
  static constexpr int kN = cuda::kVecSize<T>;
  const GroupShape& shape;
  std::int64_t first;  // its first element
  unsigned thread, threads;

  // Calls one(index) and many(index, stride, count) as a Span does.
  template <class One, class Many>
  FUSEREG_DEVICE_INLINE void walk(const T* w, const T* out, const One& one,
                                  const Many& many) const {
    if (shape.outer == 1) {
      const Span<T> span(w + first, out + first, shape.inner, thread, threads);
      span.walk([&](std::int64_t i) { one(first + i); },
                [&](std::int64_t i, auto count) { many(first + i, span.stride(), count); });
      return;
    }
    const std::int64_t row = shape.groups * shape.inner;
    const std::int64_t rows_each = threads / shape.inner;
    const std::int64_t columns_each = threads - rows_each * shape.inner;
    std::int64_t o = thread / shape.inner;
    std::int64_t i = thread - o * shape.inner;
    while (o < shape.outer) {
      one(first + o * row + i);
      o += rows_each;
      i += columns_each;
      if (i >= shape.inner) {
        i -= shape.inner;
        ++o;
      }
    }
  }

  template <class A>
  FUSEREG_DEVICE_INLINE void sum(const T* w, const T* out, double threshold,
                                 double (&sums)[2]) const {
    GroupSums<T, A> s(threshold);
    walk(
        w, out,
        [&](std::int64_t at) {
          s.add(w[at]);
          s.flush();
        },
        [&](std::int64_t at, std::int64_t stride, auto count) {
          constexpr int kCount = decltype(count)::value;
          cuda::Raw<T, kN> x[kCount];
          FUSEREG_UNROLL
          for (int u = 0; u < kCount; ++u) x[u].load(w + at + u * stride);
          FUSEREG_UNROLL
          for (int u = 0; u < kCount; ++u) {
            FUSEREG_UNROLL
            for (int k = 0; k < kN; ++k) s.add(x[u][k]);
            s.flush();
          }
        });
    sums[0] = s.absolute;
    sums[1] = s.square;
  }
};

template <class T, Op op>
__device__ double groups_by_runs(T* w, T* g, const GroupShape& shape, const Strengths& s,
                                 double scale, std::int64_t first, bool by_warp) {
  using C = Compute<T>;
  constexpr int kN = cuda::kVecSize<T>;
  const std::int64_t group = by_warp ? first + cuda::warp_id() : first;
  const RunsOfGroup<T> own{shape, group * shape.inner, by_warp ? cuda::lane_id() : threadIdx.x,
                           static_cast<unsigned>(by_warp ? cuda::kWarpSize : kThreads)};
  const bool writes = op == Op::kProx || (op != Op::kValue && g != nullptr);
  T* const out = op == Op::kProx || !writes ? w : g;
  const double threshold = op == Op::kProx ? s.l1 : 0.0;
  double sums[2] = {0.0, 0.0};
  // All threads take part in the reductions, those of warps without a group too.
  const auto reduce = [&] {
    if (by_warp) {
      sums[0] = cuda::warp_sum(sums[0]);
      sums[1] = cuda::warp_sum(sums[1]);
    } else {
      cuda::block_sum(sums);
    }
  };
  if (group < shape.groups) own.template sum<C>(w, out, threshold, sums);
  reduce();
  if (group < shape.groups && threshold == 0.0 && sums[0] != 0.0 && inaccurate<C>(sums[1])) {
    own.template sum<double>(w, out, threshold, sums);
    reduce();
  }
  if (group >= shape.groups) return 0.0;
  const GroupTerms t = group_terms<op>(s, shape.group_size(), sums);
  if (writes) {
    const NewElements<T, op> news(s.l1, t.l2, scale);
    own.walk(
        w, out, [&](std::int64_t at) { out[at] = news.one(w[at], out[at]); },
        [&](std::int64_t at, std::int64_t stride, auto count) {
          constexpr int kCount = decltype(count)::value;
          cuda::Raw<T, kN> x[kCount];
          cuda::Raw<T, kN> before[kCount];
          FUSEREG_UNROLL
          for (int u = 0; u < kCount; ++u) {
            x[u].load(w + at + u * stride);
            if constexpr (op == Op::kAddGrad) before[u].load(out + at + u * stride);
          }
          FUSEREG_UNROLL
          for (int u = 0; u < kCount; ++u) {
            cuda::store(out + at + u * stride, cuda::rounded_to<T, kN>([&](int k) {
                          return news.value(x[u][k], op == Op::kAddGrad ? before[u][k] : T{});
                        }));
          }
        });
  }
  return own.thread == 0 ? t.value : 0.0;
}

// What the threads of a block exchange about columns; one for all dtypes.
struct ColumnMemory {
  double partial[16 / sizeof(std::uint16_t) * kThreads];
  double totals[2][kThreads];  // of columns
  double factors[kThreads];    // of groups
  bool any_inaccurate;
};

template <class T, Op op>
__device__ double groups_by_columns(T* w, T* g, const GroupShape& shape, const Strengths& s,
                                    double scale, std::int64_t first, ColumnMemory& memory) {
  double* const absolute = memory.partial;
  double* const square = memory.partial + kThreads;
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
  absolute[threadIdx.x] = sums[0];
  square[threadIdx.x] = sums[1];
  __syncthreads();
  double value = 0.0;
  if (mine) {
    const unsigned start = lane / inner * inner;
    sums[0] = sums[1] = 0.0;
    for (unsigned c = start; c < start + inner; ++c) {
      for (int v = 0; v < kWarps; ++v) {
        sums[0] += absolute[v * cuda::kWarpSize + static_cast<int>(c)];
        sums[1] += square[v * cuda::kWarpSize + static_cast<int>(c)];
      }
    }
    const GroupTerms t = group_terms<op>(s, shape.group_size(), sums);
    if (warp == 0 && lane == start) value = t.value;
    if (op == Op::kProx || (op != Op::kValue && g != nullptr)) {
      const NewElements<T, op> news(s.l1, t.l2, scale);
      T* const out = op == Op::kProx ? w : g;
      for (std::int64_t o = warp; o < shape.outer; o += kWarps) {
        const std::int64_t at = o * width + column;
        out[at] = news.one(w[at], out[at]);
      }
    }
  }
  return value;
}

// Rows that a thread of vector columns has under way at once.
constexpr int kRowsAhead = 8;

// A thread's columns, a vector wide, and its rows: every rows_at_once-th.
template <class T>
struct VectorColumns {
  static constexpr int kN = cuda::kVecSize<T>;
  std::int64_t at;     // of the first element
  std::int64_t first;  // row
  std::int64_t rows, rows_at_once, pitch;

  // Calls many(position of the first, count), the others following stride() apart.
  template <class Many>
  FUSEREG_DEVICE_INLINE void walk(const Many& many) const {
    std::int64_t o = first;
    for (; o + (kRowsAhead - 1) * rows_at_once < rows; o += kRowsAhead * rows_at_once) {
      many(at + o * pitch, std::integral_constant<int, kRowsAhead>{});
    }
    FUSEREG_NO_UNROLL
    for (; o < rows; o += rows_at_once) many(at + o * pitch, std::integral_constant<int, 1>{});
  }
  FUSEREG_DEVICE_INLINE std::int64_t stride() const { return rows_at_once * pitch; }

  template <class A>
  FUSEREG_DEVICE_INLINE void sum(const T* w, double threshold, double (&absolute)[kN],
                                 double (&square)[kN]) const {
    FUSEREG_UNROLL
    for (int k = 0; k < kN; ++k) absolute[k] = square[k] = 0.0;
    walk([&](std::int64_t from, auto count) {
      constexpr int kCount = decltype(count)::value;
      cuda::Raw<T, kN> x[kCount];
      FUSEREG_UNROLL
      for (int u = 0; u < kCount; ++u) x[u].load(w + from + u * stride());
      FUSEREG_UNROLL
      for (int k = 0; k < kN; ++k) {
        GroupSums<T, A> s(threshold);
        FUSEREG_UNROLL
        for (int u = 0; u < kCount; ++u) s.add(x[u][k]);
        s.flush();
        absolute[k] += s.absolute;
        square[k] += s.square;
      }
    });
  }
};

template <class T, Op op>
__device__ double groups_by_vector_columns(T* w, T* g, const GroupShape& shape, const Strengths& s,
                                           double scale, std::int64_t first, ColumnMemory& memory) {
  using C = Compute<T>;
  constexpr int kN = cuda::kVecSize<T>;
  const auto inner = static_cast<int>(shape.inner);
  const auto groups = static_cast<int>(groups_per_task<T>(shape, GroupMode::kVectorColumns));
  const std::int64_t rest = shape.groups - first;
  const int own_groups = rest < groups ? static_cast<int>(rest) : groups;
  const int lanes = groups * inner / kN;
  const int rows_at_once = kThreads / lanes;
  const auto thread = static_cast<int>(threadIdx.x);
  const int lane = thread % lanes;
  const int columns = own_groups * inner;
  const bool mine = thread / lanes < rows_at_once && lane * kN < columns;
  const VectorColumns<T> own{first * inner + lane * kN, thread / lanes, mine ? shape.outer : 0,
                             rows_at_once, shape.groups * shape.inner};
  const double threshold = op == Op::kProx ? s.l1 : 0.0;
  double absolute[kN];
  double square[kN];
  const auto add_up = [&](const double (&v)[kN], double* total) {
    __syncthreads();  // the last readers are done
    FUSEREG_UNROLL
    for (int k = 0; k < kN; ++k) memory.partial[k * kThreads + thread] = v[k];
    __syncthreads();
    if (thread >= columns) return;
    double sum = 0.0;
    for (int r = 0; r < rows_at_once; ++r) {
      sum += memory.partial[thread % kN * kThreads + r * lanes + thread / kN];
    }
    total[thread] = sum;
  };
  const auto reduce = [&] {
    if (kGivesValue<op> && s.l1 != 0.0) add_up(absolute, memory.totals[0]);
    add_up(square, memory.totals[1]);
    __syncthreads();
  };
  // Of the group that is this thread's, if any.
  const auto sums_of_group = [&](double (&sums)[2]) {
    sums[0] = sums[1] = 0.0;
    for (int c = thread * inner; c < (thread + 1) * inner; ++c) {
      if (kGivesValue<op> && s.l1 != 0.0) sums[0] += memory.totals[0][c];
      sums[1] += memory.totals[1][c];
    }
  };
  double sums[2] = {0.0, 0.0};
  own.template sum<C>(w, threshold, absolute, square);
  if (thread == 0) memory.any_inaccurate = false;
  reduce();
  if (thread < own_groups) {
    sums_of_group(sums);
    if (threshold == 0.0 && inaccurate<C>(sums[1])) memory.any_inaccurate = true;
  }
  __syncthreads();
  if (memory.any_inaccurate) {
    own.template sum<double>(w, threshold, absolute, square);
    reduce();
    if (thread < own_groups) sums_of_group(sums);
  }
  double value = 0.0;
  if (thread < own_groups) {
    const GroupTerms t = group_terms<op>(s, shape.group_size(), sums);
    memory.factors[thread] = t.l2;
    value = t.value;
  }
  __syncthreads();
  if (op == Op::kProx || (op != Op::kValue && g != nullptr)) {
    T* const out = op == Op::kProx ? w : g;
    C c2[kN];
    FUSEREG_UNROLL
    for (int k = 0; k < kN; ++k) {
      const int group = (lane * kN + k) / inner;
      const double l2 = group < own_groups ? memory.factors[group] : 0.0;
      c2[k] = static_cast<C>(op == Op::kProx ? l2 : l2 * scale);
    }
    NewElements<T, op> news(s.l1, 0.0, scale);
    own.walk([&](std::int64_t from, auto count) {
      constexpr int kCount = decltype(count)::value;
      cuda::Raw<T, kN> x[kCount];
      cuda::Raw<T, kN> before[kCount];
      FUSEREG_UNROLL
      for (int u = 0; u < kCount; ++u) {
        x[u].load(w + from + u * own.stride());
        if constexpr (op == Op::kAddGrad) before[u].load(out + from + u * own.stride());
      }
      FUSEREG_UNROLL
      for (int u = 0; u < kCount; ++u) {
        cuda::store(out + from + u * own.stride(), cuda::rounded_to<T, kN>([&](int k) {
                      news.c2 = c2[k];
                      return news.value(x[u][k], op == Op::kAddGrad ? before[u][k] : T{});
                    }));
      }
    });
  }
  return value;
}

template <Op op>
__global__ void __launch_bounds__(kThreads, 2)
    penalty_groups_kernel(FUSEREG_GRID_CONSTANT(GroupTable, t)) {
  FUSEREG_SHARED(memory, ColumnMemory);
  const double scale = read_scale(t.scale);
  double value = 0.0;
  const std::uint32_t tasks = t.first_task[t.count];
  for (std::uint32_t task = blockIdx.x; task < tasks; task += gridDim.x) {
    const int i = cuda::find_in_parameters(t.first_task, t.count, task);
    const GroupShape shape = t.shape[i];
    const Strengths s = t.strengths[i];
    const GroupMode mode = t.mode[i];
    auto run = [&](auto tag) {
      using T = typename decltype(tag)::type;
      T* const w = static_cast<T*>(t.w[i]);
      T* const g = static_cast<T*>(t.g[i]);
      const std::int64_t first =
          static_cast<std::int64_t>(task - t.first_task[i]) * groups_per_task<T>(shape, mode);
      if (mode == GroupMode::kVectorColumns)
        return groups_by_vector_columns<T, op>(w, g, shape, s, scale, first, memory);
      if (mode == GroupMode::kColumns)
        return groups_by_columns<T, op>(w, g, shape, s, scale, first, memory);
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
    GroupMode mode{};
    const std::int64_t per_task = dispatch_dtype(item.dtype, [&](auto tag) {
      using T = typename decltype(tag)::type;
      mode = group_mode<T>(item.shape, item.w, item.g);
      return groups_per_task<T>(item.shape, mode);
    });
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
    t.mode[i] = mode;
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
