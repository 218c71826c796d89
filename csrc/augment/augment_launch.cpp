// The CPU launchers of augmentation. Contract: augment.h.
#include <algorithm>

#include "augment/augment.h"
#include "augment/augment_math.h"
#include "augment/scratch.h"
#include "core/ceil_div.h"
#include "core/pages.h"
#include "core/parallel.h"

namespace fusereg::augment {
namespace {

// What a thread should get at least: elements of the result.
constexpr std::int64_t kGrain = 1 << 13;

// Whether a sample is filtered along its axes (augment_filter.h), and the memory for one of them and
// a partner; 0 if none is.
std::int64_t filter_bytes(const Job& job, std::int64_t lanes) {
  if (!job.antialias || job.x.type == Element::kFloat64) return 0;
  std::int64_t taps[2] = {0, 0};
  for (std::int64_t i = 0; i < job.n; ++i) {
    const double* const m = job.records + i * kRecord;
    if (!is_axis_aligned(m) || is_projective(m)) continue;
    taps[0] = std::max(taps[0], most_taps(extent_of(m), job.interpolation, job.x.w));
    taps[1] = std::max(taps[1], most_taps(extent_of(m + 3), job.interpolation, job.x.h));
  }
  if (taps[0] == 0) return 0;
  constexpr std::int64_t kFloat = sizeof(float);
  auto axis = [](std::int64_t count, std::int64_t most) {
    return round_up_to_line(count * static_cast<std::int64_t>(sizeof(std::int32_t))) +
           round_up_to_line(count * kFloat) +
           round_up_to_line(count * static_cast<std::int64_t>(sizeof(Span<float>))) +
           round_up_to_line(count * most * kFloat);
  };
  const std::int64_t strip = job.x.w * (job.x.channels_last ? job.c : 1) * lanes;
  const std::int64_t pitch = ceil_div(job.y.w, kBlock) * kBlock;
  return round_up_to_line(strip * kFloat) + 2 * (round_up_to_line(job.c * lanes * pitch * kFloat) +
                                                 axis(job.y.w, taps[0]) + axis(job.y.h, taps[1]));
}

}  // namespace

void run_cpu(const Forward& job) {
  prepare_pages(job.y.data, job.n * job.y.sample * element_size(job.y.type));
  const CpuKernels& kernels = cpu_kernels();
  const std::int64_t row = std::max<std::int64_t>(job.y.w * job.c, 1);
  const std::int64_t rows = job.n * job.y.h;
  if (const std::int64_t bytes = filter_bytes(job, kernels.lanes); bytes > 0) {
    const std::int64_t parts = std::clamp<std::int64_t>(rows * row / kGrain, 1, max_threads());
    const ScratchMemory scratch(bytes, parts);
    parallel_for(parts, 1, [&](std::int64_t begin, std::int64_t end) {
      for (std::int64_t p = begin; p < end; ++p)
        kernels.filtered(job, rows * p / parts, rows * (p + 1) / parts, scratch.of(p));
    });
    return;
  }
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
