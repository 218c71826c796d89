// CUDA's dialect as plain C++, so that a .cu file compiles with a C++ compiler and its kernels run
// on the processor under AddressSanitizer and UndefinedBehaviorSanitizer. See README.md beside this
// file.
//
// A CUDA thread is a fiber. Barriers, warp shuffles and votes, cluster barriers, atomics and
// acquire loads are the points where one fiber may give way to another; between them a thread runs
// alone.
#pragma once

#include <math.h>

#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <limits>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <vector>

// --- qualifiers ---

#define __global__
#define __device__
#define __host__
#define __constant__
#define __grid_constant__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __align__(n) __attribute__((aligned(n)))
#define __managed__
// As a static, one variable would serve all blocks, with no red zone in templates: refused.
#define __shared__ on_the_host_declare_shared_memory_with_FUSEREG_SHARED

// --- the runtime's types ---

struct uint3 {
  unsigned x, y, z;
};
struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
  constexpr dim3(uint3 v) : x(v.x), y(v.y), z(v.z) {}
};

#define FUSEREG_HOST_VECTOR_TYPES(type, name)                                                 \
  struct alignas(2 * sizeof(type)) name##2 { type x, y; };                                    \
  struct alignas(4 * sizeof(type) < 16 ? 4 * sizeof(type) : 16) name##4 { type x, y, z, w; }; \
  inline name##2 make_##name##2(type x, type y) { return {x, y}; }                            \
  inline name##4 make_##name##4(type x, type y, type z, type w) { return {x, y, z, w}; }
FUSEREG_HOST_VECTOR_TYPES(int, int)
FUSEREG_HOST_VECTOR_TYPES(unsigned, uint)
FUSEREG_HOST_VECTOR_TYPES(float, float)
FUSEREG_HOST_VECTOR_TYPES(double, double)
FUSEREG_HOST_VECTOR_TYPES(unsigned short, ushort)
FUSEREG_HOST_VECTOR_TYPES(long long, longlong)
FUSEREG_HOST_VECTOR_TYPES(unsigned long long, ulonglong)
#undef FUSEREG_HOST_VECTOR_TYPES

// Work on a stream is done when the call returns, so a stream is only a name.
struct CUstream_st;
using cudaStream_t = CUstream_st*;

// The names and numbers are CUDA's; only those that cuda.cuh or the model below speaks of.
enum cudaError_t {
  cudaSuccess = 0,
  cudaErrorInvalidValue = 1,
  cudaErrorMemoryAllocation = 2,
  cudaErrorInvalidConfiguration = 9,
  cudaErrorInsufficientDriver = 35,
  cudaErrorCallRequiresNewerDriver = 36,
  cudaErrorDevicesUnavailable = 46,
  cudaErrorInvalidDeviceFunction = 98,
  cudaErrorNoDevice = 100,
  cudaErrorInvalidDevice = 101,
  cudaErrorNoKernelImageForDevice = 209,
  cudaErrorInvalidPtx = 218,
  cudaErrorJitCompilerNotFound = 221,
  cudaErrorUnsupportedPtxVersion = 222,
  cudaErrorIllegalAddress = 700,
  cudaErrorLaunchOutOfResources = 701,
  cudaErrorLaunchTimeout = 702,
  cudaErrorAssert = 710,
  cudaErrorHardwareStackError = 714,
  cudaErrorIllegalInstruction = 715,
  cudaErrorMisalignedAddress = 716,
  cudaErrorLaunchFailure = 719,
  cudaErrorCooperativeLaunchTooLarge = 720,
  cudaErrorSystemDriverMismatch = 803,
  cudaErrorInvalidClusterSize = 912,
};

enum cudaDeviceAttr {
  cudaDevAttrMultiProcessorCount = 16,
  cudaDevAttrL2CacheSize = 38,
  cudaDevAttrMaxThreadsPerMultiProcessor = 39,
  cudaDevAttrComputeCapabilityMajor = 75,
  cudaDevAttrComputeCapabilityMinor = 76,
  cudaDevAttrMaxSharedMemoryPerMultiprocessor = 81,
  cudaDevAttrMaxSharedMemoryPerBlockOptin = 97,
};

enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize = 8 };

enum cudaMemcpyKind {
  cudaMemcpyHostToHost,
  cudaMemcpyHostToDevice,
  cudaMemcpyDeviceToHost,
  cudaMemcpyDeviceToDevice,
  cudaMemcpyDefault,
};

enum cudaStreamCaptureStatus {
  cudaStreamCaptureStatusNone,
  cudaStreamCaptureStatusActive,
};

struct cudaDeviceProp {
  char name[256];
  std::size_t totalGlobalMem;
  int major, minor, multiProcessorCount;
};

const char* cudaGetErrorName(cudaError_t error);
const char* cudaGetErrorString(cudaError_t error);
cudaError_t cudaGetLastError();
cudaError_t cudaPeekAtLastError();
cudaError_t cudaDriverGetVersion(int* version);
cudaError_t cudaRuntimeGetVersion(int* version);
cudaError_t cudaGetDeviceCount(int* count);
cudaError_t cudaGetDevice(int* device);
cudaError_t cudaSetDevice(int device);
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device);
cudaError_t cudaGetDeviceProperties(cudaDeviceProp* properties, int device);
cudaError_t cudaMalloc(void** p, std::size_t bytes);
cudaError_t cudaFree(void* p);
cudaError_t cudaMemcpyAsync(void* to, const void* from, std::size_t bytes, cudaMemcpyKind,
                            cudaStream_t = nullptr);
cudaError_t cudaMemsetAsync(void* p, int value, std::size_t bytes, cudaStream_t = nullptr);
cudaError_t cudaStreamIsCapturing(cudaStream_t, cudaStreamCaptureStatus* status);
cudaError_t cudaFuncSetAttribute(const void* function, cudaFuncAttribute, int value);
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, const void* function,
                                                          int threads, std::size_t shared_bytes);
inline cudaError_t cudaStreamSynchronize(cudaStream_t) { return cudaSuccess; }
inline cudaError_t cudaDeviceSynchronize() { return cudaSuccess; }

// --- the machine ---

namespace fusereg::cuda_on_host {

// A kernel did something for which real hardware would hang, or give no defined result.
struct Fault : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// In which order threads and blocks run.
//   forward   blocks and threads upwards; each thread to its next yield, in turn
//   reverse   blocks and threads downwards; the thread that was last made ready runs first
//   random    any ready thread, any block next, and atomics yield at random too; drawn from the
//   seed
// A kernel that gives other results under another order lacks a barrier. The start is taken from
// FUSEREG_HOST_SCHEDULE=forward|reverse|random[:seed].
enum class Order { kForward, kReverse, kRandom };
struct Schedule {
  Order order = Order::kForward;
  std::uint64_t seed = 0;
};
Schedule schedule();
void set_schedule(Schedule schedule);
// "forward", "reverse", "random" or "random:<seed>"; throws std::invalid_argument.
Schedule parse_schedule(const std::string& text);

// The device that is modeled: what may be resident at once, and what cudaGetDeviceProperties says.
struct Device {
  int count = 2;
  int sm_count = 4;
  int threads_per_sm = 2048;
  int blocks_per_sm = 32;
  int shared_per_sm = 228 * 1024;
  int shared_per_block = 227 * 1024;
  int cluster_blocks = 8;
  bool capturing = false;  // what streams say; launches run all the same
  int granted_sms = 0;     // fewer than sm_count, under MPS say, where not 0: cooperative launches
                           // that ask for more are refused
};
// device_properties() keeps its first answer, so set the model before the first launch.
Device& device();

// How many launches have run: lets a test say "one launch for the whole list".
std::uint64_t launch_count();
// Bytes of parameters that all of them have copied to the device.
std::uint64_t parameter_bytes();
// How often a kernel has been asked about, or given an attribute.
std::uint64_t question_count();

int max_resident_blocks(unsigned threads_per_block, std::size_t shared_bytes);

// Bytes of a kernel's parameter.
struct Parameter {
  const void* data;
  std::size_t size;
};

struct Launch {
  std::string op;
  const void* function;
  dim3 grid, block;
  std::size_t shared_bytes;
  bool cooperative;
  dim3 cluster;
  cudaStream_t stream;
  std::vector<Parameter> parameters;
  std::function<void()> body;  // of one thread; owns copies of the parameters
};

// Why the device would not take this launch; cudaSuccess if it would.
cudaError_t refusal(const Launch& launch);

// Runs the kernel for every thread of the grid and returns when all are done. Throws Fault.
cudaError_t run(const Launch& launch);

// What launches on the device call: runs it, now or when the stream comes to it.
cudaError_t launch(const Launch& launch);

// --- what a kernel's code calls ---

struct Coordinates {
  uint3 thread{}, block{};
  dim3 block_dim, grid_dim;
};
extern Coordinates coordinates;  // of the thread that is running

// The place in the source that a report names.
struct Site {
  const char* file;
  int line;
};

enum class Barrier { kSync, kCount, kAnd, kOr, kCluster };
int barrier(Barrier kind, int predicate, Site site);

enum class WarpOp { kSync, kShuffle, kBallot };
struct WarpRequest {
  WarpOp op;
  unsigned mask;
  unsigned bytes;       // of a shuffled value
  std::uint64_t value;  // what this lane offers
  int source;           // the lane whose value it wants
};
std::uint64_t warp_exchange(const WarpRequest& request, Site site);
int lane();

// After an atomic operation: another thread may run here.
void after_atomic(bool changed, Site site);
unsigned load_acquire(const unsigned* p, const char* file = __builtin_FILE(),
                      int line = __builtin_LINE());
void store_release(unsigned* p, unsigned value);

[[noreturn]] void fault(const std::string& what);

inline void check_aligned(const void* p, std::size_t bytes, const char* what) {
  if (reinterpret_cast<std::uintptr_t>(p) % bytes != 0) {
    fault("misaligned address: a " + std::to_string(bytes) + "-byte " + what +
          " needs an address that is a multiple of it");
  }
}

void* dynamic_shared_memory();
void cluster_barrier(const char* file = __builtin_FILE(), int line = __builtin_LINE());
unsigned cluster_rank();
void* cluster_map(void* p, unsigned rank);

int new_shared_variable();
void* shared_variable_of_block(int id, std::size_t bytes, std::size_t alignment);

// One variable per declaration and block. The lambda is only its name: each has a type of its own,
// in each instance of a template.
template <class T, class Name>
T& shared_variable(Name) {
  static const int id = new_shared_variable();
  return *static_cast<T*>(shared_variable_of_block(id, sizeof(T), alignof(T)));
}

template <class T>
std::uint64_t to_bits(T v) {
  std::uint64_t bits = 0;
  std::memcpy(&bits, &v, sizeof(T));
  return bits;
}

template <class T>
T shuffle(unsigned mask, T v, int source, Site site) {
  static_assert(std::is_arithmetic_v<T> && (sizeof(T) == 4 || sizeof(T) == 8),
                "CUDA shuffles 4- and 8-byte numbers");
  const std::uint64_t bits =
      warp_exchange({WarpOp::kShuffle, mask, sizeof(T), to_bits(v), source}, site);
  T result;
  std::memcpy(&result, &bits, sizeof(T));
  return result;
}

void check_width(int width);

}  // namespace fusereg::cuda_on_host

// --- built-in variables and functions ---

inline const uint3& threadIdx = fusereg::cuda_on_host::coordinates.thread;
inline const uint3& blockIdx = fusereg::cuda_on_host::coordinates.block;
inline const dim3& blockDim = fusereg::cuda_on_host::coordinates.block_dim;
inline const dim3& gridDim = fusereg::cuda_on_host::coordinates.grid_dim;
inline constexpr int warpSize = 32;

// The default arguments take the caller's place in the source.
#define FUSEREG_HOST_SITE const char *file = __builtin_FILE(), int line = __builtin_LINE()

inline void __syncthreads(FUSEREG_HOST_SITE) {
  fusereg::cuda_on_host::barrier(fusereg::cuda_on_host::Barrier::kSync, 0, {file, line});
}
inline int __syncthreads_count(int predicate, FUSEREG_HOST_SITE) {
  return fusereg::cuda_on_host::barrier(fusereg::cuda_on_host::Barrier::kCount, predicate,
                                        {file, line});
}
inline int __syncthreads_and(int predicate, FUSEREG_HOST_SITE) {
  return fusereg::cuda_on_host::barrier(fusereg::cuda_on_host::Barrier::kAnd, predicate,
                                        {file, line});
}
inline int __syncthreads_or(int predicate, FUSEREG_HOST_SITE) {
  return fusereg::cuda_on_host::barrier(fusereg::cuda_on_host::Barrier::kOr, predicate,
                                        {file, line});
}
inline void __syncwarp(unsigned mask = 0xffffffffu, FUSEREG_HOST_SITE) {
  fusereg::cuda_on_host::warp_exchange({fusereg::cuda_on_host::WarpOp::kSync, mask, 0, 0, -1},
                                       {file, line});
}
inline void __threadfence() {}
inline void __threadfence_block() {}
inline void __threadfence_system() {}

inline unsigned __ballot_sync(unsigned mask, int predicate, FUSEREG_HOST_SITE) {
  return static_cast<unsigned>(fusereg::cuda_on_host::warp_exchange(
      {fusereg::cuda_on_host::WarpOp::kBallot, mask, 0, predicate != 0, -1}, {file, line}));
}
inline int __any_sync(unsigned mask, int predicate, FUSEREG_HOST_SITE) {
  return __ballot_sync(mask, predicate, file, line) != 0;
}
inline int __all_sync(unsigned mask, int predicate, FUSEREG_HOST_SITE) {
  return __ballot_sync(mask, predicate, file, line) == mask;
}

// A source outside the lane's segment of `width` lanes means its own value, as on the device.
template <class T>
T __shfl_sync(unsigned mask, T v, int source, int width = 32, FUSEREG_HOST_SITE) {
  fusereg::cuda_on_host::check_width(width);
  const int first = fusereg::cuda_on_host::lane() & ~(width - 1);
  return fusereg::cuda_on_host::shuffle(mask, v, first | (source & (width - 1)), {file, line});
}
template <class T>
T __shfl_up_sync(unsigned mask, T v, unsigned delta, int width = 32, FUSEREG_HOST_SITE) {
  fusereg::cuda_on_host::check_width(width);
  const int self = fusereg::cuda_on_host::lane();
  const int first = self & ~(width - 1);
  const int source = self - static_cast<int>(delta & 31u);
  return fusereg::cuda_on_host::shuffle(mask, v, source < first ? self : source, {file, line});
}
template <class T>
T __shfl_down_sync(unsigned mask, T v, unsigned delta, int width = 32, FUSEREG_HOST_SITE) {
  fusereg::cuda_on_host::check_width(width);
  const int self = fusereg::cuda_on_host::lane();
  const int last = self | (width - 1);
  const int source = self + static_cast<int>(delta & 31u);
  return fusereg::cuda_on_host::shuffle(mask, v, source > last ? self : source, {file, line});
}
template <class T>
T __shfl_xor_sync(unsigned mask, T v, int lane_mask, int width = 32, FUSEREG_HOST_SITE) {
  fusereg::cuda_on_host::check_width(width);
  const int self = fusereg::cuda_on_host::lane();
  const int last = self | (width - 1);
  const int source = self ^ (lane_mask & 31);
  return fusereg::cuda_on_host::shuffle(mask, v, source > last ? self : source, {file, line});
}

// --- atomics ---
// Threads share one processor, so a plain operation is atomic; what matters is that another thread
// may run after it.

namespace fusereg::cuda_on_host {
// As in `atomicAdd(unsigned*, 1)`, the operand converts to the pointer's type.
template <class T>
struct Exactly {
  using type = T;
};
template <class T>
using Operand = typename Exactly<T>::type;

template <class T>
T exchange(T* p, T value, Site site) {
  const T old = *p;
  *p = value;
  after_atomic(std::memcmp(&old, &value, sizeof(T)) != 0, site);
  return old;
}

// Integer sums wrap on the device, where plain C++ leaves signed overflow undefined.
template <class T>
T wrapping_add(T a, T b) {
  if constexpr (std::is_integral_v<T>) {
    using U = std::make_unsigned_t<T>;
    return static_cast<T>(static_cast<U>(a) + static_cast<U>(b));
  } else {
    return a + b;
  }
}
}  // namespace fusereg::cuda_on_host

template <class T>
T atomicExch(T* p, fusereg::cuda_on_host::Operand<T> v, FUSEREG_HOST_SITE) {
  return fusereg::cuda_on_host::exchange(p, v, {file, line});
}
template <class T>
T atomicAdd(T* p, fusereg::cuda_on_host::Operand<T> v, FUSEREG_HOST_SITE) {
  static_assert(std::is_same_v<T, int> || std::is_same_v<T, unsigned> ||
                    std::is_same_v<T, unsigned long long> || std::is_floating_point_v<T>,
                "CUDA has no atomicAdd for this type");
  return fusereg::cuda_on_host::exchange(p, fusereg::cuda_on_host::wrapping_add(*p, v),
                                         {file, line});
}
template <class T>
T atomicSub(T* p, fusereg::cuda_on_host::Operand<T> v, FUSEREG_HOST_SITE) {
  static_assert(std::is_same_v<T, int> || std::is_same_v<T, unsigned>,
                "CUDA has no atomicSub for this type");
  return fusereg::cuda_on_host::exchange(
      p, static_cast<T>(static_cast<unsigned>(*p) - static_cast<unsigned>(v)), {file, line});
}
template <class T>
T atomicMin(T* p, fusereg::cuda_on_host::Operand<T> v, FUSEREG_HOST_SITE) {
  static_assert(std::is_integral_v<T>, "CUDA has no atomicMin for this type");
  return fusereg::cuda_on_host::exchange(p, v < *p ? v : *p, {file, line});
}
template <class T>
T atomicMax(T* p, fusereg::cuda_on_host::Operand<T> v, FUSEREG_HOST_SITE) {
  static_assert(std::is_integral_v<T>, "CUDA has no atomicMax for this type");
  return fusereg::cuda_on_host::exchange(p, v > *p ? v : *p, {file, line});
}
template <class T>
T atomicAnd(T* p, fusereg::cuda_on_host::Operand<T> v, FUSEREG_HOST_SITE) {
  return fusereg::cuda_on_host::exchange(p, static_cast<T>(*p & v), {file, line});
}
template <class T>
T atomicOr(T* p, fusereg::cuda_on_host::Operand<T> v, FUSEREG_HOST_SITE) {
  return fusereg::cuda_on_host::exchange(p, static_cast<T>(*p | v), {file, line});
}
template <class T>
T atomicXor(T* p, fusereg::cuda_on_host::Operand<T> v, FUSEREG_HOST_SITE) {
  return fusereg::cuda_on_host::exchange(p, static_cast<T>(*p ^ v), {file, line});
}
template <class T>
T atomicCAS(T* p, fusereg::cuda_on_host::Operand<T> expected, fusereg::cuda_on_host::Operand<T> v,
            FUSEREG_HOST_SITE) {
  return fusereg::cuda_on_host::exchange(p, *p == expected ? v : *p, {file, line});
}
inline unsigned atomicInc(unsigned* p, unsigned limit, FUSEREG_HOST_SITE) {
  return fusereg::cuda_on_host::exchange(p, *p >= limit ? 0u : *p + 1u, {file, line});
}
inline unsigned atomicDec(unsigned* p, unsigned limit, FUSEREG_HOST_SITE) {
  return fusereg::cuda_on_host::exchange(p, *p == 0u || *p > limit ? limit : *p - 1u, {file, line});
}

// --- arithmetic ---

template <class T>
T __ldg(const T* p) {
  return *p;
}
template <class T>
T __ldcs(const T* p) {
  return *p;
}
template <class T>
void __stcs(T* p, T v) {
  *p = v;
}

[[noreturn]] inline void __trap() { fusereg::cuda_on_host::fault("__trap() was called"); }

inline int __popc(unsigned v) { return __builtin_popcount(v); }
inline int __popcll(unsigned long long v) { return __builtin_popcountll(v); }
inline int __ffs(int v) { return __builtin_ffs(v); }
inline int __clz(int v) { return v == 0 ? 32 : __builtin_clz(static_cast<unsigned>(v)); }
inline unsigned __umulhi(unsigned a, unsigned b) {
  return static_cast<unsigned>((static_cast<std::uint64_t>(a) * b) >> 32);
}

namespace fusereg::cuda_on_host {
template <class To, class From>
To reinterpret(From from) {
  static_assert(sizeof(To) == sizeof(From), "same size");
  To to;
  std::memcpy(&to, &from, sizeof(To));
  return to;
}
}  // namespace fusereg::cuda_on_host
inline unsigned __float_as_uint(float v) { return fusereg::cuda_on_host::reinterpret<unsigned>(v); }
inline int __float_as_int(float v) { return fusereg::cuda_on_host::reinterpret<int>(v); }
inline float __uint_as_float(unsigned v) { return fusereg::cuda_on_host::reinterpret<float>(v); }
inline float __int_as_float(int v) { return fusereg::cuda_on_host::reinterpret<float>(v); }
inline long long __double_as_longlong(double v) {
  return fusereg::cuda_on_host::reinterpret<long long>(v);
}
inline double __longlong_as_double(long long v) {
  return fusereg::cuda_on_host::reinterpret<double>(v);
}

inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __fsqrt_rn(float a) { return sqrtf(a); }
inline float __fmaf_rn(float a, float b, float c) { return fmaf(a, b, c); }
inline double __dadd_rn(double a, double b) { return a + b; }
inline double __dmul_rn(double a, double b) { return a * b; }
inline double __ddiv_rn(double a, double b) { return a / b; }
inline double __dsqrt_rn(double a) { return sqrt(a); }
inline float rsqrtf(float a) { return 1.0f / sqrtf(a); }
inline double rsqrt(double a) { return 1.0 / sqrt(a); }

#define FUSEREG_HOST_MIN_MAX(type)                          \
  inline type min(type a, type b) { return b < a ? b : a; } \
  inline type max(type a, type b) { return a < b ? b : a; }
FUSEREG_HOST_MIN_MAX(int)
FUSEREG_HOST_MIN_MAX(unsigned)
FUSEREG_HOST_MIN_MAX(long)
FUSEREG_HOST_MIN_MAX(unsigned long)
FUSEREG_HOST_MIN_MAX(long long)
FUSEREG_HOST_MIN_MAX(unsigned long long)
#undef FUSEREG_HOST_MIN_MAX
inline float min(float a, float b) { return fminf(a, b); }
inline float max(float a, float b) { return fmaxf(a, b); }
inline double min(double a, double b) { return fmin(a, b); }
inline double max(double a, double b) { return fmax(a, b); }
