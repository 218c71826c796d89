// CUDA kernels of augmentation's gradient. Contract: augment.h.
//
// A thread takes an input pixel, with all its channels, so that the output pixels that can reach it are
// found once. Neighboring threads take neighboring pixels of a row. What the pixels of a sample have in
// common is worked out once for a block's, in shared memory.
#include "augment/augment.h"
#include "augment/augment_gradient.h"
#include "augment/augment_math.h"
#include "augment/launch.cuh"
#include "augment/reduce.cuh"

namespace fusereg::augment {
namespace {

constexpr const char* kOp = "fusereg.augment";

struct Range {
  double low, high;
};

// Along one axis, all coordinates of the output pixels.
FUSEREG_DEVICE_INLINE Range all_coordinates(const double* m, const Images& y) {
  Range r = {m[2], m[2]};
  const double by[2] = {m[0] * static_cast<double>(y.w - 1), m[1] * static_cast<double>(y.h - 1)};
  for (const double b : by) (b < 0.0 ? r.low : r.high) += b;
  return r;
}

// Along one axis, where the pixels that stand for `at` can be: itself, and under a fill mode that
// folds, everything on a side of the image that holds another one.
FUSEREG_DEVICE_INLINE Range unfolded(std::int32_t at, std::int32_t size, FillMode mode,
                                     const Range& all) {
  Range r = {static_cast<double>(at), static_cast<double>(at)};
  if (mode == FillMode::kConstant) return r;
  // The nearest pixels on either side that are folded to this one.
  double before = at - size;
  double after = at + size;
  if (mode == FillMode::kBorder) {
    before = at == 0 ? -1.0 : -2.0 * kFarthest;
    after = at == size - 1 ? size : 2.0 * kFarthest;
  } else if (mode == FillMode::kSymmetric) {
    before = -1.0 - at;
    after = 2.0 * size - 1.0 - at;
  } else if (mode == FillMode::kReflect) {
    before = size == 1 ? -1.0 : at == 0 ? -2.0 * (size - 1) : -at;
    after = size == 1 ? 1.0 : at == size - 1 ? 3.0 * (size - 1) : 2.0 * (size - 1) - at;
  }
  if (all.low <= before && all.low < r.low) r.low = all.low;
  if (all.high >= after && all.high > r.high) r.high = all.high;
  return r;
}

// Output pixels [begin, end) along both axes.
struct Window {
  std::int32_t row_begin, row_end, begin, end;
};
FUSEREG_DEVICE_INLINE std::int32_t cut_to(double v, std::int64_t size) {
  return static_cast<std::int32_t>(cut(v, size));
}

// Output columns [begin, end) of a row at which step * x + start is within the range.
FUSEREG_DEVICE_INLINE void limit_columns(double step, double start, const Range& r,
                                         std::int64_t width, std::int32_t& begin,
                                         std::int32_t& end) {
  if (__builtin_fabs(step) < 1e-9) return;
  double first = (r.low - start) / step;
  double last = (r.high - start) / step;
  if (first > last) {
    const double other = first;
    first = last;
    last = other;
  }
  const std::int32_t from = cut_to(floor_of(first), width);
  const std::int32_t to = cut_to(floor_of(last) + 2.0, width);
  begin = from > begin ? from : begin;
  end = to < end ? to : end;
}

// How far from a coordinate a tap can be, and a little more for rounding. A reduced image's pixels are
// up to one and a half of the output's wide, and are filtered as widely as they are interpolated.
FUSEREG_DEVICE_INLINE double reach_of(const Job& job, const View& view, const double* m) {
  const double r = job.interpolation == Interpolation::kBicubic ? 2.0 : 1.0;
  const double extent = job.antialias ? extent_of(m) : 1.0;
  return r * (extent > 1.0 ? extent : 1.0) * (view.reduces ? 4.0 : 1.0) + 0.02;
}

// Cuts a window to the output pixels whose places, under a perspective, are within the ranges: what
// is around the corners' images, if the rectangle does not cross the line that goes to infinity.
FUSEREG_DEVICE_INLINE void limit_projective(const View& v, const Range& rx, const Range& ry,
                                            const Images& y, Window& window) {
  const double* const m = v.m;
  const double p = v.p[0];
  const double q = v.p[1];
  double low_x = 2.0 * kFarthest, low_y = low_x;
  double high_x = -low_x, high_y = -low_x;
  int signs = 0;
  for (int corner = 0; corner < 4; ++corner) {
    const double cx = (corner & 1) != 0 ? rx.high : rx.low;
    const double cy = (corner & 2) != 0 ? ry.high : ry.low;
    const double w =
        (m[3] * q - m[4] * p) * cx + (m[1] * p - m[0] * q) * cy + (m[0] * m[4] - m[1] * m[3]);
    const double at_x =
        ((m[4] - m[5] * q) * cx + (m[2] * q - m[1]) * cy + (m[1] * m[5] - m[2] * m[4])) / w;
    const double at_y =
        ((m[5] * p - m[3]) * cx + (m[0] - m[2] * p) * cy + (m[2] * m[3] - m[0] * m[5])) / w;
    signs += w > 1e-9 ? 1 : w < -1e-9 ? -1 : 0;
    low_x = at_x < low_x ? at_x : low_x;
    high_x = at_x > high_x ? at_x : high_x;
    low_y = at_y < low_y ? at_y : low_y;
    high_y = at_y > high_y ? at_y : high_y;
  }
  if (signs != 4 && signs != -4) return;
  window.begin = cut_to(floor_of(low_x) - 1.0, y.w);
  window.end = cut_to(floor_of(high_x) + 2.0, y.w);
  window.row_begin = cut_to(floor_of(low_y) - 1.0, y.h);
  window.row_end = cut_to(floor_of(high_y) + 2.0, y.h);
}

// Of a sample, for all its pixels.
struct Common {
  std::int64_t sample;
  View view, values;  // of its gradient; see gradient_at()
  Reduced z;          // see for_taps()
  double det;
  double reach_x, reach_y;
  Range every_x, every_y;
};

template <Antialias kAntialias>
__device__ void put_common(const Job& job, std::int64_t sample, Common& to) {
  to.sample = sample;
  view_of(job, job.grad_x, sample, to.view);
  const View& view = to.view;
  const double* const m = view.m;
  if (kAntialias != Antialias::kNever && view.reduces) to.z = reduced_of(m, view.x);
  if (job.color) view_to_warp<kAntialias>(job, sample, to.values);
  to.det = m[0] * m[4] - m[1] * m[3];
  to.reach_x = reach_of(job, view, m);
  to.reach_y = reach_of(job, view, m + 3);
  const Range everywhere = {-2.0 * kFarthest, 2.0 * kFarthest};
  to.every_x = view.projective ? everywhere : all_coordinates(m, job.y);
  to.every_y = view.projective ? everywhere : all_coordinates(m + 3, job.y);
}

// Of each thread's pixel: where the coordinates are whose taps can reach it.
struct Near {
  Range x[kThreads], y[kThreads];
};

// Adds what one output image gives to the pixel (x, y) of grad_x[sample].
template <class T, int kGroup, Antialias kAntialias>
__device__ void gather_gradient(const Job& job, const Common& common, std::int64_t out,
                                bool as_partner, std::int32_t x, std::int32_t y, int channel,
                                Near& near, Number<T> (&sum)[kGroup]) {
  using C = Number<T>;
  const View& view = common.view;
  const double* const m = view.m;
  const auto h = static_cast<std::int32_t>(view.x.h);
  const auto w = static_cast<std::int32_t>(view.x.w);
  const auto own_x = static_cast<std::int32_t>(x - view.left);
  const auto own_y = static_cast<std::int32_t>(y - view.top);
  if (own_x < 0 || own_x >= w || own_y < 0 || own_y >= h) return;
  const double reach_x = common.reach_x;
  const double reach_y = common.reach_y;
  Range rx = {common.every_x.low - reach_x, common.every_x.high + reach_x};
  Range ry = {common.every_y.low - reach_y, common.every_y.high + reach_y};
  // What is folded are the reduced image's pixels, which stand for several of these.
  if (!view.reduces || view.mode == FillMode::kConstant) {
    rx = unfolded(own_x, w, view.mode, rx);
    ry = unfolded(own_y, h, view.mode, ry);
  }
  rx = {rx.low - reach_x, rx.high + reach_x};
  ry = {ry.low - reach_y, ry.high + reach_y};
  // Rows: the inverse map of the rectangle's corners.
  Window window = {0, static_cast<std::int32_t>(job.y.h), 0, static_cast<std::int32_t>(job.y.w)};
  const double det = common.det;
  if (view.projective) {
    limit_projective(view, rx, ry, job.y, window);
  } else if (__builtin_fabs(det) > 1e-9) {
    double low = 2.0 * kFarthest;
    double high = -2.0 * kFarthest;
    for (int corner = 0; corner < 4; ++corner) {
      const double cx = ((corner & 1) != 0 ? rx.high : rx.low) - m[2];
      const double cy = ((corner & 2) != 0 ? ry.high : ry.low) - m[5];
      const double at = (m[0] * cy - m[3] * cx) / det;
      low = at < low ? at : low;
      high = at > high ? at : high;
    }
    window.row_begin = cut_to(floor_of(low) - 1.0, job.y.h);
    window.row_end = cut_to(floor_of(high) + 2.0, job.y.h);
  }
  near.x[threadIdx.x] = rx;
  near.y[threadIdx.x] = ry;
  for (std::int32_t row = window.row_begin; row < window.row_end; ++row) {
    compiler_barrier();
    std::int32_t begin = window.begin;
    std::int32_t end = window.end;
    if (!view.projective) {
      limit_columns(m[0], row_start(m, row), near.x[threadIdx.x], job.y.w, begin, end);
      limit_columns(m[3], row_start(m + 3, row), near.y[threadIdx.x], job.y.w, begin, end);
    }
    for (std::int32_t col = begin; col < end; ++col) {
      compiler_barrier();
      C g[kGroup];
      // First whether any tap is this pixel, and then the sums, so that neither has registers of
      // gradient_at() beside its own.
      bool found = false;
      FUSEREG_NO_UNROLL
      for (int pass = 0; pass < 2; ++pass) {
        compiler_barrier();
        for_taps<C, kAntialias>(
            job, view, common.z, col, row, [&](std::int32_t at) { return at == y; },
            [&](std::int32_t at) { return at == x; },
            [&](std::int32_t, std::int32_t, C weight) {
              found = true;
              if (pass == 0) return;
              for (int k = 0; k < kGroup; ++k) sum[k] = add(sum[k], multiply(weight, g[k]));
            });
        if (!found) break;
        if (pass == 0 && !gradient_at<T, kGroup, kAntialias>(job, common.values, common.sample, out,
                                                             as_partner, col, row, channel, g))
          break;
      }
    }
  }
}

// Of the kThreads samples from `first` on, those that `sample` is mixed into: a bit each. All threads
// of the block call.
FUSEREG_DEVICE_INLINE void find_partners(const Job& job, std::int64_t sample, std::int64_t first,
                                         unsigned (&found)[kThreads / cuda::kWarpSize]) {
  const std::int64_t out = first + threadIdx.x;
  const bool is_one = out < job.n && partner_of(job.records + out * kRecord, job.n) == sample;
  const unsigned bits = __ballot_sync(cuda::kFullMask, is_one);
  __syncthreads();  // the last ones have been read
  if (cuda::lane_id() == 0) found[cuda::warp_id()] = bits;
  __syncthreads();
}

// A block has pixels of one sample, and looks for those it is mixed into once for all of them.
template <class T, int kGroup, Antialias kAntialias>
__global__ void __launch_bounds__(kThreads)
    augment_backward_kernel(FUSEREG_GRID_CONSTANT(Job, job)) {
  using C = Number<T>;
  FUSEREG_SHARED(found, unsigned[kThreads / cuda::kWarpSize]);
  FUSEREG_SHARED(common, Common);
  FUSEREG_SHARED(tiles, Tiles);
  FUSEREG_SHARED(near, Near);
  const Images& grad = job.grad_x;
  bool more = first_tile(tiles, ceil_div(grad.h * grad.w, kThreads), 1, job.n);
  for (; more; more = next_tile(tiles)) {
    const std::int64_t sample = tiles.sample;
    const std::int64_t i = tiles.col * kThreads + threadIdx.x;
    const bool inside = i < grad.h * grad.w;
    const auto x = static_cast<std::int32_t>(i % grad.w);
    const auto y = static_cast<std::int32_t>(i / grad.w);
    if (threadIdx.x == 0) put_common<kAntialias>(job, sample, common);
    __syncthreads();
    for (int c = 0; c < job.c; c += kGroup) {
      C sum[kGroup] = {};
      // The sample's own output first, then, kThreads samples at a time, those that it is mixed into.
      for (std::int64_t first = -kThreads; first < job.n; first += kThreads) {
        const bool own = first < 0;
        if (!own) find_partners(job, common.sample, first, found);
        const int parts = own ? 1 : kThreads / cuda::kWarpSize;
        for (int part = 0; part < parts; ++part) {
          for (unsigned bits = !inside ? 0 : own ? 1 : found[part]; bits != 0; bits &= bits - 1) {
            const std::int64_t out =
                own ? common.sample
                    : first + part * cuda::kWarpSize + __ffs(static_cast<int>(bits)) - 1;
            gather_gradient<T, kGroup, kAntialias>(job, common, out, !own, x, y, c, near, sum);
          }
        }
      }
      if (!inside) continue;
      C* const at =
          static_cast<C*>(grad.data) + common.sample * grad.sample + y * grad.row + x * grad.pixel;
      FUSEREG_UNROLL
      for (int k = 0; k < kGroup; ++k) at[(c + k) * grad.channel] = sum[k];
    }
  }
}

}  // namespace

void run_cuda(const Backward& backward, int device, void* stream) {
  const Job& job = backward;
  const cuda::DeviceGuard guard(device);
  const std::int64_t tiles = job.n * ceil_div(job.grad_x.h * job.grad_x.w, kThreads);
  const cuda::LaunchConfig config = config_for(tiles * kThreads, device, stream);
  dispatch_element(job.x.type, [&](auto tag) {
    using T = typename decltype(tag)::type;
    if constexpr (sizeof(T) > 1) {
      auto launch = [&](auto group) {
        constexpr int kGroup = decltype(group)::value;
        if (job.antialias) {
          cuda::launch(kOp, augment_backward_kernel<T, kGroup, Antialias::kReduced>, config, job);
        } else {
          cuda::launch(kOp, augment_backward_kernel<T, kGroup, Antialias::kNever>, config, job);
        }
      };
      if (job.reduced != nullptr) launch_reduce<T>(kOp, job, device, stream);
      if (job.c == 3) {
        launch(std::integral_constant<int, 3>{});
      } else {
        launch(std::integral_constant<int, 1>{});
      }
    }
  });
}

}  // namespace fusereg::augment
