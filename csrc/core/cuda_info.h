// What the CUDA runtime says of this machine.
#pragma once

#include <cstddef>
#include <string>
#include <vector>

namespace fusereg::cuda {

struct DeviceInfo {
  int index = 0;
  std::string name;
  int major = 0;
  int minor = 0;
  int sm_count = 0;
  std::size_t total_memory = 0;
};

struct DeviceReport {
  std::vector<DeviceInfo> devices;
  int driver_version = 0;   // 13000 for CUDA 13.0; 0 where there is no driver
  int runtime_version = 0;  // of the runtime that is linked into this module
  std::string error;        // why `devices` is empty or cut short
};

// For `fusereg info`. Never throws because of the machine: no driver is an answer, not a fault.
DeviceReport device_info();

// Whether a graph is captured on the stream.
bool is_capturing(const char* op, void* stream);

// Whether this process has a context on the device; true where that cannot be told.
bool has_context(int device);

void set_device(int device);

// Who makes a device current again after a launch on another (cuda.cuh).
void set_restore_device(void (*restore)(int device));

}  // namespace fusereg::cuda
