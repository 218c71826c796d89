// What kernels share: shared memory, wide memory access, reductions in a fixed order, barriers
// between blocks and clusters. Comes with cuda.cuh, which says how it all runs on the host.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

#include "core/dtype.h"

#if defined(FUSEREG_CUDA_ON_HOST)
#include "cuda_on_host.h"
#else
#include <cuda_runtime.h>
#endif

namespace fusereg::cuda {

inline constexpr int kWarpSize = 32;
inline constexpr unsigned kFullMask = 0xffffffffu;

#define FUSEREG_DEVICE_INLINE __device__ __forceinline__

// Before a loop whose trip count is known, and before one that is to stay as it is: unrolled by the
// compiler, what it loads would still be waited for one by one where it stores in between.
#if defined(FUSEREG_CUDA_ON_HOST)
#define FUSEREG_UNROLL
#define FUSEREG_NO_UNROLL
#else
#define FUSEREG_UNROLL _Pragma("unroll")
#define FUSEREG_NO_UNROLL _Pragma("unroll 1")
#endif

// FUSEREG_SHARED(tile, float[8][32]) declares `tile`, a variable of that type in the block's shared
// memory. On the host each block gets its own, between red zones and filled with garbage. (A static
// variable would be one for all blocks, and g++ puts no red zones around the statics of templates.)
//
// FUSEREG_GRID_CONSTANT(Arguments, args) declares a kernel's parameter that all threads read in
// place: needed for a large struct, of which each thread would otherwise make a copy.
#if defined(FUSEREG_CUDA_ON_HOST)
#define FUSEREG_SHARED(name, ...) \
  auto& name = ::fusereg::cuda_on_host::shared_variable<__VA_ARGS__>([] {})
#define FUSEREG_GRID_CONSTANT(type, name) const type& name
#else
namespace detail {
template <class T>
struct Identity {
  using type = T;
};
}  // namespace detail
#define FUSEREG_SHARED(name, ...) \
  __shared__ typename ::fusereg::cuda::detail::Identity<__VA_ARGS__>::type name
#define FUSEREG_GRID_CONSTANT(type, name) const __grid_constant__ type name
#endif

// The launch's dynamic shared memory, at 16-byte alignment.
template <class T>
FUSEREG_DEVICE_INLINE T* dynamic_shared() {
#if defined(FUSEREG_CUDA_ON_HOST)
  return static_cast<T*>(cuda_on_host::dynamic_shared_memory());
#else
  extern __shared__ __align__(16) unsigned char fusereg_dynamic_shared[];
  return reinterpret_cast<T*>(fusereg_dynamic_shared);
#endif
}

// --- memory access ---

// N elements that move in one instruction where they fill 2, 4, 8 or 16 bytes.
template <class T, int N>
struct alignas(sizeof(T) * N <= 16 ? sizeof(T) * N : 16) Vec {
  static_assert(sizeof(T) * N <= 16 && (sizeof(T) * N & (sizeof(T) * N - 1)) == 0,
                "Vec: 1, 2, 4, 8 or 16 bytes");
  static constexpr int kSize = N;
  T values[N];
  FUSEREG_DEVICE_INLINE T& operator[](int i) { return values[i]; }
  FUSEREG_DEVICE_INLINE const T& operator[](int i) const { return values[i]; }
};

// How many T fill the widest access.
template <class T>
inline constexpr int kVecSize = 16 / static_cast<int>(sizeof(T));

__host__ __device__ inline bool is_aligned(const void* p, std::size_t bytes) {
  return reinterpret_cast<std::uintptr_t>(p) % bytes == 0;
}

namespace detail {

#if !defined(FUSEREG_CUDA_ON_HOST)
template <std::size_t kBytes>
struct CarrierOf;
template <>
struct CarrierOf<1> {
  using type = unsigned char;
};
template <>
struct CarrierOf<2> {
  using type = unsigned short;
};
template <>
struct CarrierOf<4> {
  using type = unsigned int;
};
template <>
struct CarrierOf<8> {
  using type = uint2;
};
template <>
struct CarrierOf<16> {
  using type = uint4;
};
template <std::size_t kBytes>
using Carrier = typename CarrierOf<kBytes>::type;

// An assignment of a vector is several stores to the optimizer, which it does not always join.
FUSEREG_DEVICE_INLINE void store_global(uint4* p, const uint4& v) {
  asm volatile("st.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(p), "r"(v.x), "r"(v.y), "r"(v.z),
               "r"(v.w)
               : "memory");
}
FUSEREG_DEVICE_INLINE void store_global(uint2* p, const uint2& v) {
  asm volatile("st.global.v2.u32 [%0], {%1, %2};" ::"l"(p), "r"(v.x), "r"(v.y) : "memory");
}
template <class T>
FUSEREG_DEVICE_INLINE void store_global(T* p, const T& v) {
  *p = v;
}
#endif

// Where the memory is, or how long it should stay in the cache.
enum class Access { kGlobal, kStreaming, kShared };

template <class V, Access kAccess>
FUSEREG_DEVICE_INLINE V load_as(const void* p) {
  V v;
#if defined(FUSEREG_CUDA_ON_HOST)
  cuda_on_host::check_aligned(p, sizeof(V), "load");
  __builtin_memcpy(&v, p, sizeof(V));
#else
  const auto* source = static_cast<const Carrier<sizeof(V)>*>(p);
  Carrier<sizeof(V)> bits;
  if constexpr (kAccess == Access::kStreaming) {
    bits = __ldcs(source);
  } else {
    bits = *source;
  }
  memcpy(&v, &bits, sizeof(V));
#endif
  return v;
}

template <class V, Access kAccess>
FUSEREG_DEVICE_INLINE void store_as(void* p, const V& v) {
#if defined(FUSEREG_CUDA_ON_HOST)
  cuda_on_host::check_aligned(p, sizeof(V), "store");
  __builtin_memcpy(p, &v, sizeof(V));
#else
  Carrier<sizeof(V)> bits;
  memcpy(&bits, &v, sizeof(V));
  auto* target = static_cast<Carrier<sizeof(V)>*>(p);
  if constexpr (kAccess == Access::kStreaming) {
    __stcs(target, bits);
  } else if constexpr (kAccess == Access::kGlobal) {
    store_global(target, bits);
  } else {
    *target = bits;
  }
#endif
}

}  // namespace detail

// N elements from p, which must be aligned to all N together.
template <int N, class T>
FUSEREG_DEVICE_INLINE Vec<T, N> load(const T* p) {
  return detail::load_as<Vec<T, N>, detail::Access::kGlobal>(p);
}
// To global memory: there is no check that p is not the block's shared memory.
template <class T, int N>
FUSEREG_DEVICE_INLINE void store(T* p, const Vec<T, N>& v) {
  detail::store_as<Vec<T, N>, detail::Access::kGlobal>(p, v);
}
// Two numbers side by side, from a 16-byte boundary on: the compiler, which does not know of it, would
// store one after the other.
FUSEREG_DEVICE_INLINE void store_pair(double* p, double first, double second) {
  store(p, Vec<double, 2>{{first, second}});
}
template <class T, int N>
FUSEREG_DEVICE_INLINE void store_shared(T* p, const Vec<T, N>& v) {
  detail::store_as<Vec<T, N>, detail::Access::kShared>(p, v);
}

// The same for data that is touched once: first to leave the cache, so that it pushes nothing out.
template <int N, class T>
FUSEREG_DEVICE_INLINE Vec<T, N> load_streaming(const T* p) {
  return detail::load_as<Vec<T, N>, detail::Access::kStreaming>(p);
}
template <class T, int N>
FUSEREG_DEVICE_INLINE void store_streaming(T* p, const Vec<T, N>& v) {
  detail::store_as<Vec<T, N>, detail::Access::kStreaming>(p, v);
}
template <class T>
FUSEREG_DEVICE_INLINE T load_streaming(const T* p) {
  return detail::load_as<T, detail::Access::kStreaming>(p);
}
template <class T>
FUSEREG_DEVICE_INLINE void store_streaming(T* p, const T& v) {
  detail::store_as<T, detail::Access::kStreaming>(p, v);
}

// kCount numbers of T as they lie in memory, in whole registers. Where a branch decides how they
// are loaded, they must stay so until all loads of the thread are issued: numbers that are
// converted within the branch are waited for there.
template <class T, int kCount>
struct Raw {
  static constexpr int kWords = static_cast<int>(sizeof(T)) * kCount / 4;
  static constexpr int kPart = kWords < 4 ? kWords : 4;
  static_assert(sizeof(T) * kCount % 4 == 0 && kWords % kPart == 0, "Raw: whole registers");
  std::uint32_t words[kWords];

  FUSEREG_DEVICE_INLINE void load(const T* p) {
    FUSEREG_UNROLL
    for (int i = 0; i < kWords; i += kPart) {
      const auto part = detail::load_as<Vec<std::uint32_t, kPart>, detail::Access::kGlobal>(
          p + i * 4 / sizeof(T));
      FUSEREG_UNROLL
      for (int k = 0; k < kPart; ++k) words[i + k] = part[k];
    }
  }
  FUSEREG_DEVICE_INLINE void clear() {
    FUSEREG_UNROLL
    for (int i = 0; i < kWords; ++i) words[i] = 0;
  }
  // Sets element e, which must be zero. By value: bytes that are copied from a reference to what
  // may lie anywhere are loaded one by one.
  FUSEREG_DEVICE_INLINE void set(int e, T v) {
    if constexpr (sizeof(T) == 2) {
      words[e / 2] |= static_cast<std::uint32_t>(bit_cast<std::uint16_t>(v)) << (e % 2 * 16);
    } else {
      memcpy(words + e * (sizeof(T) / 4), &v, sizeof(T));
    }
  }
  FUSEREG_DEVICE_INLINE T operator[](int e) const {
    if constexpr (sizeof(T) == 2) {
      return bit_cast<T>(static_cast<std::uint16_t>(words[e / 2] >> (e % 2 * 16)));
    } else {
      T v;
      memcpy(&v, words + e * (sizeof(T) / 4), sizeof(T));
      return v;
    }
  }
  // After a branch in which they were loaded: the optimizer then moves no use into it.
  FUSEREG_DEVICE_INLINE void join() {
#if !defined(FUSEREG_CUDA_ON_HOST)
    FUSEREG_UNROLL
    for (int i = 0; i < kWords; ++i) asm("" : "+r"(words[i]));
#endif
  }
};

// The same with each number in registers of its own. What is loaded one by one is waited for where
// words are put together.
template <class T, int kCount>
struct Singles {
  using Bits = std::conditional_t<sizeof(T) == 8, std::uint64_t, std::uint32_t>;
  Bits words[kCount];

  FUSEREG_DEVICE_INLINE void clear() {
    FUSEREG_UNROLL
    for (int e = 0; e < kCount; ++e) words[e] = 0;
  }
  FUSEREG_DEVICE_INLINE void set(int e, T v) {
    if constexpr (sizeof(T) == 2) {
      words[e] = bit_cast<std::uint16_t>(v);
    } else {
      words[e] = bit_cast<Bits>(v);
    }
  }
  FUSEREG_DEVICE_INLINE T operator[](int e) const {
    if constexpr (sizeof(T) == 2) {
      return bit_cast<T>(static_cast<std::uint16_t>(words[e]));
    } else {
      return bit_cast<T>(words[e]);
    }
  }
  FUSEREG_DEVICE_INLINE void join() {
#if !defined(FUSEREG_CUDA_ON_HOST)
    FUSEREG_UNROLL
    for (int e = 0; e < kCount; ++e) {
      if constexpr (sizeof(T) == 8) {
        asm("" : "+l"(words[e]));
      } else {
        asm("" : "+r"(words[e]));
      }
    }
#endif
  }
};

// Calls use(p, load(p, count)) for the elements from p on, `count` at a time, by `threads` threads
// of which this is `thread`: vectors where `vectors` allows, kDeep loads ahead of their use.
template <int kDeep, class T, class Load, class Use>
FUSEREG_DEVICE_INLINE void for_run(T* p, std::int64_t n, unsigned thread, unsigned threads,
                                   bool vectors, const Load& load, const Use& use) {
  constexpr int kN = kVecSize<T>;
  constexpr std::integral_constant<int, 1> one{};
  constexpr std::integral_constant<int, kN> all{};
  const auto misalignment = reinterpret_cast<std::uintptr_t>(p) % 16;
  std::int64_t head =
      misalignment == 0 ? 0 : static_cast<std::int64_t>((16 - misalignment) / sizeof(T));
  if (!vectors || head > n) head = n;
  for (std::int64_t i = thread; i < head; i += threads) use(p + i, load(p + i, one));
  T* const from = p + head;
  const std::int64_t count = (n - head) / kN;
  std::int64_t v = thread;
  if constexpr (kDeep > 1) {
    for (; v + (kDeep - 1) * threads < count; v += kDeep * threads) {
      decltype(load(from, all)) data[kDeep];
      FUSEREG_UNROLL
      for (int u = 0; u < kDeep; ++u) data[u] = load(from + (v + u * threads) * kN, all);
      FUSEREG_UNROLL
      for (int u = 0; u < kDeep; ++u) use(from + (v + u * threads) * kN, data[u]);
    }
  }
  FUSEREG_NO_UNROLL
  for (; v < count; v += threads) use(from + v * kN, load(from + v * kN, all));
  for (std::int64_t i = count * kN + thread; i < n - head; i += threads)
    use(from + i, load(from + i, one));
}

// f(0), f(1), ... rounded to T: of 16-bit types, two in one conversion.
template <class T, int N, class F>
FUSEREG_DEVICE_INLINE Vec<T, N> rounded_to(const F& f) {
  Vec<T, N> v;
  if constexpr (sizeof(T) == 2 && N % 2 == 0) {
    FUSEREG_UNROLL
    for (int e = 0; e < N; e += 2) {
      const std::uint32_t pair = round_pair<T>(f(e), f(e + 1));
      v[e] = T{static_cast<std::uint16_t>(pair)};
      v[e + 1] = T{static_cast<std::uint16_t>(pair >> 16)};
    }
  } else {
    FUSEREG_UNROLL
    for (int e = 0; e < N; ++e) v[e] = from_compute<T>(f(e));
  }
  return v;
}

// --- who am I ---

FUSEREG_DEVICE_INLINE unsigned thread_rank() {
  return threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z);
}
FUSEREG_DEVICE_INLINE unsigned block_threads() { return blockDim.x * blockDim.y * blockDim.z; }
FUSEREG_DEVICE_INLINE unsigned grid_blocks() { return gridDim.x * gridDim.y * gridDim.z; }
FUSEREG_DEVICE_INLINE unsigned block_rank() {
  return blockIdx.x + gridDim.x * (blockIdx.y + gridDim.y * blockIdx.z);
}
FUSEREG_DEVICE_INLINE unsigned lane_id() { return thread_rank() % kWarpSize; }
FUSEREG_DEVICE_INLINE unsigned warp_id() { return thread_rank() / kWarpSize; }

// --- where no vector fits ---

// A warp takes a window of 32 * N elements that follow each other, and a lane every 32nd of them, so
// that what a warp loads or stores at once lies side by side; its first one is the lane's number.
// Bits of the elements come from lanes that have them for N neighbors each, lane 0 for the first:
// window_bits() gives each lane what window_bit() needs to answer for the lane's element j. All
// lanes of the warp must call both.
template <int N>
FUSEREG_DEVICE_INLINE std::uint32_t window_bits(std::uint32_t bits) {
  static_assert(N == 8, "four lanes to a word");
  bits <<= lane_id() % 4 * N;
  bits |= __shfl_xor_sync(kFullMask, bits, 1);
  return bits | __shfl_xor_sync(kFullMask, bits, 2);
}
template <int N>
FUSEREG_DEVICE_INLINE bool window_bit(std::uint32_t bits, int j) {
  return (__shfl_sync(kFullMask, bits, j * (kWarpSize / N)) >> lane_id() & 1u) != 0;
}

// --- reductions ---
// The order of the additions depends on the number of threads alone, so the bits do not change from
// run to run. Blocks must have whole warps, and all threads of the warp or block must take part.

struct Sum {
  template <class T>
  FUSEREG_DEVICE_INLINE T operator()(T a, T b) const {
    return a + b;
  }
};
// NaN wins, as in torch: a plain comparison would lose it.
struct Max {
  template <class T>
  FUSEREG_DEVICE_INLINE T operator()(T a, T b) const {
    return a > b || a != a ? a : b;
  }
};
struct Min {
  template <class T>
  FUSEREG_DEVICE_INLINE T operator()(T a, T b) const {
    return a < b || a != a ? a : b;
  }
};

// Every lane gets the result, and the same bits: the exchange is a butterfly, and op commutes.
template <class T, class Op>
FUSEREG_DEVICE_INLINE T warp_reduce(T v, Op op) {
  FUSEREG_UNROLL
  for (int offset = kWarpSize / 2; offset > 0; offset /= 2) {
    v = op(v, __shfl_xor_sync(kFullMask, v, offset));
  }
  return v;
}
template <class T>
FUSEREG_DEVICE_INLINE T warp_sum(T v) {
  return warp_reduce(v, Sum{});
}

// K values at once for the price of one in barriers. Every thread gets the results. May be called
// again at once. K * sizeof(T) * 32 bytes of shared memory.
template <class T, int K, class Op>
FUSEREG_DEVICE_INLINE void block_reduce(T (&v)[K], Op op, T identity) {
  FUSEREG_SHARED(partial, T[K][kWarpSize]);
  const unsigned lane = lane_id();
  const unsigned warp = warp_id();
  const unsigned warps = block_threads() / kWarpSize;
  FUSEREG_UNROLL
  for (int k = 0; k < K; ++k) {
    v[k] = warp_reduce(v[k], op);
    if (lane == 0) partial[k][warp] = v[k];
  }
  __syncthreads();
  FUSEREG_UNROLL
  for (int k = 0; k < K; ++k) {
    // Every warp does the same work on the same values: cheaper than a second exchange.
    v[k] = warp_reduce(lane < warps ? partial[k][lane] : identity, op);
  }
  __syncthreads();  // partial is free again
}
template <class T, class Op>
FUSEREG_DEVICE_INLINE T block_reduce(T v, Op op, T identity) {
  T values[1] = {v};
  block_reduce(values, op, identity);
  return values[0];
}
template <class T, int K>
FUSEREG_DEVICE_INLINE void block_sum(T (&v)[K]) {
  block_reduce(v, Sum{}, T(0));
}
template <class T>
FUSEREG_DEVICE_INLINE T block_sum(T v) {
  return block_reduce(v, Sum{}, T(0));
}

// --- between blocks ---

// One load that sees what another block released; in a loop, a wait. The host shim lets other
// threads run here, so every wait for another thread has to go through it.
FUSEREG_DEVICE_INLINE unsigned load_acquire(const unsigned* p) {
#if defined(FUSEREG_CUDA_ON_HOST)
  return cuda_on_host::load_acquire(p);
#else
  unsigned v;
  asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(v) : "l"(p) : "memory");
  return v;
#endif
}
FUSEREG_DEVICE_INLINE void store_release(unsigned* p, unsigned v) {
#if defined(FUSEREG_CUDA_ON_HOST)
  cuda_on_host::store_release(p, v);
#else
  asm volatile("st.release.gpu.global.u32 [%0], %1;" ::"l"(p), "r"(v) : "memory");
#endif
}

// True, in all threads, for the one of `blocks` blocks that gets here last; that block sees
// everything that the others wrote before they called. So a grid reduces in one launch: each block
// writes its partial result to its own slot, and the last one adds the slots in their order.
// *counter must be 0 before the first launch, and is 0 again after each, if every block calls once.
FUSEREG_DEVICE_INLINE bool is_last_block(unsigned* counter, unsigned blocks) {
  FUSEREG_SHARED(is_last, bool);
  __threadfence();  // what this thread wrote is visible ...
  __syncthreads();  // ... as is what the block wrote, before one thread says so
  if (thread_rank() == 0) {
    const unsigned last = blocks - 1;
    is_last = atomicInc(counter, last) == last;  // wraps to 0 with the last block
  }
  __syncthreads();
  const bool result = is_last;
  if (result) __threadfence();
  return result;
}
FUSEREG_DEVICE_INLINE bool is_last_block(unsigned* counter) {
  return is_last_block(counter, grid_blocks());
}

// A barrier of the whole grid, for cooperative launches. *state must be 0 before the first launch
// and may be used again at once, by grids of any size, one at a time: bit 31 flips at each barrier.
FUSEREG_DEVICE_INLINE void grid_sync(unsigned* state) {
  constexpr unsigned kFlag = 0x80000000u;
  __syncthreads();
  if (thread_rank() == 0) {
    __threadfence();
    // The blocks' shares add up to exactly kFlag, so the low bits return to where they were.
    const unsigned share = block_rank() == 0 ? kFlag - (grid_blocks() - 1) : 1u;
    const unsigned before = atomicAdd(state, share);
    while (((load_acquire(state) ^ before) & kFlag) == 0) {
    }
    __threadfence();
  }
  __syncthreads();
}

// --- clusters (sm_90 and newer; LaunchConfig::cluster) ---

#if defined(FUSEREG_CUDA_ON_HOST) || !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
#define FUSEREG_HAS_CLUSTERS 1
#else
#define FUSEREG_HAS_CLUSTERS 0
#endif

// A barrier of all threads of the cluster; writes to any block's shared memory are visible after
// it.
FUSEREG_DEVICE_INLINE void cluster_sync() {
#if defined(FUSEREG_CUDA_ON_HOST)
  cuda_on_host::cluster_barrier();
#elif defined(__CUDA_ARCH__) && FUSEREG_HAS_CLUSTERS
  asm volatile("barrier.cluster.arrive.release;" ::: "memory");
  asm volatile("barrier.cluster.wait.acquire;" ::: "memory");
#else
  __trap();
#endif
}

// This block's place in its cluster.
FUSEREG_DEVICE_INLINE unsigned cluster_rank() {
#if defined(FUSEREG_CUDA_ON_HOST)
  return cuda_on_host::cluster_rank();
#elif defined(__CUDA_ARCH__) && FUSEREG_HAS_CLUSTERS
  unsigned rank;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
#else
  return 0;
#endif
}

// The address at which block `rank` of the cluster keeps what this block keeps at p (shared
// memory). That block must be alive while it is used: cluster_sync() before the first and after the
// last use.
template <class T>
FUSEREG_DEVICE_INLINE T* cluster_map(T* p, unsigned rank) {
#if defined(FUSEREG_CUDA_ON_HOST)
  return static_cast<T*>(cuda_on_host::cluster_map(p, rank));
#elif defined(__CUDA_ARCH__) && FUSEREG_HAS_CLUSTERS
  std::uint64_t mapped;
  asm("mapa.u64 %0, %1, %2;" : "=l"(mapped) : "l"(reinterpret_cast<std::uint64_t>(p)), "r"(rank));
  return reinterpret_cast<T*>(mapped);
#else
  (void)rank;
  return p;
#endif
}

}  // namespace fusereg::cuda
