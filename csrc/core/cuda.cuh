// What CUDA kernels and their launchers share: the one launch(), the device guard, errors with a
// remedy, wide memory access, reductions in a fixed order, barriers between blocks.
//
// The same source compiles in two ways. nvcc builds it for the device. With FUSEREG_CUDA_ON_HOST a
// C++17 compiler builds it as plain C++ against tests/cuda_on_host/cuda_on_host.h, which runs the
// kernels on the processor, under the sanitizers, on a machine with no CUDA toolkit at all. Three
// things are spelled differently from everyday CUDA for its sake:
//   FUSEREG_SHARED(tile, float[256]);         instead of  __shared__ float tile[256];
//   FUSEREG_GRID_CONSTANT(Arguments, args)    instead of  const __grid_constant__ Arguments args
//   dynamic_shared<float>()                   instead of  extern __shared__ float memory[];
#pragma once

#include <array>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <map>
#include <memory>
#include <mutex>
#include <stdexcept>
#include <string>
#include <tuple>
#include <type_traits>
#include <utility>
#include <vector>

#include "core/ceil_div.h"

#if defined(FUSEREG_CUDA_ON_HOST)
#include "cuda_on_host.h"
#else
#include <cuda_runtime.h>
#endif

namespace fusereg::cuda {

using Stream = cudaStream_t;

// --- errors ---

namespace detail {

// What the user can do about it; empty where CUDA's own words are all there is to say.
inline std::string remedy(cudaError_t error) {
  switch (error) {
    case cudaErrorNoKernelImageForDevice:
    case cudaErrorInvalidDeviceFunction: {
      std::string text = "this build holds no code for this device";
#if defined(FUSEREG_CUDA_ARCHITECTURES)
      text += " (it was built for " FUSEREG_CUDA_ARCHITECTURES ")";
#endif
      int device = 0, major = 0, minor = 0;
      if (cudaGetDevice(&device) == cudaSuccess &&
          cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device) ==
              cudaSuccess &&
          cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device) ==
              cudaSuccess) {
        const std::string capability = std::to_string(major) + std::to_string(minor);
        return text + ": build fusereg with CMAKE_CUDA_ARCHITECTURES=" + capability;
      }
      return text + ": build fusereg with CMAKE_CUDA_ARCHITECTURES=native on this machine";
    }
    case cudaErrorUnsupportedPtxVersion:
    case cudaErrorInvalidPtx:
    case cudaErrorJitCompilerNotFound:
      return "the driver cannot translate this build's code for this device: update the driver, or "
             "build fusereg with this device's architecture in CMAKE_CUDA_ARCHITECTURES";
    case cudaErrorInsufficientDriver:
    case cudaErrorCallRequiresNewerDriver:
    case cudaErrorSystemDriverMismatch: {
      int driver = 0, runtime = 0;
      if (cudaDriverGetVersion(&driver) == cudaSuccess && driver == 0) {
        return "no NVIDIA driver was found on this machine";
      }
      cudaRuntimeGetVersion(&runtime);
      const auto name = [](int v) {
        return std::to_string(v / 1000) + "." + std::to_string(v % 1000 / 10);
      };
      return "the driver supports CUDA " + name(driver) + " and this build needs " + name(runtime) +
             ": update the driver, or use a build of fusereg for CUDA " +
             std::to_string(driver / 1000);
    }
    case cudaErrorNoDevice:
      return "no CUDA device is visible: check nvidia-smi and CUDA_VISIBLE_DEVICES";
    case cudaErrorDevicesUnavailable:
      return "another process holds the device exclusively";
    case cudaErrorMemoryAllocation:
      return "the device's memory is full: free tensors or call torch.cuda.empty_cache()";
    case cudaErrorLaunchOutOfResources:
      return "a block of this kernel asks for more registers or shared memory than the device has: "
             "please report it with the device's name";
    case cudaErrorCooperativeLaunchTooLarge:
      return "the blocks of this launch could not all be resident at once, so they could not wait "
             "for "
             "each other: launch no more than max_resident_blocks()";
    case cudaErrorIllegalAddress:
    case cudaErrorMisalignedAddress:
    case cudaErrorLaunchFailure:
    case cudaErrorIllegalInstruction:
    case cudaErrorHardwareStackError:
    case cudaErrorLaunchTimeout:
    case cudaErrorAssert:
      return "a kernel that ran earlier in this process failed, and the device is unusable until "
             "the "
             "process ends: run again with CUDA_LAUNCH_BLOCKING=1, or under compute-sanitizer, to "
             "find which";
    default:
      return {};
  }
}

}  // namespace detail

// Throws std::runtime_error that names the operation and carries CUDA's own words and the remedy.
[[noreturn]] inline void throw_error(const char* op, cudaError_t error,
                                     const std::string& note = {}) {
  // Clear the runtime's record, so that torch's next check does not report this error as its own.
  (void)cudaGetLastError();
  std::string text = std::string(op) + ": CUDA error " + cudaGetErrorName(error) + ": " +
                     cudaGetErrorString(error);
  if (!note.empty()) text += " (" + note + ")";
  const std::string remedy = detail::remedy(error);
  if (!remedy.empty()) text += "; " + remedy;
  throw std::runtime_error(text);
}

inline void check(const char* op, cudaError_t error) {
  if (error != cudaSuccess) throw_error(op, error);
}

// --- devices ---

// Makes a device current again that was. The module has it done by torch where the device has no
// context yet, and would get one: some 500 MB (core/cuda_info.h).
inline std::atomic<void (*)(int)> restore_device{nullptr};

// Makes `device` current for its lifetime. torch keeps the tensor's device and the current device
// apart, and a launch goes to the current one.
class DeviceGuard {
 public:
  explicit DeviceGuard(int device) {
    check("fusereg: device guard", cudaGetDevice(&previous_));
    if (previous_ == device) return;
    check("fusereg: device guard", cudaSetDevice(device));
    changed_ = true;
  }
  ~DeviceGuard() {
    if (!changed_) return;
    if (void (*const restore)(int) = restore_device.load(std::memory_order_relaxed)) {
      restore(previous_);
    } else {
      (void)cudaSetDevice(previous_);
    }
  }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

 private:
  int previous_ = 0;
  bool changed_ = false;
};

struct DeviceProperties {
  int major = 0;
  int minor = 0;
  int sm_count = 0;
  int max_threads_per_sm = 0;
  int max_shared_per_sm = 0;
  int max_shared_per_block_optin = 0;
  int l2_bytes = 0;
};

// Asked once per device and process; makes no CUDA context.
inline const DeviceProperties& device_properties(int device) {
  constexpr int kMaxDevices = 128;
  static std::array<std::atomic<const DeviceProperties*>, kMaxDevices> cache{};
  if (device < 0 || device >= kMaxDevices) {
    throw_error("fusereg: device properties", cudaErrorInvalidDevice);
  }
  auto& entry = cache[static_cast<std::size_t>(device)];
  if (const DeviceProperties* known = entry.load(std::memory_order_acquire)) return *known;

  auto properties = std::make_unique<DeviceProperties>();
  const auto ask = [device](int* value, cudaDeviceAttr attribute) {
    check("fusereg: device properties", cudaDeviceGetAttribute(value, attribute, device));
  };
  ask(&properties->major, cudaDevAttrComputeCapabilityMajor);
  ask(&properties->minor, cudaDevAttrComputeCapabilityMinor);
  ask(&properties->sm_count, cudaDevAttrMultiProcessorCount);
  ask(&properties->max_threads_per_sm, cudaDevAttrMaxThreadsPerMultiProcessor);
  ask(&properties->max_shared_per_sm, cudaDevAttrMaxSharedMemoryPerMultiprocessor);
  ask(&properties->max_shared_per_block_optin, cudaDevAttrMaxSharedMemoryPerBlockOptin);
  ask(&properties->l2_bytes, cudaDevAttrL2CacheSize);
  // Two threads may ask at once: the first answer stays, for the life of the process.
  const DeviceProperties* expected = nullptr;
  if (entry.compare_exchange_strong(expected, properties.get(), std::memory_order_acq_rel)) {
    return *properties.release();
  }
  return *expected;
}

inline int current_device() {
  int device = 0;
  check("fusereg: current device", cudaGetDevice(&device));
  return device;
}

// --- launching ---

// The most bytes that the parameters of one kernel may take: 32,764 from CUDA 12.1 on, 4 KB before.
#if defined(FUSEREG_CUDA_ON_HOST) || (defined(CUDART_VERSION) && CUDART_VERSION >= 12010)
inline constexpr std::size_t kKernelParamLimit = 32764;
#else
inline constexpr std::size_t kKernelParamLimit = 4096;
#endif
// What one big struct of arguments may take of it, so that a kernel can have a few others beside
// it.
inline constexpr std::size_t kMaxKernelParamBytes = (kKernelParamLimit - 256) / 16 * 16;

inline constexpr int kMaxThreadsPerBlock = 1024;

struct LaunchConfig {
  dim3 grid = dim3(1);
  dim3 block = dim3(1);
  std::size_t shared_bytes = 0;  // dynamic shared memory
  Stream stream = nullptr;
  bool cooperative = false;  // all blocks resident at once: needed by grid_sync()
  dim3 cluster = dim3(1);    // blocks that share a cluster: needed by cluster_sync()
};

namespace detail {

// How many bytes parameters of these types take, each at its own alignment.
template <class... P>
constexpr std::size_t param_bytes() {
  std::size_t bytes = 0;
  ((bytes = (bytes + alignof(P) - 1) / alignof(P) * alignof(P) + sizeof(P)), ...);
  return bytes;
}

inline std::string dim_text(const dim3& d) {
  return "(" + std::to_string(d.x) + ", " + std::to_string(d.y) + ", " + std::to_string(d.z) + ")";
}

inline std::uint64_t volume(const dim3& d) { return static_cast<std::uint64_t>(d.x) * d.y * d.z; }

// Refuses what the driver would only call "invalid argument".
inline void check_config(const char* op, const LaunchConfig& c) {
  const auto refuse = [op](const std::string& what) {
    throw std::runtime_error(std::string(op) + ": launch: " + what);
  };
  const std::uint64_t threads = volume(c.block);
  if (threads == 0 || threads > kMaxThreadsPerBlock || c.block.z > 64) {
    refuse("a block must have 1 to 1024 threads, got " + dim_text(c.block));
  }
  if (c.grid.x > 0x7fffffffu || c.grid.y > 65535u || c.grid.z > 65535u) {
    refuse("a grid has at most (2147483647, 65535, 65535) blocks, got " + dim_text(c.grid));
  }
  if (volume(c.cluster) == 0 || c.grid.x % c.cluster.x || c.grid.y % c.cluster.y ||
      c.grid.z % c.cluster.z) {
    refuse("the grid " + dim_text(c.grid) + " must be a multiple of the cluster " +
           dim_text(c.cluster));
  }
}

// The driver itself refuses a cooperative launch that could not be resident: it never hangs. It may
// hold fewer blocks than max_resident_blocks(), under MPS or in a green context.
template <class Note>
bool launched(const char* op, cudaError_t error, const Note& note) {
  if (error == cudaErrorCooperativeLaunchTooLarge) {
    (void)cudaGetLastError();
    return false;
  }
  if (error != cudaSuccess) throw_error(op, error, note());
  return true;
}

// What follows asks CUDA, for some microseconds, what does not change: once for each kernel and device.

// A kernel gets up to 48 KB of dynamic shared memory unasked; more must be asked for. What it has got it
// keeps, so that less is there too.
inline cudaError_t allow_shared_bytes(const void* function, int device, std::size_t bytes) {
  constexpr std::size_t kUnasked = 48 * 1024;
  if (bytes <= kUnasked) return cudaSuccess;
  static std::mutex mutex;
  static std::map<std::pair<const void*, int>, std::size_t> allowed;
  const std::lock_guard<std::mutex> lock(mutex);
  std::size_t& most = allowed[{function, device}];
  if (bytes <= most) return cudaSuccess;
  const cudaError_t error = cudaFuncSetAttribute(
      function, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(bytes));
  if (error == cudaSuccess) most = bytes;
  return error;
}

inline int max_blocks_per_sm(const char* op, const void* function, int device, int threads,
                             std::size_t shared_bytes) {
  static std::mutex mutex;
  static std::map<std::tuple<const void*, int, int, std::size_t>, int> known;
  const std::lock_guard<std::mutex> lock(mutex);
  const auto key = std::make_tuple(function, device, threads, shared_bytes);
  if (const auto at = known.find(key); at != known.end()) return at->second;
  check(op, allow_shared_bytes(function, device, shared_bytes));
  int blocks = 0;
  check(op,
        cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, function, threads, shared_bytes));
  known.emplace(key, blocks);
  return blocks;
}

#if defined(FUSEREG_CUDA_ON_HOST)

// False: the driver does not hold all blocks of a cooperative launch at once.
template <class... P>
bool launch_with(const char* op, void (*kernel)(P...), const LaunchConfig& c,
                 const std::decay_t<P>&... params) {
  // Copies on the heap, as the device has its own; one by one, so that an index past the end of any
  // meets a red zone.
  const std::tuple<std::shared_ptr<const std::decay_t<P>>...> copies(
      std::make_shared<const std::decay_t<P>>(params)...);
  const auto body = [kernel, copies] {
    std::apply([kernel](const auto&... copy) { kernel(*copy...); }, copies);
  };
  const auto* const function = reinterpret_cast<const void*>(kernel);
  check(op, allow_shared_bytes(function, current_device(), c.shared_bytes));
  const cudaError_t error = cuda_on_host::launch({op,
                                                  function,
                                                  c.grid,
                                                  c.block,
                                                  c.shared_bytes,
                                                  c.cooperative,
                                                  c.cluster,
                                                  c.stream,
                                                  {{&params, sizeof(params)}...},
                                                  body});
  return launched(op, error,
                  [&c] { return "grid " + dim_text(c.grid) + ", block " + dim_text(c.block); });
}

#else

template <class... P>
bool launch_with(const char* op, void (*kernel)(P...), const LaunchConfig& c,
                 const std::decay_t<P>&... params) {
  // One element more, since an array of none is not C++.
  void* pointers[] = {const_cast<void*>(static_cast<const void*>(&params))..., nullptr};
  const void* function = reinterpret_cast<const void*>(kernel);
  const auto note = [&c] {
    return "grid " + dim_text(c.grid) + ", block " + dim_text(c.block) + ", " +
           std::to_string(c.shared_bytes) + " bytes of dynamic shared memory";
  };

  const int device = current_device();
  const cudaError_t refused = allow_shared_bytes(function, device, c.shared_bytes);
  if (refused != cudaSuccess) {
    const int most = device_properties(device).max_shared_per_block_optin;
    throw_error(op, refused,
                note() + ", where a block of this device has at most " + std::to_string(most));
  }

  cudaLaunchAttribute attributes[2];
  unsigned count = 0;
  if (c.cooperative) {
    attributes[count].id = cudaLaunchAttributeCooperative;
    attributes[count++].val.cooperative = 1;
  }
  if (volume(c.cluster) > 1) {
    if (volume(c.cluster) >
        8) {  // 8 works on every device that has clusters; more must be asked for
      const cudaError_t error =
          cudaFuncSetAttribute(function, cudaFuncAttributeNonPortableClusterSizeAllowed, 1);
      if (error != cudaSuccess) throw_error(op, error, "cluster " + dim_text(c.cluster));
    }
    attributes[count].id = cudaLaunchAttributeClusterDimension;
    attributes[count].val.clusterDim.x = c.cluster.x;
    attributes[count].val.clusterDim.y = c.cluster.y;
    attributes[count++].val.clusterDim.z = c.cluster.z;
  }

  cudaLaunchConfig_t config = {};
  config.gridDim = c.grid;
  config.blockDim = c.block;
  config.dynamicSmemBytes = c.shared_bytes;
  config.stream = c.stream;
  config.attrs = attributes;
  config.numAttrs = count;
  return launched(op, cudaLaunchKernelExC(&config, function, pointers), note);
}

#endif

}  // namespace detail

// Every launch goes through here. `op` names the operation in errors ("fusereg.l1_penalty"). The
// arguments are converted to the kernel's parameter types. An empty grid launches nothing. The
// device must be current (DeviceGuard). Nothing is waited for: a fault inside the kernel shows
// later. False: the device does not hold all blocks of a cooperative launch at once; nothing runs.
template <class... P, class... A>
[[nodiscard]] bool try_launch(const char* op, void (*kernel)(P...), const LaunchConfig& config,
                              const A&... args) {
  static_assert(sizeof...(P) == sizeof...(A), "launch: wrong number of kernel arguments");
  static_assert((std::is_trivially_copyable_v<std::decay_t<P>> && ...),
                "launch: kernel parameters are copied as bytes");
  static_assert(detail::param_bytes<std::decay_t<P>...>() <= kKernelParamLimit,
                "launch: the kernel's parameters do not fit");
  if (detail::volume(config.grid) == 0) return true;
  detail::check_config(op, config);
  return detail::launch_with<P...>(op, kernel, config, args...);
}

// As try_launch(), for launches that nothing can stand in for.
template <class... P, class... A>
void launch(const char* op, void (*kernel)(P...), const LaunchConfig& config, const A&... args) {
  if (!try_launch(op, kernel, config, args...)) {
    throw_error(op, cudaErrorCooperativeLaunchTooLarge, "grid " + detail::dim_text(config.grid));
  }
}

// The most blocks of this kernel that the current device can hold at once: the largest grid that a
// cooperative launch may have.
template <class... P>
int max_resident_blocks(const char* op, void (*kernel)(P...), int threads,
                        std::size_t shared_bytes = 0) {
  const int device = current_device();
  return device_properties(device).sm_count *
         detail::max_blocks_per_sm(op, reinterpret_cast<const void*>(kernel), device, threads,
                                   shared_bytes);
}

}  // namespace fusereg::cuda

#if defined(__CUDACC__) || defined(FUSEREG_CUDA_ON_HOST)
#include "core/cuda_device.cuh"
#endif
