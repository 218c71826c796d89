// The CPU launchers of augmentation. Contract: augment.h.
#include <algorithm>

#include "augment/antialias_launch.h"
#include "augment/augment.h"
#include "core/ceil_div.h"
#include "core/pages.h"
#include "core/parallel.h"

namespace fusereg::augment {
namespace {

// What a thread should get at least: elements of the result.
constexpr std::int64_t kGrain = 1 << 13;

}  // namespace

void run_cpu(const Forward& job) {
  prepare_pages(job.y.data, job.n * job.y.sample * element_size(job.y.type));
  if (job.antialias && job.x.type != Element::kFloat64) return run_antialiased(job);
  const CpuKernels& kernels = cpu_kernels();
  const std::int64_t row = std::max<std::int64_t>(job.y.w * job.c, 1);
  const std::int64_t rows = job.n * job.y.h;
  parallel_for(rows, std::max<std::int64_t>(kGrain / row, 1),
               [&](std::int64_t begin, std::int64_t end) { kernels.forward(job, begin, end); });
}

void run_cpu(const Backward& job) {
  // A few bands for each thread at most: each walks all output pixels that reach it.
  const CpuKernels& kernels = cpu_kernels();
  const std::int64_t wanted = ceil_div(2 * max_threads(), std::max<std::int64_t>(job.n, 1));
  const std::int64_t bands = std::clamp<std::int64_t>(wanted, 1, job.grad_x.h);
  parallel_for(job.n * bands, 1, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t i = begin; i < end; ++i) {
      const std::int64_t band = i % bands;
      kernels.backward(job, i / bands, job.grad_x.h * band / bands,
                       job.grad_x.h * (band + 1) / bands);
    }
  });
}

}  // namespace fusereg::augment
