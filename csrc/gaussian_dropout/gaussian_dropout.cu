// The CUDA kernel of Gaussian dropout. Contract: gaussian_dropout.h.
//
// A thread takes groups of 8 elements, two Philox calls each: their loads are under way before the
// draws are made. Memory moves in 16-byte vectors where pointers and index_offset allow it. Of 16-bit
// types a thread takes eight groups at once, which share the round keys: there instructions are what
// bounds the kernel.
#include <algorithm>

#include "core/cuda.cuh"
#include "core/normal.h"
#include "gaussian_dropout/gaussian_dropout.h"

namespace fusereg::gaussian_dropout {
namespace {

using namespace ::fusereg::normal;

constexpr int kThreads = 256;
constexpr int kBlocksPerSm = 32;
constexpr int kFewBlocksPerSm = 2;
// Groups that a thread takes at once, where each multiprocessor then still has some blocks.
template <class T>
constexpr int kAtOnce = sizeof(T) == 2 ? 8 : 1;
constexpr int kWindow = cuda::kWarpSize * kNormals;

// `chunk`: the first of the two that a group has, an even number.
FUSEREG_DEVICE_INLINE void normals(std::uint64_t key, std::uint64_t low, std::uint64_t chunk,
                                   float (&n)[kNormals]) {
  FUSEREG_UNROLL
  for (int half = 0; half < 2; ++half) {
    const PhiloxWords w = philox<kNumberRounds>(key, low, chunk | static_cast<std::uint64_t>(half));
    normal_pair<float, std::uint32_t>(w.word[0], w.word[1], n[4 * half], n[4 * half + 1]);
    normal_pair<float, std::uint32_t>(w.word[2], w.word[3], n[4 * half + 2], n[4 * half + 3]);
  }
}

template <class T>
FUSEREG_DEVICE_INLINE Compute<T> noisy(T x, float normal, Compute<T> strength) {
  using C = Compute<T>;
  const C factor = add(multiply(static_cast<C>(normal), strength), C{1});
  return multiply(static_cast<C>(to_compute(x)), factor);
}

template <class T>
__global__ void __launch_bounds__(kThreads)
    gaussian_dropout_kernel(FUSEREG_GRID_CONSTANT(Job, job)) {
  constexpr int kN = cuda::kVecSize<T> < kNormals ? cuda::kVecSize<T> : kNormals;
  constexpr int kGroups = kAtOnce<T>;
  const T* const x = static_cast<const T*>(job.x);
  T* const y = static_cast<T*>(job.y);
  const std::uint64_t key = job.random.key();
  const std::uint64_t low = job.random.low();
  const auto strength = static_cast<Compute<T>>(job.strength);
  const std::uint64_t first = job.index_offset / kNormals;
  const std::int64_t groups = (job.numel + kNormals - 1) / kNormals;
  const std::int64_t whole = job.numel / kNormals;
  // A small tensor's groups are spread over all threads.
  const bool spread = static_cast<std::int64_t>(gridDim.x) * kThreads >= groups;
  const int own = spread ? 1 : kGroups;
  const std::int64_t step = static_cast<std::int64_t>(gridDim.x) * (own * kThreads);
  std::int64_t group = static_cast<std::int64_t>(blockIdx.x) * (own * kThreads) + threadIdx.x;
  // So many whole groups, kThreads apart.
  const auto take = [&](std::int64_t from, auto count) {
    constexpr int kCount = decltype(count)::value;
    cuda::Raw<T, kNormals> data[kCount];
    const std::uint64_t chunk = (first + static_cast<std::uint64_t>(from)) << 1;
    FUSEREG_UNROLL
    for (int u = 0; u < kCount; ++u) {
      const T* const at = x + (from + u * kThreads) * kNormals;
      FUSEREG_UNROLL
      for (int i = 0; i < kNormals; i += kN) {
        const auto words = cuda::load_streaming<4>(reinterpret_cast<const std::uint32_t*>(at + i));
        FUSEREG_UNROLL
        for (int k = 0; k < 4; ++k) data[u].words[i / kN * 4 + k] = words[k];
      }
      data[u].join();
    }
    FUSEREG_UNROLL
    for (int u = 0; u < kCount; ++u) {
      float n[kNormals];
      normals(key, low, chunk + u * (2 * kThreads), n);
      T* const to = y + (from + u * kThreads) * kNormals;
      FUSEREG_UNROLL
      for (int i = 0; i < kNormals; i += kN) {
        cuda::store(to + i, cuda::rounded_to<T, kN>([&](int e) {
                      return noisy<T>(data[u][i + e], n[i + e], strength);
                    }));
      }
    }
  };
  if constexpr (kGroups > 1) {
    for (; !spread && group + (kGroups - 1) * kThreads < whole; group += step) {
      take(group, std::integral_constant<int, kGroups>{});
    }
  }
  for (; group < groups; group += step) {
    for (std::int64_t at = group; at < group + own * kThreads && at < groups; at += kThreads) {
      if (at < whole) {
        take(at, std::integral_constant<int, 1>{});
        continue;
      }
      float n[kNormals];
      normals(key, low, (first + static_cast<std::uint64_t>(at)) << 1, n);
      FUSEREG_UNROLL
      for (int e = 0; e < kNormals; ++e) {
        const std::int64_t i = at * kNormals + e;
        if (i < job.numel) y[i] = from_compute<T>(noisy<T>(x[i], n[e], strength));
      }
    }
  }
}

// Element by element, where no vector fits: a warp takes the 256 elements of its groups, a lane every
// 32nd of them, so that what it loads or stores at once lies side by side.
template <class T>
__global__ void __launch_bounds__(kThreads)
    gaussian_dropout_window_kernel(FUSEREG_GRID_CONSTANT(Job, job)) {
  FUSEREG_SHARED(drawn, float[kThreads * kNormals]);
  const T* const x = static_cast<const T*>(job.x);
  T* const y = static_cast<T*>(job.y);
  const std::uint64_t key = job.random.key();
  const std::uint64_t low = job.random.low();
  const auto strength = static_cast<Compute<T>>(job.strength);
  const auto lane = static_cast<int>(cuda::lane_id());
  float* const of_warp = drawn + cuda::warp_id() * kWindow;
  // Windows of whole groups. Those before and behind them are the last block's.
  const auto cut = static_cast<std::int64_t>(job.index_offset % kNormals);
  const std::int64_t head = cut == 0 ? 0 : kNormals - cut;
  const std::int64_t windows = (job.numel - head) / kWindow;
  const std::uint64_t first = (job.index_offset + static_cast<std::uint64_t>(head)) / kNormals;
  const int step = static_cast<int>(gridDim.x) * (kThreads / cuda::kWarpSize);
  std::int64_t w = std::int64_t{blockIdx.x} * (kThreads / cuda::kWarpSize) + cuda::warp_id();
  for (; w < windows; w += step) {
    const std::int64_t at = head + w * kWindow + lane;
    T data[kNormals];
    FUSEREG_UNROLL
    for (int j = 0; j < kNormals; ++j) {
      data[j] = cuda::load_streaming(x + at + j * cuda::kWarpSize);
    }
    float n[kNormals];
    normals(key, low, (first + static_cast<std::uint64_t>(w * cuda::kWarpSize + lane)) << 1, n);
    FUSEREG_UNROLL
    for (int e = 0; e < kNormals; e += 4) {
      cuda::store_shared(of_warp + lane * kNormals + e,
                         cuda::Vec<float, 4>{{n[e], n[e + 1], n[e + 2], n[e + 3]}});
    }
    __syncwarp();
    FUSEREG_UNROLL
    for (int j = 0; j < kNormals; ++j) n[j] = of_warp[j * cuda::kWarpSize + lane];
    __syncwarp();
    FUSEREG_UNROLL
    for (int j = 0; j < kNormals; ++j) {
      y[at + j * cuda::kWarpSize] = from_compute<T>(noisy<T>(data[j], n[j], strength));
    }
  }
  if (blockIdx.x != gridDim.x - 1) return;
  // At most 34 groups.
  std::int64_t group = threadIdx.x;
  if (cut == 0 || group > 0) group += windows * cuda::kWarpSize;
  if (group * kNormals >= job.numel + cut) return;
  float n[kNormals];
  normals(key, low, (job.index_offset / kNormals + static_cast<std::uint64_t>(group)) << 1, n);
  FUSEREG_UNROLL
  for (int e = 0; e < kNormals; ++e) {
    const std::int64_t i = group * kNormals + e - cut;
    if (i >= 0 && i < job.numel) y[i] = from_compute<T>(noisy<T>(x[i], n[e], strength));
  }
}

}  // namespace

void run_cuda(const Job& job, int device, void* stream) {
  if (job.numel == 0) return;
  const cuda::DeviceGuard guard(device);
  const std::int64_t multiprocessors = cuda::device_properties(device).sm_count;
  const bool vectors = cuda::is_aligned(job.x, 16) && cuda::is_aligned(job.y, 16) &&
                       job.index_offset % kNormals == 0;
  const std::int64_t groups = ceil_div(job.numel, kNormals) + (vectors ? 0 : 1);
  dispatch_dtype(job.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    std::int64_t blocks = ceil_div(groups, (vectors ? kAtOnce<T> : 1) * kThreads);
    if (blocks < multiprocessors * kFewBlocksPerSm) blocks = ceil_div(groups, kThreads);
    cuda::LaunchConfig config;
    config.block = dim3(kThreads);
    config.grid = dim3(static_cast<unsigned>(std::min(blocks, multiprocessors * kBlocksPerSm)));
    config.stream = static_cast<cuda::Stream>(stream);
    const auto kernel = vectors ? &gaussian_dropout_kernel<T> : &gaussian_dropout_window_kernel<T>;
    cuda::launch("fusereg.gaussian_dropout", kernel, config, job);
  });
}

}  // namespace fusereg::gaussian_dropout
