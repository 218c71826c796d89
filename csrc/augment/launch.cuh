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

// A block's tiles, one after the other: for (bool more = first_tile(...); more; more = next_tile(tiles)). In
// shared memory, where they take no registers, and divided by one thread; all threads of the block call.
struct Tiles {
  std::int64_t at, across, of_sample, all;
  std::int64_t sample, row, col;  // the tile's, the last two in tiles
};
FUSEREG_DEVICE_INLINE bool this_tile(Tiles& tiles) {
  if (threadIdx.x == 0) {
    tiles.sample = tiles.at / tiles.of_sample;
    const std::int64_t in_sample = tiles.at - tiles.sample * tiles.of_sample;
    tiles.row = in_sample / tiles.across;
    tiles.col = in_sample - tiles.row * tiles.across;
  }
  __syncthreads();
  return tiles.at < tiles.all;
}
FUSEREG_DEVICE_INLINE bool first_tile(Tiles& tiles, std::int64_t across, std::int64_t down,
                                      std::int64_t samples) {
  if (threadIdx.x == 0) {
    tiles.at = blockIdx.x;
    tiles.across = across;
    tiles.of_sample = across * down;
    tiles.all = samples * tiles.of_sample;
  }
  return this_tile(tiles);
}
FUSEREG_DEVICE_INLINE bool next_tile(Tiles& tiles) {
  __syncthreads();  // the last tile is done with what it shared
  if (threadIdx.x == 0) tiles.at += gridDim.x;
  return this_tile(tiles);
}

// The compiler moves no access to memory past this. Behind it shared memory is read again, which over a long
// loop would else be kept in registers, or in local memory where there are too few; before it, loads are
// issued together.
FUSEREG_DEVICE_INLINE void compiler_barrier() {
#if !defined(FUSEREG_CUDA_ON_HOST)
  asm volatile("" ::: "memory");
#endif
}

}  // namespace fusereg::augment
