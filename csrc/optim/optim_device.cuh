// Device code of an optimizer's step: chunks of tensors, and rows of those with a group term.
//
// All combinations of dtypes share one loop: a thread moves kPerThread elements of each tensor with as
// many 16-byte accesses as their dtype needs, which is the same for the whole block. Where float64 meets
// another dtype, elements are moved one by one.
#pragma once

#include "optim/coefficients.h"
#include "optim/launch.cuh"
#include "optim/optim_math.h"

namespace fusereg::optim {

// Elements that a thread moves at once; of float64 fewer: they and their arithmetic take more
// registers.
template <class C>
inline constexpr int kPerThread = sizeof(C) == 8 ? 2 : 8;

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

// A thread's elements as they lie in memory, from a 16-byte boundary on. All that a step reads is
// loaded before the first of it is converted: what is converted in the branch that loads it would be
// waited for there.
template <class C>
struct Held;

template <>
struct Held<double> {
  cuda::Vec<double, 2> pair;
  FUSEREG_DEVICE_INLINE void load(DType, const void* x, std::int64_t at) {
    pair = cuda::load<2>(in_global(static_cast<const double*>(x) + at));
  }
  FUSEREG_DEVICE_INLINE void get(DType, double (&y)[2]) const {
    y[0] = pair[0];
    y[1] = pair[1];
  }
};

template <>
struct Held<float> {
  std::uint32_t words[8];
  FUSEREG_DEVICE_INLINE void load(DType dtype, const void* x, std::int64_t at) {
    const bool wide = dtype == DType::kFloat32;
    const char* const from = static_cast<const char*>(x) + at * (wide ? 4 : 2);
    put(0, from);
    if (wide) {
      put(4, from + 16);
    } else {
      FUSEREG_UNROLL
      for (int i = 4; i < 8; ++i) words[i] = 0;
    }
#if !defined(FUSEREG_CUDA_ON_HOST)
    // No use is moved into the branch.
    FUSEREG_UNROLL
    for (std::uint32_t& word : words) asm("" : "+r"(word));
#endif
  }
  FUSEREG_DEVICE_INLINE void get(DType dtype, float (&y)[8]) const {
    if (dtype == DType::kFloat32) {
      FUSEREG_UNROLL
      for (int i = 0; i < 8; ++i) y[i] = bit_cast<float>(words[i]);
    } else if (dtype == DType::kBFloat16) {
      narrow<BFloat16>(y);
    } else {
      narrow<Half>(y);
    }
  }

 private:
  FUSEREG_DEVICE_INLINE void put(int first, const char* from) {
    const auto part = cuda::load<4>(in_global(reinterpret_cast<const std::uint32_t*>(from)));
    FUSEREG_UNROLL
    for (int i = 0; i < 4; ++i) words[first + i] = part[i];
  }
  template <class T>
  FUSEREG_DEVICE_INLINE void narrow(float (&y)[8]) const {
    FUSEREG_UNROLL
    for (int i = 0; i < 8; ++i) {
      y[i] = to_float(T{static_cast<std::uint16_t>(words[i / 2] >> (i % 2 * 16))});
    }
  }
};

template <class T, class C>
FUSEREG_DEVICE_INLINE void store_typed(T* x, const C (&y)[kPerThread<C>]) {
  constexpr int kN = cuda::kVecSize<T> < kPerThread<C> ? cuda::kVecSize<T> : kPerThread<C>;
  FUSEREG_UNROLL
  for (int i = 0; i < kPerThread<C>; i += kN) {
    cuda::store(x + i, cuda::rounded_to<T, kN>([&](int e) { return y[i + e]; }));
  }
}
FUSEREG_DEVICE_INLINE void store_many(DType, void* x, std::int64_t at, const double (&y)[2]) {
  store_typed(static_cast<double*>(x) + at, y);
}
FUSEREG_DEVICE_INLINE void store_many(DType dtype, void* x, std::int64_t at, const float (&y)[8]) {
  if (dtype == DType::kFloat32) {
    store_typed(static_cast<float*>(x) + at, y);
  } else if (dtype == DType::kBFloat16) {
    store_typed(static_cast<BFloat16*>(x) + at, y);
  } else {
    store_typed(static_cast<Half*>(x) + at, y);
  }
}

// What every thread of a block needs to know of its tensor.
struct Work {
  Coefficients<double> k;
  Coefficients<float> narrow;  // the same
  HyperValues h;
  Flags flags;
  bool update;  // neither an overflow nor a rest forbids it
  bool average;
  bool value;
  Target target;  // a table's entry, where that lies in memory
};

// They stay in shared memory: in registers, loads that are under way would have no room.
template <class C>
FUSEREG_DEVICE_INLINE const Coefficients<C>& coefficients_of(const Work& w) {
  if constexpr (sizeof(C) == 8) {
    return w.k;
  } else {
    return w.narrow;
  }
}

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
  FUSEREG_UNROLL
  for (int j = 0; j < most_states(algorithm); ++j) {
    if (j < states) s[j] = load_one<C>(item.state_dtype, item.state[j], at);
  }
  C p = weight_at<C>(item, at);
  if (algorithm == Algorithm::kFtrl && is_16_bit(item.p_dtype)) {
    p = recovered(item.p_dtype, p, s[0], s[1], k);
  }
  p = updated<algorithm>(p, load_one<C>(item.g_dtype, g, at), s, k, f);
  if constexpr (algorithm != Algorithm::kLambNorms) {
    store_one(item.p_dtype, item.p, at, p);
    if (item.copy != nullptr) store_one(item.copy_dtype, item.copy, at, p);
  }
  if constexpr (algorithm != Algorithm::kLamb) {
    FUSEREG_UNROLL
    for (int j = 0; j < most_states(algorithm); ++j) {
      if (j < states) store_one(item.state_dtype, item.state[j], at, s[j]);
    }
  }
  return p;
}

// The average after a step has written p, or has rested.
template <class C>
FUSEREG_DEVICE_INLINE void average_one(const Target& item, std::int64_t at, C weight) {
  C* const a = static_cast<C*>(item.average) + at;
  *a = averaged(*a, weight_at<C>(item, at), weight);
}

FUSEREG_DEVICE_INLINE bool aligned_at(const void* x, DType dtype, std::int64_t at) {
  const int bytes = dtype == DType::kFloat64 ? 8 : dtype == DType::kFloat32 ? 4 : 2;
  return (reinterpret_cast<std::uintptr_t>(x) + static_cast<std::uintptr_t>(at * bytes)) % 16 == 0;
}

// As weight_at, of kPerThread elements.
template <class C>
struct Weights {
  Held<C> own;
  Held<C> copy;
  FUSEREG_DEVICE_INLINE void load(const Target& item, std::int64_t at) {
    own.load(item.p_dtype, item.p, at);
    if (has_copy(item)) copy.load(item.copy_dtype, item.copy, at);
  }
  FUSEREG_DEVICE_INLINE void get(const Target& item, C (&p)[kPerThread<C>]) const {
    own.get(item.p_dtype, p);
    if (!has_copy(item)) return;
    C changed[kPerThread<C>];
    copy.get(item.copy_dtype, changed);
    FUSEREG_UNROLL
    for (int i = 0; i < kPerThread<C>; ++i) p[i] = settled(item.copy_dtype, p[i], changed[i]);
  }
  FUSEREG_DEVICE_INLINE static void store(const Target& item, std::int64_t at,
                                          const C (&p)[kPerThread<C>]) {
    store_many(item.p_dtype, item.p, at, p);
    if (has_copy(item)) store_many(item.copy_dtype, item.copy, at, p);
  }

 private:
  // A master is float32.
  FUSEREG_DEVICE_INLINE static bool has_copy(const Target& item) {
    return sizeof(C) == 4 && item.copy != nullptr;
  }
};

// The average of kPerThread elements, in the type that computes.
template <class C>
struct Average {
  Held<C> held;
  FUSEREG_DEVICE_INLINE void load(const Target& item, std::int64_t at) {
    held.load(Traits<C>::kDType, item.average, at);
  }
  // p: as it is stored.
  FUSEREG_DEVICE_INLINE void store(const Target& item, std::int64_t at, C weight,
                                   const C (&p)[kPerThread<C>]) const {
    C a[kPerThread<C>];
    held.get(Traits<C>::kDType, a);
    FUSEREG_UNROLL
    for (int i = 0; i < kPerThread<C>; ++i) a[i] = averaged(a[i], p[i], weight);
    store_typed(static_cast<C*>(item.average) + at, a);
  }
};

// What memory has of p once it is stored.
template <class C>
FUSEREG_DEVICE_INLINE void round_as_stored(const Target& item, C (&p)[kPerThread<C>]) {
  if (!is_16_bit(item.p_dtype)) return;
  FUSEREG_UNROLL
  for (int i = 0; i < kPerThread<C>; ++i) p[i] = stored(item.p_dtype, p[i]);
}

// kPerThread elements from `at` on; calls seen(p) with what the step begins with, and leaves the
// new p there, of kLambNorms the update. Everything is loaded before the first number is used.
template <Algorithm algorithm, class C, class Seen>
FUSEREG_DEVICE_INLINE void update_many(const Target& item, const void* gradient, std::int64_t at,
                                       const Coefficients<C>& k, const Flags& f, int states,
                                       bool average, C (&p)[kPerThread<C>], const Seen& seen) {
  constexpr int kN = kPerThread<C>;
  // What is not loaded is zero: else its registers would be kept from one turn of the loop to the next.
  Weights<C> weights{};
  Held<C> held_g{};
  Held<C> held_s[kMaxStates] = {};
  Average<C> mean{};
  weights.load(item, at);
  if (algorithm != Algorithm::kLamb) held_g.load(item.g_dtype, gradient, at);
  FUSEREG_UNROLL
  for (int j = 0; j < most_states(algorithm); ++j) {
    if (j < states) held_s[j].load(item.state_dtype, item.state[j], at);
  }
  if (average) mean.load(item, at);
  weights.get(item, p);
  seen(p);
  C g[kN] = {};
  C s[kMaxStates][kN] = {};
  if (algorithm != Algorithm::kLamb) held_g.get(item.g_dtype, g);
  FUSEREG_UNROLL
  for (int j = 0; j < most_states(algorithm); ++j) {
    if (j < states) held_s[j].get(item.state_dtype, s[j]);
  }
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
  if constexpr (algorithm != Algorithm::kLamb) {
    FUSEREG_UNROLL
    for (int j = 0; j < most_states(algorithm); ++j) {
      if (j < states) store_many(item.state_dtype, item.state[j], at, s[j]);
    }
  }
  if constexpr (algorithm == Algorithm::kLambNorms) return;
  weights.store(item, at, p);
  if (!average) return;
  round_as_stored(item, p);
  mean.store(item, at, k.average, p);
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

// Whether kPerThread elements are taken at once: not where float64 meets another dtype.
FUSEREG_DEVICE_INLINE bool fits(const Target& item, int states) {
  const bool wide = item.p_dtype == DType::kFloat64;
  return (item.g_dtype == DType::kFloat64) == wide &&
         (states == 0 || (item.state_dtype == DType::kFloat64) == wide);
}

FUSEREG_DEVICE_INLINE std::int64_t head_of(const Target& item, const void* gradient, int states,
                                           std::int64_t begin, std::int64_t n) {
  std::int64_t head = 0;
  while (head < 8 && !aligned_at(item.p, item.p_dtype, begin + head)) ++head;
  bool together = fits(item, states) && aligned_at(gradient, item.g_dtype, begin + head) &&
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
  const Coefficients<C>& k = coefficients_of<C>(w);
  const Flags& f = w.flags;
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
      update_many<algorithm>(item, gradient, at, k, f, states, average, p, seen);
      FUSEREG_UNROLL
      for (int i = 0; i < kN; ++i) {
        if (kNorms) add_update(p[i]);
      }
      return;
    }
    Weights<C> weights{};
    Average<C> mean{};
    weights.load(item, at);
    if (average) mean.load(item, at);
    weights.get(item, p);
    seen(p);
    if (average) mean.store(item, at, k.average, p);
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
    FUSEREG_UNROLL
    for (int j = 0; j < most_states(algorithm); ++j) {
      if (j < states) s[j] = load_one<C>(item.state_dtype, item.state[j], at);
    }
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
        Weights<C> weights{};
        weights.load(item, at);
        C p[kN];
        weights.get(item, p);
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

  Coefficients<C> k = coefficients_of<C>(w);
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
        update_many<algorithm>(item, gradient, at, k, f, states, average && !prox, p,
                               [](const C(&)[kN]) {});
        if (!prox) return;
        round_as_stored(item, p);
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
        Held<C> own;
        Average<C> mean{};
        own.load(item.p_dtype, item.p, at);
        if (average) mean.load(item, at);
        C p[kN];
        own.get(item.p_dtype, p);
        FUSEREG_UNROLL
        for (int i = 0; i < kN; ++i) p[i] = shrunk(p[i]);
        Weights<C>::store(item, at, p);
        if (!average) return;
        round_as_stored(item, p);
        mean.store(item, at, k.average, p);
      });
  return value;
}

FUSEREG_HD inline std::int64_t rows_per_task(std::int64_t row) {
  return row <= kWarpRow ? kWarps : 1;
}

}  // namespace fusereg::optim
