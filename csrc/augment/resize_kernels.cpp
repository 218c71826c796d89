// CPU kernels of antialiased resizing; compiled once per instruction set. Contract: resize.h.
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

template <class C, class U>
FUSEREG_INLINE void store_some(U* to, Vector<C> v, std::int64_t left) {
  constexpr int kN = kWidth<C>;
  if constexpr (sizeof(C) == 8 || sizeof(U) == 8) {
    for (std::int64_t i = 0; i < kN && i < left; ++i) {
      if constexpr (sizeof(U) == 8) {
        to[i] = static_cast<double>(v[i]);
      } else if constexpr (sizeof(U) == 1) {
        to[i] = to_uint8(v[i]);
      } else {
        to[i] = from_compute<U>(static_cast<float>(v[i]));
      }
    }
  } else if (left >= kN) {
    store_as(to, v);
  } else {
    U part[kN];
    store_as(part, v);
    memcpy(to, part, static_cast<std::size_t>(left) * sizeof(U));
  }
}

// --- the two passes ---
// What of an image a call concerns: channels of their own, or all of them last.
struct Part {
  std::int64_t sample, row;
  int channel, channels;
};

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

// Along the columns of x: element e of a row of x becomes vector e of the strip.
template <class T>
void along_columns(const ResizeJob& job, const Part& part, Number<T>* strip) {
  using C = Number<T>;
  constexpr int kN = kWidth<C>;
  const Images& x = job.x;
  const bool last = x.channels_last;
  const std::int64_t run = last ? x.w * job.c : x.w;
  const std::int64_t taps = job.rows.taps;
  const T* const image = static_cast<const T*>(x.data) + part.sample * x.sample;
  const auto rows = static_cast<int>(job.y.h - part.row < kN ? job.y.h - part.row : kN);
  Vector<C> sums[kTogether][kN] = {};
  for (int r = 0; r < (last ? 1 : part.channels); ++r) {
    const T* const plane = image + (last ? 0 : (part.channel + r) * x.channel);
    for (std::int64_t e = 0; e < run;) {
      const int count = run - e >= kTogether * kN ? kTogether : 1;
      for (int q = 0; q < rows; ++q) {
        const std::int64_t row = part.row + q;
        const C* const weights = static_cast<const C*>(job.rows.weights) + row * taps;
        const T* const p = plane + first_tap(job.rows, row, x.h) * x.row + e;
        if (count == kTogether) {
          sum_of_rows<T, kTogether>(p, x.row, weights, taps, kN, sums, q);
        } else {
          sum_of_rows<T, 1>(p, x.row, weights, taps, run - e, sums, q);
        }
      }
      for (int i = 0; i < count; ++i, e += kN) {
        turn<kN / 2, C>(sums[i]);
        for (int q = 0; q < kN && e + q < run; ++q) store(strip + (e + q) * kN, sums[i][q]);
      }
    }
    strip += run * kN;
  }
}

// Along the strip, to y.
template <class C, class U>
void along_rows(const ResizeJob& job, const Part& part, const C* strip) {
  constexpr int kN = kWidth<C>;
  const Images& y = job.y;
  const bool last = y.channels_last;
  const std::int64_t run = last ? y.w * job.c : y.w;
  const std::int64_t taps = job.columns.taps;
  // From a column of the strip to the next, and from a channel to the next.
  const std::int64_t step = (job.x.channels_last ? job.c : 1) * kN;
  const std::int64_t plane = job.x.channels_last ? kN : job.x.w * kN;
  U* const image = static_cast<U*>(y.data) + part.sample * y.sample;
  for (int r = 0; r < (last ? 1 : part.channels); ++r) {
    std::int64_t column = 0;
    int channel = last ? 0 : r;
    for (std::int64_t e = 0; e < run; e += kN) {
      Vector<C> v[kN];
      for (int q = 0; q < kN; ++q) {
        Vector<C> sum = {};
        if (e + q < run) {
          const C* const weights = static_cast<const C*>(job.columns.weights) + column * taps;
          const C* p = strip + channel * plane + first_tap(job.columns, column, job.x.w) * step;
          for (std::int64_t k = 0; k < taps; ++k, p += step) {
            if (weights[k] != C{0}) sum = sum + load(p) * weights[k];
          }
          sum = sum * static_cast<C>(job.scale[part.channel + channel]) +
                static_cast<C>(job.shift[part.channel + channel]);
          if (!last || ++channel == job.c) {
            ++column;
            if (last) channel = 0;
          }
        }
        v[q] = sum;
      }
      turn<kN / 2, C>(v);
      U* to = image + part.row * y.row + (last ? 0 : (part.channel + r) * y.channel) + e;
      for (int q = 0; q < kN && part.row + q < y.h; ++q, to += y.row)
        store_some<C, U>(to, v[q], run - e);
    }
  }
}

void strip(const ResizeJob& job, std::int64_t sample, int channel, int channels, std::int64_t row,
           void* scratch) {
  const Part part = {sample, row, channel, channels};
  dispatch_element(job.x.type, [&](auto tag) {
    using T = typename decltype(tag)::type;
    along_columns<T>(job, part, static_cast<Number<T>*>(scratch));
  });
  dispatch_element(job.y.type, [&](auto tag) {
    using U = typename decltype(tag)::type;
    if (job.x.type == Element::kFloat64) {
      along_rows<double, U>(job, part, static_cast<const double*>(scratch));
    } else {
      along_rows<float, U>(job, part, static_cast<const float*>(scratch));
    }
  });
}

}  // namespace

const ResizeKernels resize_kernels = {{kWidth<float>, kWidth<double>}, &strip};

}  // namespace fusereg::augment::FUSEREG_ISA
