// The update formulas of optim.h, for a number or (after core/simd.h) a vector of them, on the
// host and on the device.
#pragma once

#include "core/soft_threshold.h"
#include "optim/optim.h"

namespace fusereg::optim {

FUSEREG_INLINE bool is_16_bit(DType dtype) {
  return dtype == DType::kFloat16 || dtype == DType::kBFloat16;
}

// The greater one; NaN wins, as in torch.maximum.
template <class V>
FUSEREG_INLINE V greater(V a, V b) {
  const V kept = a > b ? a : b;
  return a != a ? a : kept;
}

// Within +-limit; NaN stays.
template <class V>
FUSEREG_INLINE V clamped(V x, V limit) {
  return x > limit ? limit : (x < -limit ? -limit : x);
}

// The same numbers in the type that computes.
template <class C>
FUSEREG_INLINE Coefficients<C> in_type(const Coefficients<double>& k) {
  return {static_cast<C>(k.grad),     static_cast<C>(k.l1),           static_cast<C>(k.l2),
          static_cast<C>(k.decay),    static_cast<C>(k.rate),         static_cast<C>(k.first),
          static_cast<C>(k.second),   static_cast<C>(k.third),        static_cast<C>(k.root),
          static_cast<C>(k.eps),      static_cast<C>(k.threshold),    static_cast<C>(k.shrink),
          static_cast<C>(k.factor),   static_cast<C>(k.other),        static_cast<C>(k.floor_l1),
          static_cast<C>(k.floor_l2), static_cast<C>(k.spared),       static_cast<C>(k.floor_group),
          static_cast<C>(k.group),    static_cast<C>(k.largest_zero), static_cast<C>(k.average)};
}

// How many states an algorithm keeps for each parameter.
FUSEREG_INLINE int state_count(Algorithm algorithm, const Flags& f) {
  switch (algorithm) {
    case Algorithm::kSgd:
      return f.momentum ? 1 : 0;
    case Algorithm::kAdam:
      return f.amsgrad ? 3 : 2;
    case Algorithm::kAdagrad:
    case Algorithm::kLion:
      return 1;
    case Algorithm::kRmsprop:
      return 1 + (f.momentum ? 1 : 0) + (f.centered ? 1 : 0);
    default:
      return 2;
  }
}

// The most that it may keep.
FUSEREG_INLINE constexpr int most_states(Algorithm algorithm) {
  switch (algorithm) {
    case Algorithm::kSgd:
    case Algorithm::kAdagrad:
    case Algorithm::kLion:
      return 1;
    case Algorithm::kAdam:
    case Algorithm::kRmsprop:
      return 3;
    default:
      return 2;
  }
}

// FTRL: the weight that z and n stood for after the last step.
template <class C, class V>
FUSEREG_INLINE V ftrl_weight(V z, V n, const Coefficients<C>& k) {
  const V quadratic = square_root(n) * k.eps + (k.factor + k.root);
  const V bound = V{} + k.third;
  return abs(z) <= bound ? V{} : with_sign_of((abs(z) - bound) / quadratic, -z);
}

// D of the algorithms that have one, from the states after the update. A weight whose `squares` are 0
// has not seen a gradient.
FUSEREG_INLINE constexpr bool has_metric(Algorithm algorithm) {
  return algorithm != Algorithm::kSgd && algorithm != Algorithm::kFtrl &&
         algorithm != Algorithm::kLion && algorithm != Algorithm::kLambNorms;
}
template <Algorithm algorithm, class C, class V>
FUSEREG_INLINE V metric(const V (&s)[kMaxStates], const Coefficients<C>& k, const Flags& f,
                        V& squares) {
  if constexpr (algorithm == Algorithm::kRmsprop || algorithm == Algorithm::kAdagrad) {
    V square = squares = s[0];
    if (algorithm == Algorithm::kRmsprop && f.centered) {
      const V mean = f.momentum ? s[2] : s[1];
      square -= mean * mean;
    }
    return square_root(square) + k.eps;
  } else {
    squares = algorithm == Algorithm::kAdam && f.amsgrad ? s[2] : s[1];
    return square_root(squares) * k.root + k.eps;
  }
}

// LAMB: the step before it is scaled.
template <class C, class V>
FUSEREG_INLINE V lamb_update(V p, V m, V denominator, const Coefficients<C>& k) {
  return m * k.rate / denominator + p * k.decay;
}

// One element of a group whose proximal step is in the metric; see optim.h.
template <class V>
struct MetricTerm {
  V metric;   // D
  V slope;    // D + lr * l2
  V shrunk;   // max(D * |q| - lr * l1, 0)
  V squares;  // see metric()
};
template <Algorithm algorithm, class C, class V>
FUSEREG_INLINE MetricTerm<V> metric_term(V q, const V (&s)[kMaxStates], const Coefficients<C>& k,
                                         const Flags& f, C scale) {
  const V zero{};
  MetricTerm<V> t;
  t.metric = metric<algorithm>(s, k, f, t.squares);
  if (f.prox == Prox::kCapped) {
    t.metric = greater(t.metric, abs(q) * k.floor_l2 + k.floor_l1);
  }
  t.metric = t.metric * scale;
  t.slope = t.metric + k.shrink;
  const V above = abs(q) * t.metric - k.threshold;
  t.shrunk = above <= zero ? zero : above;  // NaN stays
  return t;
}
// The new weight, by the ratio lr * group * sqrt(n) / norm.
template <class C, class V>
FUSEREG_INLINE V metric_weight(V q, const MetricTerm<V>& t, C ratio, const Coefficients<C>& k) {
  const V zero{};
  const V shrunk = signed_or_zero(t.shrunk / (t.slope + ratio), q, zero + k.largest_zero);
  return t.squares <= zero + k.spared ? q : shrunk;
}

// Finds the ratio of metric_weight for a group. `sums(norm, group, scale)` gives, over the group and
// at that scale of its metric, with x = shrunk / (slope * norm + group): sum x^2,
// sum x^2 * slope / (slope * norm + group), and sum metric^2. The norm of the new weights is where
// the first one is 1; Newton's method on the inverse of its square root comes from below, and is
// exact after one step where all metrics are equal. Infinite for a group that becomes zero.
struct MetricSums {
  double square;
  double slope;
  double metric;
};
template <class F>
FUSEREG_INLINE double metric_ratio(double group, double floor_group, double shrink,
                                   double tolerance, double& scale, const F& sums) {
  scale = 1.0;
  if (group == 0.0) return 0.0;
  MetricSums at = sums(0.0, 1.0, scale);
  const double length = square_root(at.metric);
  if (length > 0.0 && length < floor_group) {
    scale = floor_group / length;
    at = sums(0.0, 1.0, scale);
  }
  const double above = square_root(at.square) - group;
  if (above <= 0.0) return 1.0 / 0.0;
  double norm = above / (square_root(at.metric) + shrink);  // not above the root
  for (int i = 0; i < 50; ++i) {
    at = sums(norm, group, scale);
    const double root = square_root(at.square);
    const double step = root * (root - 1.0) / at.slope;
    norm += step;
    if (!(step > tolerance * norm)) break;
  }
  return group / norm;
}

// The average after a step to p, as torch.lerp rounds it.
template <class C, class V>
FUSEREG_INLINE V averaged(V average, V p, C weight) {
  const V way = p - average;
  return weight < C(0.5) ? average + way * weight : p - way * (C(1) - weight);
}

// The new p, of kLambNorms u. For vectors, core/simd.h comes before this file.
template <Algorithm algorithm, class C, class V>
FUSEREG_INLINE V updated(V p, V g, V (&s)[kMaxStates], const Coefficients<C>& k, const Flags& f) {
  const V zero{};
  const V largest_zero = zero + k.largest_zero;
  g = g * k.grad;
  if (k.l1 != C(0)) g += sign(p) * k.l1;
  if (k.l2 != C(0)) g += p * k.l2;
  if constexpr (algorithm == Algorithm::kFtrl) {
    s[1] += g * g;
    const V quadratic = square_root(s[1]) * k.first + k.second;
    const V bound = zero + k.third;
    const V at_zero = s[0] > bound ? bound : (s[0] < -bound ? -bound : s[0]);
    const V elsewhere = -(p * (quadratic + k.root) + sign(p) * k.third);
    s[0] = (p == zero ? at_zero : elsewhere) + g;
    const V magnitude = (abs(s[0]) - k.threshold) / (quadratic + k.shrink);
    return signed_or_zero(abs(s[0]) <= zero + k.threshold ? zero : magnitude, -s[0], largest_zero);
  } else if constexpr (algorithm == Algorithm::kLion) {
    const V c = s[0] * k.first + g * k.third;
    s[0] += (g - s[0]) * k.root;
    const V before = p * k.decay;
    V q = before - sign(c) * k.rate;
    if (f.prox == Prox::kDecoupled) {
      return signed_or_zero((abs(q) - k.threshold) * k.factor, q, largest_zero);
    }
    if (f.prox == Prox::kNone) return q;
    // The sign of the penalized gradient; a zero waits for one that is larger than l1, and a step
    // ends at zero.
    const V at_zero = abs(c) <= zero + k.floor_l1 ? zero : c;
    const V elsewhere = c + before * k.floor_l2 + sign(p) * k.floor_l1;
    q = before - sign(p == zero ? at_zero : elsewhere) * k.rate;
    if (k.floor_l1 != C(0)) q = sign(q) * sign(before) < zero ? zero : q;
    q = signed_or_zero(abs(q), q, largest_zero);
    return abs(s[0]) + abs(c) <= zero + k.spared ? before : q;
  } else {
    V denominator = zero + C(1);
    V squares = zero;
    if constexpr (algorithm == Algorithm::kSgd) {
      if (f.momentum) {
        s[0] = s[0] * k.first + g * k.second;
        g = f.nesterov ? g + s[0] * k.first : s[0];
      }
      p -= g * k.rate;
    } else if constexpr (algorithm == Algorithm::kAdam) {
      s[0] += (g - s[0]) * k.first;
      s[1] = s[1] * k.second + g * g * k.third;
      if (f.amsgrad) s[2] = greater(s[1], s[2]);
      denominator = metric<algorithm>(s, k, f, squares);
      p = p * k.decay - s[0] * k.rate / denominator;
    } else if constexpr (algorithm == Algorithm::kLambNorms) {
      s[0] += (g - s[0]) * k.first;
      s[1] = s[1] * k.second + g * g * k.third;
      return lamb_update(p, s[0], metric<algorithm>(s, k, f, squares), k);
    } else if constexpr (algorithm == Algorithm::kLamb) {
      denominator = metric<algorithm>(s, k, f, squares);
      p -= lamb_update(p, s[0], denominator, k) * k.other;
    } else if constexpr (algorithm == Algorithm::kNadam) {
      s[0] += (g - s[0]) * k.first;
      s[1] = s[1] * k.second + g * g * k.third;
      denominator = metric<algorithm>(s, k, f, squares);
      p = p * k.decay - (g * k.rate + s[0] * k.other) / denominator;
    } else if constexpr (algorithm == Algorithm::kRmsprop) {
      s[0] = s[0] * k.second + g * g * k.third;
      if (f.centered) {
        // One state or another by its address would put them into memory.
        const V mean = f.momentum ? s[2] : s[1];
        const V next = mean + (g - mean) * k.third;
        if (f.momentum) {
          s[2] = next;
        } else {
          s[1] = next;
        }
      }
      denominator = metric<algorithm>(s, k, f, squares);
      V step = g / denominator;
      if (f.momentum) step = s[1] = s[1] * k.first + step;
      p -= step * k.rate;
    } else {
      s[0] += g * g;
      denominator = metric<algorithm>(s, k, f, squares);
      p -= g * k.rate / denominator;
    }
    if (f.prox == Prox::kNone) return p;
    if (algorithm == Algorithm::kSgd || f.prox == Prox::kDecoupled) {
      return signed_or_zero((abs(p) - k.threshold) * k.factor, p, largest_zero);
    }
    if (f.prox == Prox::kCapped) {
      denominator = greater(denominator, abs(p) * k.floor_l2 + k.floor_l1);
    }
    const V inverse = C(1) / denominator;
    V magnitude = abs(p) - inverse * k.threshold;
    if (k.shrink != C(0)) magnitude = magnitude / (inverse * k.shrink + C(1));
    const V shrunk = signed_or_zero(magnitude, p, largest_zero);
    return squares <= zero + k.spared ? p : shrunk;
  }
}

}  // namespace fusereg::optim
