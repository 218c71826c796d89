// Bernoulli draws: which elements are kept, as a pure function of (seed, offset, index).
//
//   keep_i = draw(index_i) < threshold
//
// Draws have 16 bits (8 elements a Philox call), threshold = round(65536 * (1 - p)), unless that
// misses p or 1 - p by more than 1 part in 1024; then they have 32 (4 elements a call). `keep` is
// what the threshold really gives, threshold / 2^bits: what scales by it is unbiased for every p.
// p = 1 has threshold 0. draw_simd.h has the same draws as masks of vectors.
#pragma once

#include <cstdint>

#include "core/philox.h"

namespace fusereg {

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

// Bit e is set if element e of the group is kept.
template <int kBits>
FUSEREG_INLINE std::uint32_t keep_mask(std::uint64_t seed, std::uint64_t low, std::uint64_t group,
                                       std::uint32_t threshold) {
  std::uint32_t mask = 0;
  if constexpr (kBits == 16) {
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
  if (draw.bits == 16) return keep_mask<16>(seed, low, group, draw.threshold);
  if (draw.bits == 32) return keep_mask<32>(seed, low, group, draw.threshold);
  return 0xffu;
}

// The mask of the 8 elements from this index on, which need not begin a group.
FUSEREG_INLINE std::uint32_t keep_mask_at(std::uint64_t seed, std::uint64_t low,
                                          std::uint64_t index, const Draw& draw) {
  const std::uint64_t group = index / kGroup;
  const auto within = static_cast<unsigned>(index % kGroup);
  std::uint32_t mask = keep_mask(seed, low, group, draw) >> within;
  if (within != 0) mask |= keep_mask(seed, low, group + 1, draw) << (kGroup - within);
  return mask & 0xffu;
}

}  // namespace fusereg
