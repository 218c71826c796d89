// Elements of an image at the places of a vector, as floats. For augment_vector.h, once per
// instruction set.
//
// Places are offsets in elements, kLanes in memory. Words of 1, 2 and 4 bytes are loaded one by one
// and put together in registers: that takes two thirds of the time of a gather instruction, which
// loads them one by one as well, and works on every processor. Words of 8 bytes are gathered.
#pragma once

#include "augment/augment_math.h"
#include "core/simd.h"

namespace fusereg::augment::FUSEREG_ISA {
namespace {

using namespace ::fusereg::FUSEREG_ISA;

using Floats = Vector<float>;
using Ints = Vector<std::int32_t>;
inline constexpr int kLanes = kWidth<float>;
inline constexpr int kParts = kBlock / kLanes;

FUSEREG_INLINE Ints load_ints(const std::int32_t* p) {
  Ints v;
  memcpy(&v, p, sizeof(v));
  return v;
}
FUSEREG_INLINE void store_ints(std::int32_t* p, Ints v) { memcpy(p, &v, sizeof(v)); }

FUSEREG_INLINE Floats to_floats(Ints v) {
#if defined(__AVX512F__)
  return _mm512_maskz_cvtepi32_ps(0xffff, bit_cast<__m512i>(v));
#else
  return __builtin_convertvector(v, Floats);
#endif
}

// `yes` where the mask is set.
FUSEREG_INLINE Floats select(Ints mask, Floats yes, Floats no) {
  return bit_cast<Floats>((bit_cast<Ints>(yes) & mask) | (bit_cast<Ints>(no) & ~mask));
}

// --- words ---
#if defined(__SSE2__)
template <class T>
FUSEREG_INLINE __m128i four_words(const T* p, const std::int32_t* at) {
  std::int32_t w[4];
  FUSEREG_UNROLL_10
  for (int i = 0; i < 4; ++i) memcpy(&w[i], p + at[i], 4);
  return _mm_unpacklo_epi64(_mm_unpacklo_epi32(_mm_cvtsi32_si128(w[0]), _mm_cvtsi32_si128(w[1])),
                            _mm_unpacklo_epi32(_mm_cvtsi32_si128(w[2]), _mm_cvtsi32_si128(w[3])));
}

// Of 1 or 2 bytes: as words of 16 bits, 8 (or, in the shorter vectors, 4).
template <int kBytes, class T>
FUSEREG_INLINE __m128i short_words(const T* p, const std::int32_t* at) {
  auto word = [&](int i) {
    std::uint16_t w = 0;
    memcpy(&w, p + at[i], kBytes);
    return w;
  };
  __m128i v = _mm_cvtsi32_si128(word(0));
  v = _mm_insert_epi16(v, word(1), 1);
  v = _mm_insert_epi16(v, word(2), 2);
  v = _mm_insert_epi16(v, word(3), 3);
  if constexpr (kLanes > 4) {
    v = _mm_insert_epi16(v, word(4), 4);
    v = _mm_insert_epi16(v, word(5), 5);
    v = _mm_insert_epi16(v, word(6), 6);
    v = _mm_insert_epi16(v, word(7), 7);
  }
  return v;
}
#endif

#if defined(__AVX512F__)
FUSEREG_INLINE __m512i joined(__m256i low, __m256i high) {
  return _mm512_inserti64x4(_mm512_castsi256_si512(low), high, 1);
}
#endif

// The kBytes bytes at each place, above them zeros.
template <int kBytes, class T>
FUSEREG_INLINE Ints words_at(const T* p, const std::int32_t* at) {
#if defined(__AVX512F__)
  if constexpr (kBytes == 4) {
    return bit_cast<Ints>(joined(_mm256_set_m128i(four_words(p, at + 4), four_words(p, at)),
                                 _mm256_set_m128i(four_words(p, at + 12), four_words(p, at + 8))));
  } else {
    return bit_cast<Ints>(_mm512_maskz_cvtepu16_epi32(
        0xffff, _mm256_set_m128i(short_words<kBytes>(p, at + 8), short_words<kBytes>(p, at))));
  }
#elif defined(__AVX2__)
  if constexpr (kBytes == 4) {
    return bit_cast<Ints>(_mm256_set_m128i(four_words(p, at + 4), four_words(p, at)));
  } else {
    return bit_cast<Ints>(_mm256_cvtepu16_epi32(short_words<kBytes>(p, at)));
  }
#elif defined(__SSE2__)
  if constexpr (kBytes == 4) {
    return bit_cast<Ints>(four_words(p, at));
  } else {
    return bit_cast<Ints>(_mm_unpacklo_epi16(short_words<kBytes>(p, at), _mm_setzero_si128()));
  }
#else
  std::int32_t words[kLanes] = {};
  for (int i = 0; i < kLanes; ++i) memcpy(&words[i], p + at[i], kBytes);
  return load_ints(words);
#endif
}

// The low and the high words of the 8 bytes at each place.
FUSEREG_INLINE void wide_words_at(const std::uint8_t* p, const std::int32_t* at, Ints& low,
                                  Ints& high) {
#if defined(__AVX512F__)
  const __m512i index = bit_cast<__m512i>(load_ints(at));
  const __m512i a =
      _mm512_mask_i32gather_epi64(__m512i{}, 0xff, _mm512_castsi512_si256(index), p, 1);
  const __m512i b = _mm512_mask_i32gather_epi64(
      __m512i{}, 0xff, _mm512_maskz_extracti64x4_epi64(0xf, index, 1), p, 1);
  const __m512i even = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
  const __m512i odd = _mm512_setr_epi32(1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31);
  low = bit_cast<Ints>(_mm512_permutex2var_epi32(a, even, b));
  high = bit_cast<Ints>(_mm512_permutex2var_epi32(a, odd, b));
#elif defined(__AVX2__)
  const __m256i index = bit_cast<__m256i>(load_ints(at));
  const auto* words = reinterpret_cast<const long long*>(p);
  const __m256i a = _mm256_i32gather_epi64(words, _mm256_castsi256_si128(index), 1);
  const __m256i b = _mm256_i32gather_epi64(words, _mm256_extracti128_si256(index, 1), 1);
  const auto fa = bit_cast<__m256>(a);
  const auto fb = bit_cast<__m256>(b);
  low = bit_cast<Ints>(
      _mm256_permute4x64_epi64(bit_cast<__m256i>(_mm256_shuffle_ps(fa, fb, 0x88)), 0xd8));
  high = bit_cast<Ints>(
      _mm256_permute4x64_epi64(bit_cast<__m256i>(_mm256_shuffle_ps(fa, fb, 0xdd)), 0xd8));
#else
  std::int32_t words[2][kLanes];
  for (int i = 0; i < kLanes; ++i) {
    std::int32_t pair[2];
    memcpy(pair, p + at[i], 8);
    words[0][i] = pair[0];
    words[1][i] = pair[1];
  }
  low = load_ints(words[0]);
  high = load_ints(words[1]);
#endif
}

// --- elements ---
// Elements that are each the low bits of a word, the others zero, as floats. The first argument
// only says of which type.
FUSEREG_INLINE Floats decoded(const std::uint8_t*, Ints words) { return to_floats(words); }
FUSEREG_INLINE Floats decoded(const BFloat16*, Ints words) { return bit_cast<Floats>(words << 16); }
FUSEREG_INLINE Floats decoded(const float*, Ints words) { return bit_cast<Floats>(words); }
FUSEREG_INLINE Floats decoded(const Half*, Ints words) {
#if defined(__AVX512F__)
  return _mm512_cvtph_ps(_mm512_maskz_cvtepi32_epi16(0xffff, bit_cast<__m512i>(words)));
#elif defined(__AVX2__)
  const auto w = bit_cast<__m256i>(words);
  return _mm256_cvtph_ps(
      _mm_packus_epi32(_mm256_castsi256_si128(w), _mm256_extracti128_si256(w, 1)));
#else
  float v[kLanes];
  for (int i = 0; i < kLanes; ++i) v[i] = to_float(Half{static_cast<std::uint16_t>(words[i])});
  return load(v);
#endif
}

template <class T>
FUSEREG_INLINE Floats take(const T* plane, const std::int32_t* at) {
  return decoded(plane, words_at<static_cast<int>(sizeof(T))>(plane, at));
}

// The element at each place, and the one after it in memory.
template <class T>
FUSEREG_INLINE void take_two(const T* plane, const std::int32_t* at, Floats& first,
                             Floats& second) {
  if constexpr (sizeof(T) == 4) {
    first = take(plane, at);
    second = take(plane + 1, at);
  } else {
    constexpr int kBits = 8 * static_cast<int>(sizeof(T));
    constexpr std::int32_t kMask = (1 << kBits) - 1;
    const Ints words = words_at<2 * static_cast<int>(sizeof(T))>(plane, at);
    first = decoded(plane, words & kMask);
    second = decoded(plane, (words >> kBits) & kMask);
  }
}

// A vector of neighbors in memory.
template <class T>
FUSEREG_INLINE Vector<Number<T>> load_run(const T* p) {
  if constexpr (sizeof(T) == 1) {
#if defined(__AVX512F__)
    return to_floats(bit_cast<Ints>(
        _mm512_maskz_cvtepu8_epi32(0xffff, _mm_loadu_si128(reinterpret_cast<const __m128i*>(p)))));
#elif defined(__AVX2__)
    return to_floats(
        bit_cast<Ints>(_mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)))));
#else
    Ints v{};
    for (int i = 0; i < kLanes; ++i) v[i] = p[i];
    return to_floats(v);
#endif
  } else {
    return load(p);
  }
}

}  // namespace
}  // namespace fusereg::augment::FUSEREG_ISA
