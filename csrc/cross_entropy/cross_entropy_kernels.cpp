// CPU kernels of cross-entropy; compiled once per instruction set. Contract: cross_entropy.h.
//
// Logits are read once from memory in each direction. A block of them is read twice, the second time
// from the first cache: for the maximum m so far, and for the sum of exp(x - m), which is rescaled
// where m has grown. There are kTile sums, whatever the vector width, so every instruction set gives
// the same bits. Where classes are neighbors, class c of a row goes to sum c % kTile; where not, the
// sums belong to kTile neighboring rows.
#include "core/simd_some.h"
// After it, for vectors.
#include "cross_entropy/cross_entropy.h"

namespace fusereg::cross_entropy::FUSEREG_ISA {
namespace {

using namespace ::fusereg::FUSEREG_ISA;

// Steps of kTile logits that make a block, whose float32 terms are added before they go to float64.
// With classes apart, logits of a column may all be in the same sets of the cache, which hold few.
template <bool columns>
constexpr std::int64_t kSteps = columns ? 8 : 32;

// What is multiplied with the logits: nothing, the class weights (or 1), or q of probabilities.
enum class Factors : std::uint8_t { kNone, kOnes, kWeights, kProbabilities };

#define FUSEREG_ALWAYS_INLINE inline __attribute__((always_inline))

template <class C>
constexpr int kVectors = kTile / kWidth<C>;
template <class C>
constexpr int kWide = static_cast<int>(sizeof(double) / sizeof(C));

template <class C>
FUSEREG_INLINE Vector<C> lane_numbers() {
  Vector<C> v;
  for (int i = 0; i < kWidth<C>; ++i) v[i] = static_cast<C>(i);
  return v;
}

template <class C>
constexpr C kLowest = sizeof(C) == 8 ? C(-0x1.fffffffffffffp1023) : C(-0x1.fffffep127f);
template <class C>
FUSEREG_INLINE Vector<C> minus_infinity() {
  return broadcast(static_cast<C>(-__builtin_inf()));
}

FUSEREG_INLINE Vector<float> larger(Vector<float> a, Vector<float> b) {
#if defined(__AVX512F__)
  return _mm512_maskz_max_ps(static_cast<__mmask16>(-1), a, b);  // b where one is NaN
#else
  return a > b ? a : b;
#endif
}
FUSEREG_INLINE Vector<double> larger(Vector<double> a, Vector<double> b) {
#if defined(__AVX512F__)
  return _mm512_maskz_max_pd(static_cast<__mmask8>(-1), a, b);
#else
  return a > b ? a : b;
#endif
}

// exp(x) for x up to 88, to within a unit of the last place of what x * log2(e) keeps of it; 0 where
// that is below the normal numbers, NaN for NaN. Cheaper than core's exp_negative, which keeps the
// accuracy of large negative x: their share of a softmax is small.
template <class V>
FUSEREG_INLINE V exponential(V x) {
  using E = Element<V>;
  using Unsigned = typename Lanes<V>::Unsigned;
  constexpr int kMantissa = is_double<V>() ? 52 : 23;
  const V least = V{} + E(is_double<V>() ? -708.0 : -87.0);
  const V t = x * E(1.4426950408889634);
  // A whole number and the exponent's bias in the low bits.
  const E shifter = is_double<V>() ? E(0x1.8p52 + 1023) : E(0x1.8p23 + 127);
  const V shifted = t + shifter;
  const V f = t - (shifted - shifter);
  const V power = bit_cast<V>(bit_cast<Unsigned>(shifted) << kMantissa);
  V p;  // 2^f for |f| <= 1/2
  if constexpr (is_double<V>()) {
    // Taylor: the first term left out is below 4e-18.
    p = polynomial(f, 1.0, 0.6931471805599453, 0.2402265069591007, 0.055504108664821576,
                   0.009618129107628477, 0.0013333558146428441, 0.00015403530393381606,
                   1.5252733804059838e-05, 1.3215486790144305e-06, 1.0178086009239696e-07,
                   7.054911620801121e-09, 4.44553827187081e-10, 2.5678435993488196e-11,
                   1.3691488853904124e-12);
  } else {
    // Fitted for the relative error, which is below 2e-9; exactly 1 for 0.
    p = polynomial(f, 1.0f, 0.693147182f, 0.240226477f, 0.0555033237f, 0.00961843692f,
                   0.0013398875f, 0.00015353362f);
  }
  p *= power;
  return x < least ? V{} : p;
}

// Where the factors of elements [at, at + width) come from. `step` is the position in the walk: the
// class where columns are walked, and that of the first of kTile classes otherwise.
template <class T, class U, Factors factors, bool columns>
struct Source {
  using C = Compute<T>;
  using V = Vector<C>;
  const U* probabilities;
  const C* weight;
  V keep;    // 1 - smoothing
  V spread;  // smoothing / classes

  explicit Source(const Problem& p)
      : probabilities(static_cast<const U*>(p.probabilities)),
        weight(static_cast<const C*>(p.weight)),
        keep(broadcast(static_cast<C>(1.0 - p.smoothing))),
        spread(broadcast(static_cast<C>(p.smoothing / static_cast<double>(p.classes)))) {}

  // count: elements that are there, kWidth or fewer; the rest is zero.
  FUSEREG_ALWAYS_INLINE V operator()(std::int64_t at, std::int64_t klass,
                                     std::int64_t count) const {
    constexpr int kW = kWidth<C>;
    if constexpr (factors == Factors::kOnes) return broadcast(C(1));
    V w = broadcast(C(1));
    if (factors == Factors::kWeights || weight != nullptr) {
      if constexpr (columns) {
        w = broadcast(weight[klass]);
      } else {
        w = count >= kW ? load(weight + klass) : load_some(weight + klass, count);
      }
    }
    if constexpr (factors == Factors::kProbabilities) {
      const V t = count >= kW ? load(probabilities + at) : load_some(probabilities + at, count);
      return (t * keep + spread) * w;
    }
    return w;
  }
};

// The running numbers of kTile sums. The largest logit is common to all where they are of one row.
template <class C>
struct Sums {
  Vector<C> largest[kVectors<C>];
  Vector<C> origin;  // what dot's logits are taken from, so that products cancel less
  Vector<double> sum[kVectors<C>][kWide<C>];
  Vector<double> dot[kVectors<C>][kWide<C>];
  Vector<double> mass[kVectors<C>][kWide<C>];  // for weights and probabilities only
};

// The largest element in each.
template <class C>
FUSEREG_INLINE Vector<C> largest_of_all(Vector<C> v) {
  C elements[kWidth<C>];
  memcpy(elements, &v, sizeof(v));
  C largest = elements[0];
  for (int i = 1; i < kWidth<C>; ++i) largest = elements[i] > largest ? elements[i] : largest;
  return broadcast(largest);
}

// Walks `steps` steps of kTile logits from element `start`, `stride` elements apart. In the last
// step, or in each for a tile of columns that is not whole, only `present` of them are there.
template <class T, class U, Factors factors, bool columns>
FUSEREG_INLINE void walk(const Problem& p, std::int64_t start, std::int64_t steps,
                         std::int64_t stride, std::int64_t present, Sums<Compute<T>>& sums) {
  using C = Compute<T>;
  using V = Vector<C>;
  constexpr int kW = kWidth<C>;
  constexpr int kV = kVectors<C>;
  constexpr bool kDot = factors != Factors::kNone;
  constexpr bool kMass = kDot && factors != Factors::kOnes;
  const T* const x = static_cast<const T*>(p.x);
  const Source<T, U, factors, columns> source(p);
  const V numbers = lane_numbers<C>();
  for (int v = 0; v < kV; ++v) {
    sums.largest[v] = broadcast(kLowest<C>);
    for (int w = 0; w < kWide<C>; ++w) sums.sum[v][w] = Vector<double>{};
  }
  if constexpr (kDot) {
    const C first = steps > 0 ? static_cast<C>(to_compute(x[start])) : C(0);
    sums.origin = broadcast(first - first == C(0) ? first : C(0));
    for (int v = 0; v < kV; ++v) {
      for (int w = 0; w < kWide<C>; ++w) sums.dot[v][w] = sums.mass[v][w] = Vector<double>{};
    }
  }
  // Elements of a vector of which `rest` are there; -infinity beyond.
  auto logits = [&](std::int64_t i, int v, std::int64_t rest) __attribute__((always_inline)) {
    const T* const at = x + start + i * stride + v * kW;
    if (rest >= kW) return load(at);
    const V some = load_some(at, rest);
    return numbers < broadcast(static_cast<C>(rest)) ? some : minus_infinity<C>();
  };
  V largest[kV], sum[kV], dot[kV], mass[kV];
  auto first_look = [&](std::int64_t i, std::int64_t count) __attribute__((always_inline)) {
#pragma GCC unroll 4
    for (int v = 0; v < kV; ++v) {
      const std::int64_t rest = count - v * kW;
      if (rest > 0) largest[v] = larger(logits(i, v, rest), largest[v]);
    }
  };
  auto second_look = [&](std::int64_t i, std::int64_t count) __attribute__((always_inline)) {
#pragma GCC unroll 4
    for (int v = 0; v < kV; ++v) {
      const std::int64_t rest = count - v * kW;
      if (rest <= 0) continue;
      // The next block, or row, comes from memory while this one is computed from the cache; the
      // first look alone would wait for it.
      if constexpr (!columns) {
        __builtin_prefetch(x + start + (i + kSteps<columns>)*stride + v * kW);
      }
      const V logit = logits(i, v, rest);
      sum[v] += exponential(V(logit - largest[v]));
      if constexpr (kDot) {
        V product = logit - sums.origin;
        V factor{};
        if constexpr (kMass) {
          factor = source(start + i * stride + v * kW, columns ? i : i * kTile + v * kW, rest);
          product *= factor;
        }
        if (rest < kW) {
          const V there = broadcast(static_cast<C>(rest));
          product = numbers < there ? product : V{};
          factor = numbers < there ? factor : V{};
        }
        dot[v] += product;
        if constexpr (kMass) mass[v] += factor;
      }
    }
  };
  for (std::int64_t block = 0; block < steps; block += kSteps<columns>) {
    const std::int64_t end = steps - block < kSteps<columns> ? steps : block + kSteps<columns>;
    const bool partial = present < kTile && (columns || end == steps);
    const std::int64_t whole = partial ? (columns ? block : end - 1) : end;
    for (int v = 0; v < kV; ++v) {
      largest[v] = sums.largest[v];
      sum[v] = dot[v] = mass[v] = V{};
    }
    for (std::int64_t i = block; i < whole; ++i) first_look(i, kTile);
    for (std::int64_t i = whole; i < end; ++i) first_look(i, present);
    if constexpr (!columns) {
      for (int v = 1; v < kV; ++v) largest[0] = larger(largest[v], largest[0]);
      largest[0] = largest_of_all<C>(largest[0]);
      for (int v = 1; v < kV; ++v) largest[v] = largest[0];
    }
    if (block != 0) {
      Vector<double> factor[kWide<C>];
      for (int v = 0; v < kV; ++v) {
        if (columns || v == 0) {
          for (int w = 0; w < kWide<C>; ++w) factor[w] = Vector<double>{};
          add_widened(exponential(V(sums.largest[v] - largest[v])), factor);
        }
        for (int w = 0; w < kWide<C>; ++w) sums.sum[v][w] *= factor[w];
      }
    }
    for (std::int64_t i = block; i < whole; ++i) second_look(i, kTile);
    for (std::int64_t i = whole; i < end; ++i) second_look(i, present);
    for (int v = 0; v < kV; ++v) {
      sums.largest[v] = largest[v];
      add_widened(sum[v], sums.sum[v]);
      if constexpr (kDot) add_widened(dot[v], sums.dot[v]);
      if constexpr (kMass) add_widened(mass[v], sums.mass[v]);
    }
  }
}

// Number i and number i + half, until one is left.
template <int kV, int kW>
FUSEREG_INLINE double add_up(const Vector<double> (&sums)[kV][kW]) {
  constexpr int kLanes = kWidth<double>;
  Vector<double> vectors[kTile / kLanes];
  static_assert(sizeof(vectors) == sizeof(sums), "kTile sums");
  memcpy(vectors, sums, sizeof(vectors));
#pragma GCC unroll 4
  for (int half = kTile / kLanes / 2; half > 0; half /= 2) {
#pragma GCC unroll 8
    for (int i = 0; i < half; ++i) vectors[i] += vectors[i + half];
  }
  double numbers[kLanes];
  memcpy(numbers, vectors, sizeof(numbers));
  for (int half = kLanes / 2; half > 0; half /= 2) {
    for (int i = 0; i < half; ++i) numbers[i] += numbers[i + half];
  }
  return numbers[0];
}

// A row's numbers; dot and mass are sums of what was counted from the origin.
template <class C, Factors factors>
FUSEREG_INLINE RowSums row_sums(const Problem& p, C largest, double sum, const Sums<C>& sums,
                                double dot, double mass) {
  RowSums row;
  row.lse = log_sum(static_cast<double>(largest), sum);
  if constexpr (factors != Factors::kNone) {
    row.mass = factors == Factors::kOnes ? static_cast<double>(p.classes) : mass;
    row.dot = dot + static_cast<double>(sums.origin[0]) * row.mass;
  }
  return row;
}

// --- forward ---

template <class T>
FUSEREG_INLINE void finish_row(const Forward& f, std::int64_t row, const RowSums& sums,
                               Parts& total) {
  f.statistics[row] = sums.lse;
  if (f.soft()) f.statistics[f.rows() + row] = sums.mass;
  const Parts parts = row_parts<T>(f, row, sums);
  if (f.reduction == Reduction::kNone) {
    const double loss = parts.loss[0] + parts.loss[1];
    if (f.wide_loss) {
      static_cast<Compute<T>*>(f.loss)[row] = static_cast<Compute<T>>(loss);
    } else {
      static_cast<T*>(f.loss)[row] = from_compute<T>(static_cast<Compute<T>>(loss));
    }
  } else {
    add(total, parts);
  }
}

template <class T, class U, Factors factors>
Parts forward_with(const Forward& f, std::int64_t begin, std::int64_t end) {
  using C = Compute<T>;
  Parts total;
  if (f.inner == 1) {
    const std::int64_t steps = (f.classes + kTile - 1) / kTile;
    const std::int64_t present = f.classes - (steps - 1) * kTile;
    for (std::int64_t row = begin; row < end; ++row) {
      RowSums sums;
      if (!is_ignored(f, row)) {
        Sums<C> of;
        walk<T, U, factors, false>(f, row * f.classes, steps, kTile, present, of);
        double dot = 0.0;
        double mass = 0.0;
        if constexpr (factors != Factors::kNone) dot = add_up(of.dot);
        if constexpr (factors != Factors::kNone) mass = add_up(of.mass);
        sums = row_sums<C, factors>(f, of.largest[0][0], add_up(of.sum), of, dot, mass);
      }
      finish_row<T>(f, row, sums, total);
    }
    return total;
  }
  const std::int64_t across = tiles(f);
  for (std::int64_t unit = begin; unit < end; ++unit) {
    const std::int64_t first = unit % across * kTile;
    const std::int64_t row = unit / across * f.inner + first;
    const std::int64_t present = f.inner - first < kTile ? f.inner - first : kTile;
    Sums<C> of;
    walk<T, U, factors, true>(f, f.row_start(row), f.classes, f.inner, present, of);
    C largest[kTile];
    double sum[kTile];
    double dot[kTile] = {};
    double mass[kTile] = {};
    memcpy(largest, of.largest, sizeof(largest));
    memcpy(sum, of.sum, sizeof(sum));
    if constexpr (factors != Factors::kNone) {
      memcpy(dot, of.dot, sizeof(dot));
      memcpy(mass, of.mass, sizeof(mass));
    }
    for (int i = 0; i < present; ++i) {
      RowSums sums;
      if (!is_ignored(f, row + i)) {
        sums = row_sums<C, factors>(f, largest[i], sum[i], of, dot[i], mass[i]);
      }
      finish_row<T>(f, row + i, sums, total);
    }
  }
  return total;
}

// --- backward ---

template <class T>
FUSEREG_INLINE double incoming(const Backward& b, std::int64_t row) {
  if (b.reduction != Reduction::kNone) row = 0;
  return dispatch_dtype(b.grad_dtype, [&](auto tag) {
    using G = typename decltype(tag)::type;
    return static_cast<double>(to_compute(static_cast<const G*>(b.grad)[row]));
  });
}

// The gradient at the row's indices, which have a term more, from the logits kept of before.
template <class T>
struct AtIndices {
  using C = Compute<T>;
  C logit[2] = {};
  FUSEREG_ALWAYS_INLINE AtIndices(const Backward& b, const RowGradient& g, std::int64_t start) {
    for (int i = 0; i < 2; ++i) {
      if (g.index[i] >= 0)
        logit[i] = to_compute(static_cast<const T*>(b.x)[start + g.index[i] * b.inner]);
    }
  }
  FUSEREG_ALWAYS_INLINE void write(const Backward& b, const RowGradient& g, Softmax<C> softmax,
                                   std::int64_t start) const {
    for (int i = 0; i < 2; ++i) {
      if (g.index[i] < 0) continue;
      const C p = exponential(C(logit[i] - softmax.reference)) * softmax.factor;
      const C other = static_cast<C>(g.spread * weight_of<T>(b, g.index[i]) + g.at[i]);
      static_cast<T*>(b.grad_x)[start + g.index[i] * b.inner] = from_compute<T>(p - other);
    }
  }
};

template <class T, class U, Factors factors>
void backward_with(const Backward& b, std::int64_t begin, std::int64_t end) {
  using C = Compute<T>;
  using V = Vector<C>;
  constexpr int kW = kWidth<C>;
  constexpr int kV = kVectors<C>;
  const T* const x = static_cast<const T*>(b.x);
  T* const out = static_cast<T*>(b.grad_x);
  // `rest` elements at `at`, of the class `klass` or of those that begin there.
  auto elements = [&](const auto& source, std::int64_t at, std::int64_t klass, std::int64_t rest,
                      V reference, V factor, V spread) __attribute__((always_inline)) {
    const V logit = rest >= kW ? load(x + at) : load_some(x + at, rest);
    V y = exponential(V(logit - reference)) * factor;
    if constexpr (factors == Factors::kOnes) {
      y -= spread;
    } else if constexpr (factors != Factors::kNone) {
      y -= spread * source(at, klass, rest);
    }
    if (rest >= kW) {
      store(out + at, y);
    } else {
      store_some(out + at, y, rest);
    }
  };
  if (b.inner == 1) {
    const Source<T, U, factors, false> source(b);
    for (std::int64_t row = begin; row < end; ++row) {
      const std::int64_t start = row * b.classes;
      if (is_ignored(b, row)) {
        memset(static_cast<void*>(out + start), 0, static_cast<std::size_t>(b.classes) * sizeof(T));
        continue;
      }
      const RowGradient g = row_gradient<T>(b, row, incoming<T>(b, row));
      const Softmax<C> softmax = softmax_of<C>(b, b.statistics[row], g.probability);
      const V reference = broadcast(softmax.reference);
      const V factor = broadcast(softmax.factor);
      const V spread = broadcast(static_cast<C>(g.spread));
      const AtIndices<T> special(b, g, start);
      std::int64_t c = 0;
      for (; b.classes - c >= kTile; c += kTile) {
#pragma GCC unroll 4
        for (int v = 0; v < kV; ++v) {
          elements(source, start + c + v * kW, c + v * kW, kW, reference, factor, spread);
        }
      }
      for (; c < b.classes; c += kW) {
        elements(source, start + c, c, b.classes - c, reference, factor, spread);
      }
      special.write(b, g, softmax, start);
    }
    return;
  }
  const Source<T, U, factors, true> source(b);
  const std::int64_t across = tiles(b);
  for (std::int64_t unit = begin; unit < end; ++unit) {
    const std::int64_t first = unit % across * kTile;
    const std::int64_t row = unit / across * b.inner + first;
    const std::int64_t present = b.inner - first < kTile ? b.inner - first : kTile;
    const std::int64_t start = b.row_start(row);
    C references[kTile] = {};
    C factors_of[kTile] = {};
    C spreads[kTile] = {};
    C logits[2][kTile] = {};
    RowGradient gradients[kTile];
    for (int i = 0; i < present; ++i) {
      if (is_ignored(b, row + i)) continue;
      gradients[i] = row_gradient<T>(b, row + i, incoming<T>(b, row + i));
      const Softmax<C> softmax = softmax_of<C>(b, b.statistics[row + i], gradients[i].probability);
      references[i] = softmax.reference;
      factors_of[i] = softmax.factor;
      spreads[i] = static_cast<C>(gradients[i].spread);
      const AtIndices<T> special(b, gradients[i], start + i);
      logits[0][i] = special.logit[0];
      logits[1][i] = special.logit[1];
    }
    for (std::int64_t c = 0; c < b.classes; ++c) {
#pragma GCC unroll 4
      for (int v = 0; v < kV; ++v) {
        const std::int64_t rest = present - v * kW;
        if (rest <= 0) break;
        elements(source, start + c * b.inner + v * kW, c, rest, load(references + v * kW),
                 load(factors_of + v * kW), load(spreads + v * kW));
      }
    }
    for (int i = 0; i < present; ++i) {
      if (is_ignored(b, row + i)) {
        for (std::int64_t c = 0; c < b.classes; ++c)
          out[start + i + c * b.inner] = from_compute<T>(C(0));
        continue;
      }
      AtIndices<T> special(b, gradients[i], start + i);
      special.logit[0] = logits[0][i];
      special.logit[1] = logits[1][i];
      special.write(b, gradients[i], {references[i], factors_of[i]}, start + i);
    }
  }
}

// --- the choice of a kernel ---

// f(tag of the logits, tag of the probabilities, factors as a constant).
template <Factors value>
struct FactorsTag {
  static constexpr Factors kValue = value;
};
template <class F>
FUSEREG_INLINE auto choose(const Problem& p, F&& f) {
  return dispatch_dtype(p.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    if (p.soft()) {
      if constexpr (sizeof(T) == 2) {
        if (p.wide_probabilities)
          return f(tag, TypeTag<float>{}, FactorsTag<Factors::kProbabilities>{});
      }
      return f(tag, tag, FactorsTag<Factors::kProbabilities>{});
    }
    if (p.smoothing == 0.0) return f(tag, tag, FactorsTag<Factors::kNone>{});
    if (p.weight == nullptr) return f(tag, tag, FactorsTag<Factors::kOnes>{});
    return f(tag, tag, FactorsTag<Factors::kWeights>{});
  });
}

Parts forward_any(const Forward& f, std::int64_t begin, std::int64_t end) {
  return choose(f, [&](auto tag, auto companion, auto factors) {
    return forward_with<typename decltype(tag)::type, typename decltype(companion)::type,
                        decltype(factors)::kValue>(f, begin, end);
  });
}

void backward_any(const Backward& b, std::int64_t begin, std::int64_t end) {
  choose(b, [&](auto tag, auto companion, auto factors) {
    backward_with<typename decltype(tag)::type, typename decltype(companion)::type,
                  decltype(factors)::kValue>(b, begin, end);
  });
}

}  // namespace

const CpuKernels kernels = {&forward_any, &backward_any};

}  // namespace fusereg::cross_entropy::FUSEREG_ISA
