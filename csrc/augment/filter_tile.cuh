// The forward kernel of antialiased warps whose rows stay rows (crops, flips, scales). Contract:
// augment.h; the same bits as augmented().
//
// A block takes a tile of a sample's output. The filters of its columns and rows are worked out once, in
// shared memory, and a strip of output rows is filtered along the columns for all the pixels of the
// input that it needs, and then along the rows: what filtered() sums up pixel by pixel, in the same
// order.
#pragma once

#include "augment/augment.h"
#include "augment/augment_math.h"
#include "augment/launch.cuh"
#include "augment/tiles.cuh"
#include "augment/warp_tile.cuh"

namespace fusereg::augment {

inline constexpr int kFilterStrip = kThreads / kFilterTile;  // a thread for each pixel
inline constexpr int kTapsAhead = 4;  // of a column, loaded before the first is used

// The filters of a tile along an axis.
struct FilterAxis {
  Span<float> span[kFilterTile];
  float weight[kFilterTile][kFilterTaps];
  std::int32_t at[kFilterTile][kFilterTaps];  // the pixels that stand for the taps: see fold()
  std::int32_t first, last;                   // of all taps
};

FUSEREG_DEVICE_INLINE std::int32_t least_of_warp(std::int32_t v) {
  return cuda::warp_reduce(v, [](std::int32_t a, std::int32_t b) { return a < b ? a : b; });
}

// A warp for each axis works out its spans, all threads the weights.
__device__ inline void prepare_filters(const Job& job, const TileView& view, std::int32_t row0,
                                       std::int32_t col0, FilterAxis (&axes)[2]) {
  const auto lane = static_cast<int>(cuda::lane_id());
  if (cuda::warp_id() < 2) {
    const auto axis = static_cast<int>(cuda::warp_id());
    const double* const m = view.m + 3 * axis;
    FilterAxis& a = axes[axis];
    const std::int64_t out = axis == 0 ? job.y.w : job.y.h;
    const std::int32_t size = axis == 0 ? view.w : view.h;
    std::int64_t at = (axis == 0 ? col0 : row0) + lane;
    if (at >= out) at = out - 1;
    const double v = axis == 0 ? add(multiply(m[0], static_cast<double>(at)), row_start(m, 0))
                               : add(multiply(m[0], 0.0), row_start(m, at));
    const auto span = make_span<float>(v, extent_of(m), size, job.interpolation, view.mode);
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
    FilterAxis& a = axes[axis];
    const std::int32_t size = axis == 0 ? view.w : view.h;
    for (int i = static_cast<int>(threadIdx.x); i < kFilterTile * kFilterTaps; i += kThreads) {
      const int line = i / kFilterTaps;
      const int k = i % kFilterTaps;
      const std::int32_t tap = a.span[line].first + k;
      if (tap > a.span[line].last) continue;
      a.weight[line][k] = weight_in(a.span[line], tap, job.interpolation);
      a.at[line][k] = fold(tap, size, view.mode);
    }
  }
}

template <int kGroup>
struct FilterColumns {
  float sum[kGroup][kFilterStrip][kFilterColumns];
};

// Rows `strip` and on of the tile, along the columns.
template <class T, int kGroup>
__device__ void filter_columns(const Job& job, const TileView& view, const FilterAxis (&axes)[2],
                               int strip, std::int32_t row0, int channel,
                               FilterColumns<kGroup>& out) {
  const FilterAxis& across = axes[0];
  const FilterAxis& down = axes[1];
  const int columns = across.last - across.first + 1;
  const T* const data = static_cast<const T*>(job.x.data) + view.offset + channel * job.x.channel;
  for (int i = static_cast<int>(threadIdx.x); i < kFilterStrip * columns; i += kThreads) {
    const int r = i / columns;
    const int column = i - r * columns;
    const int line = strip + r;
    if (row0 + line >= job.y.h) break;
    const std::int32_t x = fold(across.first + column, view.w, view.mode);
    const int taps = down.span[line].last - down.span[line].first + 1;
    float fill[kGroup];
    float sum[kGroup] = {};
    FUSEREG_UNROLL
    for (int c = 0; c < kGroup; ++c) fill[c] = static_cast<float>(job.fill[channel + c]);
    FUSEREG_NO_UNROLL
    for (int k = 0; k < taps; k += kTapsAhead) {
      float weight[kTapsAhead];
      bool inside[kTapsAhead];
      T v[kTapsAhead][kGroup];
      FUSEREG_UNROLL
      for (int j = 0; j < kTapsAhead; ++j) {
        weight[j] = k + j < taps ? down.weight[line][k + j] : 0.0f;
        const std::int32_t y = weight[j] != 0.0f ? down.at[line][k + j] : -1;
        inside[j] = x >= 0 && y >= 0;
        // Of what is not asked for the first pixel: a load within a branch would be waited for there.
        const T* const at = inside[j] ? data + y * job.x.row + x * job.x.pixel : data;
        FUSEREG_UNROLL
        for (int c = 0; c < kGroup; ++c) v[j][c] = at[c * job.x.channel];
      }
      compiler_barrier();
      FUSEREG_UNROLL
      for (int j = 0; j < kTapsAhead; ++j) {
        FUSEREG_UNROLL
        for (int c = 0; c < kGroup; ++c) {
          const float value = inside[j] ? tap(&v[j][c]) : fill[c];
          sum[c] = weight[j] != 0.0f ? add(sum[c], multiply(weight[j], value)) : sum[c];
        }
      }
    }
    FUSEREG_UNROLL
    for (int c = 0; c < kGroup; ++c) out.sum[c][r][column] = sum[c];
  }
}

// A pixel of them along the row: see filtered().
template <int kGroup>
FUSEREG_DEVICE_INLINE void filter_row(const Job& job, const FilterAxis (&axes)[2], int line, int r,
                                      int col, int channel, const FilterColumns<kGroup>& in,
                                      float (&v)[kGroup]) {
  const Span<float>& across = axes[0].span[col];
  const float coverage = multiply(across.coverage, axes[1].span[line].coverage);
  float sum[kGroup] = {};
  const int taps = coverage > 0.0f ? across.last - across.first + 1 : 0;
  const int first = across.first - axes[0].first;
  for (int k = 0; k < taps; ++k) {
    const float weight = axes[0].weight[col][k];
    if (weight == 0.0f) continue;
    FUSEREG_UNROLL
    for (int c = 0; c < kGroup; ++c) {
      sum[c] = add(sum[c], multiply(weight, in.sum[c][r][first + k]));
    }
  }
  FUSEREG_UNROLL
  for (int c = 0; c < kGroup; ++c) {
    const auto fill = static_cast<float>(job.fill[channel + c]);
    v[c] = !(coverage > 0.0f) ? fill : coverage == 1.0f ? sum[c] : lerp(fill, sum[c], coverage);
  }
}

template <class T, int kGroup>
__global__ void __launch_bounds__(kThreads, 4)
    augment_filter_kernel(FUSEREG_GRID_CONSTANT(Job, job)) {
  struct Sources {
    TileView views[2];  // of the sample and its partner
    FilterAxis axes[2][2];
    TileMix mix;
    Tiles tiles;
    std::int32_t row0, col0;
  };
  FUSEREG_SHARED(sources, Sources);
  FUSEREG_SHARED(columns, FilterColumns<kGroup>);
  const auto r = static_cast<int>(threadIdx.x) / kFilterTile;
  const auto col = static_cast<int>(threadIdx.x) % kFilterTile;
  const std::int64_t across = ceil_div(job.y.w, kFilterTile);
  Tiles& tiles = sources.tiles;
  const std::int32_t& row0 = sources.row0;
  const std::int32_t& col0 = sources.col0;
  bool more = first_tile(tiles, across * ceil_div(job.y.h, kFilterTile), job.n);
  for (; more; more = next_tile(tiles)) {
    const std::int64_t sample = tiles.at / tiles.of_sample;
    if (way_of(job, sample) != Way::kFilters) continue;
    TileMix& mix = sources.mix;
    if (threadIdx.x == 0) {
      const std::int64_t in_sample = tiles.at - sample * tiles.of_sample;
      sources.row0 = static_cast<std::int32_t>(in_sample / across) * kFilterTile;
      sources.col0 = static_cast<std::int32_t>(in_sample % across) * kFilterTile;
      put_view<Antialias::kNever>(job, sample, sources.views[0]);  // none is of a resized image
    }
    if (threadIdx.x == cuda::kWarpSize) {
      put_mix(job, sample, mix);
      if (mix.partner >= 0) put_view<Antialias::kNever>(job, mix.partner, sources.views[1]);
    }
    __syncthreads();
    const int images =
        mix.partner >= 0 && touches(mix.box, col0, row0, kFilterTile, kFilterTile) ? 2 : 1;
    for (int image = 0; image < images; ++image) {
      prepare_filters(job, sources.views[image], row0, col0, sources.axes[image]);
    }
    const std::int32_t out_col = col0 + col;
    for (int strip = 0; strip < kFilterTile && row0 + strip < job.y.h; strip += kFilterStrip) {
      const std::int32_t out_row = row0 + strip + r;
      const bool inside = out_row < job.y.h && out_col < job.y.w;
      const bool mixes = images == 2 && touches(mix.box, out_col, out_row, 1, 1);
      for (int c = 0; c < job.c; c += kGroup) {
        float v[kGroup] = {};
        for (int image = 0; image < images; ++image) {
          const FilterAxis(&axes)[2] = sources.axes[image];
          const TileView& view = sources.views[image];
          __syncthreads();  // the columns are free, and their filters are there
          filter_columns<T, kGroup>(job, view, axes, strip, row0, c, columns);
          __syncthreads();
          if (!inside || (image == 1 && !mixes)) continue;
          float found[kGroup];
          if (!erased<T, kGroup>(job, view.sample, out_col, out_row, c, found)) {
            filter_row<kGroup>(job, axes, strip + r, r, col, c, columns, found);
            finished<T, kGroup>(job, view.sample, c, found);
          }
          FUSEREG_UNROLL
          for (int k = 0; k < kGroup; ++k) {
            v[k] = image == 0 ? found[k] : mixed(mix, v[k], found[k]);
          }
        }
        if (!inside) continue;
        const std::int64_t at = sources.views[0].sample * job.y.sample + out_row * job.y.row +
                                out_col * job.y.pixel + c * job.y.channel;
        FUSEREG_UNROLL
        for (int k = 0; k < kGroup; ++k)
          write(job.y.data, job.y.type, at + k * job.y.channel, v[k]);
      }
    }
  }
}

template <class T>
void launch_filters(const char* op, const Job& job, int device, void* stream) {
  const std::int64_t tiles =
      job.n * ceil_div(job.y.h, kFilterTile) * ceil_div(job.y.w, kFilterTile);
  const cuda::LaunchConfig config = config_for(tiles * kThreads, device, stream);
  if (job.c == 3) {
    cuda::launch(op, augment_filter_kernel<T, 3>, config, job);
  } else {
    cuda::launch(op, augment_filter_kernel<T, 1>, config, job);
  }
}

}  // namespace fusereg::augment
