// CPU kernels of dropout fused with its neighbors; compiled once per instruction set. Contract:
// fused_dropout.h.
//
// Memory is walked by words of 64 elements, for which one function that is not inlined draws 64
// bits: all forms and dtypes share its one copy, and the processor overlaps its arithmetic with
// the loads around it. A word is computed by pairs of vectors. Those of bfloat16 hold the elements
// at even and at odd positions, each in the upper half of a float where it lies already, so that
// nothing is unpacked or packed.
#include "core/draw_simd.h"
#include "fused_dropout/fused_dropout.h"

namespace fusereg::fused_dropout::FUSEREG_ISA {
namespace {

using namespace ::fusereg::FUSEREG_ISA;

constexpr int kWord = 64;

// --- the bits ---

// Bit e is set where element e of the two vectors of draws is kept.
template <int kBits>
FUSEREG_INLINE std::uint64_t compare(const U64Vector (&draws)[2], DrawVector<kBits> threshold) {
  constexpr int kHalf = kBlock<kBits> / 2;
#if defined(__AVX512F__)
  const auto bits = [&](int i) __attribute__((always_inline)) -> std::uint64_t {
    return Masks<float, kBits>::make(draws[i], threshold).bits;
  };
  return bits(0) | bits(1) << kHalf;
#elif defined(__AVX2__)
  const auto first = bit_cast<__m256i>(bit_cast<DrawVector<kBits>>(draws[0]) < threshold);
  const auto second = bit_cast<__m256i>(bit_cast<DrawVector<kBits>>(draws[1]) < threshold);
  if constexpr (kBits == 16) {
    // The pack works within 128-bit halves.
    const __m256i packed = _mm256_permute4x64_epi64(_mm256_packs_epi16(first, second), 0xd8);
    return static_cast<std::uint32_t>(_mm256_movemask_epi8(packed));
  } else {
    return static_cast<std::uint32_t>(_mm256_movemask_ps(_mm256_castsi256_ps(first)) |
                                      _mm256_movemask_ps(_mm256_castsi256_ps(second)) << kHalf);
  }
#elif defined(__SSE2__)
  const auto first = bit_cast<__m128i>(bit_cast<DrawVector<kBits>>(draws[0]) < threshold);
  const auto second = bit_cast<__m128i>(bit_cast<DrawVector<kBits>>(draws[1]) < threshold);
  if constexpr (kBits == 16) {
    return static_cast<std::uint32_t>(_mm_movemask_epi8(_mm_packs_epi16(first, second)));
  } else {
    return static_cast<std::uint32_t>(_mm_movemask_ps(_mm_castsi128_ps(first)) |
                                      _mm_movemask_ps(_mm_castsi128_ps(second)) << kHalf);
  }
#elif defined(__aarch64__)
  const auto first = bit_cast<DrawVector<kBits>>(draws[0]) < threshold;
  const auto second = bit_cast<DrawVector<kBits>>(draws[1]) < threshold;
  if constexpr (kBits == 16) {
    return bits_of(bit_cast<uint16x8_t>(first)) | bits_of(bit_cast<uint16x8_t>(second)) << kHalf;
  } else {
    return bits_of(bit_cast<uint32x4_t>(first)) | bits_of(bit_cast<uint32x4_t>(second)) << kHalf;
  }
#else
  std::uint64_t bits = 0;
  for (int i = 0; i < 2; ++i) {
    const auto d = bit_cast<DrawVector<kBits>>(draws[i]);
    for (int j = 0; j < kHalf; ++j)
      bits |= static_cast<std::uint64_t>(d[j] < threshold[j]) << (i * kHalf + j);
  }
  return bits;
#endif
}

template <int kBits>
__attribute__((noinline)) std::uint64_t draw_word(const MaskKeys& keys, std::uint64_t low,
                                                  std::uint64_t word, std::uint32_t threshold) {
  constexpr int kCalls = kWord / kBlock<kBits>;
  const DrawVector<kBits> limit =
      DrawVector<kBits>{} + static_cast<typename DrawType<kBits>::type>(threshold);
  std::uint64_t bits = 0;
  for (int i = 0; i < kCalls; ++i) {
    U64Vector draws[2];
    philox_chunks(keys, low, (word * kCalls + static_cast<std::uint64_t>(i)) * kPhiloxChunks,
                  draws);
    bits |= compare<kBits>(draws, limit) << (i * kBlock<kBits>);
  }
  return bits;
}

// --- pairs of vectors ---

template <class T>
inline constexpr int kPair = 2 * kWidth<Compute<T>>;

template <class C>
struct Pair {
  Vector<C> v[2];
};

// How the elements of a pair lie: one vector after the other, or in turn.
template <class T>
inline constexpr bool kInTurn = Traits<T>::kDType == DType::kBFloat16;

template <class T, bool kTurn = kInTurn<T>>
FUSEREG_INLINE Pair<Compute<T>> load_pair(const T* p) {
  if constexpr (kTurn) {
    U32Vector u;
    memcpy(&u, p, sizeof(u));
    return {{bit_cast<Vector<float>>(u << 16), bit_cast<Vector<float>>(u & 0xffff0000u)}};
  } else {
    return {{load(p), load(p + kWidth<Compute<T>>)}};
  }
}

// As store(BFloat16*) rounds, in the upper halves; the lower ones are rubbish.
FUSEREG_INLINE U32Vector round_to_bfloat16(Vector<float> v) {
  const auto u = bit_cast<U32Vector>(v);
  return v != v ? u | 0x400000u : u + (((u >> 16) & 1u) + 0x7fffu);
}

template <class T, bool kTurn = kInTurn<T>>
FUSEREG_INLINE void store_pair(T* p, const Pair<Compute<T>>& pair) {
  if constexpr (kTurn) {
    const U32Vector u =
        (round_to_bfloat16(pair.v[0]) >> 16) | (round_to_bfloat16(pair.v[1]) & 0xffff0000u);
    memcpy(p, &u, sizeof(u));
  } else {
    store(p, pair.v[0]);
    store(p + kWidth<Compute<T>>, pair.v[1]);
  }
}

// One bit set in each lane: that of the lane's element.
template <class C, bool kTurn>
FUSEREG_INLINE MaskVector<C> own_bits(int i) {
  using M = typename MaskType<C>::type;
  MaskVector<C> own{};
  for (int j = 0; j < kWidth<C>; ++j)
    own[j] = static_cast<M>(std::uint64_t{1} << (kTurn ? 2 * j + i : i * kWidth<C> + j));
  return own;
}

// The pair with the elements whose bits are 0 replaced by 0.
template <class T, bool kTurn = kInTurn<T>>
FUSEREG_INLINE Pair<Compute<T>> keep(const Pair<Compute<T>>& pair, std::uint64_t bits) {
  using C = Compute<T>;
#if defined(__AVX512F__)
  if constexpr (sizeof(C) == 8) {
    return {{_mm512_maskz_mov_pd(static_cast<__mmask8>(bits), pair.v[0]),
             _mm512_maskz_mov_pd(static_cast<__mmask8>(bits >> 8), pair.v[1])}};
  } else if constexpr (kTurn) {
    const __m512i all = _mm512_set1_epi32(static_cast<int>(bits));
    const __mmask16 even = _mm512_test_epi32_mask(all, bit_cast<__m512i>(own_bits<float, true>(0)));
    const __mmask16 odd = _mm512_test_epi32_mask(all, bit_cast<__m512i>(own_bits<float, true>(1)));
    return {{_mm512_maskz_mov_ps(even, pair.v[0]), _mm512_maskz_mov_ps(odd, pair.v[1])}};
  } else {
    return {{_mm512_maskz_mov_ps(static_cast<__mmask16>(bits), pair.v[0]),
             _mm512_maskz_mov_ps(static_cast<__mmask16>(bits >> 16), pair.v[1])}};
  }
#else
  const MaskVector<C> all = MaskVector<C>{} + static_cast<typename MaskType<C>::type>(bits);
  Pair<C> kept;
  FUSEREG_UNROLL_10
  for (int i = 0; i < 2; ++i) {
    const MaskVector<C> own = own_bits<C, kTurn>(i);
    kept.v[i] = bit_cast<Vector<C>>(bit_cast<MaskVector<C>>(pair.v[i]) & ((all & own) == own));
  }
  return kept;
#endif
}

// --- the forms: what becomes of a pair ---

template <class T, bool kWithBias>
struct Add {
  static constexpr bool kBias = kWithBias;
  static constexpr bool kOther = true;
  static constexpr bool kDraws = true;
  using C = Compute<T>;
  static FUSEREG_ALWAYS_INLINE Pair<C> apply(const Pair<C>& x, const Pair<C>& other,
                                             const Pair<C>& bias, Vector<C> scale,
                                             std::uint64_t bits) {
    Pair<C> y = x;
    FUSEREG_UNROLL_10
    for (int i = 0; i < 2; ++i) {
      if constexpr (kBias) y.v[i] += bias.v[i];
      y.v[i] *= scale;
    }
    y = keep<T>(y, bits);
    FUSEREG_UNROLL_10
    for (int i = 0; i < 2; ++i) y.v[i] += other.v[i];
    return y;
  }
};

template <class T, Activation kActivation>
struct Activate {
  static constexpr bool kBias = false;
  static constexpr bool kOther = false;
  static constexpr bool kDraws = true;
  using C = Compute<T>;
  static FUSEREG_ALWAYS_INLINE Pair<C> apply(const Pair<C>& x, const Pair<C>&, const Pair<C>&,
                                             Vector<C> scale, std::uint64_t bits) {
    return keep<T>({{activate<kActivation>(x.v[0]) * scale, activate<kActivation>(x.v[1]) * scale}},
                   bits);
  }
};

template <class T, Activation kActivation>
struct ActivateBackward {
  static constexpr bool kBias = false;
  static constexpr bool kOther = true;
  // A result of relu that is positive was kept.
  static constexpr bool kDraws = kActivation != Activation::kRelu;
  using C = Compute<T>;
  static FUSEREG_ALWAYS_INLINE Pair<C> apply(const Pair<C>& grad, const Pair<C>& x, const Pair<C>&,
                                             Vector<C> scale, std::uint64_t bits) {
    Pair<C> y;
    FUSEREG_UNROLL_10
    for (int i = 0; i < 2; ++i) {
      const Vector<C> g = grad.v[i] * scale;
      if constexpr (kDraws) {
        y.v[i] = g * slope<kActivation>(x.v[i]);
      } else {
        y.v[i] = x.v[i] <= Vector<C>{} ? Vector<C>{} : g;
      }
    }
    if constexpr (kDraws) y = keep<T>(y, bits);
    return y;
  }
};

// --- walking ---

// Asks for the lines that a later word will read and write: see dropout's kernels.
FUSEREG_INLINE void prefetch(const void* p, std::size_t bytes, bool write) {
  constexpr std::uintptr_t kAhead = 2048;  // bytes
  constexpr std::uintptr_t kLine = 64;
  const auto from = reinterpret_cast<std::uintptr_t>(p) + kAhead;
  for (std::uintptr_t b = 0; b < bytes; b += kLine) {
    const auto* const line = reinterpret_cast<const void*>(from + b);
    if (write) {
      __builtin_prefetch(line, 1);
    } else {
      __builtin_prefetch(line, 0);
    }
  }
}

// The bias of a word's elements, which may begin in any column and go on into the next rows.
template <class T>
struct BiasWindow {
  static constexpr std::int64_t kSmall = 512;
  const T* bias;
  std::int64_t columns;
  T row[kSmall + kWord];

  FUSEREG_ALWAYS_INLINE BiasWindow(const T* bias_, std::int64_t columns_)
      : bias(bias_), columns(columns_) {
    if (columns > kSmall) return;
    for (std::int64_t i = 0; i < columns; ++i) row[i] = bias[i];
    for (std::int64_t i = columns; i < columns + kWord; ++i) row[i] = row[i - columns];
  }
  // Valid until the next call.
  FUSEREG_ALWAYS_INLINE const T* at(std::int64_t column) {
    if (columns <= kSmall) return row + column;
    const std::int64_t rest = columns - column;
    if (rest >= kWord) return bias + column;
    memcpy(row, bias + column, static_cast<std::size_t>(rest) * sizeof(T));
    memcpy(row + rest, bias, static_cast<std::size_t>(kWord - rest) * sizeof(T));
    return row;
  }
};

// Calls word(x, other, y, word, skip, count) for each word of a span; the first and the last may be
// there in part and go through buffers of kWord elements, of which [skip, skip + count) count.
template <class T, bool kOther, class F>
FUSEREG_INLINE void walk(const Span& span, const F& word_function) {
  const T* x = static_cast<const T*>(span.x);
  const T* other = static_cast<const T*>(span.other);
  T* y = static_cast<T*>(span.y);
  std::int64_t n = span.n;
  std::uint64_t word = span.index / kWord;
  auto partial = [&](std::int64_t skip, std::int64_t count) {
    T from[kWord], beside[kWord], to[kWord];
    memset(from, 0, sizeof(from));
    memset(beside, 0, sizeof(beside));
    const auto bytes = static_cast<std::size_t>(count) * sizeof(T);
    memcpy(from + skip, x, bytes);
    if constexpr (kOther) memcpy(beside + skip, other, bytes);
    word_function(from, beside, to, word, skip, count);
    memcpy(y, to + skip, bytes);
    x += count;
    if constexpr (kOther) other += count;
    y += count;
    n -= count;
    ++word;
  };
  const auto skip = static_cast<std::int64_t>(span.index % kWord);
  if (skip != 0) partial(skip, n < kWord - skip ? n : kWord - skip);
  for (; n >= kWord; n -= kWord) {
    prefetch(x, kWord * sizeof(T), false);
    if constexpr (kOther) prefetch(other, kWord * sizeof(T), false);
    prefetch(y, kWord * sizeof(T), true);
    word_function(x, other, y, word, 0, kWord);
    x += kWord;
    if constexpr (kOther) other += kWord;
    y += kWord;
    ++word;
  }
  if (n > 0) partial(0, n);
}

// What the draws need, made once a span.
struct Drawing {
  FUSEREG_ALWAYS_INLINE explicit Drawing(const Stream& stream)
      : keys(stream.seed), s(stream), few(keys, stream.low, stream.draw) {}
  FUSEREG_ALWAYS_INLINE std::uint64_t operator()(std::uint64_t word) {
    if (s.draw.bits == 16) return draw_word<16>(keys, s.low, word, s.draw.threshold);
    if (s.draw.bits == 32) return draw_word<32>(keys, s.low, word, s.draw.threshold);
    std::uint64_t bits = ~std::uint64_t{0};
    if (s.draw.bits != 0) memcpy(&bits, few.bits<sizeof(bits)>(word), sizeof(bits));
    return bits;
  }
  MaskKeys keys;
  const Stream& s;
  MaskDraws<kFewBits> few;
};

template <class T, class Function>
void elements(const Span& span, const Stream& s) {
  using C = Compute<T>;
  Drawing draw(s);
  const Vector<C> scale = broadcast(static_cast<C>(s.scale));
  using Window = BiasWindow<T>;
  Window window(static_cast<const T*>(span.bias),
                Function::kBias ? span.columns : Window::kSmall + 1);
  std::int64_t column = span.column;
  walk<T, Function::kOther>(
      span, [&](const T* x, const T* other, T* y, std::uint64_t word, std::int64_t skip,
                std::int64_t count) __attribute__((always_inline)) {
        const std::uint64_t bits = Function::kDraws ? draw(word) : 0;
        const T* bias = nullptr;
        T shifted[kWord];
        if constexpr (Function::kBias) {
          bias = window.at(column);
          if (skip != 0) {
            memset(shifted, 0, sizeof(shifted));
            memcpy(shifted + skip, bias, static_cast<std::size_t>(count) * sizeof(T));
            bias = shifted;
          }
          column += count;
          if (column >= span.columns) column %= span.columns;
        }
        FUSEREG_UNROLL_10
        for (int i = 0; i < kWord; i += kPair<T>) {
          Pair<C> beside{}, added{};
          if constexpr (Function::kOther) beside = load_pair(other + i);
          if constexpr (Function::kBias) added = load_pair(bias + i);
          store_pair(y + i, Function::apply(load_pair(x + i), beside, added, scale, bits >> i));
        }
      });
}

void add(DType dtype, const Span& span, const Stream& s) {
  dispatch_dtype(dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    if (span.bias != nullptr) {
      elements<T, Add<T, true>>(span, s);
    } else {
      elements<T, Add<T, false>>(span, s);
    }
  });
}

template <template <class, Activation> class Function>
FUSEREG_INLINE void dispatch_activation(DType dtype, Activation activation, const Span& span,
                                        const Stream& s) {
  dispatch_dtype(dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    switch (activation) {
      case Activation::kRelu:
        return elements<T, Function<T, Activation::kRelu>>(span, s);
      case Activation::kGelu:
        return elements<T, Function<T, Activation::kGelu>>(span, s);
      case Activation::kGeluTanh:
        return elements<T, Function<T, Activation::kGeluTanh>>(span, s);
      default:
        return elements<T, Function<T, Activation::kSilu>>(span, s);
    }
  });
}

void activate_any(DType dtype, Activation activation, const Span& span, const Stream& s) {
  dispatch_activation<Activate>(dtype, activation, span, s);
}

void activate_backward_any(DType dtype, Activation activation, const Span& span, const Stream& s) {
  dispatch_activation<ActivateBackward>(dtype, activation, span, s);
}

// --- the gradient of the bias ---

// The sums are of numbers that the rounding to T has not touched yet, and in memory order: the
// pairs lie one vector after the other here, bfloat16 too.
template <class T>
void bias_backward(const Span& span, double* sums, const Stream& s) {
  using C = Compute<T>;
  constexpr int kW = kWidth<C>;
  constexpr int kWide = static_cast<int>(sizeof(double) / sizeof(C));
  Drawing draw(s);
  const Vector<C> scale = broadcast(static_cast<C>(s.scale));
  std::int64_t column = span.column;
  walk<T, false>(span, [&](const T* x, const T*, T* y, std::uint64_t word, std::int64_t skip,
                           std::int64_t count) __attribute__((always_inline)) {
    const std::uint64_t bits = draw(word);
    const bool direct = count == kWord && column + kWord <= span.columns;
    C products[kWord];
    FUSEREG_UNROLL_10
    for (int i = 0; i < kWord; i += 2 * kW) {
      Pair<C> g = load_pair<T, false>(x + i);
      g = keep<T, false>({{g.v[0] * scale, g.v[1] * scale}}, bits >> i);
      store_pair<T, false>(y + i, g);
      FUSEREG_UNROLL_10
      for (int j = 0; j < 2; ++j) {
        if (direct) {
          Vector<double> wide[kWide];
          double* const at = sums + column + i + j * kW;
          memcpy(&wide, at, sizeof(wide));
          add_widened(g.v[j], wide);
          memcpy(at, &wide, sizeof(wide));
        } else {
          store(products + i + j * kW, g.v[j]);
        }
      }
    }
    if (!direct) {
      std::int64_t c = column;
      for (std::int64_t i = skip; i < skip + count; ++i) {
        sums[c] += static_cast<double>(products[i]);
        c = c + 1 == span.columns ? 0 : c + 1;
      }
    }
    column += count;
    if (column >= span.columns) column %= span.columns;
  });
}

void bias_backward_any(DType dtype, const Span& span, double* sums, const Stream& s) {
  dispatch_dtype(dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    bias_backward<T>(span, sums, s);
  });
}

// --- rows ---

template <class T>
void row(const T* x, const T* residual, T* y, std::int64_t n, double factor) {
  using C = Compute<T>;
  constexpr int kW = kWidth<C>;
  const Vector<C> scale = broadcast(static_cast<C>(factor));
  std::int64_t i = 0;
  for (; i + kW <= n; i += kW) store(y + i, load(residual + i) + load(x + i) * scale);
  if (i < n) {
    store_partial(y + i, load_partial(residual + i, n - i) + load_partial(x + i, n - i) * scale,
                  n - i);
  }
}

void row_any(DType dtype, const void* x, const void* residual, void* y, std::int64_t n,
             double scale) {
  dispatch_dtype(dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    row(static_cast<const T*>(x), static_cast<const T*>(residual), static_cast<T*>(y), n, scale);
  });
}

}  // namespace

const CpuKernels kernels = {&add, &activate_any, &activate_backward_any, &bias_backward_any,
                            &row_any};

}  // namespace fusereg::fused_dropout::FUSEREG_ISA
