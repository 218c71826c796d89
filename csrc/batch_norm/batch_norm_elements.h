// For the CPU kernels alone, once per instruction set: what the kernels of the plain cases do to a
// vector of elements.
#pragma once

#include "batch_norm/batch_norm_memory.h"

namespace fusereg::batch_norm::FUSEREG_ISA {
namespace {

constexpr int kPlainRun = 64;  // float32 terms that are added before they go to float64

// What becomes of z, or of its gradient; and as a type.
enum class After { kNothing, kRelu, kReluBits };
template <After kAfter>
struct AfterTag {
  static constexpr After kValue = kAfter;
};

// --- vectors ---

// z < 0 ? 0 : z, a NaN and -0 as they are, which GCC makes of two instructions: the second operand
// is the result unless the first one is greater.
FUSEREG_INLINE Vector<float> relu(Vector<float> z) {
  const Vector<float> zero{};
#if defined(__AVX512F__)
  return _mm512_maskz_max_ps(static_cast<__mmask16>(-1), zero, z);
#elif defined(__AVX2__)
  return _mm256_max_ps(zero, z);
#elif defined(__SSE2__)
  return _mm_max_ps(zero, z);
#else
  return z < zero ? zero : z;
#endif
}

// The bits of n <= kWidth elements, of which the first is element i of a line of bits.
FUSEREG_INLINE void put_bits(std::uint8_t* line, std::int64_t i, std::uint32_t bits,
                             std::int64_t n) {
  constexpr int kW = kWidth<float>;
  if (n < kW) bits &= (1u << n) - 1u;
  if constexpr (kW >= 8) {
    for (std::int64_t j = 0; j < n; j += 8)
      line[(i + j) / 8] = static_cast<std::uint8_t>(bits >> j);
  } else {
    // Half a byte; its other half is there already, or follows.
    std::uint8_t& byte = line[i / 8];
    byte = i % 8 == 0 ? static_cast<std::uint8_t>(bits)
                      : static_cast<std::uint8_t>(byte | (bits << (i % 8)));
  }
}
FUSEREG_INLINE std::uint32_t get_bits(const std::uint8_t* line, std::int64_t i, std::int64_t n) {
  constexpr int kW = kWidth<float>;
  std::uint32_t bits = 0;
  if constexpr (kW >= 8) {
    for (std::int64_t j = 0; j < n; j += 8)
      bits |= static_cast<std::uint32_t>(line[(i + j) / 8]) << j;
  } else {
    bits = static_cast<std::uint32_t>(line[i / 8]) >> (i % 8) & ((1u << kW) - 1u);
  }
  return bits;
}

// A channel's coefficients, or a vector of columns'.
struct Coefficient {
  Vector<float> m, a, b, q, r;
};

// --- what is done to a vector of elements; `i`: of memory; `line`, `e`: its bits ---

struct At {
  std::int64_t i;
  std::int64_t line;  // first byte of the line of bits
  std::int64_t e;     // element of that line
};

// A vector's elements are all there, or some of them; kStream: all, and the results go past the
// cache, straight to memory.
enum class How { kWhole, kPart, kStream };
template <How kHow>
struct HowTag {
  static constexpr How kValue = kHow;
};

template <How kHow, class T>
FUSEREG_INLINE Vector<float> get(const T* p, std::int64_t n) {
  return kHow == How::kPart ? load_some(p, n) : load(p);
}
template <How kHow, class T>
FUSEREG_INLINE void put(T* p, Vector<float> v, std::int64_t n) {
  if (kHow == How::kPart) {
    store_some(p, v, n);
  } else if (kHow == How::kStream) {
    store_past_the_cache(p, v);
  } else {
    store(p, v);
  }
}

template <class T, After kAfter, bool kResidual>
struct Write {
  const T* x;
  const T* residual;
  T* y;
  std::uint8_t* bits;
  explicit Write(const Forward& job)
      : x(static_cast<const T*>(job.x)),
        residual(static_cast<const T*>(job.residual)),
        y(static_cast<T*>(job.y)),
        bits(job.bits) {}
  std::uint8_t* lines_of_bits() const { return bits; }
  void set_bits(std::uint8_t* lines) { bits = lines; }
  static constexpr bool kBits = kAfter == After::kReluBits;
  static constexpr bool kMakesBits = kBits;
  const T* result() const { return y; }
  bool streams() const { return y != x && y != residual; }
  template <How kHow>
  FUSEREG_ALWAYS_INLINE void apply(const At& at, const Coefficient& k, std::int64_t n) const {
    Vector<float> z = (get<kHow>(x + at.i, n) - k.m) * k.a + k.b;
    if constexpr (kResidual) z += get<kHow>(residual + at.i, n);
    if constexpr (kAfter == After::kReluBits)
      put_bits(bits + at.line, at.e, passing_bits<true>(z), kHow == How::kPart ? n : kWidth<float>);
    if constexpr (kAfter != After::kNothing) z = relu(z);
    put<kHow>(y + at.i, z, n);
  }
  template <Cache kCache>
  FUSEREG_ALWAYS_INLINE void ahead(std::int64_t i) const {
    ask_for<kCache>(x, i);
    if constexpr (kResidual) ask_for<kCache>(residual, i);
  }
};

template <class T, After kAfter>
struct GradientOf {
  const T* x;
  const T* grad;
  const std::uint8_t* bits;
  explicit GradientOf(const Backward& job)
      : x(static_cast<const T*>(job.x)), grad(static_cast<const T*>(job.grad)), bits(job.bits) {}
  // x - m, and returns dz
  template <How kHow>
  FUSEREG_ALWAYS_INLINE Vector<float> make(const At& at, const Coefficient& k, std::int64_t n,
                                           Vector<float>& d) const {
    d = get<kHow>(x + at.i, n) - k.m;
    const Vector<float> g = get<kHow>(grad + at.i, n);
    if constexpr (kAfter == After::kNothing) return g;
    if constexpr (kAfter == After::kRelu) {
      // As d * a + b <= 0, and for all numbers: a sum is rounded to its sign. One instruction less.
      return d * k.a <= -k.b ? Vector<float>{} : g;
    }
    return masked<float>(g, mask_of_bits<float>(get_bits(bits + at.line, at.e,
                                                         kHow == How::kPart ? n : kWidth<float>)));
  }
  template <Cache kCache>
  FUSEREG_ALWAYS_INLINE void ahead(std::int64_t i) const {
    ask_for<kCache>(x, i);
    ask_for<kCache>(grad, i);
  }
};

template <class T, After kAfter, bool kResidual>
struct WriteGradient {
  GradientOf<T, kAfter> from;
  T* grad_x;
  T* grad_residual;
  explicit WriteGradient(const Backward& job)
      : from(job),
        grad_x(static_cast<T*>(job.grad_x)),
        grad_residual(static_cast<T*>(job.grad_residual)) {}
  const std::uint8_t* lines_of_bits() const { return from.bits; }
  void set_bits(const std::uint8_t* lines) { from.bits = lines; }
  static constexpr bool kBits = kAfter == After::kReluBits;
  static constexpr bool kMakesBits = false;
  const T* result() const { return grad_x; }
  // The second result has to lie as the first one does, for both to begin a line at once.
  bool streams() const {
    if (grad_x == from.grad || grad_x == from.x) return false;
    return !kResidual ||
           (grad_residual != from.grad && to_next_line(grad_x) == to_next_line(grad_residual));
  }
  template <How kHow>
  FUSEREG_ALWAYS_INLINE void apply(const At& at, const Coefficient& k, std::int64_t n) const {
    Vector<float> d;
    const Vector<float> dz = from.template make<kHow>(at, k, n, d);
    if constexpr (kResidual) put<kHow>(grad_residual + at.i, dz, n);
    put<kHow>(grad_x + at.i, k.a * dz + k.q * d + k.r, n);
  }
  template <Cache kCache>
  FUSEREG_ALWAYS_INLINE void ahead(std::int64_t i) const {
    from.template ahead<kCache>(i);
  }
};

// The two terms of an element.
struct Terms {
  Vector<float> first, second;
};

template <class T>
struct MomentTerms {
  const T* x;
  explicit MomentTerms(const Forward& job) : x(static_cast<const T*>(job.x)) {}
  const std::uint8_t* lines_of_bits() const { return nullptr; }
  static constexpr bool kBits = false;
  template <How kHow>
  FUSEREG_ALWAYS_INLINE Terms get(const At& at, const Coefficient& k, std::int64_t n) const {
    Vector<float> d = FUSEREG_ISA::get<kHow>(x + at.i, n) - k.m;
    if constexpr (kHow == How::kPart) d = masked<float>(d, first_lanes(n));
    return {d, d * d};
  }
  template <Cache kCache>
  FUSEREG_ALWAYS_INLINE void ahead(std::int64_t i) const {
    ask_for<kCache>(x, i);
  }
};

template <class T, After kAfter>
struct GradientTerms {
  GradientOf<T, kAfter> from;
  explicit GradientTerms(const Backward& job) : from(job) {}
  const std::uint8_t* lines_of_bits() const { return from.bits; }
  void set_bits(const std::uint8_t* lines) { from.bits = lines; }
  static constexpr bool kBits = kAfter == After::kReluBits;
  template <How kHow>
  FUSEREG_ALWAYS_INLINE Terms get(const At& at, const Coefficient& k, std::int64_t n) const {
    Vector<float> d;
    Vector<float> dz = from.template make<kHow>(at, k, n, d);
    if constexpr (kHow == How::kPart) {
      dz = masked<float>(dz, first_lanes(n));
      d = masked<float>(d, first_lanes(n));
    }
    return {dz, dz * d};
  }
  template <Cache kCache>
  FUSEREG_ALWAYS_INLINE void ahead(std::int64_t i) const {
    from.template ahead<kCache>(i);
  }
};

}  // namespace
}  // namespace fusereg::batch_norm::FUSEREG_ISA
