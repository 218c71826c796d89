// CUDA forward of batch normalization, streaming: a kernel that reads x for its statistics, and one
// that reads it again, normalizes and writes y; and the choice of kernels. Contract: batch_norm.h;
// how work is laid over blocks: batch_norm_plan.h; the resident kernels: batch_norm_resident.cu.
//
// Statistics: float32 sums of x - shift over short runs, shift being an element of the channel,
// then float64, then Chan's combination of the blocks' moments in their order, which the last block
// of each slab does, and updates the running statistics.
//
// Predicted for an H200 (4.2 TB/s of copy), N = 256, bfloat16, from the bytes alone; not measured:
//   shape           x      3 transfers   resident (2 transfers)
//   64 x 112^2     411 MB    294 us        196 us
//   256 x 56^2     411 MB    294 us        196 us
//   512 x 28^2     206 MB    147 us         98 us
//   1024 x 14^2    103 MB     73 us         49 us
//   2048 x 7^2      51 MB     37 us         24 us
// plus some 3 us for each launch. In channels_last, 64 (or 32) channels of the first two shapes are
// more than all shared memory together, some 23 MB: these take the 3 transfers. So do float64, and
// what does not begin at multiples of 16 bytes. The second read walks backwards, so that what is
// left of x in L2 (up to some 25 MB) is not read from memory: 6 % of the first row, half of the
// last.
#include "batch_norm/batch_norm_finish.cuh"
#include "batch_norm/batch_norm_sums.cuh"

namespace fusereg::batch_norm {
namespace {

// At least so many blocks on a multiprocessor: enough loads under way, and none of the spills that
// come where the compiler saves registers for one more block by itself.
template <class T>
constexpr int kBlocksPerSm = sizeof(T) == 8 ? 1 : 2;

template <class T, class Walk>
__global__ void __launch_bounds__(kThreads, kBlocksPerSm<T>)
    batch_norm_moments_kernel(FUSEREG_GRID_CONSTANT(Arguments<Forward>, g)) {
  const Tiling& t = g.tiling;
  const Share share = share_of_block(t, blockIdx.x);
  auto* const partials = static_cast<Moments*>(g.partials);
  block_moments<T>(TypeTag<Walk>{}, g.job, t, share, Ignore{},
                   [&](int c, const Moments& m) { partials[partial_index(t, share, c)] = m; });
  finish_forward(g, share.slab, partials, t.splits);
}

template <class T, class Walk, bool kHeavy>
__global__ void __launch_bounds__(kThreads, kHeavy || Walk::kColumns ? kBlocksPerSm<T> : 3)
    batch_norm_apply_kernel(FUSEREG_GRID_CONSTANT(Arguments<Forward>, g)) {
  using C = Compute<T>;
  FUSEREG_SHARED(coefficients, ChannelNumbers<C>);
  const Forward& job = g.job;
  const Tiling& t = g.tiling;
  // The last that was read comes first.
  const Share share = share_of_block(t, gridDim.x - 1 - blockIdx.x);
  if (const int i = static_cast<int>(threadIdx.x); i < slab_channels(t, share.slab)) {
    const std::int64_t c = first_channel(t, share) + i;
    set_coefficients(coefficients, i, job, c, read_statistic(job, t, share.group, c));
  }
  __syncthreads();
  const auto plain = plain_of<C>(job.epilogue);
  Walk walk = walk_share(TypeTag<Walk>{}, t, share, job.mask);
  const auto k = kept_coefficients(walk, coefficients);
  for_each_octet<kAhead<T> / 2>(
      walk,
      [&](const Place& place) {
        ForwardData<T, Walk::kWide> data{};
        data.x = load_octet<Walk>(static_cast<const T*>(job.x), place);
        finish_octet_inputs<Walk>(job, place, data);
        return data;
      },
      [&](const Place& place, const ForwardData<T, Walk::kWide>& data) {
        write_forward<kHeavy, Walk>(job, plain, k, place, data);
      });
}

// Running statistics from moments that were given.
__global__ void __launch_bounds__(kThreads)
    batch_norm_running_kernel(FUSEREG_GRID_CONSTANT(Arguments<Forward>, g)) {
  const Tiling& t = g.tiling;
  const std::int64_t c = static_cast<std::int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (c < t.channels) {
    Moments total;
    for (std::int64_t group = 0; group < t.groups; ++group) {
      total.add(read_moments(g.job, t, group, c));
    }
    update_running(g.job, c, total);
  }
  if (cuda::is_last_block(g.semaphores)) count_batch(g.job);
}

}  // namespace

std::int64_t scratch_bytes(const Forward& job, int device) {
  if (job.statistics != Statistics::kCompute) return 0;
  return std::max(partial_bytes<Moments>(plan_of(job, device)),
                  partial_bytes<Moments>(plan_of(job, device, false)));
}

void run_cuda(const Forward& job, void* scratch, void* semaphores, int device, void* stream) {
  const cuda::DeviceGuard guard(device);
  Arguments<Forward> g{};
  g.job = job;
  g.partials = scratch;
  g.semaphores = static_cast<unsigned*>(semaphores);
  cuda::LaunchConfig config;
  config.stream = static_cast<cuda::Stream>(stream);
  const bool any = job.layout.channels > 0;
  if (any && try_resident(kForwardOp, g, plan_of(job, device), config.stream)) return;
  const Plan plan = plan_of(job, device, false);
  if (job.statistics == Statistics::kFixed) {
    g.job.batches = nullptr;
  } else if (any && job.statistics == Statistics::kCompute) {
    g.tiling = plan.reduce;
    set_grid(config, kForwardOp, g.tiling.items() * g.tiling.splits);
    dispatch_kernel(job.dtype, g.tiling, true, [&](auto tag, auto walk, auto) {
      using T = typename decltype(tag)::type;
      using Walk = typename decltype(walk)::type;
      cuda::launch(kForwardOp, batch_norm_moments_kernel<T, Walk>, config, g);
    });
  } else if (job.running_mean.data != nullptr || job.running_var.data != nullptr ||
             job.batches != nullptr) {
    g.tiling = plan.reduce;
    // One block at least: where there are no channels, the batch is counted all the same.
    set_grid(config, kForwardOp,
             ceil_div(std::max<std::int64_t>(job.layout.channels, 1), kThreads));
    cuda::launch(kForwardOp, batch_norm_running_kernel, config, g);
  }
  if (job.y == nullptr || job.layout.numel() == 0) return;
  g.tiling = plan.apply;
  set_grid(config, kForwardOp, g.tiling.items() * g.tiling.splits);
  dispatch_kernel(
      job.dtype, g.tiling, is_heavy(job.epilogue), [&](auto tag, auto walk, auto heavy) {
        using T = typename decltype(tag)::type;
        using Walk = typename decltype(walk)::type;
        cuda::launch(kForwardOp, batch_norm_apply_kernel<T, Walk, decltype(heavy)::value>, config,
                     g);
      });
}

}  // namespace fusereg::batch_norm
