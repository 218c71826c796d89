// Bernoulli draws: which elements are kept, as a pure function of (seed, offset, index).
//
//   keep_i = draw(index_i) < threshold
//
// Draws have 16 bits (8 elements a Philox call), threshold = round(65536 * (1 - p)), unless that
// misses p or 1 - p by more than 1 part in 1024; then they have 32 (4 elements a call). `keep` is
// what the threshold really gives, threshold / 2^bits: what scales by it is unbiased for every p.
// p = 1 has threshold 0. draw_simd.h has the same draws as masks of vectors.
//
// Where 1 - p has at most kMostDigits binary digits, a draw has just these, each from a call of its
// own that serves 128 elements: of the element with index i, digit d (0: the lowest) is the
// complement of bit i % 128 of the call with the chunk i / 128 + d * 2^57. The comparison is then
// one AND (of a 0 in the threshold) or OR (of a 1) a digit, from the lowest on, of whole words.
#pragma once

#include <cstdint>

#include "core/philox.h"

namespace fusereg {

inline constexpr int kMostDigits = 2;

struct Draw {
  int bits = 16;
  std::uint32_t threshold = 0;
  double keep = 0.0;
};

// Needs 0 < p <= 1.
Draw make_draw(double p);

// As FUSEREG_INLINE, of a class.
#if defined(__CUDACC__)
#define FUSEREG_MEMBER __host__ __device__ __forceinline__
#else
#define FUSEREG_MEMBER inline __attribute__((always_inline))
#endif

// A call's (seed, offset), or where the kernel finds it: two 64-bit integers in memory of the
// tensors' device.
struct SeedPair {
  std::uint64_t seed = 0;
  std::uint64_t offset = 0;
  const std::int64_t* pair = nullptr;
  // Philox's key, and the low half of its counter.
  FUSEREG_MEMBER std::uint64_t key() const {
    return pair == nullptr ? seed : static_cast<std::uint64_t>(pair[0]);
  }
  FUSEREG_MEMBER std::uint64_t low() const {
    return (pair == nullptr ? offset : static_cast<std::uint64_t>(pair[1])) / 4;
  }
};

// Elements that are drawn together: one Philox call of 16-bit draws, two of 32-bit draws.
inline constexpr int kGroup = 8;

// The chunk of 128 elements' digit.
FUSEREG_INLINE std::uint64_t digit_chunk(std::uint64_t chunk, int digit) {
  return chunk + (static_cast<std::uint64_t>(digit) << 57);
}

// Folds the bits of a digit into those of the lower ones, `kept` being 0 at first.
template <class W>
FUSEREG_INLINE W fold_digit(W kept, W bits, std::uint32_t threshold, int digit) {
  return (threshold >> digit & 1u) != 0 ? kept | bits : kept & bits;
}

// The 8 bits of a group in a call that serves 128 elements.
FUSEREG_INLINE std::uint32_t bits_of_group(const PhiloxWords& w, std::uint64_t group) {
  // No array is indexed by what is known at run time only: on a device it would be in memory.
  const auto part = static_cast<unsigned>(group % 16);
  const std::uint32_t first = part < 8 ? w.word[0] : w.word[2];
  const std::uint32_t second = part < 8 ? w.word[1] : w.word[3];
  return ((part & 4u) == 0 ? first : second) >> (part % 4 * 8) & 0xffu;
}

// The masks below for draws of few digits. The lowest digit of a threshold is 1: it had fewer else.
FUSEREG_INLINE std::uint32_t keep_mask_of_digits(std::uint64_t seed, std::uint64_t low,
                                                 std::uint64_t group, const Draw& draw) {
  static_assert(kMostDigits == 2, "a call for each digit");
  const std::uint64_t chunk = group / 16;
  std::uint32_t kept = bits_of_group(philox<kMaskRounds>(seed, low, chunk), group);
  if (draw.bits == 2) {
    const PhiloxWords w = philox<kMaskRounds>(seed, low, digit_chunk(chunk, 1));
    kept = fold_digit(kept, bits_of_group(w, group), draw.threshold, 1);
  }
  return kept;
}

// Bit e is set if element e of the group is kept. kBits is 32, or 16 for all other draws.
template <int kBits>
FUSEREG_INLINE std::uint32_t keep_mask(std::uint64_t seed, std::uint64_t low, std::uint64_t group,
                                       const Draw& draw) {
  const std::uint32_t threshold = draw.threshold;
  std::uint32_t mask = 0;
  if constexpr (kBits == 16) {
    if (draw.bits < 16) return keep_mask_of_digits(seed, low, group, draw);
    const PhiloxWords w = philox<kMaskRounds>(seed, low, group);
    FUSEREG_UNROLL_10
    for (int i = 0; i < 4; ++i) {
      mask |= static_cast<std::uint32_t>((w.word[i] & 0xffffu) < threshold) << (2 * i);
      mask |= static_cast<std::uint32_t>((w.word[i] >> 16) < threshold) << (2 * i + 1);
    }
  } else {
    FUSEREG_UNROLL_10
    for (int half = 0; half < 2; ++half) {
      const PhiloxWords w =
          philox<kMaskRounds>(seed, low, 2 * group + static_cast<std::uint64_t>(half));
      FUSEREG_UNROLL_10
      for (int i = 0; i < 4; ++i) {
        mask |= static_cast<std::uint32_t>(w.word[i] < threshold) << (4 * half + i);
      }
    }
  }
  return mask;
}

// The same where the bits of a draw are known at run time; without any, all are kept.
FUSEREG_INLINE std::uint32_t keep_mask(std::uint64_t seed, std::uint64_t low, std::uint64_t group,
                                       const Draw& draw) {
  if (draw.bits == 0) return 0xffu;
  return draw.bits == 32 ? keep_mask<32>(seed, low, group, draw)
                         : keep_mask<16>(seed, low, group, draw);
}

// The mask of the 8 elements from this index on, which need not begin a group.
FUSEREG_INLINE std::uint32_t keep_mask_at(std::uint64_t seed, std::uint64_t low,
                                          std::uint64_t index, const Draw& draw) {
#if defined(__CUDA_ARCH__)
  // Unknown again at each call: kernels with this among much else have no registers to keep the
  // keys of all rounds.
  asm volatile("" : "+l"(seed));
#endif
  const std::uint64_t group = index / kGroup;
  const auto within = static_cast<unsigned>(index % kGroup);
  std::uint32_t mask = keep_mask(seed, low, group, draw) >> within;
  if (within != 0) mask |= keep_mask(seed, low, group + 1, draw) << (kGroup - within);
  return mask & 0xffu;
}

}  // namespace fusereg
