#include "core/cuda_info.h"

#include "core/cuda.cuh"

namespace fusereg {

namespace py = pybind11;

py::list cuda_device_info() {
  py::list devices;
  const cuda::DeviceReport report = cuda::device_info();
  for (const cuda::DeviceInfo& d : report.devices) {
    py::dict entry;
    entry["index"] = d.index;
    entry["name"] = d.name;
    entry["capability"] = std::to_string(d.major) + "." + std::to_string(d.minor);
    entry["sm_count"] = d.sm_count;
    entry["memory_bytes"] = d.total_memory;
    entry["driver"] = report.driver_version;
    entry["runtime"] = report.runtime_version;
    devices.append(entry);
  }
  return devices;
}

py::str cuda_error() { return {cuda::device_info().error}; }

}  // namespace fusereg
