// What the CUDA kernels of this room share: where a launch leaves the one number that it computes.
#pragma once

#include <algorithm>

#include "core/launch_table.cuh"
#include "optim/optim.h"

namespace fusereg::optim {

inline constexpr int kThreads = 256;
inline constexpr std::int64_t kChunkElements = 16 * 1024;

// p, of which the compiler is told that it is in global memory: it does not know where an address leads
// that is itself read from memory, as those of a MemoryTable are.
template <class T>
FUSEREG_DEVICE_INLINE const T* in_global(const T* p) {
#if !defined(FUSEREG_CUDA_ON_HOST)
  __builtin_assume(__isGlobal(p));
#endif
  return p;
}

// `total` collects the number over the launches of one call.
struct Output {
  unsigned* counter = nullptr;
  double* total = nullptr;
  double* slots = nullptr;
  void* value = nullptr;
  bool value_is_float64 = false;
  bool first = true;
};

inline Output output_in(void* workspace, void* value, DType dtype) {
  auto* const bytes = static_cast<char*>(workspace);
  return {reinterpret_cast<unsigned*>(bytes),
          reinterpret_cast<double*>(bytes + 8),
          reinterpret_cast<double*>(bytes + 16),
          value,
          dtype == DType::kFloat64,
          true};
}

FUSEREG_DEVICE_INLINE void write_scalar(void* to, bool is_float64, double x) {
  if (is_float64) {
    *static_cast<double*>(to) = x;
  } else {
    *static_cast<float*>(to) = static_cast<float>(x);
  }
}

inline cuda::LaunchConfig config_for(std::int64_t tasks, cuda::Stream stream) {
  cuda::LaunchConfig config;
  config.grid = dim3(static_cast<unsigned>(std::clamp<std::int64_t>(tasks, 1, kMaxBlocks)));
  config.block = dim3(kThreads);
  config.stream = stream;
  return config;
}

}  // namespace fusereg::optim
