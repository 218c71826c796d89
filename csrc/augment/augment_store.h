// Vectors of values to the result, in its dtype and layout. For the CPU kernels, once per instruction
// set. The roundings are those of augment_sampling.h, lane by lane.
#pragma once

#include "augment/augment_gather.h"

namespace fusereg::augment::FUSEREG_ISA {
namespace {

// --- one vector ---
// a > b ? a : b and a < b ? a : b: of a NaN, b.
FUSEREG_INLINE Floats larger(Floats a, Floats b) {
#if defined(__AVX512F__)
  return _mm512_maskz_max_ps(0xffff, a, b);
#elif defined(__AVX2__)
  return _mm256_max_ps(a, b);
#elif defined(__SSE2__)
  return _mm_max_ps(a, b);
#else
  return select(a > b, a, b);
#endif
}
FUSEREG_INLINE Floats lesser(Floats a, Floats b) {
#if defined(__AVX512F__)
  return _mm512_maskz_min_ps(0xffff, a, b);
#elif defined(__AVX2__)
  return _mm256_min_ps(a, b);
#elif defined(__SSE2__)
  return _mm_min_ps(a, b);
#else
  return select(a < b, a, b);
#endif
}

template <class U>
FUSEREG_INLINE void store_as(U* to, Floats v) {
  if constexpr (sizeof(U) > 1) {
    store(to, v);
  } else {
    const Floats within = lesser(larger(v, Floats{}), broadcast(255.0f));
    const Ints bytes = bit_cast<Ints>(within + 12582912.0f) & 255;
#if defined(__AVX512F__)
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to),
                     _mm512_maskz_cvtepi32_epi8(0xffff, bit_cast<__m512i>(bytes)));
#elif defined(__AVX2__)
    const auto b = bit_cast<__m256i>(bytes);
    const __m128i words =
        _mm_packus_epi32(_mm256_castsi256_si128(b), _mm256_extracti128_si256(b, 1));
    _mm_storel_epi64(reinterpret_cast<__m128i*>(to), _mm_packus_epi16(words, words));
#elif defined(__SSE2__)
    const auto b = bit_cast<__m128i>(bytes);
    const __m128i words = _mm_packs_epi32(b, b);
    const std::int32_t four = _mm_cvtsi128_si32(_mm_packus_epi16(words, words));
    memcpy(to, &four, 4);
#else
    for (int i = 0; i < kLanes; ++i) to[i] = static_cast<std::uint8_t>(bytes[i]);
#endif
  }
}

// Past the cache (kPast; `to` is aligned to what is stored then), or as usual.
template <bool kPast, class U>
FUSEREG_INLINE void put(U* to, Floats v) {
#if defined(__SSE2__)
  constexpr int kStored = kLanes * static_cast<int>(sizeof(U));
  if constexpr (kPast && sizeof(U) == 4) {
#if defined(__AVX512F__)
    return _mm512_stream_ps(to, v);
#elif defined(__AVX2__)
    return _mm256_stream_ps(to, v);
#else
    return _mm_stream_ps(to, v);
#endif
  }
#if defined(__AVX2__)
  if constexpr (kPast && kStored == 32) {
    __m256i stored;
    store_as(reinterpret_cast<U*>(&stored), v);
    return _mm256_stream_si256(reinterpret_cast<__m256i*>(to), stored);
  }
#endif
  if constexpr (kPast && kStored == 16) {
    __m128i stored;
    store_as(reinterpret_cast<U*>(&stored), v);
    return _mm_stream_si128(reinterpret_cast<__m128i*>(to), stored);
  }
#endif
  store_as(to, v);
}

// --- three channels last ---
// Lane i takes element index(i) of a and b together.
template <class F>
FUSEREG_INLINE Floats shuffled(Floats a, Floats b, const F& index) {
  Ints mask;
  for (int i = 0; i < kLanes; ++i) mask[i] = index(i);
  return __builtin_shuffle(a, b, mask);
}

FUSEREG_INLINE Floats reversed(Floats v) {
  return shuffled(v, v, [](int i) { return kLanes - 1 - i; });
}

// Three planes of kLanes pixels as pixels of three channels.
FUSEREG_INLINE void interleave(Floats v0, Floats v1, Floats v2, Floats (&out)[3]) {
  FUSEREG_UNROLL_10
  for (int k = 0; k < 3; ++k) {
    const int base = k * kLanes;
    const Floats two = shuffled(v0, v1, [base](int i) {
      const int channel = (base + i) % 3;
      return channel < 2 ? channel * kLanes + (base + i) / 3 : 0;
    });
    out[k] = shuffled(two, v2,
                      [base](int i) { return (base + i) % 3 < 2 ? i : kLanes + (base + i) / 3; });
  }
}
// The other way.
FUSEREG_INLINE void separate(const Floats (&in)[3], Floats (&out)[3]) {
  FUSEREG_UNROLL_10
  for (int k = 0; k < 3; ++k) {
    const Floats two =
        shuffled(in[0], in[1], [k](int i) { return 3 * i + k < 2 * kLanes ? 3 * i + k : 0; });
    out[k] = shuffled(two, in[2],
                      [k](int i) { return 3 * i + k < 2 * kLanes ? i : 3 * i + k - kLanes; });
  }
}

// --- runs of pixels ---
#if defined(__AVX2__)
// Bytes of three channels last, regrouped before they become floats: a shuffle of bytes moves four
// times as many elements as one of floats.

// Byte i is number index(i) of those from `from` on; zero where it is not among them.
template <class F>
FUSEREG_INLINE __m128i shuffled_bytes(const std::uint8_t* from, const F& index) {
  typedef std::int8_t Bytes __attribute__((vector_size(16)));
  Bytes mask;
  for (int i = 0; i < 16; ++i) {
    const int at = index(i);
    mask[i] = static_cast<std::int8_t>(at >= 0 && at < 16 ? at : -1);
  }
  return _mm_shuffle_epi8(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)),
                          bit_cast<__m128i>(mask));
}

FUSEREG_INLINE Floats bytes_to_floats(__m128i bytes) {
#if defined(__AVX512F__)
  return to_floats(bit_cast<Ints>(_mm512_maskz_cvtepu8_epi32(0xffff, bytes)));
#else
  return to_floats(bit_cast<Ints>(_mm256_cvtepu8_epi32(bytes)));
#endif
}

// 8 pixels from the last to the first: bytes 8 k to 8 k + 7 of these, in the low half.
template <int k>
FUSEREG_INLINE __m128i mirrored_third(const std::uint8_t* from) {
  constexpr int kFrom = k == 0 ? 8 : k == 1 ? 4 : 0;
  return shuffled_bytes(from + kFrom, [](int i) {
    const int to = 8 * k + i % 8;
    return 21 - 3 * (to / 3) + to % 3 - kFrom;
  });
}

// kLanes pixels of three channels, from the last to the first.
FUSEREG_INLINE void load_mirrored(const std::uint8_t* from, Floats (&v)[3]) {
#if defined(__AVX512F__)
  const std::uint8_t* const after = from + 24;
  v[0] = bytes_to_floats(_mm_unpacklo_epi64(mirrored_third<0>(after), mirrored_third<1>(after)));
  v[1] = bytes_to_floats(_mm_unpacklo_epi64(mirrored_third<2>(after), mirrored_third<0>(from)));
  v[2] = bytes_to_floats(_mm_unpacklo_epi64(mirrored_third<1>(from), mirrored_third<2>(from)));
#else
  v[0] = bytes_to_floats(mirrored_third<0>(from));
  v[1] = bytes_to_floats(mirrored_third<1>(from));
  v[2] = bytes_to_floats(mirrored_third<2>(from));
#endif
}

// Channel k of kLanes pixels, mirrored or not.
template <bool kMirrored, int k>
FUSEREG_INLINE Floats load_channel(const std::uint8_t* from) {
  auto place = [](int i) {
    const int pixel = i % kLanes;
    return 3 * (kMirrored ? kLanes - 1 - pixel : pixel) + k;
  };
  __m128i bytes = shuffled_bytes(from, place);
  if constexpr (kLanes == 16) {
    bytes = _mm_or_si128(bytes, shuffled_bytes(from + 16, [&](int i) { return place(i) - 16; }));
    bytes = _mm_or_si128(bytes, shuffled_bytes(from + 32, [&](int i) { return place(i) - 32; }));
  } else {
    // What is at 16 to 23 is at 8 to 15 of those from 8 on.
    bytes = _mm_or_si128(
        bytes, shuffled_bytes(from + 8, [&](int i) { return place(i) < 16 ? -1 : place(i) - 8; }));
  }
  return bytes_to_floats(bytes);
}
#endif

// kLanes pixels of three channels as they lie, or mirrored.
template <class T>
FUSEREG_INLINE void load_pixels(const T* from, bool mirrored, Floats (&v)[3]) {
#if defined(__AVX2__)
  if constexpr (sizeof(T) == 1) {
    if (mirrored) return load_mirrored(from, v);
  }
#endif
  for (int k = 0; k < 3; ++k) v[k] = load_run(from + k * kLanes);
  if (!mirrored) return;
  Floats planes[3];
  separate(v, planes);
  interleave(reversed(planes[0]), reversed(planes[1]), reversed(planes[2]), v);
}

// The same as planes.
template <bool kMirrored, class T>
FUSEREG_INLINE void load_planes(const T* from, Floats (&planes)[3]) {
#if defined(__AVX2__)
  if constexpr (sizeof(T) == 1) {
    planes[0] = load_channel<kMirrored, 0>(from);
    planes[1] = load_channel<kMirrored, 1>(from);
    planes[2] = load_channel<kMirrored, 2>(from);
    return;
  }
#endif
  const Floats v[3] = {load_run(from), load_run(from + kLanes), load_run(from + 2 * kLanes)};
  separate(v, planes);
  for (int k = 0; k < 3 && kMirrored; ++k) planes[k] = reversed(planes[k]);
}

}  // namespace
}  // namespace fusereg::augment::FUSEREG_ISA
