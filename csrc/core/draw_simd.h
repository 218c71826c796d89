// The draws of draw.h by vectors, for files that are compiled once per instruction set: a block of
// kBlock elements is one vector call of Philox; its two vectors of draws become masks as wide as
// the type that computes.
//
//   const MaskKeys keys(seed);
//   MaskDraws<kBits> mask_draws(keys, low, draw);
//   U64Vector draws[2];
//   mask_draws.make(block, draws);                              elements [block * kBlock, ...)
//   const auto masks = Masks<C, kBits>::make(draws[half], threshold);
//   masks.part(i)                                  of elements half * kBlock / 2 + i * kWidth<C>
//
// kBits is 16, 32, or kFewBits for draws of few digits, which are made 16 bits wide: 0 or 0xffff,
// which every threshold tells apart.
#pragma once

#include "core/draw.h"
#include "core/simd.h"

namespace fusereg::FUSEREG_ISA {

#define FUSEREG_ALWAYS_INLINE inline __attribute__((always_inline))

using MaskKeys = PhiloxKeys<kMaskRounds>;

inline constexpr int kFewBits = 1;

// Calls f with a compile-time value of a draw's bits.
template <int kValue>
struct DrawBits {
  static constexpr int value = kValue;
};
template <class F>
FUSEREG_ALWAYS_INLINE void dispatch_bits(const Draw& draw, F&& f) {
  if (draw.bits == 16) {
    f(DrawBits<16>{});
  } else if (draw.bits == 32) {
    f(DrawBits<32>{});
  } else {
    f(DrawBits<kFewBits>{});
  }
}

// The bits of a lane that has a draw.
template <int kBits>
inline constexpr int kLaneBits = kBits == 32 ? 32 : 16;

// Two vectors of draws, and elements that have them.
template <int kBits>
inline constexpr int kBlock = 2 * kVectorBytes * 8 / kLaneBits<kBits>;

template <int kBits>
struct DrawType {
  using type = std::uint16_t;
};
template <>
struct DrawType<32> {
  using type = std::uint32_t;
};
template <int kBits>
using DrawVector = Vector<typename DrawType<kBits>::type>;

// Lanes of 16 bits that are 0 where a bit is set, and 0xffff elsewhere.
FUSEREG_INLINE U64Vector lanes_of_bits(const unsigned char* bits) {
#if defined(__AVX512F__)
  __mmask32 mask;
  memcpy(&mask, bits, sizeof(mask));
  return bit_cast<U64Vector>(_mm512_movm_epi16(~mask));
#else
  constexpr int kLanes = kVectorBytes / 2;
  DrawVector<16> bit{};
  for (int i = 0; i < kLanes; ++i) bit[i] = static_cast<std::uint16_t>(1u << i);
  DrawVector<16> word{};
  if constexpr (kLanes == 16) {
    std::uint16_t mask;
    memcpy(&mask, bits, sizeof(mask));
    word += mask;
  } else {
    word += *bits;
  }
  return bit_cast<U64Vector>((word & bit) == 0);
#endif
}

// What the first three rounds make of a seed, of offset / 4 and of a chunk's upper 32 bits, which 2^32
// chunks share: the words that are the same for all of these, with the next round's key.
struct MaskStart {
  std::uint64_t upper;
  U64Vector first, second[2], third;
};

// (A function of the file that includes this, not a member: see simd.h.)
[[maybe_unused]] __attribute__((noinline)) static void start_masks(const MaskKeys& keys,
                                                                   std::uint64_t low,
                                                                   std::uint64_t upper,
                                                                   MaskStart& start) {
  constexpr std::uint64_t kLower = 0xffffffffu;
  const std::uint64_t product0 = multiply_low(low, kPhiloxFactor0);
  const std::uint64_t word2 = (product0 >> 32) ^ upper ^ keys.key[0][1][0];
  const std::uint64_t product1 = multiply_low(word2, kPhiloxFactor1);
  start.upper = upper;
  start.first = U64Vector{} + (((low >> 32) ^ keys.key[0][0][0]) & kLower);
  start.second[0] = U64Vector{} + (((product1 >> 32) ^ keys.key[1][0][0]) & kLower);
  start.second[1] = U64Vector{} + ((product0 ^ keys.key[1][1][0]) & kLower);
  start.third = U64Vector{} + ((product1 ^ keys.key[2][0][0]) & kLower);
}

// philox_chunks() of chunks whose upper half is start's: without one of its multiplications.
FUSEREG_INLINE void chunks_from(const MaskStart& start, const MaskKeys& keys, std::uint64_t chunk,
                                U64Vector (&draws)[2]) {
  const U64Vector product1 = multiply_low(philox_lanes() + chunk, kPhiloxFactor1);
  const U64Vector product0 = multiply_low((product1 >> 32) ^ start.first, kPhiloxFactor0);
  const U64Vector next0 = multiply_low(product1 ^ start.second[0], kPhiloxFactor0);
  const U64Vector next1 = multiply_low((product0 >> 32) ^ start.second[1], kPhiloxFactor1);
  philox_words_from(
      3, {{(next1 >> 32) ^ start.third, next1, (next0 >> 32) ^ product0 ^ keys.key[2][1], next0}},
      keys, draws);
}

// The draws of a call, block after block.
template <int kBits>
class MaskDraws {
 public:
  FUSEREG_ALWAYS_INLINE MaskDraws(const MaskKeys& keys, std::uint64_t low, const Draw&)
      : keys_(keys), low_(low) {
    start_.upper = ~std::uint64_t{0};  // of no chunk
  }

  FUSEREG_ALWAYS_INLINE void make(std::uint64_t block, U64Vector (&draws)[2]) {
    const std::uint64_t chunk = block * kPhiloxChunks;
    if (__builtin_expect(chunk >> 32 != start_.upper, 0))
      start_masks(keys_, low_, chunk >> 32, start_);
    chunks_from(start_, keys_, chunk, draws);
  }

 private:
  const MaskKeys& keys_;
  std::uint64_t low_;
  MaskStart start_;
};

// Of draws of few digits: the bits of as many elements as a vector call gives a digit of, ones where
// they are kept. (A function of the file that includes this, not a member: see simd.h.)
[[maybe_unused]] __attribute__((noinline)) static void draw_bits(const MaskKeys& keys,
                                                                 std::uint64_t low,
                                                                 const Draw& draw,
                                                                 std::uint64_t call,
                                                                 U64Vector (&kept)[2]) {
  kept[0] = kept[1] = U64Vector{};
  for (int digit = 0; digit < draw.bits; ++digit) {
    U64Vector w[2];
    philox_chunks(keys, low, digit_chunk(call * kPhiloxChunks, digit), w);
    for (int i = 0; i < 2; ++i) kept[i] = fold_digit(kept[i], w[i], draw.threshold, digit);
  }
}

// Such a call serves 16 blocks.
template <>
class MaskDraws<kFewBits> {
 public:
  FUSEREG_ALWAYS_INLINE MaskDraws(const MaskKeys& keys, std::uint64_t low, const Draw& draw)
      : keys_(keys), low_(low), draw_(draw) {}

  FUSEREG_ALWAYS_INLINE void make(std::uint64_t block, U64Vector (&draws)[2]) {
    const unsigned char* const from = bits<kVectorBytes / 8>(block);
    draws[0] = lanes_of_bits(from);
    draws[1] = lanes_of_bits(from + kVectorBytes / 16);
  }

  // Where the bits of the elements [8 kBytes at, 8 kBytes (at + 1)) are: ones if they are kept.
  template <int kBytes>
  FUSEREG_ALWAYS_INLINE const unsigned char* bits(std::uint64_t at) {
    constexpr std::uint64_t kParts = sizeof(bits_) / kBytes;
    if (at / kParts != known_) {
      known_ = at / kParts;
      draw_bits(keys_, low_, draw_, known_, bits_);
    }
    return reinterpret_cast<const unsigned char*>(bits_) + at % kParts * kBytes;
  }

 private:
  const MaskKeys& keys_;
  std::uint64_t low_;
  Draw draw_;
  std::uint64_t known_ = ~std::uint64_t{0};  // none: calls are counted in 2^8 elements or more
  U64Vector bits_[2];
};

// All ones where an element is kept, as wide as the type that computes.
template <class C>
struct MaskType {
  using type = std::int32_t;
};
template <>
struct MaskType<double> {
  using type = std::int64_t;
};
template <class C>
using MaskVector = Vector<typename MaskType<C>::type>;

#if defined(__AVX512F__)

// One bit an element.
using Bits = std::uint32_t;

// The masks of the elements that one vector of draws decides on; part i belongs to their i-th
// vector.
template <class C, int kBits>
struct Masks {
  static constexpr int kParts = static_cast<int>(sizeof(C)) * 8 / kLaneBits<kBits>;
  Bits bits;
  static FUSEREG_ALWAYS_INLINE Masks make(U64Vector draws, DrawVector<kBits> threshold) {
    if constexpr (kLaneBits<kBits> == 16) {
      return {_mm512_cmplt_epu16_mask(bit_cast<__m512i>(draws), bit_cast<__m512i>(threshold))};
    } else {
      return {_mm512_cmplt_epu32_mask(bit_cast<__m512i>(draws), bit_cast<__m512i>(threshold))};
    }
  }
  FUSEREG_ALWAYS_INLINE Bits part(int i) const { return bits >> (i * kWidth<C>); }
};

#else

// Part i of n of a vector of 16-bit (or 32-bit) masks, widened to 32 (or 64) bits.
template <class Wide, class Narrow>
FUSEREG_INLINE Wide widen_half(Narrow keep, int i) {
#if defined(__AVX2__)
  const auto whole = bit_cast<__m256i>(keep);
  const __m128i half = i == 0 ? _mm256_castsi256_si128(whole) : _mm256_extracti128_si256(whole, 1);
  return bit_cast<Wide>(sizeof(Wide{}[0]) == 4 ? _mm256_cvtepi16_epi32(half)
                                               : _mm256_cvtepi32_epi64(half));
#elif defined(__SSE2__)
  // A mask is as good as its own sign: it is put twice.
  const auto m = bit_cast<__m128i>(keep);
  if (sizeof(Wide{}[0]) == 4)
    return bit_cast<Wide>(i == 0 ? _mm_unpacklo_epi16(m, m) : _mm_unpackhi_epi16(m, m));
  return bit_cast<Wide>(i == 0 ? _mm_unpacklo_epi32(m, m) : _mm_unpackhi_epi32(m, m));
#elif defined(__aarch64__)
  if constexpr (sizeof(Wide{}[0]) == 4) {
    const auto m = bit_cast<int16x8_t>(keep);
    return bit_cast<Wide>(i == 0 ? vmovl_s16(vget_low_s16(m)) : vmovl_high_s16(m));
  } else {
    const auto m = bit_cast<int32x4_t>(keep);
    return bit_cast<Wide>(i == 0 ? vmovl_s32(vget_low_s32(m)) : vmovl_high_s32(m));
  }
#else
  constexpr int kCount = sizeof(Wide) / sizeof(Wide{}[0]);
  Wide wide{};
  for (int j = 0; j < kCount; ++j) wide[j] = keep[i * kCount + j];
  return wide;
#endif
}

template <class C, int kBits>
struct Masks {
  static constexpr int kParts = static_cast<int>(sizeof(C)) * 8 / kLaneBits<kBits>;
  typedef decltype(DrawVector<kBits>{} < DrawVector<kBits>{}) Keep;
  Keep keep;
  static FUSEREG_ALWAYS_INLINE Masks make(U64Vector draws, DrawVector<kBits> threshold) {
    return {bit_cast<DrawVector<kBits> >(draws) < threshold};
  }
  FUSEREG_ALWAYS_INLINE MaskVector<C> part(int i) const {
    if constexpr (kParts == 1) {
      return bit_cast<MaskVector<C> >(keep);
    } else if constexpr (kParts == 2) {
      return widen_half<MaskVector<C> >(keep, i);
    } else {
      return widen_half<MaskVector<C> >(widen_half<Vector<std::int32_t> >(keep, i / 2), i % 2);
    }
  }
};

#endif

}  // namespace fusereg::FUSEREG_ISA
