// For the CPU kernels alone, once per instruction set: how a tile's elements become lines and
// strips, and the loops over a strip from which the kernels are put together.
#pragma once

#include "batch_norm/batch_norm.h"
#include "core/activation.h"
#include "core/draw_simd.h"

namespace fusereg::batch_norm::FUSEREG_ISA {
namespace {

using namespace ::fusereg::FUSEREG_ISA;

constexpr int kLanes = 32;
constexpr int kRun = 16;              // float32 terms that are added before they go to float64
constexpr std::int64_t kStrip = 512;  // elements
constexpr std::int64_t kPad = 64;     // a vector may be read from any element of a strip

template <class C>
constexpr int kVectors = kLanes / kWidth<C>;
template <class C>
using Word = typename MaskType<C>::type;

FUSEREG_INLINE std::int64_t padded(std::int64_t n) { return (n + kLanes - 1) / kLanes * kLanes; }

// A strip's elements as numbers of the type that computes, or a mask's words.
template <class C>
struct Buffer {
  alignas(64) C at[kStrip + kPad];
};

template <class C>
struct Block {
  Vector<C> v[kVectors<C>];
};

#define FUSEREG_EACH_VECTOR(v) _Pragma("GCC unroll 16") for (int v = 0; v < kVectors<C>; ++v)

// 1 / keep
template <class C>
C scale_of(const Epilogue& e) {
  return static_cast<C>(e.dropout && e.draw.keep > 0.0 ? 1.0 / e.draw.keep : 0.0);
}

// --- coefficients ---

// A tile's, as numbers of the type that computes; each array may be read past its end.
template <class C, std::int64_t kColumns = kMaxColumns>
struct Numbers {
  C m[kColumns + kPad], a[kColumns + kPad], b[kColumns + kPad];
  C q[kColumns + kPad], r[kColumns + kPad];
};

// How a tile's elements become lines. Short lines would cost more for themselves than for their
// elements, so several are taken as one, whose columns have the coefficients of their channels over
// and over: a few rows of channels (inner = 1), or a row's lines of several channels.
struct Fold {
  bool columns = false;    // whether each column has coefficients and sums of its own
  std::int64_t rows = 1;   // of o in a line
  std::int64_t width = 1;  // columns
  std::int64_t inner = 1;  // columns in a row that are of one channel

  Fold(const Layout& l, const Tile& t, const std::uint8_t* mask, const std::uint8_t* bits) {
    columns = l.inner <= kMaxFolded;
    if (!columns) return;
    inner = l.inner;
    width = t.channels * inner;
    const bool whole_bytes = bits == nullptr || l.channels % 8 == 0;
    if (inner == 1 && mask == nullptr && t.channels == l.channels && whole_bytes) {
      rows = kMaxColumns / width;
      if (rows > t.rows) rows = t.rows;
      width *= rows;
    }
  }

  // For the plain kernels, which walk down so many columns at a time: no more rows than that takes.
  Fold(const Layout& l, const Tile& t, std::int64_t at_least, const std::uint8_t* bits)
      : columns(true), width(t.channels * l.inner), inner(l.inner) {
    if (inner > 1 || t.channels != l.channels || (bits != nullptr && l.channels % 8 != 0)) return;
    while (width < at_least && 2 * rows <= t.rows) {
      rows *= 2;
      width *= 2;
    }
  }
};

template <class C>
void convert(C* to, const double* from, std::int64_t channels, const Fold& fold) {
  if (fold.inner == 1) {
    for (std::int64_t i = 0; i < channels; ++i) to[i] = static_cast<C>(from[i]);
    for (std::int64_t r = 1; r < fold.rows; ++r)
      memcpy(to + r * channels, to, static_cast<std::size_t>(channels) * sizeof(C));
  } else {
    const std::int64_t inner = fold.columns ? fold.inner : 1;
    for (std::int64_t c = 0; c < channels; ++c) {
      const C value = static_cast<C>(from[c]);
      for (std::int64_t i = 0; i < inner; ++i) to[c * inner + i] = value;
    }
  }
  memset(to + (fold.columns ? fold.width : channels), 0, kPad * sizeof(C));
}

// m alone, or also a and b, or also q and r.
enum class Which { kM, kAffine, kGradient };

template <class C, std::int64_t kColumns>
void convert(Numbers<C, kColumns>& k, const Coefficients& from, std::int64_t n, const Fold& fold,
             Which which) {
  convert(k.m, from.m, n, fold);
  if (which == Which::kM) return;
  convert(k.a, from.a, n, fold);
  convert(k.b, from.b, n, fold);
  if (which == Which::kGradient) {
    convert(k.q, from.q, n, fold);
    convert(k.r, from.r, n, fold);
  }
}

// --- masks ---

// Where the activation passes the gradient on whole, as in torch: a ReLU where not z <= 0, so that a
// NaN does; a leaky ReLU where z > 0.
template <bool kRelu, class C>
FUSEREG_INLINE auto passes(Vector<C> z) {
  if constexpr (kRelu) return ~(z <= Vector<C>{});
  if constexpr (!kRelu) return z > Vector<C>{};
}
template <bool kRelu>
FUSEREG_INLINE std::uint32_t passing_bits(Vector<float> z) {
#if defined(__AVX512F__)
  return _mm512_cmp_ps_mask(z, Vector<float>{}, kRelu ? _CMP_NLE_UQ : _CMP_GT_OQ);
#elif defined(__AVX2__)
  return static_cast<std::uint32_t>(_mm256_movemask_ps(bit_cast<__m256>(passes<kRelu, float>(z))));
#elif defined(__SSE2__)
  return static_cast<std::uint32_t>(_mm_movemask_ps(bit_cast<__m128>(passes<kRelu, float>(z))));
#elif defined(__aarch64__)
  return bits_of(bit_cast<uint32x4_t>(passes<kRelu, float>(z)));
#else
  std::uint32_t bits = 0;
  const auto mask = passes<kRelu, float>(z);
  for (int i = 0; i < kWidth<float>; ++i) bits |= static_cast<std::uint32_t>(mask[i] != 0) << i;
  return bits;
#endif
}
template <bool kRelu>
FUSEREG_INLINE std::uint32_t passing_bits(Vector<double> z) {
#if defined(__AVX512F__)
  return _mm512_cmp_pd_mask(z, Vector<double>{}, kRelu ? _CMP_NLE_UQ : _CMP_GT_OQ);
#elif defined(__AVX2__)
  return static_cast<std::uint32_t>(
      _mm256_movemask_pd(bit_cast<__m256d>(passes<kRelu, double>(z))));
#elif defined(__SSE2__)
  return static_cast<std::uint32_t>(_mm_movemask_pd(bit_cast<__m128d>(passes<kRelu, double>(z))));
#elif defined(__aarch64__)
  return bits_of(bit_cast<uint64x2_t>(passes<kRelu, double>(z)));
#else
  std::uint32_t bits = 0;
  const auto mask = passes<kRelu, double>(z);
  for (int i = 0; i < kWidth<double>; ++i) bits |= static_cast<std::uint32_t>(mask[i] != 0) << i;
  return bits;
#endif
}

// All ones in the lanes whose bit is set.
template <class C>
FUSEREG_INLINE MaskVector<C> mask_of_bits(std::uint32_t bits) {
#if defined(__AVX512F__)
  if constexpr (sizeof(C) == 4) {
    return bit_cast<MaskVector<C>>(_mm512_movm_epi32(static_cast<__mmask16>(bits)));
  } else {
    return bit_cast<MaskVector<C>>(_mm512_movm_epi64(static_cast<__mmask8>(bits)));
  }
#else
  MaskVector<C> lane{};
  for (int i = 0; i < kWidth<C>; ++i) lane[i] = Word<C>(1) << i;
  return ((MaskVector<C>{} + static_cast<Word<C>>(bits)) & lane) == lane;
#endif
}

template <class C>
FUSEREG_INLINE Vector<C> masked(Vector<C> v, MaskVector<C> mask) {
  return bit_cast<Vector<C>>(bit_cast<MaskVector<C>>(v) & mask);
}
template <class C>
FUSEREG_INLINE Vector<C> select(MaskVector<C> mask, Vector<C> yes, Vector<C> no) {
  return bit_cast<Vector<C>>((bit_cast<MaskVector<C>>(yes) & mask) |
                             (bit_cast<MaskVector<C>>(no) & ~mask));
}

template <class C>
FUSEREG_INLINE MaskVector<C> load_words(const Word<C>* words) {
  MaskVector<C> mask;
  memcpy(&mask, words, sizeof(mask));
  return mask;
}

// Makes words of ones or zeros for the elements of a strip: which ones dropout keeps.
template <class C>
class Keeper {
 public:
  Keeper(const Epilogue& e, bool dropout)
      : draw_(e.draw),
        index_offset_(e.index_offset),
        low_(dropout ? e.random.low() : 0),
        keys_(dropout ? e.random.key() : 0) {
    if (dropout) memset(buffer_, 0, sizeof(buffer_));
  }

  // Of n <= kStrip elements from element `at` of memory on; valid until the next call.
  const Word<C>* words(std::int64_t at, std::int64_t n) {
    const std::uint64_t index = index_offset_ + static_cast<std::uint64_t>(at);
    std::int64_t skip = 0;
    dispatch_bits(draw_, [&](auto bits) { skip = fill<decltype(bits)::value>(index, n); });
    return buffer_ + skip;
  }

 private:
  // Returns where the first word is.
  template <int kBits>
  std::int64_t fill(std::uint64_t index, std::int64_t n) {
    constexpr int kHalf = kBlock<kBits> / 2;
    constexpr auto kSize = static_cast<std::uint64_t>(kBlock<kBits>);
    const DrawVector<kBits> threshold =
        DrawVector<kBits>{} + static_cast<typename DrawType<kBits>::type>(draw_.threshold);
    MaskDraws<kBits> mask_draws(keys_, low_, draw_);
    std::uint64_t block = index / kSize;
    const auto skip = static_cast<std::int64_t>(index % kSize);
    for (std::int64_t at = 0; at < skip + n; at += kBlock<kBits>, ++block) {
      U64Vector draws[2];
      mask_draws.make(block, draws);
      for (int half = 0; half < 2; ++half) {
        const auto masks = Masks<C, kBits>::make(draws[half], threshold);
        for (int i = 0; i < Masks<C, kBits>::kParts; ++i) {
#if defined(__AVX512F__)
          const MaskVector<C> part = mask_of_bits<C>(masks.part(i));
#else
          const MaskVector<C> part = masks.part(i);
#endif
          memcpy(buffer_ + at + half * kHalf + i * kWidth<C>, &part, sizeof(part));
        }
      }
    }
    return skip;
  }

  Draw draw_;
  std::uint64_t index_offset_;
  std::uint64_t low_;
  MaskKeys keys_;
  Word<C> buffer_[kStrip + 2 * kBlock<16> + kPad];
};

// Words of a mask's n bytes.
template <class C>
void words_of_bytes(Word<C>* words, const std::uint8_t* bytes, std::int64_t n) {
  for (std::int64_t i = 0; i < n; ++i) words[i] = -static_cast<Word<C>>(bytes[i] != 0);
  memset(words + n, 0, static_cast<std::size_t>(padded(n) - n) * sizeof(Word<C>));
}

// --- lines ---

// Where the elements of a line, or of a strip of one, are.
struct Line {
  std::int64_t at;  // element of memory
  std::int64_t n;
  std::int64_t column;       // of the first element: its channel in the tile (Columns)
  std::int64_t bits;         // byte
  const std::uint8_t* mask;  // one byte an element, or null
};

// Calls on_line(line, channel in the tile) for each line of the tile; reverse: the last rows first.
// on_masked_row(line): a line of which the mask says that it counts for nothing.
template <class OnLine, class OnMaskedRow>
FUSEREG_INLINE void for_each_line(const Layout& l, const std::uint8_t* mask, const Tile& t,
                                  const Fold& fold, bool reverse, OnLine on_line,
                                  OnMaskedRow on_masked_row) {
  constexpr std::int64_t kBand = 16;
  const std::int64_t band_rows = kBand * fold.rows;
  const std::int64_t bands = (t.rows + band_rows - 1) / band_rows;
  const std::int64_t bit_line = l.inner == 1 ? (l.channels + 7) / 8 : (l.inner + 7) / 8;
  for (std::int64_t band = 0; band < bands; ++band) {
    const std::int64_t from = (reverse ? bands - 1 - band : band) * band_rows;
    const std::int64_t to = from + band_rows < t.rows ? from + band_rows : t.rows;
    for (std::int64_t row = t.row + from; row < t.row + to; row += fold.rows) {
      const std::int64_t first = row * l.channels + t.channel;
      if (l.inner == 1) {
        const std::int64_t left = t.row + to - row;
        const std::int64_t n = left < fold.rows ? left * t.channels : fold.width;
        const Line line{first, n, 0, row * bit_line + t.channel / 8, nullptr};
        if (mask != nullptr && mask[row] == 0) {
          on_masked_row(line);
        } else {
          on_line(line, 0);
        }
        continue;
      }
      const std::uint8_t* const row_mask = mask == nullptr ? nullptr : mask + row * l.inner;
      if (fold.columns) {
        on_line(Line{first * l.inner, fold.width, 0, first * bit_line, row_mask}, 0);
        continue;
      }
      for (std::int64_t c = 0; c < t.channels; ++c) {
        on_line(Line{(first + c) * l.inner, l.inner, 0, (first + c) * bit_line, row_mask}, c);
      }
    }
  }
}

template <class K>
constexpr const K* none() {
  return nullptr;
}
template <class K>
struct PlainOf;
template <class K>
struct PlainOf<const K&> {
  using type = K;
};
template <class K>
using Plain = typename PlainOf<K>::type;

// --- strips ---

// The strip's elements as numbers C: where they lie, if these are whole blocks, or in the buffer,
// padded to such with m, so that what is past the end adds nothing to a sum (k null: with zeros).
template <class T, class K>
const Compute<T>* widen(const T* from, std::int64_t n, Buffer<Compute<T>>& buffer, const K* k) {
  using C = Compute<T>;
  constexpr int kW = kWidth<C>;
  if constexpr (sizeof(T) == sizeof(C)) {
    if (n % kLanes == 0) return from;
  }
  std::int64_t i = 0;
  for (; i + kW <= n; i += kW) store(buffer.at + i, load(from + i));
  if (i < n) store(buffer.at + i, load_partial(from + i, n - i));
  for (i = n; i < padded(n); ++i) buffer.at[i] = k == nullptr ? C(0) : k->m_[K::kOne ? 0 : i];
  return buffer.at;
}

// Where a strip's results are made: in place, if that will do.
template <class T>
Compute<T>* target(T* to, std::int64_t n, Buffer<Compute<T>>& buffer) {
  if constexpr (sizeof(T) == sizeof(Compute<T>)) {
    if (n % kLanes == 0) return to;
  }
  (void)to;
  (void)n;
  return buffer.at;
}

template <class T>
void narrow(T* to, const Compute<T>* from, std::int64_t n) {
  constexpr int kW = kWidth<Compute<T>>;
  if (static_cast<const void*>(to) == from) return;
  std::int64_t i = 0;
  for (; i + kW <= n; i += kW) store(to + i, load(from + i));
  if (i < n) store_partial(to + i, load(from + i), n - i);
}

// One channel's coefficients for all elements of a strip, or a channel for each element.
template <class C>
struct Same {
  static constexpr bool kOne = true;
  const C* m_;
  const C* a_;
  const C* b_;
  const C* q_;
  const C* r_;
  Same(const Numbers<C>& k, std::int64_t c)
      : m_(k.m + c), a_(k.a + c), b_(k.b + c), q_(k.q + c), r_(k.r + c) {}
  FUSEREG_ALWAYS_INLINE Vector<C> get(const C* p, std::int64_t) const { return broadcast(*p); }
};
template <class C>
struct Columns {
  static constexpr bool kOne = false;
  const C* m_;
  const C* a_;
  const C* b_;
  const C* q_;
  const C* r_;
  Columns(const Numbers<C>& k, std::int64_t c)
      : m_(k.m + c), a_(k.a + c), b_(k.b + c), q_(k.q + c), r_(k.r + c) {}
  FUSEREG_ALWAYS_INLINE Vector<C> get(const C* p, std::int64_t i) const { return load(p + i); }
};

// Where the mask has no ones: m (k null: zero).
template <class C, class K>
const C* blank(const C* x, const Word<C>* words, std::int64_t n, Buffer<C>& buffer, const K* k) {
  for (std::int64_t i = 0; i < n; i += kWidth<C>) {
    const Vector<C> value = k == nullptr ? Vector<C>{} : k->get(k->m_, i);
    store(buffer.at + i, select<C>(load_words<C>(words + i), load(x + i), value));
  }
  return buffer.at;
}

// Coefficient p at element i; for Same, what was loaded before the loop.
#define FUSEREG_AT(p, i) (K::kOne ? p##0 : k.get(k.p##_, i))

// z = (x - m) * a + b (+ residual), and max(z, 0) if asked for.
template <bool kRelu, bool kResidual, class C, class K>
void affine(C* z, const C* x, const C* residual, std::int64_t n, const K k) {
  const Vector<C> m0 = k.get(k.m_, 0), a0 = k.get(k.a_, 0), b0 = k.get(k.b_, 0);
  const Vector<C> zero{};
  for (std::int64_t i = 0; i < n; i += kWidth<C>) {
    Vector<C> v = (load(x + i) - FUSEREG_AT(m, i)) * FUSEREG_AT(a, i) + FUSEREG_AT(b, i);
    if (kResidual) v += load(residual + i);
    if (kRelu) v = v < zero ? zero : v;
    store(z + i, v);
  }
}
template <class C, class K>
void affine(C* z, const C* x, const C* residual, std::int64_t n, const K& k, bool relu) {
  if (residual == nullptr) {
    relu ? affine<true, false>(z, x, residual, n, k) : affine<false, false>(z, x, residual, n, k);
  } else {
    relu ? affine<true, true>(z, x, residual, n, k) : affine<false, true>(z, x, residual, n, k);
  }
}

template <class C>
void activate(C* z, std::int64_t n, Activation activation, C slope) {
  const Vector<C> zero{};
  for (std::int64_t i = 0; i < n; i += kWidth<C>) {
    const Vector<C> v = load(z + i);
    switch (activation) {
      case Activation::kNone:
        return;
      case Activation::kRelu:
        store(z + i, v < zero ? zero : v);
        break;
      case Activation::kLeakyRelu:
        store(z + i, v < zero ? v * slope : v);
        break;
      case Activation::kSilu:
        store(z + i, silu(v));
        break;
      case Activation::kGelu:
        store(z + i, gelu(v));
        break;
    }
  }
}

// A block of n < kLanes elements, of which whole vectors can be read: p itself if so many are there.
template <class C>
FUSEREG_INLINE const C* last_block(const C* p, std::int64_t n, std::int64_t there, C* copy) {
  if (there >= kLanes) return p;
  memset(copy, 0, kLanes * sizeof(C));
  memcpy(copy, p, static_cast<std::size_t>(n) * sizeof(C));
  return copy;
}

// `there`: how many elements can be read from z on, n at least: a line of bits may end where the
// tensor does.
template <bool kRelu, class C>
void write_bits(std::uint8_t* to, const C* z, std::int64_t n, std::int64_t there) {
  C copy[kLanes];
  for (std::int64_t i = 0; i < n; i += kLanes) {
    std::uint32_t bits = 0;
    const C* const from = n - i >= kLanes ? z + i : last_block(z + i, n - i, there - i, copy);
    FUSEREG_EACH_VECTOR(v) {
      bits |= passing_bits<kRelu>(load(from + v * kWidth<C>)) << (v * kWidth<C>);
    }
    if (n - i >= kLanes) {
      memcpy(to + i / 8, &bits, sizeof(bits));
      continue;
    }
    bits &= (1u << (n - i)) - 1u;
    for (std::int64_t j = i; j < n; j += 8) to[j / 8] = static_cast<std::uint8_t>(bits >> (j - i));
  }
}

// z *= scale where the words are ones, else 0.
template <class C>
void keep(C* z, const C* from, std::int64_t n, const Word<C>* words, C scale) {
  for (std::int64_t i = 0; i < n; i += kWidth<C>) {
    store(z + i, masked<C>(load(from + i) * scale, load_words<C>(words + i)));
  }
}

// dz = g where the bit is set, else g * slope (ReLU: 0). `there`: as for write_bits, from g on.
template <class C>
void rectify_by_bits(C* dz, const C* g, std::int64_t n, std::int64_t there,
                     const std::uint8_t* from, bool relu, C slope) {
  C copy[kLanes];
  for (std::int64_t i = 0; i < n; i += kLanes) {
    std::uint32_t bits = 0;
    const C* const block = n - i >= kLanes ? g + i : last_block(g + i, n - i, there - i, copy);
    if (n - i >= kLanes) {
      memcpy(&bits, from + i / 8, sizeof(bits));
    } else {
      for (std::int64_t j = i; j < n; j += 8)
        bits |= static_cast<std::uint32_t>(from[j / 8]) << (j - i);
    }
    FUSEREG_EACH_VECTOR(v) {
      const std::int64_t at = i + v * kWidth<C>;
      const MaskVector<C> positive = mask_of_bits<C>(bits >> (v * kWidth<C>));
      const Vector<C> d = load(block + v * kWidth<C>);
      store(dz + at, relu ? masked<C>(d, positive) : select<C>(positive, d, d * slope));
    }
  }
}

// dz = g * activation'(z), z made again from x and the residual.
template <bool kRelu, class C, class K>
void rectify(C* dz, const C* g, const C* x, const C* residual, std::int64_t n, const K k, C slope) {
  const Vector<C> m0 = k.get(k.m_, 0), a0 = k.get(k.a_, 0), b0 = k.get(k.b_, 0);
  const Vector<C> zero{};
  for (std::int64_t i = 0; i < n; i += kWidth<C>) {
    Vector<C> z = (load(x + i) - FUSEREG_AT(m, i)) * FUSEREG_AT(a, i) + FUSEREG_AT(b, i);
    if (residual != nullptr) z += load(residual + i);
    const Vector<C> d = load(g + i);
    store(dz + i, passes<kRelu, C>(z) ? d : kRelu ? zero : d * slope);
  }
}
// From y = activation(z) alone: z, and dz = g * activation'(z). No activation is a slope of 1.
template <class C>
void invert(C* z, C* dz, const C* y, const C* g, std::int64_t n, C slope) {
  const Vector<C> zero{};
  const C inverse = C(1) / slope;
  for (std::int64_t i = 0; i < n; i += kWidth<C>) {
    const Vector<C> v = load(y + i);
    const Vector<C> d = load(g + i);
    store(z + i, v > zero ? v : v * inverse);
    store(dz + i, v > zero ? d : d * slope);
  }
}
template <class C>
void multiply_by_derivative(C* dz, const C* g, const C* z, std::int64_t n, Activation activation) {
  for (std::int64_t i = 0; i < n; i += kWidth<C>) {
    const Vector<C> v = load(z + i);
    const Vector<C> d = load(g + i);
    store(dz + i, d * (activation == Activation::kSilu ? silu_derivative(v) : gelu_derivative(v)));
  }
}

// grad_x = a * dz + q * (x - m) + r
template <class C, class K>
void gradient(C* to, const C* dz, const C* x, std::int64_t n, const K k) {
  const Vector<C> m0 = k.get(k.m_, 0), a0 = k.get(k.a_, 0), q0 = k.get(k.q_, 0),
                  r0 = k.get(k.r_, 0);
  for (std::int64_t i = 0; i < n; i += kWidth<C>) {
    store(to + i, FUSEREG_AT(a, i) * load(dz + i) +
                      FUSEREG_AT(q, i) * (load(x + i) - FUSEREG_AT(m, i)) + FUSEREG_AT(r, i));
  }
}

#undef FUSEREG_AT

}  // namespace
}  // namespace fusereg::batch_norm::FUSEREG_ISA
