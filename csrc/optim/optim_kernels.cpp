// CPU kernels of the optimizers; compiled once per instruction set. Contract: optim.h.
//
// There is one update loop for each algorithm, in float32 and in float64. Tensors of other dtypes
// are widened into a tile in the first-level cache, updated there and narrowed again, so that all
// combinations of dtypes share that loop.
//
// Sums are kept in kLanes columns of float64, element i in column i % kLanes, whatever the vector
// width: every instruction set adds the same numbers in the same order and gives the same bits.
#include "core/simd.h"
#include "optim/optim.h"
#include "optim/optim_math.h"

namespace fusereg::optim::FUSEREG_ISA {
namespace {

using namespace ::fusereg::FUSEREG_ISA;

constexpr int kLanes = 32;
constexpr int kTile = 512;

// --- sums ---

template <class C>
struct Lanes {
  static constexpr int kWide = static_cast<int>(sizeof(double) / sizeof(C));
  static constexpr int kVectors = kLanes / kWidth<C>;
  Vector<double> sums[kVectors][kWide];
};

template <class C>
FUSEREG_INLINE double add_lanes(const Lanes<C>& lanes) {
  double sum[kLanes];
  static_assert(sizeof(sum) == sizeof(lanes.sums), "one sum a lane");
  memcpy(sum, lanes.sums, sizeof(sum));
  for (int i = 0; i < 16; ++i) sum[i] += sum[i + 16];
  for (int i = 0; i < 8; ++i) sum[i] += sum[i + 8];
  for (int i = 0; i < 4; ++i) sum[i] += sum[i + 4];
  return (sum[0] + sum[2]) + (sum[1] + sum[3]);
}

// Calls f(v, x) for each vector of n elements; v is its place among the lanes.
template <class T, class F>
FUSEREG_INLINE void for_each_vector(const T* x, std::int64_t n, F f) {
  constexpr int kW = kWidth<Compute<T>>;
  constexpr int kVectors = kLanes / kW;
  std::int64_t i = 0;
  for (; n - i >= kLanes; i += kLanes) {
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) f(v, load(x + i + v * kW));
  }
  for (int v = 0; i < n; i += kW, ++v) f(v, load_partial(x + i, n - i < kW ? n - i : kW));
}

// Both sums in float64: no square of a float32 overflows there.
FUSEREG_INLINE void add_both(Vector<float> x, Vector<double> (&absolute)[2],
                             Vector<double> (&square)[2]) {
  Vector<double> wide[2] = {};
  add_widened(x, wide);
  for (int h = 0; h < 2; ++h) {
    absolute[h] += abs(wide[h]);
    square[h] += wide[h] * wide[h];
  }
}
FUSEREG_INLINE void add_both(Vector<double> x, Vector<double> (&absolute)[1],
                             Vector<double> (&square)[1]) {
  absolute[0] += abs(x);
  square[0] += x * x;
}

template <class T>
void add_sums(const T* x, std::int64_t n, Sums& sums) {
  Lanes<Compute<T>> absolute{};
  Lanes<Compute<T>> square{};
  for_each_vector(x, n, [&](int v, Vector<Compute<T>> at) __attribute__((always_inline)) {
    add_both(at, absolute.sums[v], square.sums[v]);
  });
  sums.absolute += add_lanes(absolute);
  sums.square += add_lanes(square);
}

// --- the update ---

// A tile in the type that computes: straight in the tensors, or widened copies.
template <class C>
struct Tile {
  C* p;
  const C* g;
  C* state[kMaxStates];
  C* average;  // null where there is none, or p is to be rounded first
  // Of a master: its 16-bit weights, and their gradient if g is null.
  void* copy;
  const void* low_g;
  bool half;
};

// x as T stores it.
template <class T>
FUSEREG_INLINE Vector<float> rounded(Vector<float> x) {
  if constexpr (Traits<T>::kDType == DType::kBFloat16) {
    const U32Vector u = bit_cast<U32Vector>(x);
    return bit_cast<Vector<float>>((u + (((u >> 16) & 1u) + 0x7fffu)) & 0xffff0000u);
  } else {
    T buffer[kWidth<float>];
    store(buffer, x);
    return load(buffer);
  }
}

// FTRL: a weight in 16 bits with the digits that z has kept.
template <class T, class C>
FUSEREG_INLINE Vector<C> recovered(Vector<C> p, const Vector<C> (&s)[kMaxStates],
                                   const Coefficients<C>& k) {
  if constexpr (sizeof(T) == 2) {
    const Vector<C> kept = ftrl_weight(s[0], s[1], k);
    return rounded<T>(kept) == p ? kept : p;
  } else {
    return p;
  }
}

template <Algorithm algorithm>
constexpr bool kWritesStates = algorithm != Algorithm::kLamb;

// The elements of one vector, or of a part of it, in 16 bits.
template <class T>
FUSEREG_INLINE Vector<float> load_low(const void* x, std::int64_t i, std::int64_t n) {
  const T* const at = static_cast<const T*>(x) + i;
  return n >= kWidth<float> ? load(at) : load_partial(at, n);
}
FUSEREG_INLINE Vector<float> load_low(bool half, const void* x, std::int64_t i, std::int64_t n) {
  return half ? load_low<Half>(x, i, n) : load_low<BFloat16>(x, i, n);
}
template <class T>
FUSEREG_INLINE void store_low(void* x, std::int64_t i, Vector<float> v, std::int64_t n) {
  T* const at = static_cast<T*>(x) + i;
  if (n >= kWidth<float>) {
    store(at, v);
  } else {
    store_partial(at, v, n);
  }
}

// A master, or its weight where that is not what the master rounds to: it was changed.
template <class T>
FUSEREG_INLINE Vector<float> taken(Vector<float> p, Vector<float> copy) {
  const U32Vector differs = bit_cast<U32Vector>(rounded<T>(p)) ^ bit_cast<U32Vector>(copy);
  const Vector<float> same = differs == U32Vector{} ? p : copy;
  return p == p ? same : copy;  // the vectors above do not round NaN as storage does
}

// T: the dtype of p in memory where FTRL must know it.
enum class Beside : std::uint8_t { kNothing, kAverage, kCopy };

template <Algorithm algorithm, class T, Beside beside, class C>
FUSEREG_INLINE void update_vector(const Tile<C>& t, std::int64_t i, std::int64_t n,
                                  const Coefficients<C>& k, const Flags& f, int states) {
  using V = Vector<C>;
  const bool whole = n >= kWidth<C>;
  const auto get = [&](const C* x) __attribute__((always_inline)) {
    return whole ? load(x + i) : load_partial(x + i, n);
  };
  const auto put = [&](C* x, V v) __attribute__((always_inline)) {
    if (whole) {
      store(x + i, v);
    } else {
      store_partial(x + i, v, n);
    }
  };
  V s[kMaxStates] = {};
  for (int j = 0; j < kMaxStates; ++j) {
    if (j < states) s[j] = get(t.state[j]);
  }
  V p = recovered<T>(get(t.p), s, k);
  V g;
  if constexpr (beside == Beside::kCopy) {
    const V copy = load_low(t.half, t.copy, i, n);
    p = t.half ? taken<Half>(p, copy) : taken<BFloat16>(p, copy);
    g = t.g != nullptr ? get(t.g) : load_low(t.half, t.low_g, i, n);
  } else {
    g = get(t.g);
  }
  const V next = updated<algorithm>(p, g, s, k, f);
  put(t.p, next);
  if constexpr (beside == Beside::kCopy) {
    if (t.half) {
      store_low<Half>(t.copy, i, next, n);
    } else {
      store_low<BFloat16>(t.copy, i, next, n);
    }
  }
  if (beside == Beside::kAverage || (beside == Beside::kCopy && t.average != nullptr)) {
    put(t.average, averaged(get(t.average), next, k.average));
  }
  for (int j = 0; j < kMaxStates; ++j) {
    if (j < states && kWritesStates<algorithm>) put(t.state[j], s[j]);
  }
}

template <Algorithm algorithm, class T, Beside beside, class C>
void update_tile(const Tile<C>& tile, std::int64_t n, const Coefficients<C>& k,
                 const Flags& flags) {
  constexpr int kW = kWidth<C>;
  const Tile<C> t = tile;
  const Flags f = flags;
  const int states = state_count(algorithm, f);
  std::int64_t i = 0;
  for (; n - i >= kW; i += kW) update_vector<algorithm, T, beside>(t, i, kW, k, f, states);
  if (i < n) update_vector<algorithm, T, beside>(t, i, n - i, k, f, states);
}

template <Algorithm algorithm, class T, class C>
void update(const Tile<C>& t, std::int64_t n, const Coefficients<C>& k, const Flags& f) {
  if constexpr (sizeof(C) == 4 && sizeof(T) == 4) {
    if (t.copy != nullptr) return update_tile<algorithm, T, Beside::kCopy>(t, n, k, f);
  }
  if (t.average != nullptr) return update_tile<algorithm, T, Beside::kAverage>(t, n, k, f);
  update_tile<algorithm, T, Beside::kNothing>(t, n, k, f);
}

template <class C>
void update_any(Algorithm algorithm, DType p_dtype, const Tile<C>& t, std::int64_t n,
                const Coefficients<C>& k, const Flags& f) {
  switch (algorithm) {
    case Algorithm::kSgd:
      return update<Algorithm::kSgd, C>(t, n, k, f);
    case Algorithm::kAdam:
      return update<Algorithm::kAdam, C>(t, n, k, f);
    case Algorithm::kAdagrad:
      return update<Algorithm::kAdagrad, C>(t, n, k, f);
    case Algorithm::kRmsprop:
      return update<Algorithm::kRmsprop, C>(t, n, k, f);
    case Algorithm::kNadam:
      return update<Algorithm::kNadam, C>(t, n, k, f);
    case Algorithm::kLion:
      return update<Algorithm::kLion, C>(t, n, k, f);
    case Algorithm::kLamb:
      return update<Algorithm::kLamb, C>(t, n, k, f);
    case Algorithm::kLambNorms:
      return update_tile<Algorithm::kLambNorms, C, Beside::kNothing>(t, n, k, f);
    default:
      if constexpr (sizeof(C) == 4) {
        if (p_dtype == DType::kFloat16) return update<Algorithm::kFtrl, Half>(t, n, k, f);
        if (p_dtype == DType::kBFloat16) return update<Algorithm::kFtrl, BFloat16>(t, n, k, f);
      }
      return update<Algorithm::kFtrl, C>(t, n, k, f);
  }
}

// --- dtypes ---

template <class T, class C>
void widen_from(const T* x, C* out, std::int64_t n) {
  if constexpr (sizeof(C) == sizeof(Compute<T>)) {
    constexpr int kW = kWidth<C>;
    std::int64_t i = 0;
    for (; n - i >= kW; i += kW) store(out + i, load(x + i));
    for (; i < n; ++i) out[i] = to_compute(x[i]);
  } else {
    for (std::int64_t i = 0; i < n; ++i) out[i] = static_cast<C>(to_compute(x[i]));
  }
}

template <class T, class C>
void narrow_to(const C* x, T* out, std::int64_t n) {
  if constexpr (sizeof(C) == sizeof(Compute<T>)) {
    constexpr int kW = kWidth<C>;
    std::int64_t i = 0;
    for (; n - i >= kW; i += kW) store(out + i, load(x + i));
    for (; i < n; ++i) out[i] = from_compute<T>(x[i]);
  } else {
    for (std::int64_t i = 0; i < n; ++i) out[i] = from_compute<T>(static_cast<Compute<T>>(x[i]));
  }
}

template <class C>
void widen(DType dtype, const void* x, std::int64_t at, C* out, std::int64_t n) {
  dispatch_dtype(dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    widen_from(static_cast<const T*>(x) + at, out, n);
  });
}

template <class C>
void narrow(DType dtype, const C* x, void* out, std::int64_t at, std::int64_t n) {
  dispatch_dtype(dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    narrow_to(x, static_cast<T*>(out) + at, n);
  });
}

// Where a master does not round to its weight, the weight was changed: it is the master now.
template <class T>
void take_typed(float* p, const T* copy, std::int64_t n) {
  constexpr int kW = kWidth<float>;
  U32Vector differs{};
  std::int64_t i = 0;
  for (; n - i >= kW; i += kW) {
    differs |= bit_cast<U32Vector>(rounded<T>(load(p + i))) ^ bit_cast<U32Vector>(load(copy + i));
  }
  std::uint32_t any = 0;
  for (int k = 0; k < kW; ++k) any |= differs[k];
  if (any == 0 && i == n) return;
  for (i = any == 0 ? i : 0; i < n; ++i) {
    if (from_compute<T>(p[i]).bits != copy[i].bits) p[i] = to_compute(copy[i]);
  }
}

void take_changed(const Item& item, std::int64_t at, std::int64_t n) {
  float* const p = static_cast<float*>(item.p) + at;
  if (item.copy_dtype == DType::kFloat16) {
    take_typed(p, static_cast<const Half*>(item.copy) + at, n);
  } else {
    take_typed(p, static_cast<const BFloat16*>(item.copy) + at, n);
  }
}

template <class C>
void average_in(const Item& item, std::int64_t begin, std::int64_t n, double weight) {
  constexpr int kW = kWidth<C>;
  const C w = static_cast<C>(weight);
  C tile[kTile];
  for (std::int64_t at = begin; at < begin + n; at += kTile) {
    const std::int64_t count = begin + n - at < kTile ? begin + n - at : kTile;
    const C* p = static_cast<const C*>(item.p) + at;
    if (item.p_dtype != Traits<C>::kDType) {
      widen(item.p_dtype, item.p, at, tile, count);
      p = tile;
    }
    C* const a = static_cast<C*>(item.average) + at;
    std::int64_t i = 0;
    for (; count - i >= kW; i += kW) store(a + i, averaged(load(a + i), load(p + i), w));
    for (; i < count; ++i) a[i] = averaged(a[i], p[i], w);
  }
}

void average_any(const Item& item, std::int64_t begin, std::int64_t n, double weight) {
  if (item.p_dtype == DType::kFloat64) return average_in<double>(item, begin, n, weight);
  average_in<float>(item, begin, n, weight);
}

template <class C>
Sums elements_in(Algorithm algorithm, const Item& item, const Flags& f, const Coefficients<C>& k,
                 std::int64_t begin, std::int64_t n, bool wants_sums) {
  constexpr DType kOwn = Traits<C>::kDType;
  const int states = state_count(algorithm, f);
  // The norms' pass writes no weights: what it computes stays in a tile.
  const bool norms = algorithm == Algorithm::kLambNorms;
  const bool own_p = item.p_dtype == kOwn && !norms;
  const bool own_g = item.g_dtype == kOwn;
  const bool own_state = item.state_dtype == kOwn;
  // Beside a master, a gradient in the weights' dtype is read where it is.
  const bool copies = item.copy != nullptr && !norms;
  const bool low_g = copies && item.g_dtype == item.copy_dtype;
  const bool direct = own_p && (own_g || low_g) && own_state;
  C tile_p[kTile];
  C tile_g[kTile];
  C tile_state[kMaxStates][kTile];
  Sums sums;
  // The sums read a tile first, the update finds it in the first-level cache.
  const std::int64_t step = direct && !wants_sums ? n : kTile;
  for (std::int64_t i = 0; i < n; i += step) {
    const std::int64_t at = begin + i;
    const std::int64_t count = n - i < step ? n - i : step;
    Tile<C> t{};
    if (item.copy != nullptr && (norms || wants_sums)) take_changed(item, at, count);
    if (copies) {
      constexpr std::int64_t kLowSize = 2;
      t.copy = static_cast<char*>(item.copy) + at * kLowSize;
      t.half = item.copy_dtype == DType::kFloat16;
      if (low_g) t.low_g = static_cast<const char*>(item.g) + at * kLowSize;
    }
    t.p = own_p ? static_cast<C*>(item.p) + at : tile_p;
    if (!own_p) widen(item.p_dtype, item.p, at, tile_p, count);
    if (own_p && item.average != nullptr) t.average = static_cast<C*>(item.average) + at;
    if (!low_g) t.g = own_g ? static_cast<const C*>(item.g) + at : tile_g;
    if (!own_g && !low_g) widen(item.g_dtype, item.g, at, tile_g, count);
    for (int j = 0; j < states; ++j) {
      t.state[j] = own_state ? static_cast<C*>(item.state[j]) + at : tile_state[j];
      if (!own_state) widen(item.state_dtype, item.state[j], at, tile_state[j], count);
    }
    if (wants_sums) add_sums(t.p, count, sums);
    update_any(algorithm, item.p_dtype, t, count, k, f);
    if (norms) {
      Sums update;
      add_sums(t.p, count, update);
      sums.update += update.square;
    }
    if (!own_p && !norms) narrow(item.p_dtype, tile_p, item.p, at, count);
    for (int j = 0; j < states && !own_state; ++j) {
      narrow(item.state_dtype, tile_state[j], item.state[j], at, count);
    }
    // p as it was rounded; it is in the first-level cache still.
    if (!own_p && !norms && item.average != nullptr) {
      average_in<C>(item, at, count, static_cast<double>(k.average));
    }
  }
  return sums;
}

Sums elements_any(Algorithm algorithm, const Item& item, const Flags& f,
                  const Coefficients<double>& k, std::int64_t begin, std::int64_t n,
                  bool wants_sums) {
  if (item.p_dtype == DType::kFloat64)
    return elements_in<double>(algorithm, item, f, k, begin, n, wants_sums);
  return elements_in<float>(algorithm, item, f, in_type<float>(k), begin, n, wants_sums);
}

// --- rows ---

// The row's square after soft-thresholding, from what the update left in p.
double shrunk_square(const Item& item, std::int64_t at, std::int64_t n, double threshold) {
  return dispatch_dtype(item.p_dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    using C = Compute<T>;
    const Vector<C> cut = broadcast(static_cast<C>(threshold));
    const Vector<C> one = broadcast(C(1));
    Lanes<C> absolute{};
    Lanes<C> square{};
    for_each_vector(static_cast<const T*>(item.p) + at, n,
                    [&](int v, Vector<C> x) __attribute__((always_inline)) {
                      add_both(soft_threshold<C>(x, cut, one), absolute.sums[v], square.sums[v]);
                    });
    return add_lanes(square);
  });
}

void shrink_row(const Item& item, std::int64_t at, std::int64_t n, double threshold,
                double factor) {
  dispatch_dtype(item.p_dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    using C = Compute<T>;
    constexpr int kW = kWidth<C>;
    T* const p = static_cast<T*>(item.p) + at;
    const Vector<C> cut = broadcast(static_cast<C>(threshold));
    const Vector<C> by = broadcast(static_cast<C>(factor));
    std::int64_t i = 0;
    for (; n - i >= kW; i += kW) store(p + i, soft_threshold<T>(load(p + i), cut, by));
    if (i < n) store_partial(p + i, soft_threshold<T>(load_partial(p + i, n - i), cut, by), n - i);
    if (item.copy == nullptr) return;
    dispatch_dtype(item.copy_dtype, [&](auto copy_tag) {
      using Copy = typename decltype(copy_tag)::type;
      if constexpr (sizeof(T) >= sizeof(C)) narrow_to(p, static_cast<Copy*>(item.copy) + at, n);
    });
  });
}

// Calls visit(q, states, width, index) for each vector of a row, in the type that computes.
template <Algorithm algorithm, class C, class F>
FUSEREG_INLINE void for_each_state(const Item& item, const Flags& f, std::int64_t at,
                                   std::int64_t n, const F& visit) {
  using V = Vector<C>;
  constexpr int kW = kWidth<C>;
  const int states = state_count(algorithm, f);
  C tile_p[kTile];
  C tile_state[kMaxStates][kTile];
  for (std::int64_t i = 0; i < n; i += kTile) {
    const std::int64_t count = n - i < kTile ? n - i : kTile;
    widen(item.p_dtype, item.p, at + i, tile_p, count);
    for (int j = 0; j < states; ++j) {
      widen(item.state_dtype, item.state[j], at + i, tile_state[j], count);
    }
    for (std::int64_t e = 0; e < count; e += kW) {
      const std::int64_t width = count - e < kW ? count - e : kW;
      V s[kMaxStates] = {};
      for (int j = 0; j < states; ++j) s[j] = load_partial(tile_state[j] + e, width);
      visit(load_partial(tile_p + e, width), s, width, at + i + e);
    }
  }
}

// A row's proximal step in the metric of the update that p and the states have had.
template <Algorithm algorithm, class C>
void shrink_in_metric(const Item& item, std::int64_t at, std::int64_t n, const Coefficients<C>& k,
                      const Flags& f) {
  using V = Vector<C>;
  constexpr int kW = kWidth<C>;
  constexpr int kLast = kLanes / kW - 1;
  C ones[kW];
  for (C& one : ones) one = C(1);
  const auto sums = [&](double norm, double group, double scale) {
    Lanes<C> square{};
    Lanes<C> slope{};
    Lanes<C> metric{};
    const C by = static_cast<C>(scale);
    const C y = static_cast<C>(norm);
    const C beside = static_cast<C>(group);
    Lanes<C> unused{};
    int v = 0;
    for_each_state<algorithm, C>(
        item, f, at, n,
        [&](V q, const V(&s)[kMaxStates], std::int64_t width, std::int64_t)
            __attribute__((always_inline)) {
              const MetricTerm<V> t = metric_term<algorithm>(q, s, k, f, by);
              const V inverse = C(1) / (t.slope * y + beside);
              const V x = t.shrunk * inverse;
              add_both(x, unused.sums[v], square.sums[v]);
              add_widened(x * x * t.slope * inverse, slope.sums[v]);
              add_both(t.metric * load_partial(ones, width), unused.sums[v], metric.sums[v]);
              v = v == kLast ? 0 : v + 1;
            });
    return MetricSums{add_lanes(square), add_lanes(slope), add_lanes(metric)};
  };
  double scale = 1.0;
  constexpr double kTolerance = sizeof(C) == 8 ? 1e-15 : 1e-8;
  const C ratio =
      static_cast<C>(metric_ratio(static_cast<double>(k.group), static_cast<double>(k.floor_group),
                                  static_cast<double>(k.shrink), kTolerance, scale, sums));
  const C by = static_cast<C>(scale);
  for_each_state<algorithm, C>(
      item, f, at, n,
      [&](V q, const V(&s)[kMaxStates], std::int64_t width, std::int64_t index)
          __attribute__((always_inline)) {
            C out[kW];
            store(out, metric_weight(q, metric_term<algorithm>(q, s, k, f, by), ratio, k));
            narrow(item.p_dtype, out, item.p, index, width);
            if (item.copy != nullptr) narrow(item.copy_dtype, out, item.copy, index, width);
          });
}

template <class C>
void shrink_in_metric_any(Algorithm algorithm, const Item& item, std::int64_t at,
                          const Coefficients<C>& k, const Flags& f) {
  switch (algorithm) {
    case Algorithm::kAdam:
      return shrink_in_metric<Algorithm::kAdam>(item, at, item.row, k, f);
    case Algorithm::kAdagrad:
      return shrink_in_metric<Algorithm::kAdagrad>(item, at, item.row, k, f);
    case Algorithm::kRmsprop:
      return shrink_in_metric<Algorithm::kRmsprop>(item, at, item.row, k, f);
    default:  // NAdam and LAMB have the same
      return shrink_in_metric<Algorithm::kNadam>(item, at, item.row, k, f);
  }
}

Sums rows_any(Algorithm algorithm, const Item& item, const Flags& flags,
              const Coefficients<double>& k, std::int64_t begin, std::int64_t n, bool wants_sums) {
  Sums total;
  const bool prox = flags.prox != Prox::kNone;
  const bool in_metric = flags.prox >= Prox::kPreconditioned && has_metric(algorithm);
  Flags f = flags;
  f.prox = Prox::kNone;  // the update leaves the proximal step to this function
  Item plain = item;
  if (prox) plain.copy = plain.average = nullptr;  // and what is made of its result
  const double sqrt_n = __builtin_sqrt(static_cast<double>(item.row));
  for (std::int64_t at = begin; at < begin + n; at += item.row) {
    Coefficients<double> c = k;
    if (item.copy != nullptr) take_changed(item, at, item.row);
    if (wants_sums || !prox) {
      const double norm = __builtin_sqrt(shrunk_square(item, at, item.row, 0.0));
      total.groups += sqrt_n * norm;
      if (!prox) c.l2 += group_gradient_factor(k.group, norm);
    }
    const Sums part = elements_any(algorithm, plain, f, c, at, item.row, wants_sums);
    total.absolute += part.absolute;
    total.square += part.square;
    if (!prox) continue;
    if (in_metric) {
      if (item.p_dtype == DType::kFloat64) {
        shrink_in_metric_any(algorithm, item, at, k, flags);
      } else {
        shrink_in_metric_any(algorithm, item, at, in_type<float>(k), flags);
      }
      if (item.average != nullptr) average_any(item, at, item.row, k.average);
      continue;
    }
    const double norm = __builtin_sqrt(shrunk_square(item, at, item.row, k.threshold));
    shrink_row(item, at, item.row, k.threshold, group_prox_factor(k.group, norm) * k.factor);
    if (item.average != nullptr) average_any(item, at, item.row, k.average);
  }
  return total;
}

// --- norms and scaling ---

double norm_any(Norm norm, DType dtype, const void* x, std::int64_t n) {
  return dispatch_dtype(dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    using C = Compute<T>;
    const T* const typed = static_cast<const T*>(x);
    if (norm == Norm::kInfinity) {
      Vector<C> most[2] = {};
      for_each_vector(typed, n, [&](int v, Vector<C> at) __attribute__((always_inline)) {
        most[v % 2] = greater(abs(at), most[v % 2]);
      });
      const Vector<C> both = greater(most[0], most[1]);
      C result = both[0];
      for (int i = 1; i < kWidth<C>; ++i) result = greater(both[i], result);
      return static_cast<double>(result);
    }
    Sums sums;
    add_sums(typed, n, sums);
    return norm == Norm::kOne ? sums.absolute : sums.square;
  });
}

// x = f(x, number), in place.
template <class F>
FUSEREG_INLINE void map_any(DType dtype, void* x, std::int64_t n, double number, const F& f) {
  dispatch_dtype(dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    using C = Compute<T>;
    constexpr int kW = kWidth<C>;
    T* const p = static_cast<T*>(x);
    const Vector<C> by = broadcast(static_cast<C>(number));
    std::int64_t i = 0;
    for (; n - i >= kW; i += kW) store(p + i, f(load(p + i), by));
    if (i < n) store_partial(p + i, f(load_partial(p + i, n - i), by), n - i);
  });
}

void scale_any(DType dtype, void* x, std::int64_t n, double factor) {
  map_any(dtype, x, n, factor,
          [](auto v, auto by) __attribute__((always_inline)) { return v * by; });
}

void clamp_any(DType dtype, void* x, std::int64_t n, double limit) {
  map_any(dtype, x, n, limit,
          [](auto v, auto by) __attribute__((always_inline)) { return clamped(v, by); });
}

}  // namespace

const CpuKernels kernels = {&elements_any, &rows_any,     &norm_any,   &scale_any,
                            &clamp_any,    &take_changed, &average_any};

}  // namespace fusereg::optim::FUSEREG_ISA
