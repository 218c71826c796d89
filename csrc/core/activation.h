// Smooth activations and their derivatives, for a number or (after core/simd.h) a vector of them,
// on the host and on the device. Nothing but +, -, *, / and comparisons, each rounded by itself:
// every instruction set gives the same bits.
//
//   silu(x)       x * s(x)                              s(z) = 1 / (1 + exp(-z))
//   gelu(x)       x * Phi(x)                            Hendrycks, Gimpel 2016
//
// All of it stands on exp() of numbers that are not positive, so nothing overflows, and on no
// difference of almost equal numbers: the tails keep their relative accuracy.
#pragma once

#include "core/dtype.h"

#if defined(FUSEREG_ISA)
#include "core/simd.h"
#endif

namespace fusereg {

// The element of V, and integers as wide as one, as many as V has.
template <class V>
struct Lanes;
template <>
struct Lanes<float> {
  using Element = float;
  using Signed = std::int32_t;
  using Unsigned = std::uint32_t;
};
template <>
struct Lanes<double> {
  using Element = double;
  using Signed = std::int64_t;
  using Unsigned = std::uint64_t;
};

#if defined(FUSEREG_ISA)
template <>
struct Lanes<FUSEREG_ISA::Vector<float>> {
  using Element = float;
  using Signed = FUSEREG_ISA::Vector<std::int32_t>;
  using Unsigned = FUSEREG_ISA::U32Vector;
};
template <>
struct Lanes<FUSEREG_ISA::Vector<double>> {
  using Element = double;
  using Signed = FUSEREG_ISA::Vector<std::int64_t>;
  using Unsigned = FUSEREG_ISA::U64Vector;
};
#endif

template <class V>
using Element = typename Lanes<V>::Element;

template <class V>
FUSEREG_INLINE constexpr bool is_double() {
  return sizeof(Element<V>) == 8;
}

// c0 + c1 x + c2 x^2 + ...
template <class V>
FUSEREG_INLINE V polynomial(V x, Element<V> c) {
  (void)x;
  return V{} + c;
}
template <class V, class... Rest>
FUSEREG_INLINE V polynomial(V x, Element<V> c, Rest... rest) {
  return c + x * polynomial(x, static_cast<Element<V>>(rest)...);
}

// p * 2^n for a whole n in [-1100, 0], which `shifted` holds in its low bits (as exp() makes it).
// In two steps, so that results below the smallest normal number are rounded once.
template <class V>
FUSEREG_INLINE V scale_by_power(V p, V shifted) {
  using Signed = typename Lanes<V>::Signed;
  using Unsigned = typename Lanes<V>::Unsigned;
  constexpr int kMantissa = is_double<V>() ? 52 : 23;
  constexpr int kBias = is_double<V>() ? 1023 : 127;
  // The low 12 bits as a signed number: n.
  constexpr int kUnused = is_double<V>() ? 52 : 20;
  const Signed n = bit_cast<Signed>(bit_cast<Unsigned>(shifted) << kUnused) >> kUnused;
  const Signed half = n >> 1;
  const V first = bit_cast<V>(bit_cast<Unsigned>(half + kBias) << kMantissa);
  const V second = bit_cast<V>(bit_cast<Unsigned>(n - half + kBias) << kMantissa);
  return p * first * second;
}

// exp(x + tail) for x <= 0 and a tail that is small beside it.
template <class V>
FUSEREG_INLINE V exp_negative(V x, V tail) {
  // Below this everything is zero; NaN stays.
  const V least = V{} + Element<V>(is_double<V>() ? -746.0 : -104.0);
  x = x < least ? least : x;
  // n = round(x / ln 2): adding 1.5 * 2^52 (2^23) leaves a whole number in the low bits.
  const Element<V> shifter = is_double<V>() ? Element<V>(0x1.8p52) : Element<V>(0x1.8p23);
  const V shifted = x * Element<V>(1.4426950408889634) + shifter;
  const V n = shifted - shifter;
  // ln 2 as a short number, whose product with n is exact, and the rest.
  if constexpr (is_double<V>()) {
    const V r = ((x - n * 0x1.62e42feep-1) - n * 0x1.a39ef35793c76p-33) + tail;
    // Taylor: |r| <= ln(2) / 2, the first term left out is below 4e-18.
    return scale_by_power(polynomial(r, 1.0, 1.0, 1.0 / 2, 1.0 / 6, 1.0 / 24, 1.0 / 120, 1.0 / 720,
                                     1.0 / 5040, 1.0 / 40320, 1.0 / 362880, 1.0 / 3628800,
                                     1.0 / 39916800, 1.0 / 479001600, 1.0 / 6227020800.0),
                          shifted);
  } else {
    const V r = ((x - n * 0.693359375f) - n * -2.12194440e-4f) + tail;
    // The first term left out is below 6e-9.
    return scale_by_power(
        polynomial(r, 1.0, 1.0, 1.0 / 2, 1.0 / 6, 1.0 / 24, 1.0 / 120, 1.0 / 720, 1.0 / 5040),
        shifted);
  }
}

// s(z), and its derivative s (1 - s).
template <class V>
struct Sigmoid {
  V value, slope;
};
template <class V>
FUSEREG_INLINE Sigmoid<V> sigmoid(V z) {
  const V one = V{} + Element<V>(1);
  const V e = exp_negative(V(-abs(z)), V{});
  const V inverse = one / (one + e);
  const V small = e * inverse;
  return {z < V{} ? small : inverse, small * inverse};
}

// Phi(x), the normal distribution function, and phi(x), its density.
template <class V>
struct Normal {
  V distribution, density;
};
template <class V>
FUSEREG_INLINE Normal<V> normal(V x) {
  using Unsigned = typename Lanes<V>::Unsigned;
  using E = Element<V>;
  // Beyond this, Phi(-a) and phi(a) are zero; NaN stays.
  const V most = V{} + E(is_double<V>() ? 39.0 : 15.0);
  V a = abs(x);
  a = a > most ? most : a;
  // a^2 / 2 exactly enough for its exponential: the square of a's upper half is exact.
  const Unsigned upper = is_double<V>() ? bit_cast<Unsigned>(a) & ~Unsigned{} << 27
                                        : bit_cast<Unsigned>(a) & ~Unsigned{} << 12;
  const V high = bit_cast<V>(upper);
  const V g = exp_negative(V(high * high * E(-0.5)), V((a - high) * (a + high) * E(-0.5)));
  // Phi(-a) = exp(-a^2 / 2) R(a). R falls slowly from 1/2 to nothing; its rational approximations
  // have positive coefficients only, so that no digit is lost. Fitted for the relative error, on
  // [0, 39] below 2e-18, on [0, 15] below 7e-9.
  V numerator, denominator;
  if constexpr (is_double<V>()) {
    numerator = polynomial(a, 0.5, 0.82681126795482073, 0.67785674910992994, 0.35598248529196459,
                           0.13137305088984236, 0.035437008509731712, 0.0070661247600933664,
                           0.0010297020193070026, 0.00010534495650326284, 6.8801960597480896e-6,
                           2.2049756841141965e-7);
    denominator = polynomial(a, 1.0, 2.451507096712507, 2.8117331613854198, 1.9956114210622485,
                             0.97615361770220417, 0.34649295018167777, 0.091373995815205657,
                             0.017975103341823178, 0.0025983262902357905, 0.00026461335199692481,
                             1.7246093978401531e-5, 5.5270543946730876e-7);
  } else {
    numerator =
        polynomial(a, 0.500000003f, 0.438326388f, 0.18323562f, 0.0406269872f, 0.00411365582f);
    denominator =
        polynomial(a, 1.0f, 1.67453773f, 1.20255451f, 0.469466856f, 0.101843078f, 0.0103112899f);
  }
  const V left = g * (numerator / denominator);
  const V one = V{} + E(1);
  return {x < V{} ? left : one - left, g * E(0.3989422804014327)};
}

template <class V>
FUSEREG_INLINE V silu(V x) {
  return x * sigmoid(x).value;
}
template <class V>
FUSEREG_INLINE V silu_derivative(V x) {
  const Sigmoid<V> s = sigmoid(x);
  return s.value + x * s.slope;
}

template <class V>
FUSEREG_INLINE V gelu(V x) {
  return x * normal(x).distribution;
}
template <class V>
FUSEREG_INLINE V gelu_derivative(V x) {
  const Normal<V> n = normal(x);
  return n.distribution + x * n.density;
}

}  // namespace fusereg
