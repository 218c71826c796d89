// For the CPU kernels alone, once per instruction set: how vectors of elements come from memory and
// go there: asking ahead, results that go past the cache, parts of vectors.
#pragma once

#include "batch_norm/batch_norm_strips.h"
#include "core/simd_some.h"

namespace fusereg::batch_norm::FUSEREG_ISA {
namespace {

// Which cache something is asked into.
enum class Cache { kFirst, kSecond };

// Asks for what lies `i` elements from p, an address that need not be the tensor's.
template <Cache kCache, class T>
FUSEREG_INLINE void ask_for(const T* p, std::int64_t i) {
  const auto address =
      reinterpret_cast<std::uintptr_t>(p) + static_cast<std::uintptr_t>(i) * sizeof(T);
  __builtin_prefetch(reinterpret_cast<const void*>(address), 0, kCache == Cache::kFirst ? 3 : 2);
}

// Whether to ask where memory is read from end to end: for 16-bit types alone, whose conversions
// keep the processor from looking far ahead. Asking for float32 takes places from its own
// prefetching, which then reads half as fast (measured on Zen 4).
template <class T>
constexpr bool kAsk = sizeof(T) == 2;

constexpr std::int64_t kLineBytes = 64;  // of the cache
template <class T>
constexpr std::int64_t kLineElements = kLineBytes / static_cast<std::int64_t>(sizeof(T));

// p: a multiple of the bytes that are stored.
FUSEREG_INLINE void store_past_the_cache(float* p, Vector<float> v) {
#if defined(__AVX512F__)
  _mm512_stream_ps(p, v);
#elif defined(__AVX2__)
  _mm256_stream_ps(p, v);
#elif defined(__SSE2__)
  _mm_stream_ps(p, v);
#else
  store(p, v);
#endif
}
template <class T>
FUSEREG_INLINE void store_past_the_cache(T* p, Vector<float> v) {
#if defined(__AVX512F__)
  _mm256_stream_si256(reinterpret_cast<__m256i*>(p), narrowed(p, v));
#elif defined(__AVX2__)
  T buffer[kWidth<float>];
  store(buffer, v);
  __m128i words;
  memcpy(&words, buffer, sizeof(words));
  _mm_stream_si128(reinterpret_cast<__m128i*>(p), words);
#else
  store(p, v);
#endif
}
FUSEREG_INLINE void finish_streams() {
#if defined(__SSE2__)
  _mm_sfence();
#endif
}

// Results of at least so many bytes would drive everything else out of the caches, and would have
// to be read before they are written.
constexpr std::int64_t kStreamBytes = std::int64_t{2} << 20;

// How many elements there are from p to the next line of the cache.
template <class T>
FUSEREG_INLINE std::int64_t to_next_line(const T* p) {
  const auto in_line = static_cast<std::int64_t>(reinterpret_cast<std::uintptr_t>(p) % kLineBytes);
  return (kLineBytes - in_line) % kLineBytes / static_cast<std::int64_t>(sizeof(T));
}

// All ones in the first n lanes.
FUSEREG_INLINE MaskVector<float> first_lanes(std::int64_t n) {
#if defined(__AVX512F__)
  return mask_of_bits<float>((1u << n) - 1u);
#else
  MaskVector<float> lane{};
  for (int i = 0; i < kWidth<float>; ++i) lane[i] = static_cast<Word<float> >(i);
  return lane < static_cast<Word<float> >(n);
#endif
}

}  // namespace
}  // namespace fusereg::batch_norm::FUSEREG_ISA
