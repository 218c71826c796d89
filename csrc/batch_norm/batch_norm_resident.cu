// CUDA kernels of batch normalization that read x (and backward, the gradient) once from memory.
// Contract: batch_norm.h; shapes and figures: batch_norm_plan.h, batch_norm.cu.
//
// A team of blocks holds a slab in shared memory: each block loads its share and sums it, leaves
// its partial result in its slot, waits for the team, combines all slots in their order (every
// block the same way, so with the same bits) and finishes its share from shared memory. Teams take
// one slab after the other. A team that waits needs all its blocks to be resident: the launch is
// cooperative, no larger than what the device holds by its own answer, and refused by the driver
// otherwise. Teams of one block need no barrier, and an ordinary launch.
//
// Slots are never used twice in a launch, so one barrier for each slab is enough. A share stays as
// it came, in x's own dtype: in octets, those of neighboring threads side by side, so that they meet
// neighboring banks.
//
// Two blocks of 256 threads share a multiprocessor: while one waits or stores, the other loads.
#include "batch_norm/batch_norm_finish.cuh"
#include "batch_norm/batch_norm_sums.cuh"

namespace fusereg::batch_norm {
namespace {

// A thread's octets in shared memory, one after the other: put() and take() go on from where the last one
// was, which takes one register.
template <class T>
class Shelf {
 public:
  using Part = typename Octet<T>::Part;
  FUSEREG_DEVICE_INLINE explicit Shelf(Part* memory) : next_(memory + threadIdx.x) {}
  FUSEREG_DEVICE_INLINE void put(const Octet<T>& v) {
    FUSEREG_UNROLL
    for (int i = 0; i < Octet<T>::kParts; ++i) {
      cuda::store_shared(next_[i * kThreads].values, v.part(i));
    }
    next_ += Octet<T>::kParts * kThreads;
  }
  FUSEREG_DEVICE_INLINE Octet<T> take() {
    Octet<T> v;
    FUSEREG_UNROLL
    for (int i = 0; i < Octet<T>::kParts; ++i) {
      v.set_part(i, cuda::load<Octet<T>::kPart>(next_[i * kThreads].values));
    }
    next_ += Octet<T>::kParts * kThreads;
    return v;
  }

 private:
  Part* next_;
};

// How a resident block goes through its slabs. It is the same for all threads and in use all the
// time, so it lies in shared memory, where it takes no registers from them.
struct Team {
  unsigned index, member, round;
  Share share;
  // The block's next slab; false: there is none. Every thread calls it.
  template <class Job>
  FUSEREG_DEVICE_INLINE bool next(const Arguments<Job>& g) {
    __syncthreads();  // the last one's coefficients, and this, have been read
    if (threadIdx.x == 0) {
      share = share_of(g.tiling, index + round * static_cast<unsigned>(g.teams), member);
      ++round;
    }
    __syncthreads();
    return share.group < g.tiling.groups;
  }
  FUSEREG_DEVICE_INLINE void start(const Tiling& t) {
    const auto splits = static_cast<unsigned>(t.splits);
    index = blockIdx.x / splits;
    member = blockIdx.x % splits;
    round = 0;
  }
  template <class Job>
  FUSEREG_DEVICE_INLINE void sync(const Arguments<Job>& g) const {
    if (g.tiling.splits > 1) {
      team_sync(counters(g), g.tiling.splits, round);
    } else {
      __syncthreads();
    }
  }
  template <class Job>
  FUSEREG_DEVICE_INLINE void leave(const Arguments<Job>& g) const {
    if (g.tiling.splits > 1) team_leave(counters(g), g.tiling.splits);
  }

 private:
  template <class Job>
  FUSEREG_DEVICE_INLINE unsigned* counters(const Arguments<Job>& g) const {
    return g.semaphores + kFirstTeamCounter + 2 * index;
  }
};

template <class T, class Walk, bool kHeavy>
__global__ void __launch_bounds__(kThreads, kResidentPerSm)
    batch_norm_forward_resident_kernel(FUSEREG_GRID_CONSTANT(Arguments<Forward>, g)) {
  using C = Compute<T>;
  FUSEREG_SHARED(coefficients, ChannelNumbers<C>);
  const Forward& job = g.job;
  const Tiling& t = g.tiling;
  auto* const memory = cuda::dynamic_shared<typename Shelf<T>::Part>();
  auto* const partials = static_cast<Moments*>(g.partials);
  FUSEREG_SHARED(plain, Plain<C>);
  FUSEREG_SHARED(team, Team);
  if (threadIdx.x == 0) {
    plain = plain_of<C>(job.epilogue);
    team.start(t);
  }
  while (team.next(g)) {
    const Share& share = team.share;
    Shelf<T> shelf(memory);
    block_moments<T>(
        TypeTag<Walk>{}, job, t, share, [&](const Octet<T>& octet) { shelf.put(octet); },
        [&](int c, const Moments& m) { partials[partial_index(t, share, c)] = m; });
    team.sync(g);
    for (int i = static_cast<int>(cuda::warp_id()); i < slab_channels(t, share.slab); i += kWarps) {
      const std::int64_t c = first_channel(t, share) + i;
      const Moments m = combine(partials + (share.group * t.channels + c) * t.splits, t.splits);
      if (cuda::lane_id() == 0) {
        const double variance = m.count > 0.0 ? m.m2 / m.count : 0.0;
        set_coefficients(coefficients, i, job, c, {m.mean, variance, m.count});
        if (team.member == 0) write_moments(job, t, share.group, c, m);
      }
    }
    __syncthreads();
    Walk walk = walk_share(TypeTag<Walk>{}, t, share, job.mask);
    const auto k = kept_coefficients(walk, coefficients);
    shelf = Shelf<T>(memory);
    for_each_octet<1>(
        walk,
        [&](const Place& place) {
          ForwardData<T, Walk::kWide> data{};
          finish_octet_inputs<Walk>(job, place, data);
          return data;
        },
        [&](const Place& place, ForwardData<T, Walk::kWide>& data) {
          data.x = shelf.take();
          write_forward<kHeavy, Walk>(job, plain, k, place, data);
        });
    if (team.member == 0) finish_forward(g, share.slab, static_cast<const Moments*>(nullptr), 1);
  }
  team.leave(g);
}

template <class T, class Walk, bool kHeavy>
__global__ void __launch_bounds__(kThreads, kResidentPerSm)
    batch_norm_backward_resident_kernel(FUSEREG_GRID_CONSTANT(Arguments<Backward>, g)) {
  using C = Compute<T>;
  FUSEREG_SHARED(coefficients, ChannelNumbers<C>);
  const Backward& job = g.job;
  const Tiling& t = g.tiling;
  auto* const memory = cuda::dynamic_shared<typename Shelf<T>::Part>();
  auto* const partials = static_cast<GradientSums*>(g.partials);
  FUSEREG_SHARED(plain, Plain<C>);
  FUSEREG_SHARED(team, Team);
  if (threadIdx.x == 0) {
    plain = plain_of<C>(job.epilogue);
    team.start(t);
  }
  while (team.next(g)) {
    const Share& share = team.share;
    const int channels = slab_channels(t, share.slab);
    if (const int i = static_cast<int>(threadIdx.x); i < channels) {
      const std::int64_t c = first_channel(t, share) + i;
      set_backward_coefficients(coefficients, i, job, c, read_statistic(job, t, share.group, c));
    }
    __syncthreads();
    Shelf<T> shelf(memory);  // of x and of the gradient, in turn
    block_sums<kHeavy, T>(
        TypeTag<Walk>{}, job, t, share, plain, coefficients,
        [&](const BackwardData<T, Walk::kWide>& data) {
          shelf.put(data.x);
          shelf.put(data.grad);
        },
        [&](int i, const GradientSums& s) {
          const std::int64_t c = first_channel(t, share) + i;
          about_mean(job, c, read_statistic(job, t, share.group, c), s,
                     static_cast<double>(coefficients.m[i]))
              .store(partials + partial_index(t, share, i));
        });
    team.sync(g);
    for (int i = static_cast<int>(cuda::warp_id()); i < channels; i += kWarps) {
      const std::int64_t c = first_channel(t, share) + i;
      const std::int64_t s = share.group * t.channels + c;
      const GradientSums sums = combine(partials + s * t.splits, t.splits);
      if (cuda::lane_id() == 0) {
        set_gradient(coefficients, i, job, c, read_statistic(job, t, share.group, c), sums);
        if (team.member == 0) {
          job.sums[s] = sums.sum;
          job.sums[t.groups * t.channels + s] = sums.dot;
        }
      }
    }
    __syncthreads();
    Walk walk = walk_share(TypeTag<Walk>{}, t, share, job.mask);
    const auto k = kept_coefficients(walk, coefficients);
    C q[Walk::kSets];
    C r[Walk::kSets];
    kept_gradient(walk, coefficients, q, r);
    shelf = Shelf<T>(memory);
    for_each_octet<1>(
        walk,
        [&](const Place& place) {
          auto data = drawn<kHeavy, Walk, T>(job, plain, place);
          finish_octet_inputs<Walk>(job, place, data);
          return data;
        },
        [&](const Place& place, BackwardData<T, Walk::kWide>& data) {
          data.x = shelf.take();
          data.grad = shelf.take();
          write_backward<kHeavy, Walk>(job, plain, k, q, r, place, data);
        });
    if (team.member == 0)
      finish_backward(g, share.slab, static_cast<const GradientSums*>(nullptr), 1);
  }
  team.leave(g);
}

// The plan counted on kResidentPerSm blocks a multiprocessor; the device may hold fewer, and then
// there are fewer teams.
template <class Job, class Kernel>
bool launch_teams(const char* op, Arguments<Job> g, const Plan& plan, Kernel kernel,
                  cuda::Stream stream) {
  cuda::LaunchConfig config;
  config.shared_bytes = static_cast<std::size_t>(plan.shared_bytes);
  config.stream = stream;
  config.cooperative = plan.reduce.splits > 1;
  if (config.cooperative) {
    const std::int64_t most =
        cuda::max_resident_blocks(op, kernel, kThreads, config.shared_bytes) / plan.reduce.splits;
    g.teams = std::min(g.teams, most);
    if (g.teams == 0) return false;
  }
  set_grid(config, op, g.teams * plan.reduce.splits);
  return cuda::try_launch(op, kernel, config, g);
}

// As dispatch_kernel(), but there is only the wide kind, of float32 and the 16-bit types.
template <class F>
bool dispatch_resident(DType dtype, bool columns, bool heavy, const F& f) {
  const auto with_type = [&](auto tag) {
    const auto with_walk = [&](auto walk) {
      return heavy ? f(tag, walk, std::true_type{}) : f(tag, walk, std::false_type{});
    };
    return columns ? with_walk(TypeTag<Columns<true>>{}) : with_walk(TypeTag<Lines<true>>{});
  };
  switch (dtype) {
    case DType::kFloat32:
      return with_type(TypeTag<float>{});
    case DType::kFloat16:
      return with_type(TypeTag<Half>{});
    case DType::kBFloat16:
      return with_type(TypeTag<BFloat16>{});
    default:
      return false;
  }
}

}  // namespace

bool launch_resident(const Arguments<Forward>& g, const Plan& plan, cuda::Stream stream) {
  const bool heavy = is_heavy(g.job.epilogue);
  return dispatch_resident(
      g.job.dtype, plan.reduce.columns, heavy, [&](auto tag, auto walk, auto is_heavy) {
        using T = typename decltype(tag)::type;
        using Walk = typename decltype(walk)::type;
        constexpr bool kHeavy = decltype(is_heavy)::value;
        return launch_teams(kForwardOp, g, plan,
                            &batch_norm_forward_resident_kernel<T, Walk, kHeavy>, stream);
      });
}

bool launch_resident(const Arguments<Backward>& g, const Plan& plan, cuda::Stream stream) {
  const bool heavy = is_heavy(g.job.epilogue);
  return dispatch_resident(
      g.job.dtype, plan.reduce.columns, heavy, [&](auto tag, auto walk, auto is_heavy) {
        using T = typename decltype(tag)::type;
        using Walk = typename decltype(walk)::type;
        constexpr bool kHeavy = decltype(is_heavy)::value;
        return launch_teams(kBackwardOp, g, plan,
                            &batch_norm_backward_resident_kernel<T, Walk, kHeavy>, stream);
      });
}

}  // namespace fusereg::batch_norm
