// Draws that the elements of a row share, looked up for elements that may be of several rows.
#pragma once

#include <cstdint>

#include "core/draw.h"

namespace fusereg {

// Memory [outer, repeat, inner], where the element at [o, r, i] has draw first + o * inner + i, and
// what `step` elements are in it: a kernel that is told does not divide in its loop.
struct RowSteps {
  std::int64_t repeat = 1;
  std::int64_t inner = 1;
  std::int64_t step_start = 0, step_repeat = 0, step_inner = 0;
};
inline RowSteps row_steps(std::int64_t repeat, std::int64_t inner, std::int64_t step) {
  return {repeat, inner, step / inner / repeat * inner, step / inner % repeat, step % inner};
}

// Goes through such memory, from element `at` on.
template <class Index>
class RowWalk {
 public:
  FUSEREG_MEMBER RowWalk(const RowSteps& steps, Index at, std::uint64_t first) : steps_(steps) {
    const Index line = at / inner();
    i_ = at - line * inner();
    const Index outer = line / repeat();
    r_ = line - outer * repeat();
    start_ = first + static_cast<std::uint64_t>(outer) * inner();
  }

  FUSEREG_MEMBER void next() {
    start_ += static_cast<std::uint64_t>(steps_.step_start);
    r_ += static_cast<Index>(steps_.step_repeat);
    i_ += static_cast<Index>(steps_.step_inner);
    if (i_ >= inner()) {
      i_ -= inner();
      ++r_;
    }
    if (r_ >= repeat()) {
      r_ -= repeat();
      start_ += inner();
    }
  }

  // The draws of the N elements from here on: bit e is set if element e is kept. mask_of(group)
  // gives a group's draws.
  template <int N, class MaskOf>
  FUSEREG_MEMBER std::uint32_t mask(const MaskOf& mask_of) const {
    Index r = r_;
    Index i = i_;
    std::uint64_t index = start_ + i;
    std::uint64_t group = ~std::uint64_t{0};
    std::uint32_t draws = 0;
    std::uint32_t mask = 0;
    // By runs of elements that have consecutive draws of one group, or (inner = 1) share one.
    for (int e = 0; e < N;) {
      if (index / kGroup != group) {
        group = index / kGroup;
        draws = mask_of(group);
      }
      const auto place = static_cast<unsigned>(index % kGroup);
      std::uint32_t bits = draws >> place;
      Index run = repeat() - r;
      if (inner() == 1) {
        bits = 0u - (bits & 1u);
      } else {
        run = inner() - i < kGroup - place ? inner() - i : static_cast<Index>(kGroup - place);
      }
      mask = (mask & ((1u << e) - 1u)) | bits << e;
      if (run >= static_cast<Index>(N - e)) break;
      e += static_cast<int>(run);
      if (inner() == 1) {
        ++index;
        r = 0;
        continue;
      }
      index += run;
      i += run;
      if (i < inner()) continue;
      i = 0;
      if (++r < repeat()) {
        index -= inner();
      } else {
        r = 0;
      }
    }
    return mask & ((1u << N) - 1u);
  }

 private:
  FUSEREG_MEMBER Index repeat() const { return static_cast<Index>(steps_.repeat); }
  FUSEREG_MEMBER Index inner() const { return static_cast<Index>(steps_.inner); }

  const RowSteps& steps_;
  Index r_, i_;
  std::uint64_t start_;  // the draw of [o, r, 0]
};

}  // namespace fusereg
