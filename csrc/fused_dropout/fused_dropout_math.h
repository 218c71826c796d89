// The activations of fused_dropout.h and their derivatives, for a number or (after core/simd.h) a
// vector of them, on the host and on the device: those of core/activation.h, and
//
//   gelu_tanh(x)  x * s(2 u), u = sqrt(2 / pi) (x + 0.044715 x^3): the tanh form, as
//                 (1 + tanh(u)) / 2 = s(2 u); its tail is as accurate as the rounding of its cubic
//                 argument allows
//   relu(x)       max(x, 0), NaN stays
#pragma once

#include "core/activation.h"

namespace fusereg::fused_dropout {

enum class Activation : std::uint8_t { kNone, kRelu, kGelu, kGeluTanh, kSilu };

// 2 u(x) of the tanh form, and its derivative.
inline constexpr double kTanhScale = 1.5957691216057308;  // 2 sqrt(2 / pi)
inline constexpr double kTanhCubic = 0.044715;
// From here on s(2 u) is 0 or 1; larger numbers would overflow in the cube.
inline constexpr double kTanhReach = 32.0;

template <class V>
FUSEREG_INLINE V within(V x, Element<V> most) {
  x = x > V{} + most ? V{} + most : x;
  return x < V{} - most ? V{} - most : x;
}

template <Activation kActivation, class V>
FUSEREG_INLINE V activate(V x) {
  using E = Element<V>;
  if constexpr (kActivation == Activation::kRelu) {
    return x <= V{} ? V{} : x;
  } else if constexpr (kActivation == Activation::kGelu) {
    return gelu(x);
  } else if constexpr (kActivation == Activation::kGeluTanh) {
    const V c = within(x, E(kTanhReach));
    const V z = c * E(kTanhScale) * (E(1) + E(kTanhCubic) * c * c);
    return x * sigmoid(z).value;
  } else if constexpr (kActivation == Activation::kSilu) {
    return silu(x);
  } else {
    return x;
  }
}

// The activation's derivative. For kRelu, `x` may as well be the result.
template <Activation kActivation, class V>
FUSEREG_INLINE V slope(V x) {
  using E = Element<V>;
  const V one = V{} + E(1);
  if constexpr (kActivation == Activation::kRelu) {
    return x <= V{} ? V{} : one;
  } else if constexpr (kActivation == Activation::kGelu) {
    return gelu_derivative(x);
  } else if constexpr (kActivation == Activation::kGeluTanh) {
    const V c = within(x, E(kTanhReach));
    const V square = E(kTanhCubic) * c * c;
    const Sigmoid<V> s = sigmoid(V(c * E(kTanhScale) * (E(1) + square)));
    return s.value + c * s.slope * (E(kTanhScale) * (E(1) + E(3) * square));
  } else if constexpr (kActivation == Activation::kSilu) {
    return silu_derivative(x);
  } else {
    return one;
  }
}

}  // namespace fusereg::fused_dropout
