// Device code of an optimizer's step: chunks of tensors, and rows of those with a group term.
//
// All combinations of dtypes share one loop: a thread moves kPerThread elements of each tensor with
// as many 16-byte accesses as their dtype needs, chosen by a branch that is the same for the whole
// block.
#pragma once

#include "optim/coefficients.h"
#include "optim/launch.cuh"
#include "optim/optim_math.h"

namespace fusereg::optim {

// Elements that a thread moves at once; of float64 fewer, for they would take twice the registers.
template <class C>
inline constexpr int kPerThread = sizeof(C) == 8 ? 4 : 8;

// Elements of a row that a warp takes alone.
inline constexpr std::int64_t kWarpRow = 1024;
inline constexpr int kWarps = kThreads / cuda::kWarpSize;

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

// What every thread of a block needs to know of its tensor.
struct Work {
  Coefficients<double> k;
  HyperValues h;
  Flags flags;
  bool update;  // neither an overflow nor a rest forbids it
  bool average;
  bool value;
  Target target;  // a table's entry, where that lies in memory
};

// Shared memory for it: its members have initializers, which are not run there.
struct alignas(Work) WorkMemory {
  unsigned char bytes[sizeof(Work)];
};

template <class C>
struct Shares {
  double absolute = 0.0;
  double square = 0.0;
  double update = 0.0;  // kLambNorms
  FUSEREG_DEVICE_INLINE void add(C p) {
    const double x = static_cast<double>(p);
    absolute += x < 0.0 ? -x : x;
    square += x * x;
  }
};

// x as a 16-bit dtype stores it.
template <class C>
FUSEREG_DEVICE_INLINE float stored(DType dtype, C x) {
  const float y = static_cast<float>(x);
  return dtype == DType::kFloat16 ? to_float(to_half(y)) : to_float(to_bfloat16(y));
}

// The master, or what its weight was changed to since the last step.
template <class C>
FUSEREG_DEVICE_INLINE C settled(DType copy_dtype, C master, C copy) {
  const auto own = bit_cast<std::uint32_t>(stored(copy_dtype, master));
  return own == bit_cast<std::uint32_t>(static_cast<float>(copy)) ? master : copy;
}

// FTRL: a 16-bit weight with the digits that z has kept.
template <class C>
FUSEREG_DEVICE_INLINE C recovered(DType p_dtype, C p, C z, C n, const Coefficients<C>& k) {
  const C kept = ftrl_weight(z, n, k);
  return stored(p_dtype, kept) == static_cast<float>(p) ? kept : p;
}

// The weight that a step begins with.
template <class C>
FUSEREG_DEVICE_INLINE C weight_at(const Target& item, std::int64_t at) {
  const C p = load_one<C>(item.p_dtype, item.p, at);
  if (item.copy == nullptr) return p;
  return settled(item.copy_dtype, p, load_one<C>(item.copy_dtype, item.copy, at));
}

// One element; gives the new weight, of kLambNorms the update.
template <Algorithm algorithm, class C>
FUSEREG_DEVICE_INLINE C update_one(const Target& item, const void* g, std::int64_t at,
                                   const Coefficients<C>& k, const Flags& f, int states) {
  C s[kMaxStates] = {};
  for (int j = 0; j < states; ++j) s[j] = load_one<C>(item.state_dtype, item.state[j], at);
  C p = weight_at<C>(item, at);
  if (algorithm == Algorithm::kFtrl && is_16_bit(item.p_dtype)) {
    p = recovered(item.p_dtype, p, s[0], s[1], k);
  }
  p = updated<algorithm>(p, load_one<C>(item.g_dtype, g, at), s, k, f);
  if constexpr (algorithm != Algorithm::kLambNorms) {
    store_one(item.p_dtype, item.p, at, p);
    if (item.copy != nullptr) store_one(item.copy_dtype, item.copy, at, p);
  }
  for (int j = 0; j < states && algorithm != Algorithm::kLamb; ++j) {
    store_one(item.state_dtype, item.state[j], at, s[j]);
  }
  return p;
}

// The average after a step has written p.
template <class C>
FUSEREG_DEVICE_INLINE void average_one(const Target& item, std::int64_t at, C weight) {
  C* const a = static_cast<C*>(item.average) + at;
  *a = averaged(*a, load_one<C>(item.p_dtype, item.p, at), weight);
}

FUSEREG_DEVICE_INLINE bool aligned_at(const void* x, DType dtype, std::int64_t at) {
  const int bytes = dtype == DType::kFloat64 ? 8 : dtype == DType::kFloat32 ? 4 : 2;
  return (reinterpret_cast<std::uintptr_t>(x) + static_cast<std::uintptr_t>(at * bytes)) % 16 == 0;
}

template <class C>
FUSEREG_DEVICE_INLINE void settle_many(const Target& item, const C (&copy)[kPerThread<C>],
                                       C (&p)[kPerThread<C>]) {
  FUSEREG_UNROLL
  for (int i = 0; i < kPerThread<C>; ++i) p[i] = settled(item.copy_dtype, p[i], copy[i]);
}

// As weight_at, of kPerThread elements.
template <class C>
FUSEREG_DEVICE_INLINE void load_weights(const Target& item, std::int64_t at,
                                        C (&p)[kPerThread<C>]) {
  load_many(item.p_dtype, item.p, at, p);
  if (item.copy == nullptr) return;
  C copy[kPerThread<C>];
  load_many(item.copy_dtype, item.copy, at, copy);
  settle_many(item, copy, p);
}

// kPerThread elements from `at` on; calls seen(p) with what the step begins with, and leaves the
// new p there. Everything is loaded before the first number is used; or, where that takes too many
// registers, p has been loaded already.
template <Algorithm algorithm, bool kLoaded = false, class C, class Seen>
FUSEREG_DEVICE_INLINE void update_many(const Target& item, const void* gradient, std::int64_t at,
                                       const Coefficients<C>& k, const Flags& f, int states,
                                       C (&p)[kPerThread<C>], const Seen& seen) {
  constexpr int kN = kPerThread<C>;
  C copy[kN];
  C g[kN] = {};
  C s[kMaxStates][kN];
  if (!kLoaded) {
    load_many(item.p_dtype, item.p, at, p);
    if (item.copy != nullptr) load_many(item.copy_dtype, item.copy, at, copy);
  }
  if (algorithm != Algorithm::kLamb) load_many(item.g_dtype, gradient, at, g);
  FUSEREG_UNROLL
  for (int j = 0; j < kMaxStates; ++j) {
    if (j < states) load_many(item.state_dtype, item.state[j], at, s[j]);
  }
  if (!kLoaded && item.copy != nullptr) settle_many(item, copy, p);
  seen(p);
  if (algorithm == Algorithm::kFtrl && is_16_bit(item.p_dtype)) {
    FUSEREG_UNROLL
    for (int i = 0; i < kN; ++i) p[i] = recovered(item.p_dtype, p[i], s[0][i], s[1][i], k);
  }
  FUSEREG_UNROLL
  for (int i = 0; i < kN; ++i) {
    C own[kMaxStates] = {s[0][i], s[1][i], s[2][i]};
    p[i] = updated<algorithm>(p[i], g[i], own, k, f);
    FUSEREG_UNROLL
    for (int j = 0; j < kMaxStates; ++j) s[j][i] = own[j];
  }
  if constexpr (algorithm != Algorithm::kLambNorms) {
    store_many(item.p_dtype, item.p, at, p);
    if (item.copy != nullptr) store_many(item.copy_dtype, item.copy, at, p);
  }
  if constexpr (algorithm == Algorithm::kLamb) return;
  FUSEREG_UNROLL
  for (int j = 0; j < kMaxStates; ++j) {
    if (j < states) store_many(item.state_dtype, item.state[j], at, s[j]);
  }
}

// As average_one; p are the weights as they were before they were stored.
template <class C>
FUSEREG_DEVICE_INLINE void average_many(const Target& item, std::int64_t at, C weight,
                                        C (&p)[kPerThread<C>]) {
  C* const average = static_cast<C*>(item.average) + at;
  C a[kPerThread<C>];
  load_typed(average, a);
  if (is_16_bit(item.p_dtype)) load_many(item.p_dtype, item.p, at, p);
  FUSEREG_UNROLL
  for (int i = 0; i < kPerThread<C>; ++i) a[i] = averaged(a[i], p[i], weight);
  store_typed(average, a);
}

// How a run of n elements from `begin` on is walked: `head` of them one by one up to p's first
// 16-byte boundary, then whole groups, then the rest. Where another tensor lies differently against
// that boundary, no group fits them all.
struct Walk {
  std::int64_t begin;
  std::int64_t n;
  std::int64_t head;
  unsigned thread;  // of so many
  unsigned threads;
};

FUSEREG_DEVICE_INLINE std::int64_t head_of(const Target& item, const void* gradient, int states,
                                           std::int64_t begin, std::int64_t n) {
  std::int64_t head = 0;
  while (head < 8 && !aligned_at(item.p, item.p_dtype, begin + head)) ++head;
  bool together = aligned_at(gradient, item.g_dtype, begin + head) &&
                  (item.copy == nullptr || aligned_at(item.copy, item.copy_dtype, begin + head));
  const DType own = item.p_dtype == DType::kFloat64 ? DType::kFloat64 : DType::kFloat32;
  together = together && (item.average == nullptr || aligned_at(item.average, own, begin + head));
  for (int j = 0; j < states; ++j) {
    together = together && aligned_at(item.state[j], item.state_dtype, begin + head);
  }
  return together && head < n ? head : n;
}

// Calls one(index) and many(index of the first). Of one walk's elements a thread always gets the
// same.
template <class C, class One, class Many>
FUSEREG_DEVICE_INLINE void walk(const Walk& w, const One& one, const Many& many) {
  constexpr int kN = kPerThread<C>;
  const std::int64_t groups = (w.n - w.head) / kN;
  for (std::int64_t i = w.thread; i < w.head; i += w.threads) one(w.begin + i);
  for (std::int64_t v = w.thread; v < groups; v += w.threads) many(w.begin + w.head + v * kN);
  for (std::int64_t i = w.head + groups * kN + w.thread; i < w.n; i += w.threads) one(w.begin + i);
}

// One chunk of one tensor by the whole block; gives the thread's shares of the sums.
template <Algorithm algorithm, class C>
__device__ Shares<C> chunk(const Target& item, const void* gradient, const Work& w,
                           std::int64_t begin, std::int64_t n) {
  constexpr int kN = kPerThread<C>;
  const Coefficients<C> k = in_type<C>(w.k);
  const Flags f = w.flags;
  const bool update = w.update;
  constexpr bool kNorms = algorithm == Algorithm::kLambNorms;
  const bool average = !kNorms && w.average && item.average != nullptr;
  const int states = update ? state_count(algorithm, f) : 0;
  const bool value = kNorms || w.value;
  Shares<C> shares;
  auto add_update = [&](C u) { shares.update += static_cast<double>(u) * static_cast<double>(u); };
  auto one = [&](std::int64_t at) {
    if (value) shares.add(weight_at<C>(item, at));
    if (update) {
      const C u = update_one<algorithm>(item, gradient, at, k, f, states);
      if (kNorms) add_update(u);
    }
    if (average) average_one(item, at, k.average);
  };
  auto many = [&](std::int64_t at) {
    C p[kN];
    auto seen = [&](const C(&weights)[kN]) {
      if (!value) return;
      FUSEREG_UNROLL
      for (int i = 0; i < kN; ++i) shares.add(weights[i]);
    };
    if (update) {
      update_many<algorithm>(item, gradient, at, k, f, states, p, seen);
      FUSEREG_UNROLL
      for (int i = 0; i < kN; ++i) {
        if (kNorms) add_update(p[i]);
      }
    } else {
      load_weights(item, at, p);
      seen(p);
    }
    if (average) average_many(item, at, k.average, p);
  };
  walk<C>({begin, n, head_of(item, gradient, states, begin, n), threadIdx.x, kThreads}, one, many);
  return shares;
}

// A row's proximal step in the metric of the update that p and the states have had, element by
// element: each thread comes back to those that it has written.
template <Algorithm algorithm, class C>
__device__ void shrink_in_metric(const Target& item, const Walk& own, const Coefficients<C>& k,
                                 const Flags& f, int states, bool by_warp, bool average) {
  const auto each = [&](const auto& visit) {
    walk<C>(own, visit, [&](std::int64_t at) {
      for (int i = 0; i < kPerThread<C>; ++i) visit(at + i);
    });
  };
  const auto term = [&](std::int64_t at, C q, double scale) {
    C s[kMaxStates] = {};
    for (int j = 0; j < states; ++j) s[j] = load_one<C>(item.state_dtype, item.state[j], at);
    return metric_term<algorithm>(q, s, k, f, static_cast<C>(scale));
  };
  const auto sums = [&](double norm, double group, double scale) {
    double v[3] = {0.0, 0.0, 0.0};
    each([&](std::int64_t at) {
      const MetricTerm<C> t = term(at, load_one<C>(item.p_dtype, item.p, at), scale);
      const C inverse = C(1) / (t.slope * static_cast<C>(norm) + static_cast<C>(group));
      const C x = t.shrunk * inverse;
      v[0] += static_cast<double>(x) * static_cast<double>(x);
      v[1] += static_cast<double>(x * x * t.slope * inverse);
      v[2] += static_cast<double>(t.metric) * static_cast<double>(t.metric);
    });
    if (by_warp) {
      for (double& x : v) x = cuda::warp_sum(x);
    } else {
      cuda::block_sum(v);
    }
    return MetricSums{v[0], v[1], v[2]};
  };
  double scale = 1.0;
  constexpr double kTolerance = sizeof(C) == 8 ? 1e-15 : 1e-8;
  const auto ratio =
      static_cast<C>(metric_ratio(static_cast<double>(k.group), static_cast<double>(k.floor_group),
                                  static_cast<double>(k.shrink), kTolerance, scale, sums));
  each([&](std::int64_t at) {
    const C q = load_one<C>(item.p_dtype, item.p, at);
    const C y = metric_weight(q, term(at, q, scale), ratio, k);
    store_one(item.p_dtype, item.p, at, y);
    if (item.copy != nullptr) store_one(item.copy_dtype, item.copy, at, y);
    if (average) average_one(item, at, k.average);
  });
}

// One row by a warp or by a block: its norm, the update, its new norm, the proximal step. Each
// thread comes back to the elements that it has written.
template <Algorithm algorithm, class C>
__device__ double row_value(const Target& item, const void* gradient, const Work& w,
                            std::int64_t row, bool by_warp) {
  constexpr int kN = kPerThread<C>;
  const std::int64_t begin = row * item.row;
  const bool mine = begin < item.numel;
  const std::int64_t n = mine ? item.row : 0;
  const bool prox = w.flags.prox != Prox::kNone;
  const bool average = w.average && item.average != nullptr;
  const int states = w.update ? state_count(algorithm, w.flags) : 0;
  const Walk own{begin, n, head_of(item, gradient, states, begin, n),
                 by_warp ? cuda::lane_id() : threadIdx.x,
                 static_cast<unsigned>(by_warp ? cuda::kWarpSize : kThreads)};
  auto sum = [&](const Shares<C>& shares, double (&v)[2]) {
    v[0] = shares.absolute;
    v[1] = shares.square;
    if (by_warp) {
      v[0] = cuda::warp_sum(v[0]);
      v[1] = cuda::warp_sum(v[1]);
    } else {
      cuda::block_sum(v);
    }
  };
  Shares<C> shares;
  walk<C>(
      own, [&](std::int64_t at) { shares.add(weight_at<C>(item, at)); },
      [&](std::int64_t at) {
        C p[kN];
        load_weights(item, at, p);
        FUSEREG_UNROLL
        for (int i = 0; i < kN; ++i) shares.add(p[i]);
      });
  double before[2];
  sum(shares, before);
  const double norm = sqrt(before[1]);
  const double sqrt_n = sqrt(static_cast<double>(item.row));
  double value = w.h.group * sqrt_n * norm;
  if (w.h.l1 != 0.0) value += w.h.l1 * before[0];
  if (w.h.l2 != 0.0) value += 0.5 * w.h.l2 * before[1];
  if (!mine || own.thread != 0) value = 0.0;
  if (!w.update) return value;

  Coefficients<C> k = in_type<C>(w.k);
  if (!prox) k.l2 = static_cast<C>(w.k.l2 + group_gradient_factor(w.k.group, norm));
  Flags f = w.flags;
  f.prox = Prox::kNone;  // the proximal step comes when the new norm is known
  const C threshold = k.threshold;
  // p as it was rounded to memory, which the proximal step will read.
  shares = Shares<C>();
  auto add = [&](C p) { shares.add(soft_threshold<C>(p, threshold, C(1))); };
  walk<C>(
      own,
      [&](std::int64_t at) {
        update_one<algorithm>(item, gradient, at, k, f, states);
        if (prox) {
          add(load_one<C>(item.p_dtype, item.p, at));
        } else if (average) {
          average_one(item, at, k.average);
        }
      },
      [&](std::int64_t at) {
        C p[kN];
        load_weights(item, at, p);
        update_many<algorithm, true>(item, gradient, at, k, f, states, p, [](const C(&)[kN]) {});
        if (!prox) {
          if (average) average_many(item, at, k.average, p);
          return;
        }
        load_many(item.p_dtype, item.p, at, p);
        FUSEREG_UNROLL
        for (int i = 0; i < kN; ++i) add(p[i]);
      });
  if (!prox) return value;
  if constexpr (has_metric(algorithm)) {
    if (w.flags.prox >= Prox::kPreconditioned) {
      shrink_in_metric<algorithm>(item, own, k, w.flags, states, by_warp, average);
      return value;
    }
  }
  double after[2];
  sum(shares, after);
  const C factor = static_cast<C>(group_prox_factor(w.k.group, sqrt(after[1])) * w.k.factor);
  auto shrunk = [&](C p) {
    return signed_or_zero((abs(p) - threshold) * factor, p, k.largest_zero);
  };
  walk<C>(
      own,
      [&](std::int64_t at) {
        const C y = shrunk(load_one<C>(item.p_dtype, item.p, at));
        store_one(item.p_dtype, item.p, at, y);
        if (item.copy != nullptr) store_one(item.copy_dtype, item.copy, at, y);
        if (average) average_one(item, at, k.average);
      },
      [&](std::int64_t at) {
        C p[kN];
        load_many(item.p_dtype, item.p, at, p);
        FUSEREG_UNROLL
        for (int i = 0; i < kN; ++i) p[i] = shrunk(p[i]);
        store_many(item.p_dtype, item.p, at, p);
        if (item.copy != nullptr) store_many(item.copy_dtype, item.copy, at, p);
        if (average) average_many(item, at, k.average, p);
      });
  return value;
}

FUSEREG_HD inline std::int64_t rows_per_task(std::int64_t row) {
  return row <= kWarpRow ? kWarps : 1;
}

}  // namespace fusereg::optim
