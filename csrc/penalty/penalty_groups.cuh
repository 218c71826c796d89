// Groups: the norms of slices of a tensor, and what follows of them. For the room's .cu files alone.
#pragma once

#include "penalty/penalty_device.cuh"

namespace fusereg::penalty {
namespace {

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

struct GroupTerms {
  double value;
  double l2;          // kProx: the factor
  bool left = false;  // nothing is written
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

// What follows of a group's sums. `leader`: one thread of those that call it for a group.
// kSums: whether the sums are wanted; kWrites: whether elements are; kMayLeave: whether groups may
// be left alone.
template <Op op>
struct OwnTerms {
  static constexpr bool kSums = true;
  static constexpr bool kWrites = op != Op::kValue;
  static constexpr bool kMayLeave = false;
  Strengths s;
  std::int64_t size;
  __device__ GroupTerms operator()(std::int64_t, const double (&sums)[2], bool) const {
    return group_terms<op>(s, size, sums);
  }
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
  // l2_of(k): the coefficient of element k, already multiplied by the scale. Elements of which
  // left(k) is true stay as they are (the gradient: 0).
  template <int kN, class F, class Left>
  FUSEREG_DEVICE_INLINE void store(std::int64_t at, const Elements<T, kN>& e, const F& l2_of,
                                   const Left& left) const {
    cuda::Vec<T, kN> y;
    FUSEREG_UNROLL
    for (int k = 0; k < kN; ++k) {
      if (left(k)) {
        y[k] = op == Op::kProx ? e.x[k] : from_compute<T>(C(0));
        continue;
      }
      y[k] = from_compute<T>(new_element<T, op>(to_compute(e.x[k]), to_compute(e.before[k]), l1,
                                                l2_of(k), has_l1, true));
    }
    cuda::store(target() + at, y);
  }
};

template <class T, Op op, class Terms>
__device__ double groups_by_runs(T* w, T* g, const GroupShape& shape, double l1, double scale,
                                 std::int64_t first, bool by_warp, const Terms& terms) {
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
  if (Terms::kSums && there) {
    const Shrink<C> shrink(l1);
    const auto load = [](T* p, auto count) { return cuda::load<decltype(count)::value>(p); };
    for_runs([&](std::int64_t at) {
      cuda::for_run<kAhead>(w + at, shape.inner, thread, threads, true, load,
                            [&](T*, const auto& x) {
                              FUSEREG_UNROLL
                              for (int k = 0; k < static_cast<int>(sizeof(x) / sizeof(T)); ++k)
                                own.add(to_compute(x[k]), shrink);
                              own.flush();
                            });
    });
    if (own.lost()) {
      own.clear();
      for_runs([&](std::int64_t at) {
        cuda::for_run<1>(w + at, shape.inner, thread, threads, true, load, [&](T*, const auto& x) {
          for (int k = 0; k < static_cast<int>(sizeof(x) / sizeof(T)); ++k)
            own.add_again(static_cast<double>(to_compute(x[k])), l1);
        });
      });
    }
  }
  // All threads take part in the reductions, those of warps without a group too.
  if constexpr (Terms::kSums) {
    if (by_warp) {
      own.sums[0] = cuda::warp_sum(own.sums[0]);
      own.sums[1] = cuda::warp_sum(own.sums[1]);
    } else {
      cuda::block_sum(own.sums);
    }
  }
  if (!there) return 0.0;
  const bool leader = (by_warp ? cuda::lane_id() : threadIdx.x) == 0;
  const GroupTerms t = terms(group, own.sums, leader);
  const Writer<T, op> writer(w, g, l1, scale);
  if (Terms::kWrites && writer.writes() && !(Terms::kMayLeave && t.left)) {
    const auto l2 = static_cast<C>(t.l2 * writer.scale);
    const auto offset_of = [](const T* p) { return reinterpret_cast<std::uintptr_t>(p) % 16; };
    const bool together = offset_of(w) == offset_of(writer.target());
    for_runs([&](std::int64_t at) {
      cuda::for_run<kAhead>(
          w + at, shape.inner, thread, threads, together,
          [&](T* p, auto count) { return writer.template load<decltype(count)::value>(p - w); },
          [&](T* p, const auto& e) {
            writer.store(p - w, e, [&](int) { return l2; }, [](int) { return false; });
          });
    });
  }
  return leader ? t.value : 0.0;
}

// After all loads of a thread, before the first use: keeps the optimizer from using one in between.
template <class T, int N>
FUSEREG_DEVICE_INLINE void join([[maybe_unused]] cuda::Vec<T, N>& v) {
#if !defined(FUSEREG_CUDA_ON_HOST)
  if constexpr (sizeof(v) % 4 == 0) {
    std::uint32_t words[sizeof(v) / 4];
    memcpy(words, &v, sizeof(v));
    FUSEREG_UNROLL
    for (std::uint32_t& word : words) asm volatile("" : "+r"(word));
    memcpy(&v, words, sizeof(v));
  }
#endif
}

// What the threads of a block tell each other about their columns.
struct ColumnSums {
  double of_warps[2][kWarps][kMaxColumns];
  double totals[2][kMaxColumns];
  double l2[kMaxColumns];  // of groups
  bool left[kMaxColumns];
};

// kN columns a thread, `lanes` threads side by side, the rows over the others.
template <class T, Op op, int kN, class Terms>
__device__ double groups_by_columns(T* w, T* g, const GroupShape& shape, double l1, double scale,
                                    std::int64_t first, unsigned lanes, ColumnSums& shared,
                                    const Terms& terms) {
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
  if (Terms::kSums && mine) {
    const Shrink<C> shrink(l1);
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
        for (int k = 0; k < kN; ++k) own[k].add_again(static_cast<double>(to_compute(x[k])), l1);
      }
    }
  }
  __syncthreads();  // the previous task's readers are done
  if constexpr (Terms::kSums) {
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
  }
  double value = 0.0;
  if (threadIdx.x < columns / inner && first + threadIdx.x < shape.groups) {
    double sums[2] = {0.0, 0.0};
    for (unsigned c = threadIdx.x * inner; Terms::kSums && c < (threadIdx.x + 1) * inner; ++c) {
      sums[0] += shared.totals[0][c];
      sums[1] += shared.totals[1][c];
    }
    const GroupTerms t = terms(first + threadIdx.x, sums, true);
    shared.l2[threadIdx.x] = t.l2;
    if constexpr (Terms::kMayLeave) shared.left[threadIdx.x] = t.left;
    value = t.value;
  }
  const Writer<T, op> writer(w, g, l1, scale);
  if (!Terms::kWrites || !writer.writes()) return value;
  __syncthreads();
  if (mine) {
    C l2[kN];
    bool left[kN] = {};
    FUSEREG_UNROLL
    for (int k = 0; k < kN; ++k) {
      l2[k] = static_cast<C>(shared.l2[(across + k) / inner] * writer.scale);
      if constexpr (Terms::kMayLeave) left[k] = shared.left[(across + k) / inner];
    }
    const auto l2_of = [&](int k) { return l2[k]; };
    const auto left_of = [&](int k) { return Terms::kMayLeave && left[k]; };
    std::int64_t o = first_row;
    for (; o + (kAhead - 1) * rows < shape.outer; o += kAhead * rows) {
      Elements<T, kN> e[kAhead];
      FUSEREG_UNROLL
      for (int u = 0; u < kAhead; ++u)
        e[u] = writer.template load<kN>((o + u * rows) * width + column);
      FUSEREG_UNROLL
      for (int u = 0; u < kAhead; ++u) join(e[u].x);
      FUSEREG_UNROLL
      for (int u = 0; u < kAhead; ++u)
        writer.store((o + u * rows) * width + column, e[u], l2_of, left_of);
    }
    for (; o < shape.outer; o += rows)
      writer.store(o * width + column, writer.template load<kN>(o * width + column), l2_of,
                   left_of);
  }
  return value;
}

// Groups from `first` on, as many as the layout gives a task, by one block.
template <class T, Op op, class Terms>
__device__ double groups_of_task(T* w, T* g, const GroupShape& shape, const GroupLayout& layout,
                                 double l1, double scale, std::int64_t first, ColumnSums& shared,
                                 const Terms& terms) {
  if (layout.mode != GroupMode::kColumns) {
    const bool by_warp = layout.mode == GroupMode::kWarp;
    return groups_by_runs<T, op>(w, g, shape, l1, scale, first, by_warp, terms);
  }
  return layout.columns == 1 ? groups_by_columns<T, op, 1>(w, g, shape, l1, scale, first,
                                                           layout.lanes, shared, terms)
                             : groups_by_columns<T, op, cuda::kVecSize<T>>(
                                   w, g, shape, l1, scale, first, layout.lanes, shared, terms);
}

}  // namespace
}  // namespace fusereg::penalty
