// The draws of draw.h by vectors, for files that are compiled once per instruction set: a block of
// kBlock elements is one vector call of Philox; its two vectors of draws become masks as wide as
// the type that computes.
//
//   U64Vector draws[2];
//   philox_chunks(keys, low, block * kPhiloxChunks, draws);     elements [block * kBlock, ...)
//   const auto masks = Masks<C, kBits>::make(draws[half], threshold);
//   masks.part(i)                                  of elements half * kBlock / 2 + i * kWidth<C>
#pragma once

#include "core/draw.h"
#include "core/simd.h"

namespace fusereg::FUSEREG_ISA {

#define FUSEREG_ALWAYS_INLINE inline __attribute__((always_inline))

using MaskKeys = PhiloxKeys<kMaskRounds>;

// Draws of a vector call, and elements that share it: two vectors of draws.
template <int kBits>
inline constexpr int kBlock = 2 * kVectorBytes * 8 / kBits;

template <int kBits>
struct DrawType;
template <>
struct DrawType<16> {
  using type = std::uint16_t;
};
template <>
struct DrawType<32> {
  using type = std::uint32_t;
};
template <int kBits>
using DrawVector = Vector<typename DrawType<kBits>::type>;

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
  static constexpr int kParts = static_cast<int>(sizeof(C)) * 8 / kBits;
  Bits bits;
  static FUSEREG_ALWAYS_INLINE Masks make(U64Vector draws, DrawVector<kBits> threshold) {
    if constexpr (kBits == 16) {
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
  static constexpr int kParts = static_cast<int>(sizeof(C)) * 8 / kBits;
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
