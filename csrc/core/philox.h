// Philox4x32 (Salmon, Moraes, Dror, Shaw 2011, "Parallel random numbers: as easy as 1, 2, 3"):
// random numbers as a pure function of a 64-bit key and a 128-bit counter. One source for the host,
// the device and, in files that are compiled once per instruction set, for vectors of counters.
//
// Rounds: 7 where a draw only decides whether an element is kept, the fewest that pass every test
// of random bits; 10, the default of Random123, where draws become numbers (docs/random-numbers.md).
//
// How fusereg uses it: key = seed; counter = (offset / 4 as 64 bits, chunk as 64 bits), low word
// first, as in cuRAND, whose `subsequence` is our chunk. One counter gives the draws of one chunk
// of elements:
//   16 bits a draw: 8 elements, element e takes half e % 2 (low half first) of word e / 2;
//   32 bits a draw: 4 elements, element e takes word e.
// A call that reserves 4 of a generator's offset owns all chunks of one value of offset / 4.
#pragma once

#include <cstdint>

#include "core/dtype.h"

#if defined(FUSEREG_ISA)
#include "core/simd.h"
#if defined(__SSE2__)
#include <immintrin.h>
#endif
#endif

// Before a loop with at most 10 steps that is to be no loop.
#if defined(__CUDACC__)
#define FUSEREG_UNROLL_10 _Pragma("unroll")
#else
#define FUSEREG_UNROLL_10 _Pragma("GCC unroll 10")
#endif

namespace fusereg {

// The state is kept in words of 64 bits (or vectors of them) of which the low 32 count: the product
// of two low halves is then one instruction, its low half is the next state as it stands, and
// nobody pays for clearing the high one.
template <class W>
struct PhiloxState {
  W word[4];
};

FUSEREG_INLINE std::uint64_t multiply_low(std::uint64_t a, std::uint32_t b) {
  return static_cast<std::uint64_t>(static_cast<std::uint32_t>(a)) * b;
}

#if defined(FUSEREG_ISA)
#if defined(__AVX512F__)
// The unmasked intrinsics of GCC 12 hold an operand that it then warns is not initialized; a mask
// of ones gives the same instruction.
inline constexpr __mmask8 kAllLanes = 0xff;
#endif

FUSEREG_INLINE FUSEREG_ISA::U64Vector multiply_low(FUSEREG_ISA::U64Vector a, std::uint32_t b) {
  const FUSEREG_ISA::U64Vector wide = FUSEREG_ISA::U64Vector{} + b;
  // (a & 0xffffffff) * wide would become the slow 64-bit multiplication.
#if defined(__AVX512F__)
  return bit_cast<FUSEREG_ISA::U64Vector>(
      _mm512_maskz_mul_epu32(kAllLanes, bit_cast<__m512i>(a), bit_cast<__m512i>(wide)));
#elif defined(__AVX2__)
  return bit_cast<FUSEREG_ISA::U64Vector>(
      _mm256_mul_epu32(bit_cast<__m256i>(a), bit_cast<__m256i>(wide)));
#elif defined(__SSE2__)
  return bit_cast<FUSEREG_ISA::U64Vector>(
      _mm_mul_epu32(bit_cast<__m128i>(a), bit_cast<__m128i>(wide)));
#elif defined(__aarch64__)
  return bit_cast<FUSEREG_ISA::U64Vector>(
      vmull_u32(vmovn_u64(bit_cast<uint64x2_t>(a)), vmovn_u64(bit_cast<uint64x2_t>(wide))));
#else
  return (a & 0xffffffffu) * wide;
#endif
}
#endif

inline constexpr std::uint32_t kPhiloxFactor0 = 0xd2511f53u;
inline constexpr std::uint32_t kPhiloxFactor1 = 0xcd9e8d57u;

// One round, with that round's key.
template <class W>
FUSEREG_INLINE void philox_round(PhiloxState<W>& s, W key0, W key1) {
  const W product0 = multiply_low(s.word[0], kPhiloxFactor0);
  const W product1 = multiply_low(s.word[2], kPhiloxFactor1);
  s.word[0] = (product1 >> 32) ^ s.word[1] ^ key0;
  s.word[1] = product1;
  s.word[2] = (product0 >> 32) ^ s.word[3] ^ key1;
  s.word[3] = product0;
}

inline constexpr int kMaskRounds = 7;
inline constexpr int kNumberRounds = 10;
// What the key's halves grow by from round to round.
inline constexpr std::uint32_t kPhiloxStep0 = 0x9e3779b9u;
inline constexpr std::uint32_t kPhiloxStep1 = 0xbb67ae85u;

struct PhiloxWords {
  std::uint32_t word[4];
};

// `low` and `high` are the counter's halves: offset / 4 and the chunk.
template <int kRounds>
FUSEREG_INLINE PhiloxWords philox(std::uint64_t key, std::uint64_t low, std::uint64_t high) {
  auto key0 = static_cast<std::uint32_t>(key);
  auto key1 = static_cast<std::uint32_t>(key >> 32);
#if defined(__CUDA_ARCH__)
  // There, words of 32 bits are the natural ones: a product of 64 bits is a pair of registers.
  std::uint32_t w0 = static_cast<std::uint32_t>(low), w1 = static_cast<std::uint32_t>(low >> 32);
  std::uint32_t w2 = static_cast<std::uint32_t>(high), w3 = static_cast<std::uint32_t>(high >> 32);
  FUSEREG_UNROLL_10
  for (int round = 0; round < kRounds; ++round) {
    std::uint32_t low0, high0, low1, high1;
    asm("{.reg .u64 p; mul.wide.u32 p, %2, %3; mov.b64 {%0, %1}, p;}"
        : "=r"(low0), "=r"(high0)
        : "r"(w0), "n"(kPhiloxFactor0));
    asm("{.reg .u64 p; mul.wide.u32 p, %2, %3; mov.b64 {%0, %1}, p;}"
        : "=r"(low1), "=r"(high1)
        : "r"(w2), "n"(kPhiloxFactor1));
    w0 = high1 ^ w1 ^ key0;
    w1 = low1;
    w2 = high0 ^ w3 ^ key1;
    w3 = low0;
    key0 += kPhiloxStep0;
    key1 += kPhiloxStep1;
  }
  return {{w0, w1, w2, w3}};
#else
  PhiloxState<std::uint64_t> s = {{low, low >> 32, high, high >> 32}};
  FUSEREG_UNROLL_10
  for (int round = 0; round < kRounds; ++round) {
    philox_round<std::uint64_t>(s, key0, key1);
    key0 += kPhiloxStep0;
    key1 += kPhiloxStep1;
  }
  return {{static_cast<std::uint32_t>(s.word[0]), static_cast<std::uint32_t>(s.word[1]),
           static_cast<std::uint32_t>(s.word[2]), static_cast<std::uint32_t>(s.word[3])}};
#endif
}

#if defined(FUSEREG_ISA)
namespace FUSEREG_ISA {

// Chunks that one call of philox_chunks serves: two vectors full of draws.
inline constexpr int kPhiloxChunks = kVectorBytes / 8;

// Pairs the even (or odd) 64-bit lanes of two vectors: a0 b0 a2 b2 ... (or a1 b1 a3 b3 ...).
FUSEREG_INLINE U64Vector interleave_even(U64Vector a, U64Vector b) {
#if defined(__AVX512F__)
  return bit_cast<U64Vector>(
      _mm512_maskz_unpacklo_epi64(kAllLanes, bit_cast<__m512i>(a), bit_cast<__m512i>(b)));
#elif defined(__AVX2__)
  return bit_cast<U64Vector>(_mm256_unpacklo_epi64(bit_cast<__m256i>(a), bit_cast<__m256i>(b)));
#elif defined(__SSE2__)
  return bit_cast<U64Vector>(_mm_unpacklo_epi64(bit_cast<__m128i>(a), bit_cast<__m128i>(b)));
#elif defined(__aarch64__)
  return bit_cast<U64Vector>(vtrn1q_u64(bit_cast<uint64x2_t>(a), bit_cast<uint64x2_t>(b)));
#else
  U64Vector v{};
  for (int i = 0; i < kPhiloxChunks; ++i) v[i] = i % 2 == 0 ? a[i] : b[i - 1];
  return v;
#endif
}
FUSEREG_INLINE U64Vector interleave_odd(U64Vector a, U64Vector b) {
#if defined(__AVX512F__)
  return bit_cast<U64Vector>(
      _mm512_maskz_unpackhi_epi64(kAllLanes, bit_cast<__m512i>(a), bit_cast<__m512i>(b)));
#elif defined(__AVX2__)
  return bit_cast<U64Vector>(_mm256_unpackhi_epi64(bit_cast<__m256i>(a), bit_cast<__m256i>(b)));
#elif defined(__SSE2__)
  return bit_cast<U64Vector>(_mm_unpackhi_epi64(bit_cast<__m128i>(a), bit_cast<__m128i>(b)));
#elif defined(__aarch64__)
  return bit_cast<U64Vector>(vtrn2q_u64(bit_cast<uint64x2_t>(a), bit_cast<uint64x2_t>(b)));
#else
  U64Vector v{};
  for (int i = 0; i < kPhiloxChunks; ++i) v[i] = i % 2 == 0 ? a[i + 1] : b[i];
  return v;
#endif
}

// The lanes' chunks relative to the first: 0, n/2, 1, n/2 + 1, ... so that interleaving words
// leaves whole chunks in their order.
FUSEREG_INLINE U64Vector philox_lanes() {
  U64Vector v{};
  for (int i = 0; i < kPhiloxChunks; ++i)
    v[i] = static_cast<std::uint64_t>(i / 2 + i % 2 * (kPhiloxChunks / 2));
  return v;
}

// The round keys as vectors, made once for many counters. They stay in memory, where the
// exclusive-or reads them: without the barrier, GCC prefers to make each of them again for every
// counter.
template <int kRounds>
struct PhiloxKeys {
  __attribute__((always_inline)) inline explicit PhiloxKeys(std::uint64_t seed) {
    auto key0 = static_cast<std::uint32_t>(seed);
    auto key1 = static_cast<std::uint32_t>(seed >> 32);
    for (int round = 0; round < kRounds; ++round) {
      key[round][0] = U64Vector{} + key0;
      key[round][1] = U64Vector{} + key1;
      key0 += kPhiloxStep0;
      key1 += kPhiloxStep1;
    }
    asm("" : "+m"(key));
  }
  U64Vector key[kRounds][2];
};

// The halves of each lane in each other's place.
FUSEREG_INLINE U64Vector swap_halves(U64Vector v) {
#if defined(__AVX512F__)
  return bit_cast<U64Vector>(
      _mm512_maskz_shuffle_epi32(static_cast<__mmask16>(-1), bit_cast<__m512i>(v), _MM_PERM_CDAB));
#elif defined(__AVX2__)
  return bit_cast<U64Vector>(_mm256_shuffle_epi32(bit_cast<__m256i>(v), 0xb1));
#elif defined(__SSE2__)
  return bit_cast<U64Vector>(_mm_shuffle_epi32(bit_cast<__m128i>(v), 0xb1));
#elif defined(__aarch64__)
  return bit_cast<U64Vector>(vrev64q_u32(bit_cast<uint32x4_t>(v)));
#else
  return (v >> 32) | (v << 32);
#endif
}

// The rounds from this one on, and the words that they give in memory order: chunk after chunk,
// word after word.
template <int kRounds>
FUSEREG_INLINE void philox_words_from(int round, PhiloxState<U64Vector> s,
                                      const PhiloxKeys<kRounds>& keys, U64Vector (&words)[2]) {
  constexpr int kLast = kRounds - 1;
  FUSEREG_UNROLL_10
  for (; round < kLast; ++round) philox_round<U64Vector>(s, keys.key[round][0], keys.key[round][1]);
  // The last one puts two words into a lane: those that are products' lower halves above.
  const U64Vector pair0 = swap_halves(multiply_low(s.word[2], kPhiloxFactor1)) ^
                          ((s.word[1] ^ keys.key[kLast][0]) & 0xffffffffu);
  const U64Vector pair1 = swap_halves(multiply_low(s.word[0], kPhiloxFactor0)) ^
                          ((s.word[3] ^ keys.key[kLast][1]) & 0xffffffffu);
  words[0] = interleave_even(pair0, pair1);
  words[1] = interleave_odd(pair0, pair1);
}

// 4 words of each of the chunks first, first + 1, ...
template <int kRounds>
FUSEREG_INLINE void philox_chunks(const PhiloxKeys<kRounds>& keys, std::uint64_t low,
                                  std::uint64_t first, U64Vector (&words)[2]) {
  const U64Vector high = philox_lanes() + first;
  philox_words_from(0, {{U64Vector{} + low, U64Vector{} + (low >> 32), high, high >> 32}}, keys,
                    words);
}

}  // namespace FUSEREG_ISA
#endif

}  // namespace fusereg
