// The CUDA kernel of Gaussian dropout. Contract: gaussian_dropout.h.
//
// A thread takes groups of 8 elements, two Philox calls each: their loads are under way before the
// draws are made. Memory moves in 16-byte vectors where pointers and index_offset allow it.
#include <algorithm>

#include "core/cuda.cuh"
#include "core/normal.h"
#include "gaussian_dropout/gaussian_dropout.h"

namespace fusereg::gaussian_dropout {
namespace {

using namespace ::fusereg::normal;

constexpr int kThreads = 256;
constexpr int kBlocksPerSm = 32;

FUSEREG_DEVICE_INLINE void normals(std::uint64_t key, std::uint64_t low, std::uint64_t group,
                                   float (&n)[kNormals]) {
  FUSEREG_UNROLL
  for (int half = 0; half < 2; ++half) {
    const PhiloxWords w =
        philox<kNumberRounds>(key, low, 2 * group + static_cast<std::uint64_t>(half));
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

template <class T, bool kVectors>
__global__ void __launch_bounds__(kThreads)
    gaussian_dropout_kernel(FUSEREG_GRID_CONSTANT(Job, job)) {
  constexpr int kN = cuda::kVecSize<T> < kNormals ? cuda::kVecSize<T> : kNormals;
  constexpr int kParts = kNormals / kN;
  const T* const x = static_cast<const T*>(job.x);
  T* const y = static_cast<T*>(job.y);
  const std::uint64_t key = job.random.key();
  const std::uint64_t low = job.random.low();
  const auto strength = static_cast<Compute<T>>(job.strength);
  // Position of the first group's first element: negative where index_offset is within a group.
  const std::uint64_t first = job.index_offset / kNormals;
  const std::int64_t origin = -static_cast<std::int64_t>(job.index_offset % kNormals);
  const std::int64_t groups = (job.numel - origin + kNormals - 1) / kNormals;
  const std::int64_t step = static_cast<std::int64_t>(gridDim.x) * kThreads;
  for (std::int64_t group = static_cast<std::int64_t>(blockIdx.x) * kThreads + threadIdx.x;
       group < groups; group += step) {
    const std::int64_t at = origin + group * kNormals;
    const bool whole = kVectors && at + kNormals <= job.numel;
    cuda::Vec<T, kN> data[kParts];
    if (whole) {
      FUSEREG_UNROLL
      for (int i = 0; i < kParts; ++i) data[i] = cuda::load_streaming<kN>(x + at + i * kN);
    }
    float n[kNormals];
    normals(key, low, first + static_cast<std::uint64_t>(group), n);
    if (whole) {
      FUSEREG_UNROLL
      for (int i = 0; i < kParts; ++i) {
        cuda::store(y + at + i * kN, cuda::rounded_to<T, kN>([&](int e) {
                      return noisy<T>(data[i][e], n[i * kN + e], strength);
                    }));
      }
    } else {
      FUSEREG_UNROLL
      for (int e = 0; e < kNormals; ++e) {
        if (at + e >= 0 && at + e < job.numel) {
          y[at + e] = from_compute<T>(noisy<T>(x[at + e], n[e], strength));
        }
      }
    }
  }
}

}  // namespace

void run_cuda(const Job& job, int device, void* stream) {
  if (job.numel == 0) return;
  const cuda::DeviceGuard guard(device);
  const std::int64_t most =
      static_cast<std::int64_t>(cuda::device_properties(device).sm_count) * kBlocksPerSm;
  cuda::LaunchConfig config;
  config.block = dim3(kThreads);
  config.stream = static_cast<cuda::Stream>(stream);
  const std::int64_t groups = ceil_div(job.numel, kNormals) + 1;
  config.grid =
      dim3(static_cast<unsigned>(std::clamp<std::int64_t>(ceil_div(groups, kThreads), 1, most)));
  const bool vectors = cuda::is_aligned(job.x, 16) && cuda::is_aligned(job.y, 16) &&
                       job.index_offset % kNormals == 0;
  constexpr const char* kOp = "fusereg.gaussian_dropout";
  dispatch_dtype(job.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    if (vectors) {
      cuda::launch(kOp, gaussian_dropout_kernel<T, true>, config, job);
    } else {
      cuda::launch(kOp, gaussian_dropout_kernel<T, false>, config, job);
    }
  });
}

}  // namespace fusereg::gaussian_dropout
