// CUDA kernels of cross-entropy. Contract: cross_entropy.h.
//
// A team of threads takes a row at a time: a block where there are many classes, a warp where there
// are few, and one thread where classes are not neighbors, so that the threads of a warp read
// neighboring rows. Each thread keeps a running maximum and the sum of exp(x - maximum); logits are
// read once in each direction, in 16-byte vectors from the first aligned one on, some of them before
// the first is used: those are added in float32.
#include <algorithm>

#include "core/cuda.cuh"
#include "cross_entropy/cross_entropy.h"

namespace fusereg::cross_entropy {
namespace {

constexpr int kThreads = 256;
// Classes from which on a block takes a row.
constexpr std::int64_t kManyClasses = 2048;

enum class Factors : std::uint8_t { kNone, kOnes, kWeights, kProbabilities };

// What a thread loads before it uses the first of it: vectors of a row, in a forward kernel, and single
// logits that are not neighbors. Of float64 fewer, whose exponentials want registers, of which more are
// left to a thread.
template <class T, Factors factors>
constexpr int kForwardRuns = sizeof(T) == 2 || (sizeof(T) == 8 && factors > Factors::kOnes) ? 2 : 4;
template <class T>
constexpr int kApart = sizeof(T) == 8 ? 6 : 32 / static_cast<int>(sizeof(T));
template <class T>
constexpr int kForwardBlocks = sizeof(T) == 8 ? 2 : 0;  // on a multiprocessor; 0: nvcc's choice

FUSEREG_DEVICE_INLINE float exponential(float x) { return expf(x); }
FUSEREG_DEVICE_INLINE double exponential(double x) { return exp(x); }
// Of a NaN and a number, the number: the NaN's exponential says what there is to say.
FUSEREG_DEVICE_INLINE float larger(float a, float b) { return fmaxf(a, b); }
FUSEREG_DEVICE_INLINE double larger(double a, double b) { return fmax(a, b); }

// --- teams ---

template <int kTeam, class Op, class T>
FUSEREG_DEVICE_INLINE T team_reduce(T v, Op op, T identity) {
  if constexpr (kTeam == 1) {
    return v;
  } else if constexpr (kTeam == cuda::kWarpSize) {
    return cuda::warp_reduce(v, op);
  } else {
    return cuda::block_reduce(v, op, identity);
  }
}
template <int kTeam>
FUSEREG_DEVICE_INLINE int member() {
  return static_cast<int>(threadIdx.x) % kTeam;
}
// f(row) for the rows of this thread's team. Blocks stay whole where a team is one.
template <int kTeam, class F>
FUSEREG_DEVICE_INLINE void each_row(std::int64_t rows, F f) {
  constexpr int kTeams = kThreads / kTeam;
  const std::int64_t first =
      static_cast<std::int64_t>(blockIdx.x) * kTeams + static_cast<int>(threadIdx.x) / kTeam;
  for (std::int64_t row = first; row < rows; row += static_cast<std::int64_t>(gridDim.x) * kTeams) {
    f(row);
  }
}

// Logits that a thread loads before it uses the first of them: kRuns vectors of kN neighbors.
template <class T, int kRuns, int kN>
struct Logits {
  cuda::Vec<T, kN> run[kRuns];
  std::int64_t first;   // class
  std::int64_t stride;  // classes from one vector to the next

  FUSEREG_DEVICE_INLINE void load(const T* x, std::int64_t at, std::int64_t between,
                                  std::int64_t inner) {
    first = at;
    stride = between;
    FUSEREG_UNROLL
    for (int r = 0; r < kRuns; ++r) run[r] = cuda::load<kN>(x + class_of(r, 0) * inner);
  }
  FUSEREG_DEVICE_INLINE void store(T* x, std::int64_t inner) const {
    FUSEREG_UNROLL
    for (int r = 0; r < kRuns; ++r) cuda::store(x + class_of(r, 0) * inner, run[r]);
  }
  FUSEREG_DEVICE_INLINE std::int64_t class_of(int r, int e) const { return first + r * stride + e; }
  // f(logit, class)
  template <class F>
  FUSEREG_DEVICE_INLINE void each(const F& f) {
    FUSEREG_UNROLL
    for (int r = 0; r < kRuns; ++r) {
      FUSEREG_UNROLL
      for (int e = 0; e < kN; ++e) f(run[r][e], class_of(r, e));
    }
  }
};

// use(Logits) for the classes of this thread: kRuns vectors at a time, or kApart that are not
// neighbors.
template <class T, int kTeam, int kRuns, class F>
FUSEREG_DEVICE_INLINE void each_class(const T* x, const Problem& p, bool vectors, const F& use) {
  constexpr int kN = kTeam == 1 ? 1 : cuda::kVecSize<T>;
  constexpr int kDeep = kTeam == 1 ? kApart<T> : kRuns;
  const std::int64_t inner = kTeam == 1 ? p.inner : 1;
  const int me = member<kTeam>();
  const auto one = [&](std::int64_t c) {
    Logits<T, 1, 1> logit;
    logit.load(x, c, 0, inner);
    use(logit);
  };
  std::int64_t head = kTeam == 1 ? 0 : p.classes;
  if (kTeam > 1 && vectors) {
    const auto over = reinterpret_cast<std::uintptr_t>(x) % 16 / sizeof(T);
    head = static_cast<std::int64_t>((cuda::kVecSize<T> - over) % cuda::kVecSize<T>);
    head = head < p.classes ? head : p.classes;
  }
  FUSEREG_NO_UNROLL
  for (std::int64_t c = me; c < head; c += kTeam) one(c);
  const std::int64_t groups = (p.classes - head) / kN;
  std::int64_t g = me;
  FUSEREG_NO_UNROLL
  for (; g + (kDeep - 1) * kTeam < groups; g += kDeep * kTeam) {
    Logits<T, kDeep, kN> logits;
    logits.load(x, head + g * kN, kTeam * kN, inner);
    use(logits);
  }
  FUSEREG_NO_UNROLL
  for (; g < groups; g += kTeam) {
    Logits<T, 1, kN> logits;
    logits.load(x, head + g * kN, 0, inner);
    use(logits);
  }
  FUSEREG_NO_UNROLL
  for (std::int64_t c = head + groups * kN + me; c < p.classes; c += kTeam) one(c);
}

template <class T, class U, Factors factors>
FUSEREG_DEVICE_INLINE Compute<T> factor_of(const Problem& p, std::int64_t at, std::int64_t c) {
  using C = Compute<T>;
  if constexpr (factors == Factors::kOnes) return C(1);
  const C w = p.weight == nullptr ? C(1) : static_cast<const C*>(p.weight)[c];
  if constexpr (factors != Factors::kProbabilities) return w;
  const C t = to_compute(static_cast<const U*>(p.probabilities)[at]);
  return (t * static_cast<C>(1.0 - p.smoothing) +
          static_cast<C>(p.smoothing / static_cast<double>(p.classes))) *
         w;
}

// --- forward ---

template <class T, class U, Factors factors, int kTeam>
__global__ void __launch_bounds__(kThreads, kForwardBlocks<T>)
    cross_entropy_forward_kernel(FUSEREG_GRID_CONSTANT(Forward, f), bool vectors,
                                 double* workspace) {
  using C = Compute<T>;
  const C lowest = sizeof(C) == 8 ? C(-0x1.fffffffffffffp1023) : C(-0x1.fffffep127f);
  Parts total;
  each_row<kTeam>(f.rows(), [&](std::int64_t row) {
    RowSums sums;
    if (!is_ignored(f, row)) {
      const std::int64_t start = f.row_start(row);
      const T* const x = static_cast<const T*>(f.x) + start;
      C largest = lowest;
      double sum = 0.0;
      // From the first logit, so that products cancel less.
      C origin = C(0);
      if constexpr (factors != Factors::kNone) {
        const C first = to_compute(x[0]);
        if (first - first == C(0)) origin = first;
      }
      double dot = 0.0;
      double mass = 0.0;
      each_class<T, kTeam, kForwardRuns<T, factors>>(x, f, vectors, [&](auto& logits) {
        C top = largest;
        logits.each([&](const T& v, std::int64_t) { top = larger(top, to_compute(v)); });
        C part = C(0);
        [[maybe_unused]] C dot_part = C(0);
        [[maybe_unused]] C mass_part = C(0);
        logits.each([&](const T& v, std::int64_t c) {
          const C logit = to_compute(v);
          part += exponential(logit - top);
          if constexpr (factors != Factors::kNone) {
            const C q = factor_of<T, U, factors>(f, start + c * f.inner, c);
            dot_part += q * (logit - origin);
            mass_part += q;
          }
        });
        sum = sum * static_cast<double>(exponential(largest - top)) + static_cast<double>(part);
        largest = top;
        if constexpr (factors != Factors::kNone) {
          dot += static_cast<double>(dot_part);
          mass += static_cast<double>(mass_part);
        }
      });
      const C top = team_reduce<kTeam>(largest, cuda::Max{}, lowest);
      double shared[3] = {sum * static_cast<double>(exponential(largest - top)), dot, mass};
      constexpr int kSums = factors == Factors::kNone ? 1 : 3;
      if constexpr (kTeam == kThreads) {
        if constexpr (kSums == 1) {
          shared[0] = cuda::block_sum(shared[0]);
        } else {
          cuda::block_sum(shared);
        }
      } else {
        FUSEREG_UNROLL
        for (int k = 0; k < kSums; ++k) shared[k] = team_reduce<kTeam>(shared[k], cuda::Sum{}, 0.0);
      }
      sums.lse = log_sum(static_cast<double>(top), shared[0]);
      sums.mass = shared[2];
      sums.dot = shared[1] + static_cast<double>(origin) * shared[2];
    }
    if (member<kTeam>() != 0) return;
    f.statistics[row] = sums.lse;
    if (f.soft()) f.statistics[f.rows() + row] = sums.mass;
    const Parts parts = row_parts<T>(f, row, sums);
    if (f.reduction == Reduction::kNone) {
      const auto loss = static_cast<C>(parts.loss[0] + parts.loss[1]);
      if (f.wide_loss) {
        static_cast<C*>(f.loss)[row] = loss;
      } else {
        static_cast<T*>(f.loss)[row] = from_compute<T>(loss);
      }
    } else {
      add(total, parts);
    }
  });
  double mine[4] = {total.loss[0], total.loss[1], total.divisor[0], total.divisor[1]};
  cuda::block_sum(mine);
  if (threadIdx.x == 0) {
    double* const own = workspace + 4 * blockIdx.x;
    cuda::store_pair(own, mine[0], mine[1]);
    cuda::store_pair(own + 2, mine[2], mine[3]);
  }
}

// One block: adds up what the others have left.
__global__ void __launch_bounds__(kThreads)
    cross_entropy_finish_kernel(FUSEREG_GRID_CONSTANT(Forward, f), const double* workspace,
                                int blocks) {
  double sums[5] = {0.0, 0.0, 0.0, 0.0, 0.0};
  for (int b = static_cast<int>(threadIdx.x); b < blocks; b += kThreads) {
    for (int k = 0; k < 4; ++k) sums[k] += workspace[4 * b + k];
  }
  if (f.weight != nullptr) {
    for (std::int64_t c = threadIdx.x; c < f.classes; c += kThreads) {
      sums[4] += f.dtype == DType::kFloat64
                     ? static_cast<const double*>(f.weight)[c]
                     : static_cast<double>(static_cast<const float*>(f.weight)[c]);
    }
  }
  cuda::block_sum(sums);
  if (threadIdx.x != 0) return;
  Parts total;
  for (int k = 0; k < 2; ++k) {
    total.loss[k] = sums[k];
    total.divisor[k] = sums[2 + k];
  }
  finish(f, total, f.weight == nullptr ? static_cast<double>(f.classes) : sums[4]);
}

// --- backward ---

template <class T, class U, Factors factors, int kTeam>
__global__ void __launch_bounds__(kThreads)
    cross_entropy_backward_kernel(FUSEREG_GRID_CONSTANT(Backward, b), bool vectors) {
  using C = Compute<T>;
  each_row<kTeam>(b.rows(), [&](std::int64_t row) {
    const std::int64_t start = b.row_start(row);
    const T* const x = static_cast<const T*>(b.x) + start;
    T* const out = static_cast<T*>(b.grad_x) + start;
    const bool ignored = is_ignored(b, row);
    RowGradient g;
    Softmax<C> softmax{C(0), C(0)};
    if (!ignored) {
      const std::int64_t at = b.reduction == Reduction::kNone ? row : 0;
      const double grad = dispatch_dtype(b.grad_dtype, [&](auto tag) {
        using G = typename decltype(tag)::type;
        return static_cast<double>(to_compute(static_cast<const G*>(b.grad)[at]));
      });
      g = row_gradient<T>(b, row, grad);
      softmax = softmax_of<C>(b, b.statistics[row], g.probability);
    }
    const C spread = static_cast<C>(g.spread);
    each_class<T, kTeam, 2>(x, b, vectors, [&](auto& logits) {
      logits.each([&](T& v, std::int64_t c) {
        C y = C(0);
        if (!ignored) {
          y = exponential(to_compute(v) - softmax.reference) * softmax.factor;
          if (c == g.index[0] || c == g.index[1]) {
            const double w = weight_of<T>(b, c);
            y -= static_cast<C>(g.spread * w + (c == g.index[0] ? g.at[0] : g.at[1]));
          } else if constexpr (factors != Factors::kNone) {
            y -= spread * factor_of<T, U, factors>(b, start + c * b.inner, c);
          }
        }
        v = from_compute<T>(y);
      });
      logits.store(out, b.inner);
    });
  });
}

// --- launchers ---

template <Factors value>
struct FactorsTag {
  static constexpr Factors kValue = value;
};
template <int value>
struct TeamTag {
  static constexpr int kValue = value;
};

// f(tag of the logits, tag of the probabilities, factors, threads a row).
template <class F>
void choose(const Problem& p, F&& f) {
  const auto with_team = [&](auto tag, auto companion, auto factors) {
    if (p.inner != 1) {
      f(tag, companion, factors, TeamTag<1>{});
    } else if (p.classes < kManyClasses) {
      f(tag, companion, factors, TeamTag<cuda::kWarpSize>{});
    } else {
      f(tag, companion, factors, TeamTag<kThreads>{});
    }
  };
  dispatch_dtype(p.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    if (p.soft()) {
      if constexpr (sizeof(T) == 2) {
        if (p.wide_probabilities) {
          with_team(tag, TypeTag<float>{}, FactorsTag<Factors::kProbabilities>{});
          return;
        }
      }
      with_team(tag, tag, FactorsTag<Factors::kProbabilities>{});
    } else if (p.smoothing == 0.0) {
      with_team(tag, tag, FactorsTag<Factors::kNone>{});
    } else if (p.weight == nullptr) {
      with_team(tag, tag, FactorsTag<Factors::kOnes>{});
    } else {
      with_team(tag, tag, FactorsTag<Factors::kWeights>{});
    }
  });
}

cuda::LaunchConfig config_for(const Problem& p, int team, void* stream) {
  cuda::LaunchConfig config;
  config.block = dim3(kThreads);
  config.stream = static_cast<cuda::Stream>(stream);
  const std::int64_t blocks = ceil_div(p.rows(), kThreads / team);
  config.grid = dim3(static_cast<unsigned>(std::clamp<std::int64_t>(blocks, 1, kMaxBlocks)));
  return config;
}

constexpr const char* kOp = "fusereg.cross_entropy";

}  // namespace

void run_cuda(const Forward& forward, double* workspace, int device, void* stream) {
  const cuda::DeviceGuard guard(device);
  const bool vectors = reinterpret_cast<std::uintptr_t>(forward.x) % dtype_size(forward.dtype) == 0;
  choose(forward, [&](auto tag, auto companion, auto factors, auto team) {
    using T = typename decltype(tag)::type;
    constexpr int kTeam = decltype(team)::kValue;
    const cuda::LaunchConfig config = config_for(forward, kTeam, stream);
    cuda::launch(kOp,
                 cross_entropy_forward_kernel<T, typename decltype(companion)::type,
                                              decltype(factors)::kValue, kTeam>,
                 config, forward, vectors, workspace);
    cuda::LaunchConfig last = config;
    last.grid = dim3(1);
    cuda::launch(kOp, cross_entropy_finish_kernel, last, forward,
                 static_cast<const double*>(workspace), static_cast<int>(config.grid.x));
  });
}

void run_cuda(const Backward& backward, int device, void* stream) {
  if (backward.rows() == 0 || backward.classes == 0) return;
  const cuda::DeviceGuard guard(device);
  // Vectors, where a row's logits and its gradient are misaligned alike.
  const auto x = reinterpret_cast<std::uintptr_t>(backward.x);
  const auto out = reinterpret_cast<std::uintptr_t>(backward.grad_x);
  const bool vectors = x % 16 == out % 16;
  choose(backward, [&](auto tag, auto companion, auto factors, auto team) {
    using T = typename decltype(tag)::type;
    constexpr int kTeam = decltype(team)::kValue;
    cuda::launch(kOp,
                 cross_entropy_backward_kernel<T, typename decltype(companion)::type,
                                               decltype(factors)::kValue, kTeam>,
                 config_for(backward, kTeam, stream), backward, vectors);
  });
}

}  // namespace fusereg::cross_entropy
