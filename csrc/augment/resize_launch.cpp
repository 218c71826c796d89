// The CPU launcher of antialiased resizing. Contract: resize.h.
#include <algorithm>

#include "augment/resize.h"
#include "augment/scratch.h"
#include "core/ceil_div.h"
#include "core/pages.h"
#include "core/parallel.h"

namespace fusereg::augment {

void run_cpu(const ResizeJob& job) {
  const ResizeKernels& kernels = cpu_resize_kernels();
  const bool wide = job.x.type == Element::kFloat64;
  const std::int64_t lanes = kernels.lanes[wide ? 1 : 0];
  // Channels that lie apart on both sides are done one after the other.
  prepare_pages(job.y.data, job.n * job.y.sample * element_size(job.y.type));
  const bool apart = !job.x.channels_last && !job.y.channels_last;
  const int groups = apart ? job.c : 1;
  const int channels = apart ? 1 : job.c;
  const std::int64_t strips = ceil_div(job.y.h, lanes);
  const std::int64_t units = job.n * groups * strips;
  constexpr std::int64_t kGrain = 1 << 13;
  const std::int64_t elements = std::max<std::int64_t>(job.x.w, job.y.w) * channels * lanes;
  const std::int64_t threads =
      std::min<std::int64_t>(max_threads(), std::max<std::int64_t>(units * elements / kGrain, 1));
  const std::int64_t parts = std::clamp<std::int64_t>(threads, 1, units);
  const std::int64_t bytes =
      job.x.w * channels * lanes * static_cast<std::int64_t>(wide ? sizeof(double) : sizeof(float));
  const ScratchMemory scratch(bytes, parts);
  parallel_for(parts, 1, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t p = begin; p < end; ++p) {
      for (std::int64_t i = units * p / parts; i < units * (p + 1) / parts; ++i) {
        const auto channel = static_cast<int>(i / strips % groups);
        kernels.strip(job, i / strips / groups, channel, channels, i % strips * lanes,
                      scratch.of(p));
      }
    }
  });
}

}  // namespace fusereg::augment
