// The scalar formulas of penalty.h, for a number or (after core/simd.h) a vector of them, on the
// host and on the device.
#pragma once

#include "core/dtype.h"

namespace fusereg::penalty {

// sign(w) with sign(+-0) = +-0 and sign(NaN) = NaN, so that a NaN weight is seen in the gradient.
template <class V>
FUSEREG_INLINE V sign(V w) {
  const V zero{};
  const V one = zero + 1;
  return w > zero ? one : (w < zero ? -one : w);
}

// factor * sign(w) * max(|w| - threshold, 0), as it will be stored in T: every zero, also one that
// the rounding to T makes, is +0.0; NaN stays.
template <class T, class V>
FUSEREG_INLINE V soft_threshold(V w, V threshold, V factor) {
  const V zero{};
  const V largest_zero = zero + Traits<T>::kRoundsToZero;
  const V shrunk = (abs(w) - threshold) * factor;
  return shrunk <= largest_zero ? zero : with_sign_of(shrunk, w);
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

}  // namespace fusereg::penalty
