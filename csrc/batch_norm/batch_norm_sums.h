// For the CPU kernels alone, once per instruction set: float32 sums over short runs, which then go
// to float64.
#pragma once

#include "batch_norm/batch_norm_strips.h"

namespace fusereg::batch_norm::FUSEREG_ISA {
namespace {

// Of one channel whose elements lie in lines: a sum for each lane.
template <class C>
struct LaneSums {
  static constexpr int kWide = static_cast<int>(sizeof(double) / sizeof(C));
  Block<C> first, second;
  Vector<double> wide_first[kVectors<C>][kWide];
  Vector<double> wide_second[kVectors<C>][kWide];
  int terms;
};

template <class C>
FUSEREG_INLINE void flush(LaneSums<C>& sums, Block<C>& first, Block<C>& second) {
  FUSEREG_EACH_VECTOR(v) {
    add_widened(first.v[v], sums.wide_first[v]);
    add_widened(second.v[v], sums.wide_second[v]);
    first.v[v] = second.v[v] = Vector<C>{};
  }
}

// Lane i and lane i + width, until one is left.
template <int kN, int kWide>
FUSEREG_INLINE double add_lanes(const Vector<double> (&sums)[kN][kWide]) {
  constexpr int kW = kWidth<double>;
  static_assert(kN * kWide * kW == kLanes, "one sum a lane");
  Vector<double> total[kN * kWide];
  memcpy(total, sums, sizeof(total));
  for (int n = kN * kWide / 2; n >= 1; n /= 2) {
    for (int i = 0; i < n; ++i) total[i] += total[i + n];
  }
  double lanes[kW];
  memcpy(lanes, total, sizeof(lanes));
  for (int n = kW / 2; n >= 1; n /= 2) {
    for (int i = 0; i < n; ++i) lanes[i] += lanes[i + n];
  }
  return lanes[0];
}

// Of the channels of a tile whose rows are lines: a sum for each column.
template <class C, std::int64_t kColumns = kMaxColumns>
struct ColumnSums {
  C first[kColumns + kPad], second[kColumns + kPad];
  double wide_first[kColumns], wide_second[kColumns];
  int terms;
  void clear(std::int64_t n) {
    terms = 0;
    const auto count = static_cast<std::size_t>(n);
    memset(first, 0, (count + kPad) * sizeof(C));
    memset(second, 0, (count + kPad) * sizeof(C));
    memset(wide_first, 0, count * sizeof(double));
    memset(wide_second, 0, count * sizeof(double));
  }
  void flush(std::int64_t n) {
    for (std::int64_t i = 0; i < n; ++i) {
      wide_first[i] += static_cast<double>(first[i]);
      wide_second[i] += static_cast<double>(second[i]);
      first[i] = second[i] = C(0);
    }
    terms = 0;
  }
};

}  // namespace
}  // namespace fusereg::batch_norm::FUSEREG_ISA
