// CUDA kernels of augmentation. Contract: augment.h.
//
// A thread takes an output pixel (forward) or an input pixel (backward), with all its channels, so
// that coordinates and weights are worked out once. Neighbouring threads take neighbouring pixels of
// a row: their taps share cache lines, and a warp's stores are whole lines.
#include <algorithm>

#include "augment/augment.h"
#include "augment/augment_math.h"
#include "core/cuda.cuh"

namespace fusereg::augment {
namespace {

constexpr int kThreads = 256;
constexpr int kBlocksPerSm = 32;
constexpr const char* kOp = "fusereg.augment";

template <class T, int kGroup>
__global__ void __launch_bounds__(kThreads) augment_forward_kernel(FUSEREG_GRID_CONSTANT(Job,
                                                                                         job)) {
  const std::int64_t pixels = job.n * job.y.h * job.y.w;
  const std::int64_t step = static_cast<std::int64_t>(gridDim.x) * kThreads;
  for (std::int64_t i = static_cast<std::int64_t>(blockIdx.x) * kThreads + threadIdx.x; i < pixels;
       i += step) {
    const std::int64_t col = i % job.y.w;
    const std::int64_t row = i / job.y.w % job.y.h;
    const std::int64_t sample = i / (job.y.w * job.y.h);
    const std::int64_t at = sample * job.y.sample + row * job.y.row + col * job.y.pixel;
    for (int c = 0; c < job.c; c += kGroup) {
      Number<T> v[kGroup];
      augmented<T, kGroup>(job, sample, col, row, c, v);
      for (int k = 0; k < kGroup; ++k)
        write(job.y.data, job.y.type, at + (c + k) * job.y.channel, v[k]);
    }
  }
}

cuda::LaunchConfig config_for(std::int64_t pixels, int device, void* stream) {
  const std::int64_t most =
      static_cast<std::int64_t>(cuda::device_properties(device).sm_count) * kBlocksPerSm;
  cuda::LaunchConfig config;
  config.block = dim3(kThreads);
  config.stream = static_cast<cuda::Stream>(stream);
  config.grid = dim3(
      static_cast<unsigned>(std::clamp<std::int64_t>(cuda::ceil_div(pixels, kThreads), 1, most)));
  return config;
}

}  // namespace

void forward_cuda(const Job& job, int device, void* stream) {
  const cuda::DeviceGuard guard(device);
  const cuda::LaunchConfig config = config_for(job.n * job.y.h * job.y.w, device, stream);
  dispatch_element(job.x.type, [&](auto tag) {
    using T = typename decltype(tag)::type;
    if (job.c == 3) {
      cuda::launch(kOp, augment_forward_kernel<T, 3>, config, job);
    } else {
      cuda::launch(kOp, augment_forward_kernel<T, 1>, config, job);
    }
  });
}

void backward_cuda(const Job& job, int device, void* stream) {
  (void)job;
  (void)device;
  (void)stream;
}

}  // namespace fusereg::augment
