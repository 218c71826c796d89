// What the bindings of the rooms share: names of arguments, answers to Python, the way to a kernel.
#pragma once

#include <cstdint>
#include <string>

#include "core/tensor.h"

namespace fusereg {

// What a call answers. Python must prepare a tensor first: nothing has been written then.
inline constexpr int kDone = 0;
inline constexpr int kNeedsPreparation = 2;

// "fusereg.op: name", the beginning of an error.
inline std::string where(const char* op, const char* name) {
  return std::string("fusereg.") + op + ": " + name;
}

// The job on the device's kernels: run_cuda or run_cpu of its room. With few elements the GIL is
// kept: letting it go and taking it again would cost more than the work.
template <class Job, class... More>
void run_job(const Job& job, const Device& device, std::int64_t elements,
             [[maybe_unused]] More... more) {
#if defined(FUSEREG_CUDA)
  if (runs_cuda_kernels(device)) {
    run_cuda(job, more..., device.index, current_stream(device));
    return;
  }
#endif
  (void)device;
  constexpr std::int64_t kWorthReleasing = 1 << 14;
  if (elements < kWorthReleasing) {
    run_cpu(job);
    return;
  }
  const py::gil_scoped_release release;
  run_cpu(job);
}

}  // namespace fusereg
