#include "core/cuda_info.h"

#if defined(__linux__)
#include <dlfcn.h>
#endif

#include "core/cuda.cuh"

namespace fusereg::cuda {

DeviceReport device_info() {
  DeviceReport report;
  const auto failed = [&report](cudaError_t error) {
    (void)cudaGetLastError();
    report.error = std::string(cudaGetErrorName(error)) + ": " + cudaGetErrorString(error);
    const std::string remedy = detail::remedy(error);
    if (!remedy.empty()) report.error += "; " + remedy;
    return report;
  };
  (void)cudaRuntimeGetVersion(&report.runtime_version);
  (void)cudaDriverGetVersion(&report.driver_version);
  int count = 0;
  if (const cudaError_t error = cudaGetDeviceCount(&count); error != cudaSuccess) {
    return failed(error);
  }
  for (int index = 0; index < count; ++index) {
    cudaDeviceProp properties;
    if (const cudaError_t error = cudaGetDeviceProperties(&properties, index);
        error != cudaSuccess) {
      return failed(error);
    }
    report.devices.push_back({index, properties.name, properties.major, properties.minor,
                              properties.multiProcessorCount, properties.totalGlobalMem});
  }
  return report;
}

bool is_capturing(const char* op, void* stream) {
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  check(op, cudaStreamIsCapturing(static_cast<Stream>(stream), &status));
  return status != cudaStreamCaptureStatusNone;
}

bool has_context(int device) {
#if defined(__linux__)
  // The driver's own function: the runtime has none that answers without making a context.
  using GetState = int (*)(int device, unsigned* flags, int* active);
  static const auto get_state = [] {
    void* const driver = dlopen("libcuda.so.1", RTLD_NOW);
    void* const found = driver == nullptr ? nullptr : dlsym(driver, "cuDevicePrimaryCtxGetState");
    return reinterpret_cast<GetState>(found);
  }();
  unsigned flags = 0;
  int active = 0;
  if (get_state != nullptr && get_state(device, &flags, &active) == 0) return active != 0;
#else
  (void)device;
#endif
  return true;
}

void set_device(int device) { (void)cudaSetDevice(device); }

void set_restore_device(void (*restore)(int)) { restore_device = restore; }

}  // namespace fusereg::cuda
