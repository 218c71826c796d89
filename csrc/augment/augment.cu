// CUDA kernels of augmentation. Contract: augment.h.
//
// They go by tiles (warp_tile.cuh, filter_tile.cuh), but for float64 images and those antialiased samples
// that fit neither. There a thread takes an output pixel with all its channels, so that coordinates and
// weights are worked out once. Neighboring threads take neighboring pixels of a row: their taps share
// cache lines, and a warp's stores are whole lines.
#include "augment/augment.h"
#include "augment/augment_math.h"
#include "augment/filter_tile.cuh"
#include "augment/launch.cuh"
#include "augment/reduce.cuh"
#include "augment/warp_tile.cuh"

namespace fusereg::augment {
namespace {

constexpr const char* kOp = "fusereg.augment";

// rest_only: what the tiles leave.
template <class T, int kGroup, Antialias kAntialias>
__global__ void __launch_bounds__(kThreads, 2)
    augment_forward_kernel(FUSEREG_GRID_CONSTANT(Job, job), bool rest_only) {
  const std::int64_t pixels = job.y.h * job.y.w;
  const std::int64_t of_sample = ceil_div(pixels, kThreads);
  for (std::int64_t tile = blockIdx.x; tile < job.n * of_sample; tile += gridDim.x) {
    const std::int64_t sample = tile / of_sample;
    if (rest_only && way_of(job, sample) != Way::kPixels) continue;
    const std::int64_t i = (tile - sample * of_sample) * kThreads + threadIdx.x;
    if (i >= pixels) continue;
    const std::int64_t col = i % job.y.w;
    const std::int64_t row = i / job.y.w;
    const std::int64_t at = sample * job.y.sample + row * job.y.row + col * job.y.pixel;
    for (int c = 0; c < job.c; c += kGroup) {
      Number<T> v[kGroup];
      augmented<T, kGroup, kAntialias>(job, sample, col, row, c, v);
      FUSEREG_UNROLL
      for (int k = 0; k < kGroup; ++k)
        write(job.y.data, job.y.type, at + (c + k) * job.y.channel, v[k]);
    }
  }
}

template <class T, Antialias kAntialias = Antialias::kReduced>
void launch_pixels(const Job& job, bool rest_only, int device, void* stream) {
  const std::int64_t tiles = job.n * ceil_div(job.y.h * job.y.w, kThreads);
  const cuda::LaunchConfig config = config_for(tiles * kThreads, device, stream);
  if (job.c == 3) {
    cuda::launch(kOp, augment_forward_kernel<T, 3, kAntialias>, config, job, rest_only);
  } else {
    cuda::launch(kOp, augment_forward_kernel<T, 1, kAntialias>, config, job, rest_only);
  }
}

}  // namespace

void run_cuda(const Forward& forward, int device, void* stream) {
  const Job& job = forward;
  const cuda::DeviceGuard guard(device);
  dispatch_element(job.x.type, [&](auto tag) {
    using T = typename decltype(tag)::type;
#if defined(FUSEREG_CUDA_ON_HOST)
    // A list of images, which no device gets: tests call the CPU's memory one.
    if (job.each != nullptr) return launch_pixels<T, Antialias::kAny>(job, false, device, stream);
#endif
    if (job.antialias) launch_reduce<T>(kOp, job, device, stream);
    if constexpr (std::is_same_v<T, double>) {
      launch_pixels<T>(job, false, device, stream);
    } else {
      launch_tiles<T>(kOp, job, device, stream);
      if (!job.antialias) return;
      launch_filters<T>(kOp, job, device, stream);
      launch_pixels<T>(job, true, device, stream);
    }
  });
}

}  // namespace fusereg::augment
