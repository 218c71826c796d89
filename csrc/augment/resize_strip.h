// A strip of output rows that are weighted sums along both axes of an image: as many as a vector has
// lanes. For the CPU kernels, once per instruction set. Order of the sums and zero weights: resize.h.
#pragma once

#include "augment/augment_store.h"
#include "augment/resize.h"

namespace fusereg::augment::FUSEREG_ISA {
namespace {

// --- vectors of either type ---
template <class C>
struct IndexOf {
  typedef std::int32_t type __attribute__((vector_size(kVectorBytes)));
};
template <>
struct IndexOf<double> {
  typedef std::int64_t type __attribute__((vector_size(kVectorBytes)));
};

// Exchanges lanes between vectors that are kStep apart; all steps together turn rows to columns.
template <int kStep, class C>
FUSEREG_INLINE void turn(Vector<C> (&v)[kWidth<C>]) {
  if constexpr (kStep > 0) {
    constexpr int kN = kWidth<C>;
    typename IndexOf<C>::type low, high;
    for (int l = 0; l < kN; ++l) {
      low[l] = (l & kStep) != 0 ? kN + l - kStep : l;
      high[l] = (l & kStep) != 0 ? kN + l : l + kStep;
    }
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC unroll 16
#endif
    for (int i = 0; i < kN; ++i) {
      if ((i & kStep) != 0) continue;
      const Vector<C> a = v[i];
      const Vector<C> b = v[i | kStep];
      v[i] = __builtin_shuffle(a, b, low);
      v[i | kStep] = __builtin_shuffle(a, b, high);
    }
    turn<kStep / 2, C>(v);
  }
}

// kWidth elements, of which `left` are there.
template <class T>
FUSEREG_INLINE Vector<Number<T>> load_some(const T* p, std::int64_t left) {
  constexpr int kN = kWidth<Number<T>>;
  if (left >= kN) return load_run(p);
  T part[kN] = {};
  memcpy(part, p, static_cast<std::size_t>(left) * sizeof(T));
  return load_run(part);
}

// Vectors beside each other that are done together: a weight is read once for all of them.
inline constexpr int kTogether = 4;

// One row of the strip: the weighted sum of rows of x, `count` vectors from p on, and of the last
// one `left` elements.
template <class T, int kCount>
FUSEREG_INLINE void sum_of_rows(const T* p, std::int64_t stride, const Number<T>* weights,
                                std::int64_t taps, std::int64_t left,
                                Vector<Number<T>> (&sums)[kTogether][kWidth<Number<T>>], int row) {
  using C = Number<T>;
  constexpr int kN = kWidth<C>;
  Vector<C> sum[kCount] = {};
  for (std::int64_t k = 0; k < taps; ++k, p += stride) {
    if (weights[k] == C{0}) continue;
    FUSEREG_UNROLL_10
    for (int i = 0; i < kCount; ++i) {
      const Vector<C> v = kCount == kTogether ? load_run(p + i * kN) : load_some(p + i * kN, left);
      sum[i] = sum[i] + v * weights[k];
    }
  }
  FUSEREG_UNROLL_10
  for (int i = 0; i < kCount; ++i) sums[i][row] = sum[i];
}

// Along the columns of an image: element e of a row, from element `begin` to `end`, becomes vector
// e - begin of the strip, whose lanes are `rows` rows of the result from `row` on.
template <class T>
void along_columns(const T* plane, const Images& x, const Band& band, std::int64_t row, int rows,
                   std::int64_t begin, std::int64_t end, Number<T>* strip) {
  using C = Number<T>;
  constexpr int kN = kWidth<C>;
  Vector<C> sums[kTogether][kN] = {};
  for (std::int64_t e = begin; e < end;) {
    const int count = end - e >= kTogether * kN ? kTogether : 1;
    for (int q = 0; q < rows; ++q) {
      const C* const weights = static_cast<const C*>(band.weights) + (row + q) * band.taps;
      const T* const p = plane + first_tap(band, row + q, x.h) * x.row + e;
      if (count == kTogether) {
        sum_of_rows<T, kTogether>(p, x.row, weights, band.taps, kN, sums, q);
      } else {
        sum_of_rows<T, 1>(p, x.row, weights, band.taps, end - e, sums, q);
      }
    }
    for (int i = 0; i < count; ++i, e += kN) {
      turn<kN / 2, C>(sums[i]);
      for (int q = 0; q < kN && e + q < end; ++q) store(strip + (e + q - begin) * kN, sums[i][q]);
    }
  }
}

// Along a strip that begins with column `begin` of `width`, `step` numbers from one to the next.
template <class C>
FUSEREG_INLINE Vector<C> along_row(const C* strip, const Band& band, std::int64_t column,
                                   std::int64_t width, std::int64_t begin, std::int64_t step) {
  const C* const weights = static_cast<const C*>(band.weights) + column * band.taps;
  const C* p = strip + (first_tap(band, column, width) - begin) * step;
  Vector<C> sum = {};
  for (std::int64_t k = 0; k < band.taps; ++k, p += step) {
    if (weights[k] != C{0}) sum = sum + load(p) * weights[k];
  }
  return sum;
}

}  // namespace
}  // namespace fusereg::augment::FUSEREG_ISA
