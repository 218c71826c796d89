// Draws that the elements of a row share, looked up for elements that may be of several rows.
#pragma once

#include <cstdint>

#include "core/draw.h"

namespace fusereg {

// The draws of N elements that follow each other in memory, where rows share them: memory is
// [outer, repeat, inner], and the element at [o, r, i] has draw first + o * inner + i. Bit e is set
// if element at + e is kept; mask_of(group) gives a group's draws.
template <int N, class Index, class MaskOf>
FUSEREG_INLINE std::uint32_t rows_mask(Index at, Index repeat, Index inner, std::uint64_t first,
                                       const MaskOf& mask_of) {
  const Index outer = at / (repeat * inner);
  const Index within = at - outer * (repeat * inner);
  Index r = within / inner;
  Index i = within - r * inner;
  std::uint64_t index = first + static_cast<std::uint64_t>(outer) * inner + i;
  std::uint64_t group = index / kGroup;
  std::uint32_t draws = mask_of(group);
  std::uint32_t mask = 0;
  for (int e = 0; e < N; ++e) {
    if (index / kGroup != group) {
      group = index / kGroup;
      draws = mask_of(group);
    }
    mask |= (draws >> (index % kGroup) & 1u) << e;
    ++index;
    if (++i < inner) continue;
    i = 0;
    if (++r < repeat) {
      index -= inner;
    } else {
      r = 0;
    }
  }
  return mask;
}

}  // namespace fusereg
