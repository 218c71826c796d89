// Filters along the axes of a tile, of which a block works out the weights once: what filtered() sums up
// pixel by pixel, in the same order. For filter_tile.cuh and reduce.cuh.
//
// A strip of output rows is filtered along the columns for all the pixels of the input that it needs, and
// then along the rows. Along the columns a thread takes elements that lie side by side, a vector of each tap:
// of three channels last, all channels alike.
#pragma once

#include "augment/augment.h"
#include "augment/augment_math.h"
#include "augment/launch.cuh"
#include "augment/tiles.cuh"

namespace fusereg::augment {

inline constexpr int kFilterStrip = kThreads / kFilterTile;  // a thread for each pixel
inline constexpr int kTapsAhead = 5;  // of a column, loaded before the first is used
static_assert(kFilterTaps % kTapsAhead == 0, "those behind the last one have no weight");
// Elements of a thread, and the room for them: vectors begin and end outside of what is needed.
template <class T>
inline constexpr int kFilterRun = sizeof(T) == 8 ? 2 : 4;
inline constexpr int kFilterPitch = kFilterColumns + 8;

template <class C>
struct FilterTap {
  C weight;          // zero behind the last one
  std::uint32_t at;  // the pixel that stands for it: see fold()
};

// The filters of a tile along an axis.
template <class C>
struct FilterAxis {
  Span<C> span[kFilterTile];
  FilterTap<C> taps[kFilterTile][kFilterTaps];
  std::int32_t first, last;  // of all taps
};

FUSEREG_DEVICE_INLINE std::int32_t least_of_warp(std::int32_t v) {
  return cuda::warp_reduce(v, [](std::int32_t a, std::int32_t b) { return a < b ? a : b; });
}

// A warp for each axis works out its spans, span_of(axis, line), all threads the weights.
template <class C, class F>
__device__ void prepare_filters(Interpolation how, FillMode mode, std::int32_t w, std::int32_t h,
                                FilterAxis<C> (&axes)[2], const F& span_of) {
  if (cuda::warp_id() < 2) {
    const auto lane = static_cast<int>(cuda::lane_id());
    const auto axis = static_cast<int>(cuda::warp_id());
    FilterAxis<C>& a = axes[axis];
    const Span<C> span = span_of(axis, lane);
    a.span[lane] = span;
    const bool any = span.first <= span.last;
    const std::int32_t first = least_of_warp(any ? span.first : INT32_MAX);
    const std::int32_t last = -least_of_warp(any ? -span.last : INT32_MAX);
    if (lane == 0) {
      a.first = first <= last ? first : 0;
      a.last = first <= last ? last : -1;
    }
  }
  __syncthreads();
  for (int axis = 0; axis < 2; ++axis) {
    FilterAxis<C>& a = axes[axis];
    for (int i = static_cast<int>(threadIdx.x); i < kFilterTile * kFilterTaps; i += kThreads) {
      const int line = i / kFilterTaps;
      const Span<C>& span = a.span[line];
      const std::int32_t tap = span.first + i % kFilterTaps;
      const bool is_one = tap <= span.last;
      a.taps[line][i % kFilterTaps] = {
          is_one ? weight_in(span, tap, how) : C{0},
          static_cast<std::uint32_t>(fold(is_one ? tap : span.last, axis == 0 ? w : h, mode))};
    }
  }
}

// How the elements of a group of channels lie: in a line for each, or all in one. They count from the first
// pixel of the view.
struct FilterLines {
  int count;           // of lines
  int pixel;           // elements of a pixel within a line
  int channel;         // from a channel to the next, of what is filtered
  bool vectors;        // a thread takes a vector, not an element
  std::int32_t begin;  // elements that are filtered: [begin, begin + size)
  std::int32_t size;
  std::int32_t to_first;  // from there to the first pixel that is needed
};
template <class T>
FUSEREG_DEVICE_INLINE FilterLines filter_lines(const Images& x, std::int64_t offset, int group,
                                               std::int32_t first, std::int32_t last) {
  constexpr int kRun = kFilterRun<T>;
  FilterLines to;
  to.pixel = x.channels_last && group == 3 ? 3 : 1;
  to.count = group / to.pixel;
  to.channel = to.pixel == 1 ? kFilterPitch : 1;
  to.vectors =
      x.pixel == to.pixel && x.row % kRun == 0 && cuda::is_aligned(x.data, kRun * sizeof(T));
  to.begin = first * to.pixel;
  to.size = (last - first + 1) * to.pixel;
  to.to_first = to.vectors ? static_cast<std::int32_t>((offset + to.begin) & (kRun - 1)) : 0;
  to.begin -= to.to_first;
  to.size += to.to_first;
  return to;
}

template <class C, int kGroup>
struct alignas(16) FilterColumns {
  C sum[kFilterStrip][kGroup * kFilterPitch];
};

// kRun elements from `data` on in a row, along the columns.
template <int kRun, class T>
FUSEREG_DEVICE_INLINE void filter_column(const T* data, std::uint32_t row, int count,
                                         const FilterTap<Number<T>>* taps, Number<T>* out) {
  using C = Number<T>;
  cuda::Vec<C, kRun> sum = {};
  FUSEREG_NO_UNROLL
  for (int k = 0; k < count; k += kTapsAhead) {
    cuda::Vec<T, kRun> v[kTapsAhead];
    FUSEREG_UNROLL
    for (int j = 0; j < kTapsAhead; ++j) {
      v[j] = cuda::load<kRun>(data + std::uint64_t{taps[k + j].at} * row);
    }
    compiler_barrier();
    FUSEREG_UNROLL
    for (int j = 0; j < kTapsAhead; ++j) {
      const C weight = taps[k + j].weight;
      FUSEREG_UNROLL
      for (int u = 0; u < kRun; ++u) {
        sum[u] = weight != C{0} ? add(sum[u], multiply(weight, tap(&v[j][u]))) : sum[u];
      }
    }
  }
  cuda::store_shared(out, sum);
}

// Rows [strip, strip + kFilterStrip) of the tile, of which there are `rows`, along the columns. `data`: the
// view's first element of the group's first channel. Under constant fill all taps are inside.
template <class T, int kGroup>
__device__ void filter_columns(const T* data, const Images& x, const FilterLines& lines,
                               std::int32_t w, FillMode mode, const FilterAxis<Number<T>>& down,
                               int strip, std::int64_t rows,
                               FilterColumns<Number<T>, kGroup>& out) {
  constexpr int kRun = kFilterRun<T>;
  const int step = lines.vectors ? kRun : 1;
  const int of_line = ceil_div(lines.size, step);
  for (int i = static_cast<int>(threadIdx.x); i < lines.count * kFilterStrip * of_line;
       i += kThreads) {
    const int item = i / of_line;
    const int r = item % kFilterStrip;
    const int line = strip + r;
    if (line >= rows) continue;
    const int at = (i - item * of_line) * step;
    const T* const from = data + item / kFilterStrip * x.channel;
    auto* const to = &out.sum[r][item / kFilterStrip * kFilterPitch + at];
    const std::int32_t element = lines.begin + at;
    const int taps = down.span[line].last - down.span[line].first + 1;
    const auto row = static_cast<std::uint32_t>(x.row);
    if (lines.vectors &&
        (mode == FillMode::kConstant || (element >= 0 && element < w * lines.pixel))) {
      filter_column<kRun>(from + element, row, taps, down.taps[line], to);
      continue;
    }
    FUSEREG_NO_UNROLL
    for (int u = 0; u < step; ++u) {
      const std::int32_t v = element + u;
      const std::int32_t pixel = (v >= 0 ? v : v - lines.pixel + 1) / lines.pixel;
      const std::int64_t in_row = fold(pixel, w, mode) * x.pixel + (v - pixel * lines.pixel);
      filter_column<1>(from + in_row, row, taps, down.taps[line], to + u);
    }
  }
}

// A pixel of them along the row: see filtered(). `in`: of its row.
template <int kGroup, class C>
FUSEREG_DEVICE_INLINE void filter_row(const FilterAxis<C> (&axes)[2], int line, int col,
                                      const FilterLines& lines, const C* in, const double* fill,
                                      C (&v)[kGroup]) {
  const Span<C>& across = axes[0].span[col];
  const C coverage = multiply(across.coverage, axes[1].span[line].coverage);
  C sum[kGroup] = {};
  const int taps = coverage > C{0} ? across.last - across.first + 1 : 0;
  in += lines.to_first + (across.first - axes[0].first) * lines.pixel;
  for (int k = 0; k < taps; ++k, in += lines.pixel) {
    const C weight = axes[0].taps[col][k].weight;
    if (weight == C{0}) continue;
    FUSEREG_UNROLL
    for (int c = 0; c < kGroup; ++c) {
      sum[c] = add(sum[c], multiply(weight, in[c * lines.channel]));
    }
  }
  FUSEREG_UNROLL
  for (int c = 0; c < kGroup; ++c) {
    const auto outside = static_cast<C>(fill[c]);
    v[c] = !(coverage > C{0}) ? outside
           : coverage == C{1} ? sum[c]
                              : lerp(outside, sum[c], coverage);
  }
}

}  // namespace fusereg::augment
