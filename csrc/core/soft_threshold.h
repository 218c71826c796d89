// The scalar formulas of penalties and their proximal steps, for a number or (after core/simd.h) a
// vector of them, on the host and on the device: penalties and optimizers share them.
#pragma once

#include "core/dtype.h"

namespace fusereg {

// sign(w) with sign(+-0) = +-0 and sign(NaN) = NaN, so that a NaN weight is seen in the gradient.
template <class V>
FUSEREG_INLINE V sign(V w) {
  const V zero{};
  const V one = zero + 1;
  return w > zero ? one : (w < zero ? -one : w);
}

// magnitude with the sign of w; +0.0 for a magnitude of up to largest_zero; NaN stays.
template <class V>
FUSEREG_INLINE V signed_or_zero(V magnitude, V w, V largest_zero) {
  return magnitude <= largest_zero ? V{} : with_sign_of(magnitude, w);
}

// factor * sign(w) * max(|w| - threshold, 0), as it will be stored in T: every zero, also one that
// the rounding to T makes, is +0.0; NaN stays.
template <class T, class V>
FUSEREG_INLINE V soft_threshold(V w, V threshold, V factor) {
  const V largest_zero = V{} + Traits<T>::kRoundsToZero;
  return signed_or_zero((abs(w) - threshold) * factor, w, largest_zero);
}

// What the group term adds to l2 in the gradient: group * sqrt(n) / norm, and 0 for an all-zero
// group.
FUSEREG_INLINE double group_gradient_factor(double group_sqrt_n, double norm) {
  return norm == 0.0 ? 0.0 : group_sqrt_n / norm;
}

// The factor of the group's proximal step, max(0, 1 - group * sqrt(n) / norm); NaN stays.
FUSEREG_INLINE double group_prox_factor(double group_sqrt_n, double norm) {
  if (norm <= group_sqrt_n) return 0.0;
  return 1.0 - group_sqrt_n / norm;
}

}  // namespace fusereg
