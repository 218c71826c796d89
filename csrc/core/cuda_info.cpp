#include "core/cuda_info.h"

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

}  // namespace fusereg::cuda
