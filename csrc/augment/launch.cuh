// How the CUDA kernels of this room are launched: threads that step through pixels or elements.
#pragma once

#include <algorithm>

#include "core/cuda.cuh"

namespace fusereg::augment {

inline constexpr int kThreads = 256;

// A thread for each of `work`, up to what keeps the device busy; then each takes several.
inline cuda::LaunchConfig config_for(std::int64_t work, int device, void* stream) {
  constexpr int kBlocksPerSm = 32;
  const std::int64_t most =
      static_cast<std::int64_t>(cuda::device_properties(device).sm_count) * kBlocksPerSm;
  cuda::LaunchConfig config;
  config.block = dim3(kThreads);
  config.stream = static_cast<cuda::Stream>(stream);
  config.grid =
      dim3(static_cast<unsigned>(std::clamp<std::int64_t>(ceil_div(work, kThreads), 1, most)));
  return config;
}

// What lies in shared memory is read again behind this: over a long loop it would else be kept in registers,
// or in local memory where there are too few.
FUSEREG_DEVICE_INLINE void read_shared_again() {
#if !defined(FUSEREG_CUDA_ON_HOST)
  asm volatile("" ::: "memory");
#endif
}

}  // namespace fusereg::augment
