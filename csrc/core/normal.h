// Two words of Philox to two normals, for a number or, in files that are compiled once per
// instruction set, for vectors of them.
//
// Box and Muller 1958: with u and v uniform, r = sqrt(-2 ln u) and a = 2 pi v,
// r cos a and r sin a are normal and independent. Errors of the polynomials (fitted for the least
// largest relative error): ln 3.2e-8, sin 3.2e-9, cos 5.7e-11, below the rounding of float32.
#pragma once

#include <cstdint>

#include "core/philox.h"
#include "core/rounded.h"

namespace fusereg::normal {

using rounded::add;
using rounded::multiply;
using rounded::square_root;

// Of the word as a signed integer.
FUSEREG_INLINE float number(std::uint32_t word) {
#if defined(__CUDA_ARCH__)
  return __int2float_rn(static_cast<int>(word));
#else
  return static_cast<float>(static_cast<std::int32_t>(word));
#endif
}

#if defined(FUSEREG_ISA)
using FloatVector = ::fusereg::FUSEREG_ISA::Vector<float>;
using WordVector = ::fusereg::FUSEREG_ISA::U32Vector;

template <class B>
FUSEREG_INLINE FloatVector multiply(FloatVector a, B b) {
  return a * b;
}
template <class B>
FUSEREG_INLINE FloatVector add(FloatVector a, B b) {
  return a + b;
}
FUSEREG_INLINE FloatVector square_root(FloatVector a) {
#if defined(__AVX512F__)
  return _mm512_maskz_sqrt_ps(0xffff, a);
#elif defined(__AVX2__)
  return _mm256_sqrt_ps(a);
#elif defined(__SSE2__)
  return _mm_sqrt_ps(a);
#elif defined(__aarch64__)
  return bit_cast<FloatVector>(vsqrtq_f32(bit_cast<float32x4_t>(a)));
#else
  for (int i = 0; i < ::fusereg::FUSEREG_ISA::kWidth<float>; ++i) a[i] = __builtin_sqrtf(a[i]);
  return a;
#endif
}
FUSEREG_INLINE FloatVector number(WordVector words) {
  return __builtin_convertvector(bit_cast<::fusereg::FUSEREG_ISA::Vector<std::int32_t>>(words),
                                 FloatVector);
}
#endif

// a b + c where a b is exact: once or twice rounded, it is the same.
template <class F>
FUSEREG_INLINE F add_exact_product(F a, float b, F c) {
  return add(multiply(a, b), c);
}
// Of 0 and numbers from 2^-100 on.
template <class F>
FUSEREG_INLINE F root(F x) {
  return square_root(x);
}
template <class F, class U>
FUSEREG_INLINE void exchange_where_negative(U word, F& a, F& b) {
  const U swap = ~((word >> 31) - 1u);  // all ones if the bit is set
  const U exchanged = (bit_cast<U>(a) ^ bit_cast<U>(b)) & swap;
  a = bit_cast<F>(bit_cast<U>(a) ^ exchanged);
  b = bit_cast<F>(bit_cast<U>(b) ^ exchanged);
}
#if defined(__CUDA_ARCH__)
FUSEREG_INLINE float add_exact_product(float a, float b, float c) { return __fmaf_rn(a, b, c); }
// What nvcc makes of __fsqrt_rn, without the branch for numbers that are smaller.
FUSEREG_INLINE float root(float x) {
  float inverse;
  asm("rsqrt.approx.ftz.f32 %0, %1;" : "=f"(inverse) : "f"(fmaxf(x, 0x1p-100f)));
  const float near = __fmul_rn(x, inverse);
  return __fmaf_rn(__fmaf_rn(-near, near, x), __fmul_rn(inverse, 0.5f), near);
}
FUSEREG_INLINE void exchange_where_negative(std::uint32_t word, float& a, float& b) {
  const bool swap = static_cast<std::int32_t>(word) < 0;
  const float first = swap ? b : a;
  b = swap ? a : b;
  a = first;
}
#endif

// -2 ln(v / 2^31) for 1/2 <= v <= 2^31: v = 2^(31 + e) (1 + f) with sqrt(1/2) <= 1 + f < sqrt(2), and
// ln(1 + f) = f - f^2 / 2 + f^3 P(f). The factor -2, a power of two, is in the coefficients: it changes
// no rounding.
template <class F, class U>
FUSEREG_INLINE F minus_two_logarithm(F v) {
  constexpr std::uint32_t kRootOfHalf = 0x3f3504f3u;
  const U bits = bit_cast<U>(v) - (31u << 23);
  const U e = (bits - kRootOfHalf) & 0xff800000u;  // as a signed integer, 2^23 e
  const F f = add(bit_cast<F>(bits - e), -1.0f);
  F p = add(multiply(f, -2.0f * 0.08700360357761383f), -2.0f * -0.1426747739315033f);
  p = add(multiply(p, f), -2.0f * 0.1491478681564331f);
  p = add(multiply(p, f), -2.0f * -0.165775865316391f);
  p = add(multiply(p, f), -2.0f * 0.19963061809539795f);
  p = add(multiply(p, f), -2.0f * -0.2500133812427521f);
  p = add(multiply(p, f), -2.0f * 0.3333390951156616f);
  const F square = multiply(f, f);
  const F tail = add(multiply(multiply(square, f), p), square);
  return add(add_exact_product(f, -2.0f, tail),
             multiply(number(e), -0x1p-22f * 0.6931471805599453f));
}

// The two normals of two words.
template <class F, class U>
FUSEREG_INLINE void normal_pair(U word0, U word1, F& normal0, F& normal1) {
  // (k + 1/2) / 2^31 of k of 31 bits: where k is small, all its bits count, and the tail is fine.
  const F radius = root(minus_two_logarithm<F, U>(add(number(word0 >> 1), 0.5f)));
  // An angle of +- 45 degrees from 30 bits; the other two choose the quarter of the circle.
  const F r = bit_cast<F>(bit_cast<U>(radius) ^ (word1 << 1 & 0x80000000u));
  const F t = multiply(number(word1 << 2), 0x1p-31f);
  const F z = multiply(t, t);
  F s = add(multiply(z, -3.59504520019982e-05f), 0.00249000103212893f);
  s = add(multiply(s, z), -0.08074543625116348f);
  s = add(multiply(s, z), 0.7853981852531433f);
  s = multiply(multiply(s, t), r);
  F c = add(multiply(z, 3.52876168108196e-06f), -0.0003259365039411932f);
  c = add(multiply(c, z), 0.015854323282837868f);
  c = add(multiply(c, z), -0.3084251284599304f);
  c = multiply(add(multiply(c, z), 1.0f), r);
  exchange_where_negative(word1, c, s);
  normal0 = c;
  normal1 = s;
}

}  // namespace fusereg::normal
