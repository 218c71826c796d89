// CPU kernels of dropout + normalization; compiled once per instruction set. Contract:
// dropout_norm.h.
//
// A row's draws are made first, 2048 elements at a time, into a buffer from which any vector of
// them can be loaded: rows need not start at a block of draws. While they are made, the lines that
// come next are fetched.
#include "core/draw_simd.h"
#include "dropout_norm/dropout_norm.h"

namespace fusereg::dropout_norm::FUSEREG_ISA {
namespace {

using namespace ::fusereg::FUSEREG_ISA;

// Elements whose draws are made at once, and after which lanes are added up.
constexpr std::int64_t kPiece = 2048;
// Elements of a row's sum that stay in the cache; of longer rows it is made anew in each sweep.
constexpr std::int64_t kBuffer = 16384;
// Lanes of a sum, the same for every instruction set.
template <class C>
constexpr int kLanes = 128 / static_cast<int>(sizeof(C));

FUSEREG_INLINE std::int64_t smaller(std::int64_t a, std::int64_t b) { return a < b ? a : b; }

// --- loads and stores of `count` elements, at most a vector ---

template <class T>
FUSEREG_ALWAYS_INLINE Vector<Compute<T>> load_some(const T* p, std::int64_t count) {
  return count >= kWidth<Compute<T>> ? load(p) : load_partial(p, count);
}
template <class T>
FUSEREG_ALWAYS_INLINE void store_some(T* p, Vector<Compute<T>> v, std::int64_t count) {
  if (count >= kWidth<Compute<T>>) {
    store(p, v);
  } else {
    store_partial(p, v, count);
  }
}

// The same at element `at` of an array of T, or of float32 where a 16-bit T has a wide companion.
template <class T>
FUSEREG_ALWAYS_INLINE Vector<Compute<T>> load_wide(const void* p, bool wide, std::int64_t at,
                                                   std::int64_t count) {
  if constexpr (sizeof(T) == 2) {
    if (wide) return load_some(static_cast<const float*>(p) + at, count);
  }
  return load_some(static_cast<const T*>(p) + at, count);
}
template <class T>
FUSEREG_ALWAYS_INLINE void store_wide(void* p, bool wide, std::int64_t at, Vector<Compute<T>> v,
                                      std::int64_t count) {
  if constexpr (sizeof(T) == 2) {
    if (wide) {
      store_some(static_cast<float*>(p) + at, v, count);
      return;
    }
  }
  store_some(static_cast<T*>(p) + at, v, count);
}

// As it would be read again.
template <class T>
FUSEREG_ALWAYS_INLINE Vector<Compute<T>> rounded(Vector<Compute<T>> v, bool wide) {
  if constexpr (sizeof(T) == 2) {
    if (!wide) {
      T narrow[kWidth<Compute<T>>];
      store(narrow, v);
      return load(narrow);
    }
  }
  return v;
}

FUSEREG_ALWAYS_INLINE void fetch(const void* base, std::int64_t from, std::int64_t bytes,
                                 bool to_write) {
  if (base == nullptr) return;
  constexpr std::int64_t kLine = 64;
  const auto start = reinterpret_cast<std::uintptr_t>(base) + static_cast<std::uintptr_t>(from);
  for (std::int64_t b = 0; b < bytes; b += kLine) {
    const auto* const line = reinterpret_cast<const void*>(start + static_cast<std::uintptr_t>(b));
    if (to_write) {
      __builtin_prefetch(line, 1);
    } else {
      __builtin_prefetch(line, 0);
    }
  }
}

// --- dropping ---

#if defined(__AVX512F__)
template <class C>
FUSEREG_ALWAYS_INLINE Vector<C> scaled(Vector<C> x, Bits keep, Vector<C> scale) {
  if constexpr (sizeof(C) == 4) {
    return _mm512_maskz_mul_ps(static_cast<__mmask16>(keep), x, scale);
  } else {
    return _mm512_maskz_mul_pd(static_cast<__mmask8>(keep), x, scale);
  }
}
#else
template <class C>
FUSEREG_ALWAYS_INLINE Vector<C> scaled(Vector<C> x, MaskVector<C> keep, Vector<C> scale) {
  return bit_cast<Vector<C>>(bit_cast<MaskVector<C>>(x * scale) & keep);
}
#endif

// Dropout of pieces of rows; kBits == 0 keeps everything as it is.
template <class C, int kBits>
class Dropper {
 public:
  __attribute__((always_inline)) inline explicit Dropper(const Problem& problem)
      : keys_(problem.random.key()),
        mask_draws_(keys_, problem.random.low(), problem.draw),
        threshold_(DrawVector<kBits>{} +
                   static_cast<typename DrawType<kBits>::type>(problem.draw.threshold)),
        scale_(
            broadcast(static_cast<C>(problem.draw.keep == 0.0 ? 0.0 : 1.0 / problem.draw.keep))) {}

  // Draws for n <= kPiece elements, the first of which has this index. ahead(i, m) is called before
  // the draws of each block of m elements from element i on.
  template <class F>
  FUSEREG_ALWAYS_INLINE void draw(std::uint64_t index, std::int64_t n, F ahead) {
    constexpr auto kSize = static_cast<std::uint64_t>(kBlock<kBits>);
    const std::uint64_t block = index / kSize;
    skip_ = static_cast<std::int64_t>(index % kSize);
    std::uint64_t b = 0;
    for (std::int64_t i = 0; i < skip_ + n; i += kBlock<kBits>) {
      ahead(i, kBlock<kBits>);
      U64Vector draws[2];
      mask_draws_.make(block + b++, draws);
      memcpy(draws_ + i, draws, sizeof(draws));
    }
  }

  // f(at, count, drop) for the vectors of the piece whose draws were made last, where drop(v) is v
  // with what is not kept at 0 and the rest scaled.
  template <class F>
  FUSEREG_ALWAYS_INLINE void each(std::int64_t n, F f) const {
    constexpr int kW = kWidth<C>;
    constexpr int kStep = Masks<C, kBits>::kParts * kW;
    std::int64_t i = 0;
    for (; i + kStep <= n; i += kStep) step(i, kStep, f);
    if (i < n) step(i, n - i, f);
  }

 private:
  template <class F>
  FUSEREG_ALWAYS_INLINE void step(std::int64_t i, std::int64_t left, F f) const {
    constexpr int kW = kWidth<C>;
    U64Vector draws;
    memcpy(&draws, draws_ + skip_ + i, sizeof(draws));
    const auto masks = Masks<C, kBits>::make(draws, threshold_);
    FUSEREG_UNROLL_10
    for (int part = 0; part < Masks<C, kBits>::kParts; ++part) {
      const std::int64_t count = left - part * kW;
      if (count <= 0) break;
      f(i + part * kW, count, [&](Vector<C> v) __attribute__((always_inline)) {
        return scaled<C>(v, masks.part(part), scale_);
      });
    }
  }

  MaskKeys keys_;
  MaskDraws<kBits> mask_draws_;
  DrawVector<kBits> threshold_;
  Vector<C> scale_;
  std::int64_t skip_ = 0;
  typename DrawType<kBits>::type draws_[kPiece + 2 * kBlock<kBits>];
};

template <class C>
class Dropper<C, 0> {
 public:
  __attribute__((always_inline)) inline explicit Dropper(const Problem&) {}
  template <class F>
  FUSEREG_ALWAYS_INLINE void draw(std::uint64_t, std::int64_t, F) {}
  template <class F>
  FUSEREG_ALWAYS_INLINE void each(std::int64_t n, F f) const {
    constexpr int kW = kWidth<C>;
    const auto all = [](Vector<C> v) __attribute__((always_inline)) { return v; };
    std::int64_t i = 0;
    for (; i + kW <= n; i += kW) f(i, static_cast<std::int64_t>(kW), all);
    if (i < n) f(i, n - i, all);
  }
};

// --- sums ---

// Pairwise, in float64.
template <class C>
FUSEREG_ALWAYS_INLINE double lane_total(const Vector<C> (&sums)[kLanes<C> / kWidth<C>]) {
  C values[kLanes<C>];
  memcpy(values, sums, sizeof(values));
  double lanes[kLanes<C>];
  for (int i = 0; i < kLanes<C>; ++i) lanes[i] = static_cast<double>(values[i]);
  FUSEREG_UNROLL_10
  for (int w = kLanes<C> / 2; w > 0; w /= 2) {
    for (int i = 0; i < w; ++i) lanes[i] += lanes[i + w];
  }
  return lanes[0];
}

// Adds K terms of n elements to their totals. term(at, count, t) gives those of `count` elements
// from `at`; the lanes of t beyond must be zeros.
template <int K, class C, class F>
FUSEREG_ALWAYS_INLINE void add_terms(std::int64_t n, double (&totals)[K], F term) {
  constexpr int kW = kWidth<C>;
  constexpr int kVectors = kLanes<C> / kW;
  for (std::int64_t from = 0; from < n; from += kPiece) {
    const std::int64_t end = smaller(n, from + kPiece);
    Vector<C> sums[K][kVectors] = {};
    auto add = [&](std::int64_t at, std::int64_t count, int v) __attribute__((always_inline)) {
      Vector<C> t[K];
      term(at, count, t);
      for (int k = 0; k < K; ++k) sums[k][v] += t[k];
    };
    std::int64_t i = from;
    for (; i + kLanes<C> <= end; i += kLanes<C>) {
      FUSEREG_UNROLL_10
      for (int v = 0; v < kVectors; ++v) add(i + v * kW, kW, v);
    }
    FUSEREG_UNROLL_10
    for (int v = 0; v < kVectors; ++v) {
      if (i + v * kW < end) add(i + v * kW, end - i - v * kW, v);
    }
    for (int k = 0; k < K; ++k) totals[k] += lane_total<C>(sums[k]);
  }
}

// Ones in the first `count` lanes.
template <class C>
FUSEREG_ALWAYS_INLINE MaskVector<C> first_lanes(std::int64_t count) {
  using M = typename MaskType<C>::type;
  MaskVector<C> lane{};
  for (int i = 0; i < kWidth<C>; ++i) lane[i] = static_cast<M>(i);
  return lane < static_cast<M>(smaller(count, kWidth<C>));
}

// --- forward ---

template <class T, int kBits>
void forward_rows(const Forward& f, std::int64_t first, std::int64_t last) {
  using C = Compute<T>;
  constexpr auto kSize = static_cast<std::int64_t>(sizeof(T));
  const std::int64_t sum_size = f.wide_sum ? 4 : kSize;
  const auto* const x = static_cast<const T*>(f.x);
  auto* const y = static_cast<T*>(f.y);
  const std::int64_t length = f.length;
  Dropper<C, kBits> dropper(f);
  alignas(64) C buffer[kBuffer];

  // Elements [from, from + n) of a row's sum, into the buffer and, at first, to memory.
  auto fill = [&](std::int64_t row, std::int64_t from, std::int64_t n,
                  bool at_first) __attribute__((always_inline)) {
    void* const sum = at_first ? f.sum : nullptr;
    for (std::int64_t piece = 0; piece < n; piece += kPiece) {
      const std::int64_t m = smaller(kPiece, n - piece);
      const std::int64_t base = row * length + from + piece;
      dropper.draw(f.index_offset + static_cast<std::uint64_t>(base), m,
                   [&](std::int64_t i, std::int64_t block) __attribute__((always_inline)) {
                     fetch(x, (base + i) * kSize, block * kSize, false);
                     fetch(f.residual, (base + i) * sum_size, block * sum_size, false);
                     fetch(sum, (base + i) * sum_size, block * sum_size, true);
                     fetch(y, (base + i) * kSize, block * kSize, true);
                   });
      dropper.each(
          m, [&](std::int64_t at, std::int64_t count, auto drop) __attribute__((always_inline)) {
            Vector<C> s = drop(load_some(x + base + at, count));
            if (f.residual != nullptr)
              s = load_wide<T>(f.residual, f.wide_sum, base + at, count) + s;
            s = rounded<T>(s, f.wide_sum);
            store_some(buffer + piece + at, s, count);
            if (sum != nullptr) store_wide<T>(sum, f.wide_sum, base + at, s, count);
          });
    }
  };
  // use(from, n) for the row's segments, each of them in the buffer.
  auto sweep = [&](std::int64_t row, bool at_first, auto use) __attribute__((always_inline)) {
    for (std::int64_t from = 0; from < length; from += kBuffer) {
      const std::int64_t n = smaller(kBuffer, length - from);
      if (at_first || length > kBuffer) fill(row, from, n, at_first);
      use(from, n);
    }
  };

  for (std::int64_t row = first; row < last; ++row) {
    const auto count = static_cast<double>(length);
    C hi = 0;
    C lo = 0;
    double variance;
    double sums[1] = {0.0};
    if (f.rms) {
      sweep(row, true, [&](std::int64_t, std::int64_t n) __attribute__((always_inline)) {
        add_terms<1, C>(n, sums,
                        [&](std::int64_t at, std::int64_t m, Vector<C>(&t)[1])
                            __attribute__((always_inline)) {
                              const Vector<C> s = load_some(buffer + at, m);
                              t[0] = s * s;
                            });
      });
      variance = sums[0] / count;
    } else {
      sweep(row, true, [&](std::int64_t, std::int64_t n) __attribute__((always_inline)) {
        add_terms<1, C>(n, sums,
                        [&](std::int64_t at, std::int64_t m, Vector<C>(&t)[1])
                            __attribute__((always_inline)) { t[0] = load_some(buffer + at, m); });
      });
      hi = static_cast<C>(sums[0] / count);
      double centered[2] = {0.0, 0.0};
      sweep(row, false, [&](std::int64_t, std::int64_t n) __attribute__((always_inline)) {
        add_terms<2, C>(
            n, centered,
            [&](std::int64_t at, std::int64_t m, Vector<C>(&t)[2]) __attribute__((always_inline)) {
              Vector<C> d = load_some(buffer + at, m) - hi;
              if (m < kWidth<C>)
                d = bit_cast<Vector<C>>(bit_cast<MaskVector<C>>(d) & first_lanes<C>(m));
              t[0] = d;
              t[1] = d * d;
            });
      });
      const double rest = centered[0] / count;
      lo = static_cast<C>(rest);
      variance = centered[1] / count - rest * rest;
      if (variance < 0.0) variance = 0.0;
    }
    const auto rstd = static_cast<C>(1.0 / __builtin_sqrt(variance + f.eps));
    if (f.statistics != nullptr) {
      auto* const kept = static_cast<C*>(f.statistics) + row * statistics_per_row(f.rms);
      if (!f.rms) {
        kept[0] = hi;
        kept[1] = lo;
      }
      kept[f.rms ? 0 : 2] = rstd;
    }
    sweep(row, false, [&](std::int64_t from, std::int64_t n) __attribute__((always_inline)) {
      auto put = [&](std::int64_t i, std::int64_t m) __attribute__((always_inline)) {
        Vector<C> v = ((load_some(buffer + i, m) - hi) - lo) * rstd;
        if (f.weight != nullptr) v *= load_wide<T>(f.weight, f.wide_weight, from + i, m);
        if (f.bias != nullptr) v += load_wide<T>(f.bias, f.wide_weight, from + i, m);
        store_some(y + row * length + from + i, v, m);
      };
      std::int64_t i = 0;
      for (; i + kWidth<C> <= n; i += kWidth<C>) put(i, kWidth<C>);
      if (i < n) put(i, n - i);
    });
  }
}

// --- backward ---

template <class T, int kBits>
void backward_rows(const Backward& b, std::int64_t first, std::int64_t last, void* partial) {
  using C = Compute<T>;
  constexpr auto kSize = static_cast<std::int64_t>(sizeof(T));
  const std::int64_t sum_size = b.wide_sum ? 4 : kSize;
  const auto* const grad_y = static_cast<const T*>(b.grad_y);
  const std::int64_t length = b.length;
  C* const of_weight = b.grad_weight == nullptr ? nullptr : static_cast<C*>(partial);
  C* const of_bias = b.grad_bias == nullptr
                         ? nullptr
                         : static_cast<C*>(partial) + (of_weight == nullptr ? 0 : length);
  Dropper<C, kBits> dropper(b);

  for (std::int64_t row = first; row < last; ++row) {
    const auto* const kept = static_cast<const C*>(b.statistics) + row * statistics_per_row(b.rms);
    const C hi = b.rms ? C(0) : kept[0];
    const C lo = b.rms ? C(0) : kept[1];
    const C rstd = kept[b.rms ? 0 : 2];
    const std::int64_t start = row * length;
    // h and g of dropout_norm.h. Lanes beyond `count` have g = 0.
    auto normalized = [&](std::int64_t at, std::int64_t count) __attribute__((always_inline)) {
      return ((load_wide<T>(b.sum, b.wide_sum, start + at, count) - hi) - lo) * rstd;
    };
    auto weighted = [&](Vector<C> gradient, std::int64_t at, std::int64_t count)
                        __attribute__((always_inline)) {
                          if (b.weight == nullptr) return gradient;
                          return gradient * load_wide<T>(b.weight, b.wide_weight, at, count);
                        };
    auto accumulate = [&](C* slot, std::int64_t at, Vector<C> v, std::int64_t count)
                          __attribute__((always_inline)) {
                            if (row != first) v = load_some(slot + at, count) + v;
                            store_some(slot + at, v, count);
                          };

    double sums[2] = {0.0, 0.0};
    add_terms<2, C>(length, sums,
                    [&](std::int64_t at, std::int64_t count, Vector<C>(&t)[2])
                        __attribute__((always_inline)) {
                          const Vector<C> gradient = load_some(grad_y + start + at, count);
                          const Vector<C> h = normalized(at, count);
                          const Vector<C> g = weighted(gradient, at, count);
                          t[0] = g * h;
                          t[1] = g;
                          if (of_weight != nullptr) accumulate(of_weight, at, gradient * h, count);
                          if (of_bias != nullptr) accumulate(of_bias, at, gradient, count);
                        });
    if (b.grad_x == nullptr && b.grad_residual == nullptr) continue;
    const auto along = static_cast<C>(sums[0] / static_cast<double>(length));
    const auto mean = static_cast<C>(b.rms ? 0.0 : sums[1] / static_cast<double>(length));

    for (std::int64_t piece = 0; piece < length; piece += kPiece) {
      const std::int64_t m = smaller(kPiece, length - piece);
      const std::int64_t base = start + piece;
      if (b.grad_x != nullptr) {
        dropper.draw(b.index_offset + static_cast<std::uint64_t>(base), m,
                     [&](std::int64_t i, std::int64_t block) __attribute__((always_inline)) {
                       fetch(b.grad_x, (base + i) * kSize, block * kSize, true);
                       fetch(b.grad_residual, (base + i) * sum_size, block * sum_size, true);
                       // This row has been read; the next one is next.
                       fetch(grad_y, (base + length + i) * kSize, block * kSize, false);
                       fetch(b.sum, (base + length + i) * sum_size, block * sum_size, false);
                     });
      }
      dropper.each(
          m, [&](std::int64_t i, std::int64_t count, auto drop) __attribute__((always_inline)) {
            const std::int64_t at = piece + i;
            const Vector<C> h = normalized(at, count);
            const Vector<C> g = weighted(load_some(grad_y + start + at, count), at, count);
            Vector<C> ds = ((g - mean) - h * along) * rstd;
            if (b.grad_sum != nullptr)
              ds += load_wide<T>(b.grad_sum, b.wide_sum, start + at, count);
            if (b.grad_residual != nullptr)
              store_wide<T>(b.grad_residual, b.wide_sum, start + at, ds, count);
            if (b.grad_x != nullptr)
              store_some(static_cast<T*>(b.grad_x) + start + at, drop(ds), count);
          });
    }
  }
}

// Calls f with compile-time values of dtype and bits.
template <class F>
FUSEREG_ALWAYS_INLINE void dispatch(const Problem& problem, F f) {
  dispatch_dtype(problem.dtype, [&](auto tag) {
    if (problem.draw.bits == 0) {
      f(tag, DrawBits<0>{});
    } else {
      dispatch_bits(problem.draw, [&](auto bits) { f(tag, bits); });
    }
  });
}

void forward(const Forward& f, std::int64_t first, std::int64_t last) {
  dispatch(f, [&](auto tag, auto bits) {
    forward_rows<typename decltype(tag)::type, decltype(bits)::value>(f, first, last);
  });
}

void backward(const Backward& b, std::int64_t first, std::int64_t last, void* partial) {
  dispatch(b, [&](auto tag, auto bits) {
    backward_rows<typename decltype(tag)::type, decltype(bits)::value>(b, first, last, partial);
  });
}

template <class T>
void combine_columns(const Backward& b, std::int64_t chunks, std::int64_t first,
                     std::int64_t last) {
  using C = Compute<T>;
  const auto* const partials = static_cast<const C*>(b.partials);
  const std::int64_t stride = b.slots() * b.length;
  constexpr std::int64_t kColumns = 64;
  for (std::int64_t from = first; from < last; from += kColumns) {
    const std::int64_t n = smaller(kColumns, last - from);
    double sums[kColumns] = {};
    for (std::int64_t c = 0; c < chunks; ++c) {
      for (std::int64_t i = 0; i < n; ++i)
        sums[i] += static_cast<double>(partials[c * stride + from + i]);
    }
    for (std::int64_t i = 0; i < n; ++i) {
      const bool in_weight = b.grad_weight != nullptr && from + i < b.length;
      void* const out = in_weight ? b.grad_weight : b.grad_bias;
      const std::int64_t at = from + i - (in_weight || b.slots() == 1 ? 0 : b.length);
      const auto value = static_cast<C>(sums[i]);
      if (b.wide_weight) {
        static_cast<float*>(out)[at] = static_cast<float>(value);
      } else {
        static_cast<T*>(out)[at] = from_compute<T>(value);
      }
    }
  }
}

void combine(const Backward& b, std::int64_t chunks, std::int64_t first, std::int64_t last) {
  dispatch_dtype(b.dtype, [&](auto tag) {
    combine_columns<typename decltype(tag)::type>(b, chunks, first, last);
  });
}

}  // namespace

const CpuKernels kernels = {&forward, &backward, &combine};

}  // namespace fusereg::dropout_norm::FUSEREG_ISA
