// CPU kernels of batch normalization; compiled once per instruction set. Contract: batch_norm.h.
//
// A tile is walked line by line: a line is the inner elements of one (o, c), whose coefficients are
// the same for all of them (Same), or with inner = 1 the channels of one o, each with its own
// (Columns). Lines are walked in blocks of kLanes elements, element i of a line in lane i % kLanes,
// whatever the vector width: so every instruction set adds the same numbers in the same order and
// gives the same bits. What a block is to do is decided by branches that go the same way for the
// whole call, which costs less than a kernel for each combination of epilogues would.
#include "batch_norm/batch_norm.h"

#include "core/draw_simd.h"

namespace fusereg::batch_norm::FUSEREG_ISA {
namespace {

using namespace ::fusereg::FUSEREG_ISA;

constexpr int kLanes = 32;
constexpr int kRun = 16;                    // float32 terms that are added before they go to float64
constexpr std::int64_t kStrip = 512;        // elements whose keep words are made at once
constexpr std::int64_t kSlack = 2 * kLanes + 64;  // partial blocks read whole vectors

template <class C>
constexpr int kVectors = kLanes / kWidth<C>;
template <class C>
using Word = typename MaskType<C>::type;

template <class C>
struct Block {
  Vector<C> v[kVectors<C>];
};

#define FUSEREG_EACH_VECTOR(v) \
  _Pragma("GCC unroll 16") for (int v = 0; v < kVectors<C>; ++v)

// The elements [i, i + rest) of a line; kWhole: all lanes are there, else the others are zero.
template <bool kWhole, class T>
FUSEREG_INLINE Block<Compute<T>> load_block(const T* p, std::int64_t rest) {
  using C = Compute<T>;
  Block<C> block;
  FUSEREG_EACH_VECTOR(v) {
    const std::int64_t n = rest - v * kWidth<C>;
    if (kWhole || n >= kWidth<C>) {
      block.v[v] = load(p + v * kWidth<C>);
    } else {
      block.v[v] = n > 0 ? load_partial(p + v * kWidth<C>, n) : Vector<C>{};
    }
  }
  return block;
}

template <bool kWhole, class T>
FUSEREG_INLINE void store_block(T* p, const Block<Compute<T>>& block, std::int64_t rest) {
  using C = Compute<T>;
  FUSEREG_EACH_VECTOR(v) {
    const std::int64_t n = rest - v * kWidth<C>;
    if (kWhole || n >= kWidth<C>) {
      store(p + v * kWidth<C>, block.v[v]);
    } else if (n > 0) {
      store_partial(p + v * kWidth<C>, block.v[v], n);
    }
  }
}

// --- coefficients ---------------------------------------------------------------------------------

// A tile's, as numbers of the type that computes; each array may be read past its end.
template <class C>
struct Numbers {
  C m[kMaxColumns + kSlack], a[kMaxColumns + kSlack], b[kMaxColumns + kSlack];
  C q[kMaxColumns + kSlack], r[kMaxColumns + kSlack];
};

template <class C>
void convert(C* to, const double* from, std::int64_t n) {
  for (std::int64_t i = 0; i < n; ++i) to[i] = static_cast<C>(from[i]);
  memset(to + n, 0, kSlack * sizeof(C));
}

// gradient: with q and r, which are zero otherwise.
template <class C>
void convert(Numbers<C>& k, const Coefficients& from, std::int64_t n, bool gradient) {
  convert(k.m, from.m, n);
  convert(k.a, from.a, n);
  convert(k.b, from.b, n);
  if (gradient) {
    convert(k.q, from.q, n);
    convert(k.r, from.r, n);
  } else {
    memset(k.q, 0, static_cast<std::size_t>(n + kSlack) * sizeof(C));
    memset(k.r, 0, static_cast<std::size_t>(n + kSlack) * sizeof(C));
  }
}

template <class C>
struct Same {
  Vector<C> m_, a_, b_, q_, r_;
  Same(const Numbers<C>& k, std::int64_t c)
      : m_(broadcast(k.m[c])),
        a_(broadcast(k.a[c])),
        b_(broadcast(k.b[c])),
        q_(broadcast(k.q[c])),
        r_(broadcast(k.r[c])) {}
  Vector<C> m(std::int64_t) const { return m_; }
  Vector<C> a(std::int64_t) const { return a_; }
  Vector<C> b(std::int64_t) const { return b_; }
  Vector<C> q(std::int64_t) const { return q_; }
  Vector<C> r(std::int64_t) const { return r_; }
};

template <class C>
struct Columns {
  const Numbers<C>& k;
  explicit Columns(const Numbers<C>& numbers, std::int64_t = 0) : k(numbers) {}
  Vector<C> m(std::int64_t i) const { return load(k.m + i); }
  Vector<C> a(std::int64_t i) const { return load(k.a + i); }
  Vector<C> b(std::int64_t i) const { return load(k.b + i); }
  Vector<C> q(std::int64_t i) const { return load(k.q + i); }
  Vector<C> r(std::int64_t i) const { return load(k.r + i); }
};

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

// Ones in the first n lanes.
template <class C>
FUSEREG_INLINE MaskVector<C> first_lanes(std::int64_t n) {
  const std::int64_t count = n < 0 ? 0 : n < kWidth<C> ? n : kWidth<C>;
  return mask_of_bits<C>((1u << count) - 1u);
}

template <class C>
FUSEREG_INLINE MaskVector<C> load_words(const Word<C>* words) {
  MaskVector<C> mask;
  memcpy(&mask, words, sizeof(mask));
  return mask;
}

// The lanes of vector v of the block at i whose byte is set.
template <class C>
FUSEREG_INLINE MaskVector<C> mask_of_bytes(const std::uint8_t* bytes, std::int64_t i, int v,
                                           std::int64_t rest) {
  std::uint32_t bits = 0;
  for (std::int64_t j = 0; j < kWidth<C> && v * kWidth<C> + j < rest; ++j)
    bits |= static_cast<std::uint32_t>(bytes[i + v * kWidth<C> + j] != 0) << j;
  return mask_of_bits<C>(bits);
}

// Which elements of a strip are kept by dropout and belong to a padded sequence: a word of ones or
// zeros for each.
template <class C>
class Keeper {
 public:
  Keeper(const Epilogue& e, bool dropout)
      : draw_(e.draw),
        dropout_(dropout),
        index_offset_(e.index_offset),
        low_(dropout ? e.random.low() : 0),
        keys_(dropout ? e.random.key() : 0) {
    if (dropout) memset(buffer_, 0, sizeof(buffer_));
  }

  // The words of n <= kStrip elements from element `at` of memory on; valid until the next call.
  // inner_mask: one byte for each of them, or null.
  const Word<C>* words(std::int64_t at, std::int64_t n, const std::uint8_t* inner_mask) {
    Word<C>* words = buffer_;
    if (dropout_) {
      const std::uint64_t index = index_offset_ + static_cast<std::uint64_t>(at);
      words += draw_.bits == 16 ? fill<16>(index, n) : fill<32>(index, n);
      if (inner_mask != nullptr) {
        for (std::int64_t i = 0; i < n; ++i) words[i] &= -static_cast<Word<C>>(inner_mask[i] != 0);
      }
    } else {
      for (std::int64_t i = 0; i < n; ++i) words[i] = -static_cast<Word<C>>(inner_mask[i] != 0);
      memset(words + n, 0, kSlack * sizeof(Word<C>));
    }
    return words;
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
  bool dropout_;
  std::uint64_t index_offset_;
  std::uint64_t low_;
  PhiloxKeys keys_;
  Word<C> buffer_[kStrip + 2 * kBlock<16> + kSlack];
};

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
                                  bool reverse, OnLine on_line, OnMaskedRow on_masked_row) {
  constexpr std::int64_t kBand = 16;
  const std::int64_t bands = (t.rows + kBand - 1) / kBand;
  for (std::int64_t band = 0; band < bands; ++band) {
    const std::int64_t from = (reverse ? bands - 1 - band : band) * kBand;
    const std::int64_t to = from + kBand < t.rows ? from + kBand : t.rows;
    for (std::int64_t row = t.row + from; row < t.row + to; ++row) {
      if (l.inner == 1) {
        const Line line{row * l.channels + t.channel, t.channels, 0,
                        row * ((l.channels + 7) / 8) + t.channel / 8, nullptr};
        if (mask != nullptr && mask[row] == 0) {
          on_masked_row(line);
        } else {
          on_line(line, 0);
        }
        continue;
      }
      for (std::int64_t c = 0; c < t.channels; ++c) {
        const std::int64_t index = row * l.channels + t.channel + c;
        on_line(Line{index * l.inner, l.inner, 0, index * ((l.inner + 7) / 8),
                     mask == nullptr ? nullptr : mask + row * l.inner},
                c);
      }
    }
  }
}

// Cuts a line into strips for which there are keep words.
template <class C, class OnStrip>
FUSEREG_INLINE void for_each_strip(const Line& line, Keeper<C>& keeper, bool keep,
                                   OnStrip on_strip) {
  if (!keep && line.mask == nullptr) {
    on_strip(line, static_cast<const Word<C>*>(nullptr));
    return;
  }
  for (std::int64_t i = 0; i < line.n; i += kStrip) {
    const std::int64_t n = line.n - i < kStrip ? line.n - i : kStrip;
    const std::uint8_t* const mask = line.mask == nullptr ? nullptr : line.mask + i;
    const Line strip{line.at + i, n, line.column + i, line.bits + i / 8, mask};
    on_strip(strip, keeper.words(strip.at, n, mask));
  }
}

// Calls on_block(i, rest, whole) for the blocks of n elements; `whole` is a type.
struct Whole {
  static constexpr bool value = true;
};
struct Partial {
  static constexpr bool value = false;
};
template <class OnBlock>
FUSEREG_INLINE void for_each_block(std::int64_t n, OnBlock on_block) {
  std::int64_t i = 0;
  for (; n - i >= kLanes; i += kLanes) on_block(i, std::int64_t{kLanes}, Whole{});
  if (i < n) on_block(i, n - i, Partial{});
}

// --- sums -----------------------------------------------------------------------------------------

// Of one channel whose elements lie in lines: a sum for each lane.
template <class C>
struct LaneSums {
  static constexpr int kWide = static_cast<int>(sizeof(double) / sizeof(C));
  Block<C> first{}, second{};
  Vector<double> wide_first[kVectors<C>][kWide] = {};
  Vector<double> wide_second[kVectors<C>][kWide] = {};
  int terms = 0;
};

template <class C>
FUSEREG_INLINE void flush(LaneSums<C>& sums, Block<C>& first, Block<C>& second) {
  FUSEREG_EACH_VECTOR(v) {
    add_widened(first.v[v], sums.wide_first[v]);
    add_widened(second.v[v], sums.wide_second[v]);
    first.v[v] = second.v[v] = Vector<C>{};
  }
  sums.terms = 0;
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
  C first[kMaxColumns + kSlack], second[kMaxColumns + kSlack];
  double wide_first[kMaxColumns], wide_second[kMaxColumns];
  int terms = 0;
  explicit ColumnSums(std::int64_t n) {
    const auto count = static_cast<std::size_t>(n);
    memset(first, 0, (count + kSlack) * sizeof(C));
    memset(second, 0, (count + kSlack) * sizeof(C));
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

// Adds, for each channel of the tile, what `terms` gives for its elements:
// terms(coefficients, strip, words, i, rest, whole, first block, second block).
template <class C, class Terms>
FUSEREG_INLINE void add_sums(const Layout& layout, const std::uint8_t* mask, const Tile& tile,
                             const Numbers<C>& k, Keeper<C>& keeper, bool keep, Sums sums,
                             Terms terms) {
  if (layout.inner == 1) {
    const Columns<C> columns(k);
    ColumnSums<C> total(tile.channels);
    for_each_line(
        layout, mask, tile, false,
        [&](const Line& line, std::int64_t) {
          for_each_strip<C>(line, keeper, keep, [&](const Line& strip, const Word<C>* words) {
            for_each_block(strip.n, [&](std::int64_t i, std::int64_t rest, auto whole) {
              Block<C> first, second;
              terms(columns, strip, words, i, rest, whole, first, second);
              C* const p = total.first + strip.column + i;
              C* const q = total.second + strip.column + i;
              FUSEREG_EACH_VECTOR(v) {
                store(p + v * kWidth<C>, load(p + v * kWidth<C>) + first.v[v]);
                store(q + v * kWidth<C>, load(q + v * kWidth<C>) + second.v[v]);
              }
            });
          });
          if (++total.terms == kRun) total.flush(tile.channels);
        },
        [](const Line&) {});
    total.flush(tile.channels);
    for (std::int64_t c = 0; c < tile.channels; ++c) {
      sums.first[c] += total.wide_first[c];
      sums.second[c] += total.wide_second[c];
    }
    return;
  }
  LaneSums<C> lanes[kMaxLines];
  for_each_line(
      layout, mask, tile, false,
      [&](const Line& line, std::int64_t channel) {
        const Same<C> same(k, channel);
        LaneSums<C>& total = lanes[channel];
        Block<C> sum_first = total.first;
        Block<C> sum_second = total.second;
        for_each_strip<C>(line, keeper, keep, [&](const Line& strip, const Word<C>* words) {
          auto step = [&](std::int64_t i, std::int64_t rest, auto whole) {
            Block<C> first, second;
            terms(same, strip, words, i, rest, whole, first, second);
            FUSEREG_EACH_VECTOR(v) {
              sum_first.v[v] += first.v[v];
              sum_second.v[v] += second.v[v];
            }
          };
          std::int64_t i = 0;
          while (strip.n - i >= kLanes) {
            const std::int64_t there = (strip.n - i) / kLanes;
            const std::int64_t blocks = there < kRun - total.terms ? there : kRun - total.terms;
            for (std::int64_t b = 0; b < blocks; ++b, i += kLanes) {
              step(i, std::int64_t{kLanes}, Whole{});
            }
            total.terms += static_cast<int>(blocks);
            if (total.terms == kRun) flush(total, sum_first, sum_second);
          }
          if (i < strip.n) {
            step(i, strip.n - i, Partial{});
            if (++total.terms == kRun) flush(total, sum_first, sum_second);
          }
        });
        total.first = sum_first;
        total.second = sum_second;
      },
      [](const Line&) {});
  for (std::int64_t c = 0; c < tile.channels; ++c) {
    LaneSums<C>& total = lanes[c];
    flush(total, total.first, total.second);
    sums.first[c] += add_lanes(total.wide_first);
    sums.second[c] += add_lanes(total.wide_second);
  }
}

// --- epilogues ------------------------------------------------------------------------------------

// What a call does with each element, apart from its coefficients.
template <class C>
struct Plan {
  Activation activation;
  bool dropout;
  Vector<C> slope;
  Vector<C> scale;  // 1 / keep
  explicit Plan(const Epilogue& e)
      : activation(e.activation),
        dropout(e.dropout),
        slope(broadcast(static_cast<C>(e.slope))),
        scale(broadcast(static_cast<C>(e.dropout && e.draw.keep > 0.0 ? 1.0 / e.draw.keep : 0.0))) {
  }
};

template <class C>
FUSEREG_INLINE void activate(Block<C>& z, const Plan<C>& plan) {
  const Vector<C> zero{};
  switch (plan.activation) {
    case Activation::kNone:
      break;
    case Activation::kRelu:
      FUSEREG_EACH_VECTOR(v) z.v[v] = select<C>(z.v[v] < zero, zero, z.v[v]);
      break;
    case Activation::kLeakyRelu:
      FUSEREG_EACH_VECTOR(v) {
        z.v[v] = select<C>(z.v[v] < zero, z.v[v] * plan.slope, z.v[v]);
      }
      break;
    default:
      break;
  }
}

// Multiplies by the activation's derivative at z.
template <class C>
FUSEREG_INLINE void activate_backward(Block<C>& dz, const Block<C>& z, const Plan<C>& plan) {
  const Vector<C> zero{};
  switch (plan.activation) {
    case Activation::kNone:
      break;
    case Activation::kRelu:
      FUSEREG_EACH_VECTOR(v) dz.v[v] = masked<C>(dz.v[v], z.v[v] > zero);
      break;
    case Activation::kLeakyRelu:
      FUSEREG_EACH_VECTOR(v) {
        dz.v[v] = select<C>(z.v[v] > zero, dz.v[v], dz.v[v] * plan.slope);
      }
      break;
    default:
      break;
  }
}

// A block's bits, of which `rest` elements are there.
template <class C>
FUSEREG_INLINE void write_bits(std::uint8_t* to, const Block<C>& z, std::int64_t rest) {
  std::uint32_t bits = 0;
  FUSEREG_EACH_VECTOR(v) bits |= positive_bits(z.v[v]) << (v * kWidth<C>);
  if (rest >= kLanes) {
    memcpy(to, &bits, sizeof(bits));
    return;
  }
  bits &= (1u << rest) - 1u;
  for (std::int64_t i = 0; i < rest; i += 8) to[i / 8] = static_cast<std::uint8_t>(bits >> i);
}

FUSEREG_INLINE std::uint32_t read_bits(const std::uint8_t* from, std::int64_t rest) {
  std::uint32_t bits = 0;
  if (rest >= kLanes) {
    memcpy(&bits, from, sizeof(bits));
    return bits;
  }
  for (std::int64_t i = 0; i < rest; i += 8) bits |= static_cast<std::uint32_t>(from[i / 8]) << i;
  return bits;
}

// --- forward --------------------------------------------------------------------------------------

template <class T>
void moments(const Forward& job, const Tile& tile, const Coefficients& coefficients, Sums sums) {
  using C = Compute<T>;
  const T* const x = static_cast<const T*>(job.x);
  Numbers<C> k;
  convert(k, coefficients, tile.channels, false);
  Keeper<C> keeper(job.epilogue, false);
  add_sums<C>(job.layout, job.mask, tile, k, keeper, false, sums,
              [x](const auto& co, const Line& strip, const Word<C>* words, std::int64_t i,
                  std::int64_t rest, auto whole, Block<C>& first, Block<C>& second)
                  __attribute__((always_inline)) {
                    constexpr bool kWhole = decltype(whole)::value;
                    first = load_block<kWhole>(x + strip.at + i, rest);
                    FUSEREG_EACH_VECTOR(v) {
                      const std::int64_t at = i + v * kWidth<C>;
                      Vector<C>& d = first.v[v];
                      d -= co.m(strip.column + at);
                      if (!kWhole) d = masked<C>(d, first_lanes<C>(rest - v * kWidth<C>));
                      if (words != nullptr) d = masked<C>(d, load_words<C>(words + at));
                      second.v[v] = d * d;
                    }
                  });
}

template <class C, class K>
FUSEREG_INLINE void normalize(Block<C>& x, const K& co, std::int64_t column) {
  FUSEREG_EACH_VECTOR(v) {
    const std::int64_t at = column + v * kWidth<C>;
    x.v[v] = (x.v[v] - co.m(at)) * co.a(at) + co.b(at);
  }
}

template <class T>
void forward(const Forward& job, const Tile& tile, const Coefficients& coefficients) {
  using C = Compute<T>;
  const T* const x = static_cast<const T*>(job.x);
  const T* const residual = static_cast<const T*>(job.residual);
  T* const y = static_cast<T*>(job.y);
  std::uint8_t* const bits = job.bits;
  Numbers<C> k;
  convert(k, coefficients, tile.channels, false);
  const Plan<C> plan(job.epilogue);
  Keeper<C> keeper(job.epilogue, plan.dropout);

  auto on_line = [&](const auto& co, const Line& line) __attribute__((always_inline)) {
    for_each_strip<C>(line, keeper, plan.dropout, [&](const Line& strip, const Word<C>* words) {
      for_each_block(strip.n, [&](std::int64_t i, std::int64_t rest, auto whole)
                                  __attribute__((always_inline)) {
        constexpr bool kWhole = decltype(whole)::value;
        const std::int64_t e = strip.at + i;
        Block<C> z = load_block<kWhole>(x + e, rest);
        normalize<C>(z, co, strip.column + i);
        if (residual != nullptr) {
          const Block<C> r = load_block<kWhole>(residual + e, rest);
          FUSEREG_EACH_VECTOR(v) z.v[v] += r.v[v];
        }
        if (bits != nullptr) write_bits<C>(bits + strip.bits + i / 8, z, rest);
        activate<C>(z, plan);
        if (words != nullptr) {
          if (plan.dropout) FUSEREG_EACH_VECTOR(v) z.v[v] *= plan.scale;
          FUSEREG_EACH_VECTOR(v) {
            z.v[v] = masked<C>(z.v[v], load_words<C>(words + i + v * kWidth<C>));
          }
        }
        store_block<kWhole>(y + e, z, rest);
      });
    });
  };
  auto on_masked_row = [&](const Line& line) {
    memset(y + line.at, 0, static_cast<std::size_t>(line.n) * sizeof(T));
    if (bits != nullptr) memset(bits + line.bits, 0, static_cast<std::size_t>((line.n + 7) / 8));
  };
  if (job.layout.inner == 1) {
    const Columns<C> columns(k);
    for_each_line(
        job.layout, job.mask, tile, true,
        [&](const Line& line, std::int64_t) { on_line(columns, line); }, on_masked_row);
  } else {
    for_each_line(
        job.layout, job.mask, tile, true,
        [&](const Line& line, std::int64_t c) { on_line(Same<C>(k, c), line); }, on_masked_row);
  }
}

// --- backward -------------------------------------------------------------------------------------

template <class T>
struct Sources {
  const T* grad;
  const T* x;
  const T* residual;
  const std::uint8_t* bits;
  explicit Sources(const Backward& job)
      : grad(static_cast<const T*>(job.grad)),
        x(static_cast<const T*>(job.x)),
        residual(static_cast<const T*>(job.residual)),
        bits(job.bits) {}
};

// dz, and d = x - m.
template <bool kWhole, class T, class K>
FUSEREG_INLINE void gradient_of_z(const Sources<T>& from, const K& co, const Line& strip,
                                  const Word<Compute<T>>* words, std::int64_t i, std::int64_t rest,
                                  const Plan<Compute<T>>& plan, Block<Compute<T>>& dz,
                                  Block<Compute<T>>& d) {
  using C = Compute<T>;
  const std::int64_t e = strip.at + i;
  const std::int64_t column = strip.column + i;
  dz = load_block<kWhole>(from.grad + e, rest);
  d = load_block<kWhole>(from.x + e, rest);
  FUSEREG_EACH_VECTOR(v) d.v[v] -= co.m(column + v * kWidth<C>);
  if (plan.dropout) FUSEREG_EACH_VECTOR(v) dz.v[v] *= plan.scale;
  if (words != nullptr) {
    FUSEREG_EACH_VECTOR(v) {
      const MaskVector<C> keep = load_words<C>(words + i + v * kWidth<C>);
      dz.v[v] = masked<C>(dz.v[v], keep);
    }
  }
  if (strip.mask != nullptr || !kWhole) {
    // What is not there may be anything, NaN as well, and dz = 0 alone would not hide it.
    FUSEREG_EACH_VECTOR(v) {
      if (!kWhole) d.v[v] = masked<C>(d.v[v], first_lanes<C>(rest - v * kWidth<C>));
      if (strip.mask != nullptr) d.v[v] = masked<C>(d.v[v], mask_of_bytes<C>(strip.mask, i, v, rest));
    }
  }
  if (plan.activation == Activation::kNone) return;
  if (from.bits != nullptr) {
    const std::uint32_t bits = read_bits(from.bits + strip.bits + i / 8, rest);
    FUSEREG_EACH_VECTOR(v) {
      const MaskVector<C> positive = mask_of_bits<C>(bits >> (v * kWidth<C>));
      dz.v[v] = plan.activation == Activation::kRelu
                    ? masked<C>(dz.v[v], positive)
                    : select<C>(positive, dz.v[v], dz.v[v] * plan.slope);
    }
    return;
  }
  Block<C> z;
  FUSEREG_EACH_VECTOR(v) {
    const std::int64_t at = column + v * kWidth<C>;
    z.v[v] = d.v[v] * co.a(at) + co.b(at);
  }
  if (from.residual != nullptr) {
    const Block<C> r = load_block<kWhole>(from.residual + e, rest);
    FUSEREG_EACH_VECTOR(v) z.v[v] += r.v[v];
  }
  activate_backward<C>(dz, z, plan);
}

template <class T>
void reduce(const Backward& job, const Tile& tile, const Coefficients& coefficients, Sums sums) {
  using C = Compute<T>;
  const Sources<T> from(job);
  Numbers<C> k;
  convert(k, coefficients, tile.channels, false);
  const Plan<C> plan(job.epilogue);
  Keeper<C> keeper(job.epilogue, plan.dropout);
  add_sums<C>(job.layout, job.mask, tile, k, keeper, plan.dropout, sums,
              [&](const auto& co, const Line& strip, const Word<C>* words, std::int64_t i,
                  std::int64_t rest, auto whole, Block<C>& first, Block<C>& second)
                  __attribute__((always_inline)) {
                    constexpr bool kWhole = decltype(whole)::value;
                    gradient_of_z<kWhole>(from, co, strip, words, i, rest, plan, first, second);
                    FUSEREG_EACH_VECTOR(v) second.v[v] *= first.v[v];
                  });
}

template <class T>
void backward(const Backward& job, const Tile& tile, const Coefficients& coefficients) {
  using C = Compute<T>;
  const Sources<T> from(job);
  T* const grad_x = static_cast<T*>(job.grad_x);
  T* const grad_residual = static_cast<T*>(job.grad_residual);
  Numbers<C> k;
  convert(k, coefficients, tile.channels, true);
  const Plan<C> plan(job.epilogue);
  Keeper<C> keeper(job.epilogue, plan.dropout);

  auto on_line = [&](const auto& co, const Line& line) __attribute__((always_inline)) {
    for_each_strip<C>(line, keeper, plan.dropout, [&](const Line& strip, const Word<C>* words) {
      for_each_block(strip.n, [&](std::int64_t i, std::int64_t rest, auto whole)
                                  __attribute__((always_inline)) {
        constexpr bool kWhole = decltype(whole)::value;
        const std::int64_t e = strip.at + i;
        Block<C> dz, d;
        gradient_of_z<kWhole>(from, co, strip, words, i, rest, plan, dz, d);
        if (grad_residual != nullptr) store_block<kWhole>(grad_residual + e, dz, rest);
        if (grad_x == nullptr) return;
        FUSEREG_EACH_VECTOR(v) {
          const std::int64_t at = strip.column + i + v * kWidth<C>;
          Vector<C>& result = dz.v[v];
          result = co.a(at) * result + co.q(at) * d.v[v] + co.r(at);
          if (strip.mask != nullptr) {
            result = masked<C>(result, mask_of_bytes<C>(strip.mask, i, v, rest));
          }
        }
        store_block<kWhole>(grad_x + e, dz, rest);
      });
    });
  };
  auto on_masked_row = [&](const Line& line) {
    const auto bytes = static_cast<std::size_t>(line.n) * sizeof(T);
    if (grad_residual != nullptr) memset(grad_residual + line.at, 0, bytes);
    if (grad_x != nullptr) memset(grad_x + line.at, 0, bytes);
  };
  if (job.layout.inner == 1) {
    const Columns<C> columns(k);
    for_each_line(
        job.layout, job.mask, tile, true,
        [&](const Line& line, std::int64_t) { on_line(columns, line); }, on_masked_row);
  } else {
    for_each_line(
        job.layout, job.mask, tile, true,
        [&](const Line& line, std::int64_t c) { on_line(Same<C>(k, c), line); }, on_masked_row);
  }
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
