// The kernel that makes the resized images of samples that turn. Contract: augment.h.
//
// A block takes a tile of a sample's z, and filters it along its axes (filter_axes.cuh); pixel by pixel where
// its filters are too wide for that. z lies at the beginning of its sample, in rows as long as x's. Blocks of
// other samples, and of what lies outside of z, have nothing to do.
#pragma once

#include "augment/augment.h"
#include "augment/augment_math.h"
#include "augment/filter_axes.cuh"
#include "augment/launch.cuh"
#include "augment/tiles.cuh"

namespace fusereg::augment {

// What all of a tile's threads read, in shared memory, where initializers are not run.
struct ReducedTile {
  Reduced z;
  std::int64_t offset;  // of the sample, in elements
  std::int32_t w, h;
  bool reduces;
};

template <class T>
__global__ void __launch_bounds__(kThreads, 4)
    augment_reduce_kernel(FUSEREG_GRID_CONSTANT(Job, job)) {
  using C = Number<T>;
  constexpr int kMost =
      sizeof(C) == 8 ? 1 : 3;  // channels at once: what shared memory has room for
  struct Sources {
    ReducedTile tile;
    FilterAxis<C> axes[2];
    FilterLines lines;
    Tiles tiles;
  };
  using Columns = FilterColumns<C, kMost>;
  FUSEREG_SHARED(sources, Sources);
  FUSEREG_SHARED(columns, Columns);
  const ReducedTile& tile = sources.tile;
  const Reduced& z = tile.z;
  const FilterLines& lines = sources.lines;
  Tiles& tiles = sources.tiles;
  const auto r = static_cast<int>(threadIdx.x) / kFilterTile;
  const auto lane = static_cast<int>(threadIdx.x) % kFilterTile;
  const int group = job.c == kMost ? kMost : 1;
  bool more =
      first_tile(tiles, ceil_div(job.x.w, kFilterTile), ceil_div(job.x.h, kFilterTile), job.n);
  for (; more; more = next_tile(tiles)) {
    const std::int64_t sample = tiles.sample;
    if (threadIdx.x == 0) {
      View view;
      view_of(job, job.x, sample, view);
      sources.tile.offset = view.offset;
      sources.tile.w = static_cast<std::int32_t>(view.x.w);
      sources.tile.h = static_cast<std::int32_t>(view.x.h);
      sources.tile.reduces = view.reduces;
      if (view.reduces) sources.tile.z = reduced_of(view.m, view.x);
    }
    __syncthreads();
    const auto row0 = static_cast<std::int32_t>(tiles.row) * kFilterTile;
    const auto col0 = static_cast<std::int32_t>(tiles.col) * kFilterTile;
    if (!tile.reduces || row0 >= z.h || col0 >= z.w) continue;
    const bool fits = filters_fit(job, z.by_x, z.by_y);
    FilterAxis<C>(&axes)[2] = sources.axes;
    if (fits) {
      prepare_filters(job.interpolation, FillMode::kConstant, tile.w, tile.h, axes,
                      [&](int axis, int line) {
                        const std::int32_t at = (axis == 0 ? col0 : row0) + line;
                        const std::int32_t end = axis == 0 ? z.w : z.h;
                        return reduced_span<C>(at < end ? at : end - 1, axis == 0 ? z.by_x : z.by_y,
                                               axis == 0 ? tile.w : tile.h, job.interpolation);
                      });
      if (threadIdx.x == 0) {
        sources.lines = filter_lines<T>(job.x, tile.offset, group, axes[0].first, axes[0].last);
      }
    }
    // Of the kernel's arguments, so that the compiler knows it to be global memory.
    const T* const images = static_cast<const T*>(job.x.data) + tile.offset;
    const std::int32_t col = col0 + lane;
    for (int strip = 0; strip < kFilterTile && row0 + strip < z.h; strip += kFilterStrip) {
      const std::int32_t row = row0 + strip + r;
      const bool inside = row < z.h && col < z.w;
      const std::int64_t at = tile.offset + row * job.x.row + col * job.x.pixel;
      for (int c = 0; c < job.c; c += group) {
        if (fits) {
          __syncthreads();  // the columns are free, and their filters are there
          filter_columns<T, kMost>(images + c * job.x.channel, job.x, lines, tile.w,
                                   FillMode::kConstant, axes[1], strip, z.h - row0, columns);
          __syncthreads();
        }
        if (!inside) continue;
        for (int k = 0; k < group; ++k) {
          C v[1];
          if (fits) {
            const double fill = 0.0;
            filter_row<1>(axes, strip + r, lane, lines, columns.sum[r] + k * lines.channel, &fill,
                          v);
          } else {
            const Spans<C> spans = {reduced_span<C>(col, z.by_x, tile.w, job.interpolation),
                                    reduced_span<C>(row, z.by_y, tile.h, job.interpolation)};
            Plane<T> plane;
            plane.data = images + (c + k) * job.x.channel;
            plane.row = job.x.row;
            plane.pixel = job.x.pixel;
            plane.h = tile.h;
            plane.w = tile.w;
            plane.mode = FillMode::kConstant;
            plane.fill = C{0};
            v[0] = filtered(plane, spans, job.interpolation);
          }
          write(job.reduced, job.x.type, at + (c + k) * job.x.channel, v[0]);
        }
      }
    }
  }
}

template <class T>
void launch_reduce(const char* op, const Job& job, int device, void* stream) {
  const std::int64_t tiles =
      job.n * ceil_div(job.x.h, kFilterTile) * ceil_div(job.x.w, kFilterTile);
  cuda::launch(op, augment_reduce_kernel<T>, config_for(tiles * kThreads, device, stream), job);
}

}  // namespace fusereg::augment
