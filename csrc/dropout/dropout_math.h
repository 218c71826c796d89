// The draws of dropout.h, one at a time, on the host and on the device.
#pragma once

#include "core/philox.h"

namespace fusereg::dropout {

// Elements that are drawn together: one Philox call of 16-bit draws, two of 32-bit draws.
inline constexpr int kGroup = 8;

// Bit e is set if element e of the group is kept.
template <int kBits>
FUSEREG_INLINE std::uint32_t keep_mask(std::uint64_t seed, std::uint64_t low, std::uint64_t group,
                                       std::uint32_t threshold) {
  std::uint32_t mask = 0;
  if constexpr (kBits == 16) {
    const PhiloxWords w = philox(seed, low, group);
    FUSEREG_UNROLL_10
    for (int i = 0; i < 4; ++i) {
      mask |= static_cast<std::uint32_t>((w.word[i] & 0xffffu) < threshold) << (2 * i);
      mask |= static_cast<std::uint32_t>((w.word[i] >> 16) < threshold) << (2 * i + 1);
    }
  } else {
    FUSEREG_UNROLL_10
    for (int half = 0; half < 2; ++half) {
      const PhiloxWords w = philox(seed, low, 2 * group + static_cast<std::uint64_t>(half));
      FUSEREG_UNROLL_10
      for (int i = 0; i < 4; ++i) {
        mask |= static_cast<std::uint32_t>(w.word[i] < threshold) << (4 * half + i);
      }
    }
  }
  return mask;
}

FUSEREG_INLINE bool is_kept(std::uint64_t seed, std::uint64_t low, std::uint64_t index, int bits,
                            std::uint32_t threshold) {
  const std::uint64_t group = index / kGroup;
  const std::uint32_t mask = bits == 16 ? keep_mask<16>(seed, low, group, threshold)
                                        : keep_mask<32>(seed, low, group, threshold);
  return (mask >> (index % kGroup) & 1u) != 0;
}

}  // namespace fusereg::dropout
