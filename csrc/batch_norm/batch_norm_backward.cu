// CUDA backward of batch normalization, streaming: a kernel that reads x and the gradient for their
// sums, and one that reads both again and writes grad_x. Contract: batch_norm.h; how work is laid
// over blocks: batch_norm_plan.h; the resident kernel: batch_norm_resident.cu.
//
// Predicted for an H200 (4.2 TB/s of copy), N = 256, bfloat16, from the bytes alone; not measured:
//   shape           x      5 transfers   resident (3 transfers)
//   64 x 112^2     411 MB    489 us        294 us
//   256 x 56^2     411 MB    489 us        294 us
//   512 x 28^2     206 MB    245 us        147 us
//   1024 x 14^2    103 MB    122 us         73 us
//   2048 x 7^2      51 MB     61 us         37 us
// Bits add 1 / 16 of a transfer to each read, a residual's gradient one transfer.
#include "batch_norm/batch_norm_finish.cuh"
#include "batch_norm/batch_norm_sums.cuh"

namespace fusereg::batch_norm {
namespace {

// At least so many blocks on a multiprocessor, or too few loads would be under way.
template <class T>
constexpr int kBlocksPerSm = sizeof(T) == 8 ? 1 : 2;

template <class T, class Walk, bool kHeavy>
__global__ void __launch_bounds__(kThreads, kBlocksPerSm<T>)
    batch_norm_sums_kernel(FUSEREG_GRID_CONSTANT(Arguments<Backward>, g)) {
  using C = Compute<T>;
  FUSEREG_SHARED(coefficients, ChannelNumbers<C>);
  const Backward& job = g.job;
  const Tiling& t = g.tiling;
  const Share share = share_of_block(t, blockIdx.x);
  if (const int i = static_cast<int>(threadIdx.x); i < slab_channels(t, share.slab)) {
    const std::int64_t c = first_channel(t, share) + i;
    set_backward_coefficients(coefficients, i, job, c, read_statistic(job, t, share.group, c));
  }
  __syncthreads();
  auto* const partials = static_cast<GradientSums*>(g.partials);
  const auto plain = plain_of<C>(job.epilogue);
  block_sums<kHeavy, T>(TypeTag<Walk>{}, job, t, share, plain, coefficients, Ignore{},
                        [&](int i, const GradientSums& s) {
                          const std::int64_t c = first_channel(t, share) + i;
                          about_mean(job, c, read_statistic(job, t, share.group, c), s,
                                     static_cast<double>(coefficients.m[i]))
                              .store(partials + partial_index(t, share, i));
                        });
  finish_backward(g, share.slab, partials, t.splits);
}

template <class T, class Walk, bool kHeavy>
__global__ void __launch_bounds__(kThreads, kBlocksPerSm<T>)
    batch_norm_gradient_kernel(FUSEREG_GRID_CONSTANT(Arguments<Backward>, g)) {
  using C = Compute<T>;
  FUSEREG_SHARED(coefficients, ChannelNumbers<C>);
  const Backward& job = g.job;
  const Tiling& t = g.tiling;
  // The last that was read comes first.
  const Share share = share_of_block(t, gridDim.x - 1 - blockIdx.x);
  const std::int64_t all = t.groups * t.channels;
  if (const int i = static_cast<int>(threadIdx.x); i < slab_channels(t, share.slab)) {
    const std::int64_t c = first_channel(t, share) + i;
    const std::int64_t s = share.group * t.channels + c;
    const Statistic statistic = read_statistic(job, t, share.group, c);
    set_backward_coefficients(coefficients, i, job, c, statistic);
    GradientSums sums;
    if (job.sums != nullptr) sums = {job.sums[s], job.sums[all + s]};
    set_gradient(coefficients, i, job, c, statistic, sums);
  }
  __syncthreads();
  const auto plain = plain_of<C>(job.epilogue);
  Walk walk = walk_share(TypeTag<Walk>{}, t, share, job.mask);
  const auto k = kept_coefficients(walk, coefficients);
  C q[Walk::kSets];
  C r[Walk::kSets];
  kept_gradient(walk, coefficients, q, r);
  for_each_octet<kAheadBackward<T, Walk>>(
      walk, [&](const Place& place) { return load_backward<kHeavy, Walk, T>(job, plain, place); },
      [&](const Place& place, const BackwardData<T, Walk::kWide>& data) {
        write_backward<kHeavy, Walk>(job, plain, k, q, r, place, data);
      });
}

}  // namespace

std::int64_t scratch_bytes(const Backward& job, int device) {
  if (!job.reduce) return 0;
  return std::max(partial_bytes<GradientSums>(plan_of(job, device)),
                  partial_bytes<GradientSums>(plan_of(job, device, false)));
}

void run_cuda(const Backward& job, void* scratch, void* semaphores, int device, void* stream) {
  if (job.layout.channels == 0) return;
  const cuda::DeviceGuard guard(device);
  Arguments<Backward> g{};
  g.job = job;
  g.partials = scratch;
  g.semaphores = static_cast<unsigned*>(semaphores);
  cuda::LaunchConfig config;
  config.stream = static_cast<cuda::Stream>(stream);
  if (try_resident(kBackwardOp, g, plan_of(job, device), config.stream)) return;
  const Plan plan = plan_of(job, device, false);
  const bool heavy = is_heavy(job.epilogue);
  const auto launch = [&](const Tiling& tiling, auto kernel_of) {
    g.tiling = tiling;
    set_grid(config, kBackwardOp, tiling.items() * tiling.splits);
    dispatch_kernel(job.dtype, tiling, heavy, [&](auto tag, auto walk, auto is_heavy) {
      cuda::launch(kBackwardOp, kernel_of(tag, walk, is_heavy), config, g);
    });
  };
  if (job.reduce) {
    launch(plan.reduce, [](auto tag, auto walk, auto is_heavy) {
      return &batch_norm_sums_kernel<typename decltype(tag)::type, typename decltype(walk)::type,
                                     decltype(is_heavy)::value>;
    });
  }
  if ((job.grad_x == nullptr && job.grad_residual == nullptr) || job.layout.numel() == 0) return;
  launch(plan.apply, [](auto tag, auto walk, auto is_heavy) {
    return &batch_norm_gradient_kernel<typename decltype(tag)::type, typename decltype(walk)::type,
                                       decltype(is_heavy)::value>;
  });
}

}  // namespace fusereg::batch_norm
