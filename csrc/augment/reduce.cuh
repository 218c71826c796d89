// The kernel that makes the resized images of samples that turn. Contract: augment.h.
//
// A thread takes a pixel of a sample's z with all its channels; z lies at the beginning of its sample, in
// rows as long as x's. Other samples' blocks have nothing to do.
#pragma once

#include "augment/augment.h"
#include "augment/augment_math.h"
#include "augment/launch.cuh"

namespace fusereg::augment {

template <class T>
__global__ void __launch_bounds__(kThreads, 4)
    augment_reduce_kernel(FUSEREG_GRID_CONSTANT(Job, job)) {
  using C = Number<T>;
  FUSEREG_SHARED(view, View);  // of the tile's sample
  FUSEREG_SHARED(z, Reduced);
  const std::int64_t of_sample = ceil_div(job.x.h * job.x.w, kThreads);
  for (std::int64_t tile = blockIdx.x; tile < job.n * of_sample; tile += gridDim.x) {
    const std::int64_t sample = tile / of_sample;
    __syncthreads();  // the last tile is done with what it shared
    if (threadIdx.x == 0) {
      view_of(job, job.x, sample, view);
      if (view.reduces) z = reduced_of(view.m, view.x);
    }
    __syncthreads();
    if (!view.reduces) continue;
    const std::int64_t i = (tile - sample * of_sample) * kThreads + threadIdx.x;
    if (i >= std::int64_t{z.h} * z.w) continue;
    const auto col = static_cast<std::int32_t>(i % z.w);
    const auto row = static_cast<std::int32_t>(i / z.w);
    const Spans<C> spans = {reduced_span<C>(col, z.by_x, view.x.w, job.interpolation),
                            reduced_span<C>(row, z.by_y, view.x.h, job.interpolation)};
    Plane<T> plane;
    // Of the kernel's arguments, so that the compiler knows it to be global memory.
    plane.data = static_cast<const T*>(job.x.data) + view.offset;
    plane.row = view.x.row;
    plane.pixel = view.x.pixel;
    plane.h = static_cast<std::int32_t>(view.x.h);
    plane.w = static_cast<std::int32_t>(view.x.w);
    plane.mode = view.mode;
    plane.fill = C{0};
    T* to = static_cast<T*>(job.reduced) + view.offset + row * view.x.row + col * view.x.pixel;
    for (int c = 0; c < job.c; ++c, plane.data += view.x.channel, to += view.x.channel)
      write(to, job.x.type, 0, filtered(plane, spans, job.interpolation));
  }
}

template <class T>
void launch_reduce(const char* op, const Job& job, int device, void* stream) {
  const std::int64_t tiles = job.n * ceil_div(job.x.h * job.x.w, kThreads);
  cuda::launch(op, augment_reduce_kernel<T>, config_for(tiles * kThreads, device, stream), job);
}

}  // namespace fusereg::augment
