// What the bindings of the rooms share: names of arguments, answers to Python, the way to a kernel.
#pragma once

#include <cstdint>
#include <optional>
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

// Below so many elements a job of the CPU keeps the GIL: letting it go and taking it again would cost
// more than the work.
inline constexpr std::int64_t kWorthReleasing = 1 << 14;

// Runs the job on the device's kernels: run_cuda(job, more..., index, stream) or run_cpu(job) of its
// room. Where the host stands in for the device (FUSEREG_HOST_IS_DEVICE) there are no others.
template <class Job, class... More>
void run_job(const Job& job, const Device& device, [[maybe_unused]] std::int64_t elements,
             [[maybe_unused]] More... more) {
#if defined(FUSEREG_CUDA)
  if (runs_cuda_kernels(device)) {
    run_cuda(job, more..., device.index, current_stream(device));
    return;
  }
#endif
#if !defined(FUSEREG_HOST_IS_DEVICE)
  (void)device;
  std::optional<py::gil_scoped_release> released;
  if (elements >= kWorthReleasing) released.emplace();
  run_cpu(job);
#endif
}

}  // namespace fusereg
