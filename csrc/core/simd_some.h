// For the CPU kernels alone, once per instruction set: the first n < kWidth elements of a vector, by
// masks where there are any; what is not there is zero, and is neither read nor written.
#pragma once

#include "core/simd.h"

namespace fusereg::FUSEREG_ISA {

#if defined(__AVX512F__)
FUSEREG_INLINE Vector<float> load_some(const float* p, std::int64_t n) {
  return _mm512_maskz_loadu_ps(static_cast<__mmask16>((1u << n) - 1u), p);
}
FUSEREG_INLINE Vector<double> load_some(const double* p, std::int64_t n) {
  return _mm512_maskz_loadu_pd(static_cast<__mmask8>((1u << n) - 1u), p);
}
template <class T>
FUSEREG_INLINE Vector<float> load_some(const T* p, std::int64_t n) {
  return widened(p, _mm256_maskz_loadu_epi16(static_cast<__mmask16>((1u << n) - 1u), p));
}
FUSEREG_INLINE void store_some(float* p, Vector<float> v, std::int64_t n) {
  _mm512_mask_storeu_ps(p, static_cast<__mmask16>((1u << n) - 1u), v);
}
FUSEREG_INLINE void store_some(double* p, Vector<double> v, std::int64_t n) {
  _mm512_mask_storeu_pd(p, static_cast<__mmask8>((1u << n) - 1u), v);
}
template <class T>
FUSEREG_INLINE void store_some(T* p, Vector<float> v, std::int64_t n) {
  _mm256_mask_storeu_epi16(p, static_cast<__mmask16>((1u << n) - 1u), narrowed(p, v));
}
#else
template <class T>
FUSEREG_INLINE Vector<Compute<T> > load_some(const T* p, std::int64_t n) {
  T buffer[kWidth<Compute<T> >];
  memset(static_cast<void*>(buffer), 0, sizeof(buffer));
  for (std::int64_t i = 0; i < n; ++i) buffer[i] = p[i];
  return load(buffer);
}
template <class T>
FUSEREG_INLINE void store_some(T* p, Vector<Compute<T> > v, std::int64_t n) {
  T buffer[kWidth<Compute<T> >];
  store(buffer, v);
  for (std::int64_t i = 0; i < n; ++i) p[i] = buffer[i];
}
#endif

}  // namespace fusereg::FUSEREG_ISA
