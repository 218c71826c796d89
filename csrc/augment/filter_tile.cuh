// The forward kernel of antialiased warps whose rows stay rows (crops, flips, scales). Contract:
// augment.h; the same bits as augmented().
//
// A block takes a tile of a sample's output, and filters it along its axes (filter_axes.cuh).
#pragma once

#include "augment/augment.h"
#include "augment/augment_math.h"
#include "augment/filter_axes.cuh"
#include "augment/launch.cuh"
#include "augment/tiles.cuh"
#include "augment/warp_tile.cuh"

namespace fusereg::augment {

// See make_span() and make_spans().
__device__ inline void prepare_filters(const Job& job, const TileView& view, std::int32_t row0,
                                       std::int32_t col0, FilterAxis<float> (&axes)[2]) {
  prepare_filters(job.interpolation, view.mode, view.w, view.h, axes, [&](int axis, int line) {
    const double* const m = view.m + 3 * axis;
    const std::int64_t out = axis == 0 ? job.y.w : job.y.h;
    std::int64_t at = (axis == 0 ? col0 : row0) + line;
    if (at >= out) at = out - 1;
    const double v = axis == 0 ? add(multiply(m[0], static_cast<double>(at)), row_start(m, 0))
                               : add(multiply(m[0], 0.0), row_start(m, at));
    return make_span<float>(v, extent_of(m), axis == 0 ? view.w : view.h, job.interpolation,
                            view.mode);
  });
}

template <class T, int kGroup>
__global__ void __launch_bounds__(kThreads, 4)
    augment_filter_kernel(FUSEREG_GRID_CONSTANT(Job, job)) {
  struct Sources {
    TileView views[2];  // of the sample and its partner
    FilterAxis<float> axes[2][2];
    FilterLines lines[2];
    TileMix mix;
    Tiles tiles;
    std::int32_t row0, col0;
  };
  FUSEREG_SHARED(sources, Sources);
  using Columns = FilterColumns<float, kGroup>;
  FUSEREG_SHARED(columns, Columns);
  const auto r = static_cast<int>(threadIdx.x) / kFilterTile;
  const auto col = static_cast<int>(threadIdx.x) % kFilterTile;
  Tiles& tiles = sources.tiles;
  bool more =
      first_tile(tiles, ceil_div(job.y.w, kFilterTile), ceil_div(job.y.h, kFilterTile), job.n);
  for (; more; more = next_tile(tiles)) {
    const std::int64_t sample = tiles.sample;
    if (way_of(job, sample) != Way::kFilters) continue;
    TileMix& mix = sources.mix;
    const std::int32_t& row0 = sources.row0;
    const std::int32_t& col0 = sources.col0;
    if (threadIdx.x == 0) {
      sources.row0 = static_cast<std::int32_t>(tiles.row) * kFilterTile;
      sources.col0 = static_cast<std::int32_t>(tiles.col) * kFilterTile;
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
      const TileView& view = sources.views[image];
      const FilterAxis<float>(&axes)[2] = sources.axes[image];
      prepare_filters(job, view, row0, col0, sources.axes[image]);
      if (threadIdx.x == 0) {
        sources.lines[image] =
            filter_lines<T>(job.x, view.offset, kGroup, axes[0].first, axes[0].last);
      }
    }
    for (int strip = 0; strip < kFilterTile && row0 + strip < job.y.h; strip += kFilterStrip) {
      for (int c = 0; c < job.c; c += kGroup) {
        float v[kGroup] = {};
        for (int image = 0; image < images; ++image) {
          const FilterAxis<float>(&axes)[2] = sources.axes[image];
          const TileView& view = sources.views[image];
          const FilterLines& lines = sources.lines[image];
          __syncthreads();  // the columns are free, and their filters are there
          // Of the kernel's arguments, so that the compiler knows it to be global memory.
          filter_columns<T, kGroup>(
              static_cast<const T*>(job.x.data) + view.offset + c * job.x.channel, job.x, lines,
              view.w, view.mode, axes[1], strip, job.y.h - row0, columns);
          __syncthreads();
          const std::int32_t out_row = row0 + strip + r;
          const std::int32_t out_col = col0 + col;
          if (out_row >= job.y.h || out_col >= job.y.w) continue;
          if (image == 1 && !touches(mix.box, out_col, out_row, 1, 1)) continue;
          float found[kGroup];
          if (!erased<T, kGroup>(job, view.sample, out_col, out_row, c, found)) {
            filter_row<kGroup>(axes, strip + r, col, lines, columns.sum[r], job.fill + c, found);
            finished<T, kGroup>(job, view.sample, c, found);
          }
          FUSEREG_UNROLL
          for (int k = 0; k < kGroup; ++k) {
            v[k] = image == 0 ? found[k] : mixed(mix, v[k], found[k]);
          }
        }
        const std::int32_t out_row = row0 + strip + r;
        const std::int32_t out_col = col0 + col;
        if (out_row >= job.y.h || out_col >= job.y.w) continue;
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
