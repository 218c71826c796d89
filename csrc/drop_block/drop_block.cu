// CUDA kernels of DropBlock. Contract: drop_block.h.
//
// A block of threads takes a tile at a time: its threads draw the corners whose blocks reach the
// tile, 8 in a Philox call or two, and set the bits of what they drop in shared memory (corners are
// rare, and setting a bit twice does no harm); then the bits are counted, or the elements written.
#include <algorithm>

#include "core/cuda.cuh"
#include "core/rounded.h"
#include "drop_block/drop_block.h"

namespace fusereg::drop_block {
namespace {

constexpr int kThreads = 256;

struct Arguments {
  const void* x;
  void* y;
  Geometry geometry;
  std::uint64_t index_offset;
  SeedPair random;
  Draw draw;
  double* kept;
  double* slots;
  int slot_count;  // 0: *kept is there already
};

using rounded::multiply;

// Vectors that a thread has under way at once.
constexpr int kAhead = 4;

FUSEREG_DEVICE_INLINE void set_bits(std::uint32_t* bits, std::int64_t at, std::int64_t n) {
  while (n > 0) {
    const auto from = static_cast<int>(at % 32);
    const int count = n < 32 - from ? static_cast<int>(n) : 32 - from;
    atomicOr(bits + at / 32, (0xffffffffu >> (32 - count)) << from);
    at += count;
    n -= count;
  }
}

FUSEREG_DEVICE_INLINE int tile_words(const Geometry& g, const Tile& t) {
  const std::int64_t planes = g.channels_last ? g.tile_planes : t.planes;
  return static_cast<int>((planes * t.rows * g.w + 31) / 32);
}

// The whole block; the bits are there for all threads when it returns.
FUSEREG_DEVICE_INLINE void mark(const Arguments& a, std::uint64_t key, std::uint64_t low,
                                const Tile& t, std::uint32_t* bits) {
  const Geometry& g = a.geometry;
  const int words = tile_words(g, t);
  for (int i = static_cast<int>(threadIdx.x); i < words; i += kThreads) bits[i] = 0;
  __syncthreads();
  const Runs runs = corner_runs(g, t);
  // A run may begin and end within a group.
  const std::int64_t groups = runs.length / kGroup + 2;
  for (std::int64_t task = threadIdx.x; task < runs.count * groups; task += kThreads) {
    const std::int64_t first = runs.first + task / groups * runs.stride;
    const std::uint64_t index = a.index_offset + static_cast<std::uint64_t>(first);
    const std::int64_t at = task % groups * kGroup - static_cast<std::int64_t>(index % kGroup);
    if (at >= runs.length) continue;
    const std::uint64_t group = index / kGroup + static_cast<std::uint64_t>(task % groups);
    const std::uint32_t keep = keep_mask(key, low, group, a.draw);
    for (int e = 0; e < kGroup; ++e) {
      if ((keep >> e & 1u) != 0 || at + e < 0 || at + e >= runs.length) continue;
      for_block(g, t, first + at + e,
                [bits](std::int64_t bit, std::int64_t n) { set_bits(bits, bit, n); });
    }
  }
  __syncthreads();
}

__global__ void __launch_bounds__(kThreads)
    drop_block_count_kernel(FUSEREG_GRID_CONSTANT(Arguments, a)) {
  FUSEREG_SHARED(bits, std::uint32_t[kTileWords]);
  const Geometry& g = a.geometry;
  const std::uint64_t key = a.random.key();
  const std::uint64_t low = a.random.low();
  unsigned long long dropped = 0;
  for (std::int64_t index = blockIdx.x; index < g.tiles; index += gridDim.x) {
    const Tile t = tile_at(g, index);
    mark(a, key, low, t, bits);
    const int words = tile_words(g, t);
    for (int i = static_cast<int>(threadIdx.x); i < words; i += kThreads)
      dropped += static_cast<unsigned long long>(__popc(bits[i]));
    __syncthreads();
  }
  dropped = cuda::block_sum(dropped);
  if (threadIdx.x == 0) a.slots[blockIdx.x] = static_cast<double>(dropped);
}

// x * scale, or 0 where it is dropped.
template <class T>
FUSEREG_DEVICE_INLINE Compute<T> scaled(T x, bool dropped, Compute<T> scale) {
  return dropped ? Compute<T>(0) : multiply(to_compute(x), scale);
}

// n consecutive elements, by the whole block.
template <class T>
FUSEREG_DEVICE_INLINE void apply_line(const T* x, T* y, std::int64_t n, const std::uint32_t* bits,
                                      Compute<T> scale) {
  constexpr int kN = cuda::kVecSize<T>;
  std::int64_t done = 0;
  if (cuda::is_aligned(x, 16) && cuda::is_aligned(y, 16)) {
    done = n / kN * kN;
    const auto vectors_at = [&](std::int64_t v, auto count) {
      constexpr int kCount = decltype(count)::value;
      cuda::Vec<T, kN> data[kCount];
      FUSEREG_UNROLL
      for (int u = 0; u < kCount; ++u) {
        data[u] = cuda::load_streaming<kN>(x + (v + u * kThreads) * kN);
      }
      FUSEREG_UNROLL
      for (int u = 0; u < kCount; ++u) {
        const std::int64_t i = (v + u * kThreads) * kN;
        const std::uint32_t dropped = bits[i / 32] >> (i % 32);
        cuda::store(y + i, cuda::rounded_to<T, kN>([&](int e) {
                      return scaled(data[u][e], (dropped >> e & 1u) != 0, scale);
                    }));
      }
    };
    std::int64_t v = threadIdx.x;
    for (; v + (kAhead - 1) * kThreads < done / kN; v += kAhead * kThreads) {
      vectors_at(v, std::integral_constant<int, kAhead>{});
    }
    FUSEREG_NO_UNROLL
    for (; v < done / kN; v += kThreads) vectors_at(v, std::integral_constant<int, 1>{});
  }
  for (std::int64_t i = done + threadIdx.x; i < n; i += kThreads)
    y[i] = from_compute<T>(scaled(x[i], (bits[i / 32] >> (i % 32) & 1u) != 0, scale));
}

// The tile's channels of each pixel, consecutive threads on consecutive channels.
template <class T>
FUSEREG_DEVICE_INLINE void apply_pixels(const T* x, T* y, const Geometry& g, const Tile& t,
                                        const std::uint32_t* bits, Compute<T> scale) {
  const auto width = static_cast<int>(g.tile_planes);  // a power of two, up to 32
  const auto elements = static_cast<int>(t.rows * g.w) * width;
  for (int i = static_cast<int>(threadIdx.x); i < elements; i += kThreads) {
    const int channel = i % width;
    if (channel >= t.planes) continue;
    const std::int64_t at = i / width * g.c + channel;
    y[at] = from_compute<T>(scaled(x[at], (bits[i / 32] >> (i % 32) & 1u) != 0, scale));
  }
}

template <class T>
__global__ void __launch_bounds__(kThreads, 3)
    drop_block_apply_kernel(FUSEREG_GRID_CONSTANT(Arguments, a)) {
  FUSEREG_SHARED(bits, std::uint32_t[kTileWords]);
  const Geometry& g = a.geometry;
  double kept;
  if (a.slot_count > 0) {
    // Sums of integers are exact in any order.
    double dropped = 0.0;
    for (int i = static_cast<int>(threadIdx.x); i < a.slot_count; i += kThreads)
      dropped += a.slots[i];
    kept = static_cast<double>(g.numel()) - cuda::block_sum(dropped);
    if (blockIdx.x == 0 && threadIdx.x == 0) *a.kept = kept;
  } else {
    kept = *a.kept;
  }
  const auto scale = static_cast<Compute<T>>(make_scale(g, kept));
  const T* const x = static_cast<const T*>(a.x);
  T* const y = static_cast<T*>(a.y);
  const std::uint64_t key = a.random.key();
  const std::uint64_t low = a.random.low();
  for (std::int64_t index = blockIdx.x; index < g.tiles; index += gridDim.x) {
    const Tile t = tile_at(g, index);
    mark(a, key, low, t, bits);
    if (g.channels_last) {
      apply_pixels(x + t.start, y + t.start, g, t, bits, scale);
    } else {
      apply_line(x + t.start, y + t.start, t.planes * t.rows * g.w, bits, scale);
    }
    __syncthreads();
  }
}

}  // namespace

void run_cuda(const Job& job, int device, void* stream) {
  const cuda::DeviceGuard guard(device);
  Arguments a = {job.x,     job.y, job.geometry, job.index_offset, job.random, job.draw, job.kept,
                 job.slots, 0};
  cuda::LaunchConfig config;
  config.block = dim3(kThreads);
  config.stream = static_cast<cuda::Stream>(stream);
  constexpr const char* kOp = "fusereg.drop_block2d";
  if (job.counts) {
    a.slot_count = static_cast<int>(std::min<std::int64_t>(job.geometry.tiles, kCountSlots));
    config.grid = dim3(static_cast<unsigned>(a.slot_count));
    cuda::launch(kOp, drop_block_count_kernel, config, a);
  }
  constexpr std::int64_t kBlocksPerSm = 16;
  const std::int64_t most = cuda::device_properties(device).sm_count * kBlocksPerSm;
  config.grid = dim3(static_cast<unsigned>(std::min(job.geometry.tiles, most)));
  dispatch_dtype(job.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    cuda::launch(kOp, drop_block_apply_kernel<T>, config, a);
  });
}

}  // namespace fusereg::drop_block
