// The CPU launcher of Gaussian dropout. Contract: gaussian_dropout.h.
#include <algorithm>

#include "core/ceil_div.h"
#include "core/pages.h"
#include "core/parallel.h"
#include "gaussian_dropout/gaussian_dropout.h"

namespace fusereg::gaussian_dropout {

void run_cpu(const Job& job) {
  prepare_pages(job.y, job.numel * dtype_size(job.dtype));
  // Whole blocks of every instruction set, and what a thread should get of them at least.
  constexpr std::int64_t kUnit = 4096;
  constexpr std::int64_t kGrain = 1 << 14;
  const CpuKernels& kernels = cpu_kernels();
  const std::int64_t units = ceil_div(job.numel, kUnit);
  parallel_for(units, kGrain / kUnit, [&](std::int64_t begin, std::int64_t end) {
    kernels.elements(job, begin * kUnit, std::min(end * kUnit, job.numel));
  });
}

}  // namespace fusereg::gaussian_dropout
