// CPU kernels of batch normalization; compiled once per instruction set. Contract: batch_norm.h.
//
// A tile is walked line by line: a line is the inner elements of one (o, c), whose coefficients are
// the same for all of them (Same), or with inner = 1 the channels of one o, each with its own
// (Columns). A line is cut into strips, which stay in the first-level cache from one loop over them
// to the next: so each step of an epilogue is a loop of its own, and there is one for each step
// rather than one for each combination of them. Strips are padded to whole blocks of kLanes.
//
// Sums along a line are kept in kLanes columns, element i of a strip in column i % kLanes, whatever
// the vector width: so every instruction set adds the same numbers in the same order and gives the
// same bits.
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

// --- coefficients ---------------------------------------------------------------------------------

// A tile's, as numbers of the type that computes; each array may be read past its end.
template <class C>
struct Numbers {
  C m[kMaxColumns + kPad], a[kMaxColumns + kPad], b[kMaxColumns + kPad];
  C q[kMaxColumns + kPad], r[kMaxColumns + kPad];
};

// How a tile's elements become lines. Short lines would cost more for themselves than for their
// elements, so several are taken as one, whose columns have the coefficients of their channels over
// and over: a few rows of channels (inner = 1), or a row's lines of several channels.
struct Fold {
  bool columns = false;      // whether each column has coefficients and sums of its own
  std::int64_t rows = 1;     // of o in a line
  std::int64_t width = 1;    // columns
  std::int64_t inner = 1;    // columns in a row that are of one channel

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

template <class C>
void convert(Numbers<C>& k, const Coefficients& from, std::int64_t n, const Fold& fold,
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

// --- masks ----------------------------------------------------------------------------------------

FUSEREG_INLINE std::uint32_t positive_bits(Vector<float> z) {
#if defined(__AVX512F__)
  return _mm512_cmp_ps_mask(z, Vector<float>{}, _CMP_GT_OQ);
#elif defined(__AVX2__)
  return static_cast<std::uint32_t>(_mm256_movemask_ps(bit_cast<__m256>(z > Vector<float>{})));
#elif defined(__SSE2__)
  return static_cast<std::uint32_t>(_mm_movemask_ps(bit_cast<__m128>(z > Vector<float>{})));
#else
  std::uint32_t bits = 0;
  for (int i = 0; i < kWidth<float>; ++i) bits |= static_cast<std::uint32_t>(z[i] > 0) << i;
  return bits;
#endif
}
FUSEREG_INLINE std::uint32_t positive_bits(Vector<double> z) {
#if defined(__AVX512F__)
  return _mm512_cmp_pd_mask(z, Vector<double>{}, _CMP_GT_OQ);
#elif defined(__AVX2__)
  return static_cast<std::uint32_t>(_mm256_movemask_pd(bit_cast<__m256d>(z > Vector<double>{})));
#elif defined(__SSE2__)
  return static_cast<std::uint32_t>(_mm_movemask_pd(bit_cast<__m128d>(z > Vector<double>{})));
#else
  std::uint32_t bits = 0;
  for (int i = 0; i < kWidth<double>; ++i) bits |= static_cast<std::uint32_t>(z[i] > 0) << i;
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
    return buffer_ + (draw_.bits == 16 ? fill<16>(index, n) : fill<32>(index, n));
  }

 private:
  // Returns where the first word is.
  template <int kBits>
  std::int64_t fill(std::uint64_t index, std::int64_t n) {
    constexpr int kHalf = kBlock<kBits> / 2;
    constexpr auto kSize = static_cast<std::uint64_t>(kBlock<kBits>);
    const DrawVector<kBits> threshold =
        DrawVector<kBits>{} + static_cast<typename DrawType<kBits>::type>(draw_.threshold);
    std::uint64_t block = index / kSize;
    const auto skip = static_cast<std::int64_t>(index % kSize);
    for (std::int64_t at = 0; at < skip + n; at += kBlock<kBits>, ++block) {
      U64Vector draws[2];
      philox_chunks(keys_, low_, block * kPhiloxChunks, draws);
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
  PhiloxKeys keys_;
  Word<C> buffer_[kStrip + 2 * kBlock<16> + kPad];
};

// Words of a mask's n bytes.
template <class C>
void words_of_bytes(Word<C>* words, const std::uint8_t* bytes, std::int64_t n) {
  for (std::int64_t i = 0; i < n; ++i) words[i] = -static_cast<Word<C>>(bytes[i] != 0);
  memset(words + n, 0, static_cast<std::size_t>(padded(n) - n) * sizeof(Word<C>));
}

// --- lines ----------------------------------------------------------------------------------------

// Where the elements of a line, or of a strip of one, are.
struct Line {
  std::int64_t at;               // element of memory
  std::int64_t n;
  std::int64_t column;           // of the first element: its channel in the tile (Columns)
  std::int64_t bits;             // byte
  const std::uint8_t* mask;      // one byte an element, or null
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

// --- strips ---------------------------------------------------------------------------------------

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

template <class C>
void write_bits(std::uint8_t* to, const C* z, std::int64_t n) {
  for (std::int64_t i = 0; i < n; i += kLanes) {
    std::uint32_t bits = 0;
    FUSEREG_EACH_VECTOR(v) bits |= positive_bits(load(z + i + v * kWidth<C>)) << (v * kWidth<C>);
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

// dz = g where the sign bit is set, else g * slope (ReLU: 0).
template <class C>
void rectify_by_bits(C* dz, const C* g, std::int64_t n, const std::uint8_t* from, bool relu,
                     C slope) {
  for (std::int64_t i = 0; i < n; i += kLanes) {
    std::uint32_t bits = 0;
    if (n - i >= kLanes) {
      memcpy(&bits, from + i / 8, sizeof(bits));
    } else {
      for (std::int64_t j = i; j < n; j += 8)
        bits |= static_cast<std::uint32_t>(from[j / 8]) << (j - i);
    }
    FUSEREG_EACH_VECTOR(v) {
      const std::int64_t at = i + v * kWidth<C>;
      const MaskVector<C> positive = mask_of_bits<C>(bits >> (v * kWidth<C>));
      const Vector<C> d = load(g + at);
      store(dz + at, relu ? masked<C>(d, positive) : select<C>(positive, d, d * slope));
    }
  }
}

// dz = g * activation'(z), z made again from x and the residual.
template <bool kRelu, class C, class K>
void rectify(C* dz, const C* g, const C* x, const C* residual, std::int64_t n, const K k,
             C slope) {
  const Vector<C> m0 = k.get(k.m_, 0), a0 = k.get(k.a_, 0), b0 = k.get(k.b_, 0);
  const Vector<C> zero{};
  for (std::int64_t i = 0; i < n; i += kWidth<C>) {
    Vector<C> z = (load(x + i) - FUSEREG_AT(m, i)) * FUSEREG_AT(a, i) + FUSEREG_AT(b, i);
    if (residual != nullptr) z += load(residual + i);
    const Vector<C> d = load(g + i);
    store(dz + i, z > zero ? d : kRelu ? zero : d * slope);
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

// --- sums -----------------------------------------------------------------------------------------

// Of one channel whose elements lie in lines: a sum for each lane.
template <class C>
struct LaneSums {
  static constexpr int kWide = static_cast<int>(sizeof(double) / sizeof(C));
  Block<C> first, second;
  Vector<double> wide_first[kVectors<C>][kWide];
  Vector<double> wide_second[kVectors<C>][kWide];
  int terms;
};

template <class C>
FUSEREG_INLINE void flush(LaneSums<C>& sums, Block<C>& first, Block<C>& second) {
  FUSEREG_EACH_VECTOR(v) {
    add_widened(first.v[v], sums.wide_first[v]);
    add_widened(second.v[v], sums.wide_second[v]);
    first.v[v] = second.v[v] = Vector<C>{};
  }
}

// Lane i and lane i + width, until one is left.
template <int kN, int kWide>
FUSEREG_INLINE double add_lanes(const Vector<double> (&sums)[kN][kWide]) {
  double lanes[kLanes];
  static_assert(sizeof(lanes) == sizeof(sums), "one sum a lane");
  memcpy(lanes, sums, sizeof(lanes));
  for (int i = 0; i < 16; ++i) lanes[i] += lanes[i + 16];
  for (int i = 0; i < 8; ++i) lanes[i] += lanes[i + 8];
  for (int i = 0; i < 4; ++i) lanes[i] += lanes[i + 4];
  return (lanes[0] + lanes[2]) + (lanes[1] + lanes[3]);
}

// Of the channels of a tile whose rows are lines: a sum for each column.
template <class C>
struct ColumnSums {
  C first[kMaxColumns + kPad], second[kMaxColumns + kPad];
  double wide_first[kMaxColumns], wide_second[kMaxColumns];
  int terms;
  void clear(std::int64_t n) {
    terms = 0;
    const auto count = static_cast<std::size_t>(n);
    memset(first, 0, (count + kPad) * sizeof(C));
    memset(second, 0, (count + kPad) * sizeof(C));
    memset(wide_first, 0, count * sizeof(double));
    memset(wide_second, 0, count * sizeof(double));
  }
  void flush(std::int64_t n) {
    for (std::int64_t i = 0; i < n; ++i) {
      wide_first[i] += static_cast<double>(first[i]);
      wide_second[i] += static_cast<double>(second[i]);
      first[i] = second[i] = C(0);
    }
    terms = 0;
  }
};

// What is added for an element: d and d^2 (dz null), or dz and dz * d; d = x - m.
template <bool kMoments, class C>
void add_line(LaneSums<C>& total, const C* x, const C* dz, C m, std::int64_t n) {
  const Vector<C> m0 = broadcast(m);
  // Copies, so that they stay in registers.
  Block<C> first = total.first;
  Block<C> second = total.second;
  int count = total.terms;
  for (std::int64_t i = 0; i < n;) {
    const std::int64_t there = (n - i) / kLanes;
    const std::int64_t blocks = there < kRun - count ? there : kRun - count;
    for (std::int64_t b = 0; b < blocks; ++b, i += kLanes) {
      FUSEREG_EACH_VECTOR(v) {
        const Vector<C> d = load(x + i + v * kWidth<C>) - m0;
        const Vector<C> one = kMoments ? d : load(dz + i + v * kWidth<C>);
        first.v[v] += one;
        second.v[v] += one * d;
      }
    }
    count += static_cast<int>(blocks);
    if (count == kRun) {
      flush(total, first, second);
      count = 0;
    }
  }
  total.first = first;
  total.second = second;
  total.terms = count;
}

template <bool kMoments, class C>
void add_row(ColumnSums<C>& total, const C* x, const C* dz, const C* m, std::int64_t n) {
  C* const first = total.first;
  C* const second = total.second;
  for (std::int64_t i = 0; i < n; i += kWidth<C>) {
    const Vector<C> d = load(x + i) - load(m + i);
    const Vector<C> one = kMoments ? d : load(dz + i);
    store(first + i, load(first + i) + one);
    store(second + i, load(second + i) + one * d);
  }
}

// Both kinds of sums, for one tile.
template <class C>
class TileSums {
 public:
  TileSums(const Tile& tile, const Fold& fold) : fold_(fold), channels_(tile.channels) {
    if (fold.columns) {
      columns_.clear(fold.width);
    } else {
      memset(static_cast<void*>(lines_), 0,
             static_cast<std::size_t>(tile.channels) * sizeof(LaneSums<C>));
    }
  }

  template <bool kMoments>
  void add(const Same<C>& k, std::int64_t channel, const C* x, const C* dz, std::int64_t n) {
    add_line<kMoments>(lines_[channel], x, dz, *k.m_, n);
  }
  template <bool kMoments>
  void add(const Columns<C>& k, std::int64_t, const C* x, const C* dz, std::int64_t n) {
    add_row<kMoments>(columns_, x, dz, k.m_, n);
  }
  void row_done() {
    if (++columns_.terms == kRun) columns_.flush(fold_.width);
  }
  void add_to(Sums sums) {
    if (fold_.columns) columns_.flush(fold_.width);
    for (std::int64_t c = 0; c < channels_; ++c) {
      double first = 0.0;
      double second = 0.0;
      if (fold_.columns) {
        // Four at a time, for one addition would wait for the other.
        double part[2][4] = {};
        for (std::int64_t r = 0; r < fold_.rows; ++r) {
          for (std::int64_t i = 0; i < fold_.inner; ++i) {
            const std::int64_t column = (r * channels_ + c) * fold_.inner + i;
            part[0][(r + i) % 4] += columns_.wide_first[column];
            part[1][(r + i) % 4] += columns_.wide_second[column];
          }
        }
        first = (part[0][0] + part[0][1]) + (part[0][2] + part[0][3]);
        second = (part[1][0] + part[1][1]) + (part[1][2] + part[1][3]);
      } else {
        LaneSums<C>& total = lines_[c];
        flush(total, total.first, total.second);
        first = add_lanes(total.wide_first);
        second = add_lanes(total.wide_second);
      }
      sums.first[c] += first;
      sums.second[c] += second;
    }
  }

 private:
  const Fold& fold_;
  std::int64_t channels_;
  ColumnSums<C> columns_;
  LaneSums<C> lines_[kMaxLines];
};

// Calls on_strip(coefficients, strip, channel in the tile) for each strip of the tile.
template <class C, class OnStrip, class OnMaskedRow>
FUSEREG_INLINE void for_each_strip(const Layout& layout, const std::uint8_t* mask, const Tile& tile,
                                   const Fold& fold, bool reverse, const Numbers<C>& k,
                                   OnStrip& on_strip, OnMaskedRow on_masked_row) {
  auto on_line = [&](const Line& line, std::int64_t channel) {
    if (fold.columns) {
      on_strip(Columns<C>(k, 0), line, channel);
      return;
    }
    for (std::int64_t i = 0; i < line.n; i += kStrip) {
      const std::int64_t n = line.n - i < kStrip ? line.n - i : kStrip;
      on_strip(Same<C>(k, channel),
               Line{line.at + i, n, i, line.bits + i / 8,
                    line.mask == nullptr ? nullptr : line.mask + i},
               channel);
    }
  };
  for_each_line(layout, mask, tile, fold, reverse, on_line, on_masked_row);
}

// A strip's words of the mask.
template <class C>
void mask_words(Word<C>* words, const Line& strip, const Fold& fold) {
  const std::int64_t inner = fold.columns ? fold.inner : strip.n;
  for (std::int64_t i = 0; i < strip.n; i += inner) words_of_bytes<C>(words + i, strip.mask, inner);
}

// Calls f(byte of the strip's bits, element of the strip, elements) for each of its lines of bits.
template <class F>
FUSEREG_INLINE void for_each_bit_line(const Line& strip, const Fold& fold, F f) {
  if (!fold.columns || fold.inner == 1) {
    f(strip.bits, std::int64_t{0}, strip.n);
    return;
  }
  const std::int64_t bytes = (fold.inner + 7) / 8;
  for (std::int64_t i = 0, at = strip.bits; i < strip.n; i += fold.inner, at += bytes)
    f(at, i, fold.inner);
}

// --- forward --------------------------------------------------------------------------------------

template <class T>
void moments(const Forward& job, const Tile& tile, const Coefficients& coefficients, Sums sums) {
  using C = Compute<T>;
  const T* const x = static_cast<const T*>(job.x);
  Numbers<C> k;
  const Fold fold(job.layout, tile, job.mask, nullptr);
  convert(k, coefficients, tile.channels, fold, Which::kM);
  TileSums<C> total(tile, fold);
  Buffer<C> buffer;
  Buffer<Word<C>> mask;
  auto on_strip = [&](const auto& co, const Line& strip, std::int64_t channel) {
    const C* from = widen(x + strip.at, strip.n, buffer, &co);
    if (strip.mask != nullptr) {
      mask_words<C>(mask.at, strip, fold);
      from = blank<C>(from, mask.at, padded(strip.n), buffer, &co);
    }
    total.template add<true>(co, channel, from, nullptr, padded(strip.n));
    if (fold.columns) total.row_done();
  };
  for_each_strip<C>(job.layout, job.mask, tile, fold, false, k, on_strip, [](const Line&) {});
  total.add_to(sums);
}

template <class T>
void forward(const Forward& job, const Tile& tile, const Coefficients& coefficients) {
  using C = Compute<T>;
  const T* const x = static_cast<const T*>(job.x);
  const T* const residual = static_cast<const T*>(job.residual);
  T* const y = static_cast<T*>(job.y);
  const Epilogue& e = job.epilogue;
  const bool relu = e.activation == Activation::kRelu && job.bits == nullptr;
  const C slope = static_cast<C>(e.slope);
  const C scale = scale_of<C>(e);
  Numbers<C> k;
  const Fold fold(job.layout, tile, job.mask, job.bits);
  convert(k, coefficients, tile.channels, fold, Which::kAffine);
  Keeper<C> keeper(e, e.dropout);
  Buffer<C> x_buffer, residual_buffer, y_buffer;
  Buffer<Word<C>> mask;
  auto on_strip = [&](const auto& co, const Line& strip, std::int64_t) {
    using K = Plain<decltype(co)>;
    const std::int64_t n = padded(strip.n);
    const C* const from = widen(x + strip.at, strip.n, x_buffer, &co);
    const C* const more =
        residual == nullptr ? nullptr
                            : widen(residual + strip.at, strip.n, residual_buffer, none<K>());
    C* const z = target(y + strip.at, strip.n, y_buffer);
    affine<C>(z, from, more, n, co, relu);
    if (job.bits != nullptr) {
      for_each_bit_line(strip, fold, [&](std::int64_t byte, std::int64_t i, std::int64_t count) {
        write_bits<C>(job.bits + byte, z + i, count);
      });
    }
    if (!relu && e.activation != Activation::kNone) activate<C>(z, n, e.activation, slope);
    if (e.dropout) keep<C>(z, z, n, keeper.words(strip.at, strip.n), scale);
    if (strip.mask != nullptr) {
      mask_words<C>(mask.at, strip, fold);
      keep<C>(z, z, n, mask.at, C(1));
    }
    narrow(y + strip.at, z, strip.n);
  };
  for_each_strip<C>(job.layout, job.mask, tile, fold, true, k, on_strip, [&](const Line& line) {
    memset(y + line.at, 0, static_cast<std::size_t>(line.n) * sizeof(T));
    if (job.bits != nullptr)
      memset(job.bits + line.bits, 0, static_cast<std::size_t>((line.n + 7) / 8));
  });
}

// --- backward -------------------------------------------------------------------------------------

// What both passes of backward make of a strip: x, and dz.
template <class T>
class GradientOfZ {
 public:
  using C = Compute<T>;
  GradientOfZ(const Backward& job, const Fold& fold)
      : job_(job),
        fold_(fold),
        keeper_(job.epilogue, job.epilogue.dropout),
        slope_(static_cast<C>(job.epilogue.slope)),
        scale_(scale_of<C>(job.epilogue)) {}

  template <class K>
  void make(const K& co, const Line& strip) {
    const Epilogue& e = job_.epilogue;
    const std::int64_t n = padded(strip.n);
    x = widen(static_cast<const T*>(job_.x) + strip.at, strip.n, x_, &co);
    const C* g = widen(static_cast<const T*>(job_.grad) + strip.at, strip.n, grad_, none<K>());
    const C* residual = nullptr;
    if (job_.residual != nullptr && job_.bits == nullptr && e.activation != Activation::kNone)
      residual = widen(static_cast<const T*>(job_.residual) + strip.at, strip.n, residual_, none<K>());
    words = nullptr;
    if (strip.mask != nullptr) {
      mask_words<C>(mask_.at, strip, fold_);
      words = mask_.at;
      x = blank<C>(x, words, n, x_, &co);
      g = blank<C>(g, words, n, grad_, none<K>());
      if (residual != nullptr) residual = blank<C>(residual, words, n, residual_, none<K>());
    }
    if (e.dropout) {
      keep<C>(grad_.at, g, n, keeper_.words(strip.at, strip.n), scale_);
      g = grad_.at;
    }
    dz = g;
    if (e.activation == Activation::kNone) return;
    dz = dz_.at;
    const bool relu = e.activation == Activation::kRelu;
    if (job_.bits != nullptr) {
      // A line's last block may reach into the next line, which is then made again.
      for_each_bit_line(strip, fold_, [&](std::int64_t byte, std::int64_t i, std::int64_t count) {
        rectify_by_bits<C>(dz_.at + i, g + i, count, job_.bits + byte, relu, slope_);
      });
    } else if (relu) {
      rectify<true>(dz_.at, g, x, residual, n, co, slope_);
    } else if (e.activation == Activation::kLeakyRelu) {
      rectify<false>(dz_.at, g, x, residual, n, co, slope_);
    } else {
      affine<C>(z_.at, x, residual, n, co, false);
      multiply_by_derivative<C>(dz_.at, g, z_.at, n, e.activation);
    }
  }

  const C* x = nullptr;
  const C* dz = nullptr;
  const Word<C>* words = nullptr;  // of the mask

 private:
  const Backward& job_;
  const Fold& fold_;
  Keeper<C> keeper_;
  C slope_, scale_;
  Buffer<C> x_, grad_, residual_, z_, dz_;
  Buffer<Word<C>> mask_;
};

template <class T>
void reduce(const Backward& job, const Tile& tile, const Coefficients& coefficients, Sums sums) {
  using C = Compute<T>;
  Numbers<C> k;
  const Fold fold(job.layout, tile, job.mask, job.bits);
  convert(k, coefficients, tile.channels, fold, Which::kAffine);
  GradientOfZ<T> from(job, fold);
  TileSums<C> total(tile, fold);
  auto on_strip = [&](const auto& co, const Line& strip, std::int64_t channel) {
    from.make(co, strip);
    total.template add<false>(co, channel, from.x, from.dz, padded(strip.n));
    if (fold.columns) total.row_done();
  };
  for_each_strip<C>(job.layout, job.mask, tile, fold, false, k, on_strip, [](const Line&) {});
  total.add_to(sums);
}

template <class T>
void backward(const Backward& job, const Tile& tile, const Coefficients& coefficients) {
  using C = Compute<T>;
  T* const grad_x = static_cast<T*>(job.grad_x);
  T* const grad_residual = static_cast<T*>(job.grad_residual);
  Numbers<C> k;
  const Fold fold(job.layout, tile, job.mask, job.bits);
  convert(k, coefficients, tile.channels, fold, Which::kGradient);
  GradientOfZ<T> from(job, fold);
  Buffer<C> buffer;
  auto on_strip = [&](const auto& co, const Line& strip, std::int64_t) {
    const std::int64_t n = padded(strip.n);
    from.make(co, strip);
    C* const made = grad_x == nullptr || grad_residual != nullptr
                        ? buffer.at
                        : target(grad_x + strip.at, strip.n, buffer);
    if (grad_x != nullptr) {
      gradient<C>(made, from.dz, from.x, n, co);
      if (from.words != nullptr) keep<C>(made, made, n, from.words, C(1));
    }
    // grad_x or grad_residual may be grad, from which dz may be read until here.
    if (grad_residual != nullptr) narrow(grad_residual + strip.at, from.dz, strip.n);
    if (grad_x != nullptr) narrow(grad_x + strip.at, made, strip.n);
  };
  for_each_strip<C>(job.layout, job.mask, tile, fold, true, k, on_strip, [&](const Line& line) {
    const auto bytes = static_cast<std::size_t>(line.n) * sizeof(T);
    if (grad_residual != nullptr) memset(grad_residual + line.at, 0, bytes);
    if (grad_x != nullptr) memset(grad_x + line.at, 0, bytes);
  });
}

// --- the table ------------------------------------------------------------------------------------

void moments_any(const Forward& job, const Tile& tile, const Coefficients& k, Sums sums) {
  dispatch_dtype(job.dtype,
                 [&](auto tag) { moments<typename decltype(tag)::type>(job, tile, k, sums); });
}
void forward_any(const Forward& job, const Tile& tile, const Coefficients& k) {
  dispatch_dtype(job.dtype, [&](auto tag) { forward<typename decltype(tag)::type>(job, tile, k); });
}
void reduce_any(const Backward& job, const Tile& tile, const Coefficients& k, Sums sums) {
  dispatch_dtype(job.dtype,
                 [&](auto tag) { reduce<typename decltype(tag)::type>(job, tile, k, sums); });
}
void backward_any(const Backward& job, const Tile& tile, const Coefficients& k) {
  dispatch_dtype(job.dtype,
                 [&](auto tag) { backward<typename decltype(tag)::type>(job, tile, k); });
}

}  // namespace

const CpuKernels kernels = {&moments_any, &forward_any, &reduce_any, &backward_any};

}  // namespace fusereg::batch_norm::FUSEREG_ISA
