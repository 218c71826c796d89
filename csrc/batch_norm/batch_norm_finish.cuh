// The end of the kernels that sum: partial results become statistics, running statistics and
// gradients of parameters, in the block that is last to arrive; and what launches need.
#pragma once

#include <algorithm>
#include <string>

#include "batch_norm/batch_norm_device.cuh"

namespace fusereg::batch_norm {

inline constexpr const char* kForwardOp = "fusereg.batch_norm";
inline constexpr const char* kBackwardOp = "fusereg.batch_norm: backward";

// Where the partial result of a share goes.
FUSEREG_DEVICE_INLINE std::int64_t partial_index(const Tiling& t, const Share& s, int channel) {
  return (s.group * t.channels + first_channel(t, s) + channel) * t.splits + s.split;
}

FUSEREG_DEVICE_INLINE void write_moments(const Forward& job, const Tiling& t, std::int64_t group,
                                         std::int64_t c, const Moments& m) {
  const std::int64_t all = t.groups * t.channels;
  double* const p = job.moments + group * t.channels + c;
  p[0] = m.mean;
  p[all] = m.count > 0.0 ? m.m2 / m.count : 0.0;
  p[2 * all] = m.count;
}
FUSEREG_DEVICE_INLINE Moments read_moments(const Forward& job, const Tiling& t, std::int64_t group,
                                           std::int64_t c) {
  const Statistic s = read_statistic(job, t, group, c);
  return {s.count, s.mean, s.variance * s.count};
}

FUSEREG_DEVICE_INLINE void update_running(const Forward& job, std::int64_t c, const Moments& m) {
  if (m.count == 0.0) return;
  const double momentum = job.momentum != kCumulative ? job.momentum
                          : job.batches == nullptr    ? 0.0
                                                      : 1.0 / static_cast<double>(*job.batches + 1);
  const auto update = [&](const PerChannel& p, double value) {
    if (p.data == nullptr) return;
    write_number(p, c, (1.0 - momentum) * read_number(p, c) + momentum * value);
  };
  update(job.running_mean, m.mean);
  if (m.count != 1.0) update(job.running_var, m.m2 / (m.count - 1.0));
}

FUSEREG_DEVICE_INLINE void count_batch(const Forward& job) {
  if (job.batches != nullptr && threadIdx.x == 0) *job.batches += 1;
}

// Called once for each share (`shares` of a slab and group call) by a block that has written its
// partial result, or, with no partial results, the moments.
template <class Partial>
__device__ void finish_forward(const Arguments<Forward>& g, std::int64_t slab,
                               const Partial* partials, std::int64_t shares) {
  const Forward& job = g.job;
  const Tiling& t = g.tiling;
  const Bundle bundle = bundle_of(t, slab);
  if (!is_last_of(g.semaphores + 1 + bundle.index, bundle.slabs * t.groups * shares)) return;
  const std::int64_t end = (bundle.first_slab + bundle.slabs) * t.pack;
  for (std::int64_t c = bundle.first_slab * t.pack + cuda::warp_id();
       c < (end < t.channels ? end : t.channels); c += kWarps) {
    Moments total;
    for (std::int64_t group = 0; group < t.groups; ++group) {
      Moments m;
      if (partials != nullptr) {
        m = combine(partials + (group * t.channels + c) * t.splits, t.splits);
        if (cuda::lane_id() == 0) write_moments(job, t, group, c, m);
      } else {
        m = read_moments(job, t, group, c);
      }
      total.add(m);
    }
    if (cuda::lane_id() == 0) update_running(job, c, total);
  }
  // All blocks have read the count before the last of them changes it.
  if (job.batches != nullptr && is_last_of(g.semaphores, bundle.bundles)) count_batch(job);
}

template <class Partial>
__device__ void finish_backward(const Arguments<Backward>& g, std::int64_t slab,
                                const Partial* partials, std::int64_t shares) {
  const Backward& job = g.job;
  const Tiling& t = g.tiling;
  const Bundle bundle = bundle_of(t, slab);
  if (!is_last_of(g.semaphores + 1 + bundle.index, bundle.slabs * t.groups * shares)) return;
  const std::int64_t all = t.groups * t.channels;
  const std::int64_t end = (bundle.first_slab + bundle.slabs) * t.pack;
  for (std::int64_t c = bundle.first_slab * t.pack + cuda::warp_id();
       c < (end < t.channels ? end : t.channels); c += kWarps) {
    GradientSums total;
    for (std::int64_t group = 0; group < t.groups; ++group) {
      const std::int64_t s = group * t.channels + c;
      GradientSums sums;
      if (partials != nullptr) {
        sums = combine(partials + s * t.splits, t.splits);
        if (cuda::lane_id() == 0) {
          job.sums[s] = sums.sum;
          job.sums[all + s] = sums.dot;
        }
      } else {
        sums = {job.sums[s], job.sums[all + s]};
      }
      if (t.outer == 0) continue;  // of no elements the variance is 0, and eps may be
      const double variance = read_statistic(job, t, group, c).variance + job.eps;
      total.add({sums.sum, sums.dot / sqrt(variance)});
    }
    if (cuda::lane_id() == 0) {
      if (job.grad_bias.data != nullptr) write_number(job.grad_bias, c, total.sum);
      if (job.grad_weight.data != nullptr) write_number(job.grad_weight, c, total.dot);
    }
  }
}

// sum dz * (x - m) is what a block sums; the mean is what the contract says.
FUSEREG_DEVICE_INLINE GradientSums about_mean(const Backward& job, std::int64_t c,
                                              const Statistic& statistic, const GradientSums& s,
                                              double m) {
  const double dot = s.dot + (m - center_of(job, c, statistic)) * s.sum;
  return {s.sum, dot * inverse_of_a(job, c, statistic)};
}

// --- launchers ---

inline DeviceLimits device_limits(int device) {
  const cuda::DeviceProperties& p = cuda::device_properties(device);
  return {p.sm_count, p.max_shared_per_sm, p.max_shared_per_block_optin};
}

inline bool aligned(std::initializer_list<const void*> pointers) {
  return std::all_of(pointers.begin(), pointers.end(),
                     [](const void* p) { return cuda::is_aligned(p, 16); });
}

inline Plan plan_of(const Forward& job, int device, bool resident = true) {
  return make_plan(job.layout, job.dtype, Direction::kForward,
                   aligned({job.x, job.residual, job.y}), job.mask != nullptr, job.bits != nullptr,
                   resident && job.statistics == Statistics::kCompute && job.y != nullptr,
                   device_limits(device));
}
inline Plan plan_of(const Backward& job, int device, bool resident = true) {
  return make_plan(job.layout, job.dtype, Direction::kBackward,
                   aligned({job.x, job.residual, job.grad, job.grad_x, job.grad_residual}),
                   job.mask != nullptr, job.bits != nullptr,
                   resident && job.reduce && job.statistics == Statistics::kCompute &&
                       job.x != nullptr && (job.grad_x != nullptr || job.grad_residual != nullptr),
                   device_limits(device));
}

template <class Partial>
std::int64_t partial_bytes(const Plan& plan) {
  const Tiling& t = plan.reduce;
  return t.groups * t.channels * t.splits * static_cast<std::int64_t>(sizeof(Partial));
}

// Calls f(type tag, walk tag, std::bool_constant<heavy>) for a kernel that can do the job.
// float64 and element by element there is only the heavy kind.
template <class F>
void dispatch_kernel(DType dtype, const Tiling& t, bool heavy, const F& f) {
  const auto narrow = [&](auto tag) {
    if (t.columns) {
      f(tag, TypeTag<Columns<false>>{}, std::true_type{});
    } else {
      f(tag, TypeTag<Lines<false>>{}, std::true_type{});
    }
  };
  const auto any = [&](auto tag) {
    const auto wide = [&](auto walk) {
      heavy ? f(tag, walk, std::true_type{}) : f(tag, walk, std::false_type{});
    };
    if (!t.wide) {
      narrow(tag);
    } else if (t.columns) {
      wide(TypeTag<Columns<true>>{});
    } else {
      wide(TypeTag<Lines<true>>{});
    }
  };
  switch (dtype) {
    case DType::kFloat64:
      narrow(TypeTag<double>{});
      break;
    case DType::kFloat32:
      any(TypeTag<float>{});
      break;
    case DType::kFloat16:
      any(TypeTag<Half>{});
      break;
    default:
      any(TypeTag<BFloat16>{});
  }
}

inline void set_grid(cuda::LaunchConfig& config, const char* op, std::int64_t blocks) {
  if (blocks > 0x7fffffff) {
    throw std::runtime_error(std::string(op) + ": " + std::to_string(blocks) +
                             " blocks are more than a launch can have: fewer groups are needed");
  }
  config.grid = dim3(static_cast<unsigned>(blocks));
  config.block = dim3(kThreads);
}

// Resident kernels (batch_norm_resident.cu). False: the device does not hold the plan's blocks at
// once.
bool launch_resident(const Arguments<Forward>& g, const Plan& plan, cuda::Stream stream);
bool launch_resident(const Arguments<Backward>& g, const Plan& plan, cuda::Stream stream);

// Whether the call's one resident kernel has been launched. Throws where it is forced and does not
// fit.
template <class Job>
bool try_resident(const char* op, Arguments<Job>& g, const Plan& plan, cuda::Stream stream) {
  if (plan.kind == KernelKind::kResident) {
    g.tiling = plan.reduce;
    g.teams = plan.teams;
    if (launch_resident(g, plan, stream)) return true;
  }
  if (resident_forced()) {
    throw std::runtime_error(std::string(op) +
                             ": the resident kernel was forced, and this call does not fit the "
                             "device's shared memory or is none that it can do");
  }
  return false;
}

}  // namespace fusereg::batch_norm
