// The CPU launcher of DropBlock. Contract: drop_block.h.
#include <algorithm>
#include <atomic>

#include "core/pages.h"
#include "core/parallel.h"
#include "drop_block/drop_block.h"

namespace fusereg::drop_block {
namespace {

// Elements that a thread should get at least.
constexpr std::int64_t kGrain = 1 << 15;

}  // namespace

void run_cpu(const Job& job) {
  const Geometry& g = job.geometry;
  prepare_pages(job.y, g.numel() * dtype_size(job.dtype));
  const CpuKernels& kernels = cpu_kernels();
  const std::int64_t grain = std::max<std::int64_t>(1, kGrain * g.tiles / g.numel());
  if (job.counts) {
    std::atomic<std::int64_t> dropped{0};
    parallel_for(g.tiles, grain, [&](std::int64_t begin, std::int64_t end) {
      std::uint32_t bits[kTileWords];
      std::int64_t count = 0;
      for (std::int64_t i = begin; i < end; ++i) count += kernels.mark(job, tile_at(g, i), bits);
      dropped += count;
    });
    *job.kept = static_cast<double>(g.numel() - dropped);
  }
  const double scale = make_scale(g, *job.kept);
  parallel_for(g.tiles, grain, [&](std::int64_t begin, std::int64_t end) {
    std::uint32_t bits[kTileWords];
    for (std::int64_t i = begin; i < end; ++i) {
      const Tile tile = tile_at(g, i);
      kernels.mark(job, tile, bits);
      kernels.apply(job, tile, bits, scale);
    }
  });
}

}  // namespace fusereg::drop_block
