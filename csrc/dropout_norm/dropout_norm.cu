// CUDA kernels of dropout + normalization. Contract: dropout_norm.h.
//
// A block takes a row at a time, or in backward a chunk of rows; a thread takes groups of 8
// neighboring elements of the row, whose draws are one Philox call of 16-bit draws (two, where
// rows do not start at a group). Rows of up to 8192 elements stay in registers between the sums and
// the result, so that everything is read once; longer ones are read again, from L2 as a rule.
// Memory moves in 16-byte vectors where length and pointers allow it, element by element otherwise;
// the bits are the same.
#include <algorithm>

#include "core/cuda.cuh"
#include "core/rounded.h"
#include "dropout_norm/dropout_norm.h"

namespace fusereg::dropout_norm {
namespace {

// Groups that a thread keeps in registers, and the most threads of a block.
constexpr int kForwardGroups = 4;
constexpr int kForwardThreads = 256;
// Groups that a thread has under way at once, forward.
constexpr int kAhead = 2;
constexpr int kBackwardGroups = 2;
constexpr int kBackwardThreads = 512;
// Of those that keep groups. Float64, and what is read element by element, would be spilled by more:
// larger blocks then read the row again, with the same bits.
template <class T, bool kVectors>
inline constexpr int kHeldThreads = kVectors && sizeof(T) < 8 ? kBackwardThreads : 256;
constexpr int kBlocksPerSm = 64;
// Columns of grad_weight that a block adds up at a time.
constexpr int kTile = 8;

static_assert(kForwardGroups * kForwardThreads == kBackwardGroups * kBackwardThreads,
              "one limit for rows in registers");
constexpr std::int64_t kMostHeld = std::int64_t{kForwardGroups} * kForwardThreads * kGroup;

using rounded::multiply;
FUSEREG_DEVICE_INLINE float square_root(float x) { return sqrtf(x); }
FUSEREG_DEVICE_INLINE double square_root(double x) { return sqrt(x); }

// --- groups of 8 elements ---

// Elements [at, at + count) of p; zeros beyond. kVectors: all 8 are there, and aligned.
template <bool kVectors, class T>
FUSEREG_DEVICE_INLINE cuda::Raw<T, kGroup> load_group(const T* p, std::int64_t at, int count) {
  cuda::Raw<T, kGroup> raw;
  if constexpr (kVectors) {
    raw.load(p + at);
  } else {
    raw.clear();
    FUSEREG_UNROLL
    for (int e = 0; e < kGroup; ++e) {
      if (e < count) raw.set(e, p[at + e]);
    }
  }
  return raw;
}
template <bool kVectors, class T, class C>
FUSEREG_DEVICE_INLINE void store_group(T* p, std::int64_t at, int count, const C (&v)[kGroup]) {
  if constexpr (kVectors) {
    constexpr int kN = cuda::kVecSize<T> < kGroup ? cuda::kVecSize<T> : kGroup;
    FUSEREG_UNROLL
    for (int i = 0; i < kGroup; i += kN) {
      cuda::store(p + at + i, cuda::rounded_to<T, kN>([&](int e) { return v[i + e]; }));
    }
  } else {
    FUSEREG_UNROLL
    for (int e = 0; e < kGroup; ++e) {
      if (e < count) p[at + e] = from_compute<T>(v[e]);
    }
  }
}

// What is read of an array of T, or of float32 where a 16-bit T has a wide companion. It is
// converted when all loads of the thread are under way.
template <class T>
class WideGroup {
 public:
  template <bool kVectors>
  FUSEREG_DEVICE_INLINE void load(const void* p, bool wide, std::int64_t at, int count) {
    if constexpr (sizeof(T) == 2) {
      if (!wide) {
        const auto narrow = load_group<kVectors>(static_cast<const T*>(p), at, count);
        raw_.clear();
        memcpy(raw_.words, narrow.words, sizeof(narrow.words));
      } else {
        raw_ = load_group<kVectors>(static_cast<const float*>(p), at, count);
      }
      raw_.join();
    } else {
      raw_ = load_group<kVectors>(static_cast<const T*>(p), at, count);
    }
  }
  template <class C>
  FUSEREG_DEVICE_INLINE void get(bool wide, C (&v)[kGroup]) const {
    if constexpr (sizeof(T) == 2) {
      if (!wide) {
        cuda::Raw<T, kGroup> narrow;
        memcpy(narrow.words, raw_.words, sizeof(narrow.words));
        FUSEREG_UNROLL
        for (int e = 0; e < kGroup; ++e) v[e] = to_compute(narrow[e]);
        return;
      }
    }
    FUSEREG_UNROLL
    for (int e = 0; e < kGroup; ++e) v[e] = to_compute(raw_[e]);
  }

 private:
  cuda::Raw<std::conditional_t<sizeof(T) == 2, float, T>, kGroup> raw_;
};

template <bool kVectors, class T, class C>
FUSEREG_DEVICE_INLINE void store_wide(void* p, bool wide, std::int64_t at, int count,
                                      const C (&v)[kGroup]) {
  if constexpr (sizeof(T) == 2) {
    if (wide) {
      store_group<kVectors>(static_cast<float*>(p), at, count, v);
      return;
    }
  }
  store_group<kVectors>(static_cast<T*>(p), at, count, v);
}

template <class C>
FUSEREG_DEVICE_INLINE void drop(C (&v)[kGroup], std::uint32_t kept, C scale) {
  FUSEREG_UNROLL
  for (int e = 0; e < kGroup; ++e) v[e] = (kept >> e & 1u) != 0 ? multiply(v[e], scale) : C(0);
}

template <class C>
FUSEREG_DEVICE_INLINE C scale_of(const Draw& draw) {
  return static_cast<C>(draw.keep == 0.0 ? 0.0 : 1.0 / draw.keep);
}

// What the threads of a block do with the groups of a row. kHeld groups a thread are known at
// compile time, so that what they hold stays in registers; 0: any number.
template <int kHeld, class F>
FUSEREG_DEVICE_INLINE void each_group(std::int64_t groups, F f, int first = 0, int last = kHeld) {
  if constexpr (kHeld > 0) {
    FUSEREG_UNROLL
    for (int u = first; u < last; ++u) {
      const std::int64_t g = threadIdx.x + static_cast<std::int64_t>(u) * blockDim.x;
      if (g < groups) f(g, u);
    }
  } else {
    for (std::int64_t g = threadIdx.x; g < groups; g += blockDim.x) f(g, 0);
  }
}

template <bool kVectors>
FUSEREG_DEVICE_INLINE int count_of(std::int64_t length, std::int64_t group) {
  if constexpr (kVectors) return kGroup;
  const std::int64_t left = length - group * kGroup;
  return left < kGroup ? static_cast<int>(left) : kGroup;
}

// --- forward ---

template <class T, int kHeld, bool kVectors>
__global__ void __launch_bounds__(kForwardThreads, kVectors && sizeof(T) < 8 ? 2 : 1)
    dropout_norm_forward_kernel(FUSEREG_GRID_CONSTANT(Forward, f)) {
  using C = Compute<T>;
  constexpr int kSlots = kHeld > 0 ? kHeld : 1;
  const auto* const x = static_cast<const T*>(f.x);
  const std::uint64_t seed = f.random.key();
  const std::uint64_t low = f.random.low();
  const C scale = scale_of<C>(f.draw);
  const auto n = static_cast<C>(f.length);
  const std::int64_t groups = (f.length + kGroup - 1) / kGroup;

  for (std::int64_t row = blockIdx.x; row < f.rows; row += gridDim.x) {
    const std::int64_t base = row * f.length;
    cuda::Raw<T, kGroup> from[kAhead];
    WideGroup<T> beside[kAhead];
    C held[kSlots][kGroup];
    auto load = [&](std::int64_t g, int u) {
      const std::int64_t at = base + g * kGroup;
      const int count = count_of<kVectors>(f.length, g);
      from[u % kAhead] = load_group<kVectors>(x, at, count);
      if (f.residual != nullptr)
        beside[u % kAhead].template load<kVectors>(f.residual, f.wide_sum, at, count);
    };
    auto add = [&](std::int64_t g, int u, bool write) {
      const std::int64_t at = base + g * kGroup;
      const int count = count_of<kVectors>(f.length, g);
      FUSEREG_UNROLL
      for (int e = 0; e < kGroup; ++e) held[u][e] = to_compute(from[u % kAhead][e]);
      C added[kGroup];
      if (f.residual != nullptr) beside[u % kAhead].get(f.wide_sum, added);
      if (f.draw.bits != 0)
        drop(held[u],
             keep_mask_at(seed, low, f.index_offset + static_cast<std::uint64_t>(at), f.draw),
             scale);
      FUSEREG_UNROLL
      for (int e = 0; e < kGroup; ++e) {
        C s = held[u][e];
        if (f.residual != nullptr) s = added[e] + s;
        if (sizeof(T) == 2 && !f.wide_sum) s = to_compute(from_compute<T>(s));
        held[u][e] = e < count ? s : C(0);
      }
      if (write && f.sum != nullptr) store_wide<kVectors, T>(f.sum, f.wide_sum, at, count, held[u]);
    };
    // use(g, u) with the group's sums in held[u].
    auto sweep = [&](bool first, auto use) {
      if constexpr (kHeld > 0) {
        if (first) {
          // Their loads are under way before the first of the draws is made.
          FUSEREG_UNROLL
          for (int u = 0; u < kHeld; u += kAhead) {
            each_group<kHeld>(groups, load, u, u + kAhead);
            each_group<kHeld>(
                groups, [&](std::int64_t g, int i) { add(g, i, true); }, u, u + kAhead);
          }
        }
        each_group<kHeld>(groups, use);
      } else {
        each_group<0>(groups, [&](std::int64_t g, int u) {
          load(g, u);
          add(g, u, first);
          use(g, u);
        });
      }
    };

    C hi = 0;
    C lo = 0;
    C variance = 0;
    C sums[1] = {C(0)};
    if (f.rms) {
      sweep(true, [&](std::int64_t, int u) {
        FUSEREG_UNROLL
        for (int e = 0; e < kGroup; ++e) sums[0] += held[u][e] * held[u][e];
      });
      cuda::block_sum(sums);
      variance = sums[0] / n;
    } else {
      sweep(true, [&](std::int64_t, int u) {
        FUSEREG_UNROLL
        for (int e = 0; e < kGroup; ++e) sums[0] += held[u][e];
      });
      cuda::block_sum(sums);
      hi = sums[0] / n;
      C centered[2] = {C(0), C(0)};
      sweep(false, [&](std::int64_t g, int u) {
        const int count = count_of<kVectors>(f.length, g);
        FUSEREG_UNROLL
        for (int e = 0; e < kGroup; ++e) {
          const C d = e < count ? held[u][e] - hi : C(0);
          centered[0] += d;
          centered[1] += d * d;
        }
      });
      cuda::block_sum(centered);
      lo = centered[0] / n;
      variance = centered[1] / n - lo * lo;
      if (variance < C(0)) variance = C(0);
    }
    const C rstd = C(1) / square_root(variance + static_cast<C>(f.eps));
    if (f.statistics != nullptr && threadIdx.x == 0) {
      C* const kept = static_cast<C*>(f.statistics) + row * statistics_per_row(f.rms);
      if (!f.rms) {
        kept[0] = hi;
        kept[1] = lo;
      }
      kept[f.rms ? 0 : 2] = rstd;
    }
    sweep(false, [&](std::int64_t g, int u) {
      const std::int64_t column = g * kGroup;
      const int count = count_of<kVectors>(f.length, g);
      WideGroup<T> weight;
      WideGroup<T> bias;
      if (f.weight != nullptr)
        weight.template load<kVectors>(f.weight, f.wide_weight, column, count);
      if (f.bias != nullptr) bias.template load<kVectors>(f.bias, f.wide_weight, column, count);
      C y[kGroup];
      FUSEREG_UNROLL
      for (int e = 0; e < kGroup; ++e) y[e] = ((held[u][e] - hi) - lo) * rstd;
      C v[kGroup];
      if (f.weight != nullptr) {
        weight.get(f.wide_weight, v);
        FUSEREG_UNROLL
        for (int e = 0; e < kGroup; ++e) y[e] *= v[e];
      }
      if (f.bias != nullptr) {
        bias.get(f.wide_weight, v);
        FUSEREG_UNROLL
        for (int e = 0; e < kGroup; ++e) y[e] += v[e];
      }
      store_group<kVectors>(static_cast<T*>(f.y), base + column, count, y);
    });
  }
}

// --- backward ---

// Adds the slots of all chunks, kTile columns a block and step: thread t takes every
// (blockDim / kTile)-th chunk of column t % kTile, and one thread a column adds up what they have.
template <class T>
FUSEREG_DEVICE_INLINE void combine(const Backward& b, std::int64_t chunks) {
  using C = Compute<T>;
  FUSEREG_SHARED(sums, double[kBackwardThreads]);
  const auto* const partials = static_cast<const C*>(b.partials);
  const std::int64_t columns = b.slots() * b.length;
  const int lanes = static_cast<int>(blockDim.x) / kTile;
  const int lane = static_cast<int>(threadIdx.x) / kTile;
  const int within = static_cast<int>(threadIdx.x) % kTile;
  for (std::int64_t from = static_cast<std::int64_t>(blockIdx.x) * kTile; from < columns;
       from += static_cast<std::int64_t>(gridDim.x) * kTile) {
    const std::int64_t column = from + within;
    double sum = 0.0;
    if (column < columns) {
      for (std::int64_t c = lane; c < chunks; c += lanes)
        sum += static_cast<double>(partials[c * columns + column]);
    }
    sums[threadIdx.x] = sum;
    __syncthreads();
    if (lane == 0 && column < columns) {
      for (int i = 1; i < lanes; ++i) sum += sums[i * kTile + within];
      const bool in_weight = b.grad_weight != nullptr && column < b.length;
      void* const out = in_weight ? b.grad_weight : b.grad_bias;
      const std::int64_t at = column - (in_weight || b.slots() == 1 ? 0 : b.length);
      const auto value = static_cast<C>(sum);
      if (b.wide_weight) {
        static_cast<float*>(out)[at] = static_cast<float>(value);
      } else {
        static_cast<T*>(out)[at] = from_compute<T>(value);
      }
    }
    __syncthreads();  // sums is free again
  }
}

template <class T, int kHeld, bool kVectors>
__global__ void __launch_bounds__(kHeld > 0 ? kHeldThreads<T, kVectors> : kBackwardThreads)
    dropout_norm_backward_kernel(FUSEREG_GRID_CONSTANT(Backward, b), Chunks chunks,
                                 unsigned* barrier) {
  using C = Compute<T>;
  constexpr int kSlots = kHeld > 0 ? kHeld : 1;
  const auto* const grad_y = static_cast<const T*>(b.grad_y);
  const std::uint64_t seed = b.random.key();
  const std::uint64_t low = b.random.low();
  const C scale = scale_of<C>(b.draw);
  const auto n = static_cast<C>(b.length);
  const std::int64_t groups = (b.length + kGroup - 1) / kGroup;
  const bool gradients = b.grad_x != nullptr || b.grad_residual != nullptr;
  C h[kSlots][kGroup];  // the normalized sum
  C g[kSlots][kGroup];  // grad_y * weight

  for (std::int64_t chunk = blockIdx.x; chunk < chunks.count; chunk += gridDim.x) {
    const std::int64_t first = chunk * chunks.rows_each;
    const std::int64_t last = b.rows - first < chunks.rows_each ? b.rows : first + chunks.rows_each;
    C* const of_weight = b.grad_weight == nullptr
                             ? nullptr
                             : static_cast<C*>(b.partials) + chunk * b.slots() * b.length;
    C* const of_bias = b.grad_bias == nullptr
                           ? nullptr
                           : static_cast<C*>(b.partials) +
                                 (chunk * b.slots() + (of_weight == nullptr ? 0 : 1)) * b.length;
    // The chunk's share of the columns that are this thread's, where registers hold them.
    C weight_sums[kSlots][kGroup] = {};
    C bias_sums[kSlots][kGroup] = {};

    for (std::int64_t row = first; row < last; ++row) {
      const std::int64_t base = row * b.length;
      const C* const kept = static_cast<const C*>(b.statistics) + row * statistics_per_row(b.rms);
      const C hi = b.rms ? C(0) : kept[0];
      const C lo = b.rms ? C(0) : kept[1];
      const C rstd = kept[b.rms ? 0 : 2];
      // dy comes in d; it is added to the thread's columns the first time.
      auto load = [&](std::int64_t group, int u, bool accumulate) {
        const std::int64_t column = group * kGroup;
        const int count = count_of<kVectors>(b.length, group);
        const auto of_grad = load_group<kVectors>(grad_y, base + column, count);
        WideGroup<T> of_sum;
        of_sum.template load<kVectors>(b.sum, b.wide_sum, base + column, count);
        WideGroup<T> weight;
        if (b.weight != nullptr)
          weight.template load<kVectors>(b.weight, b.wide_weight, column, count);
        C w[kGroup];
        if (b.weight != nullptr) weight.get(b.wide_weight, w);
        of_sum.get(b.wide_sum, h[u]);
        C d[kGroup];
        FUSEREG_UNROLL
        for (int e = 0; e < kGroup; ++e) {
          d[e] = to_compute(of_grad[e]);
          h[u][e] = ((h[u][e] - hi) - lo) * rstd;
          g[u][e] = b.weight == nullptr ? d[e] : d[e] * w[e];
          if (!accumulate) continue;
          if constexpr (kHeld > 0) {
            weight_sums[u][e] += d[e] * h[u][e];
            bias_sums[u][e] += d[e];
          } else if (e < count) {
            const C before_w = row == first || of_weight == nullptr ? C(0) : of_weight[column + e];
            const C before_b = row == first || of_bias == nullptr ? C(0) : of_bias[column + e];
            if (of_weight != nullptr) of_weight[column + e] = before_w + d[e] * h[u][e];
            if (of_bias != nullptr) of_bias[column + e] = before_b + d[e];
          }
        }
      };
      C sums[2] = {C(0), C(0)};
      each_group<kHeld>(groups, [&](std::int64_t group, int u) { load(group, u, true); });
      if (!gradients) continue;
      each_group<kHeld>(groups, [&](std::int64_t group, int u) {
        if constexpr (kHeld == 0) load(group, u, false);
        const int count = count_of<kVectors>(b.length, group);
        FUSEREG_UNROLL
        for (int e = 0; e < kGroup; ++e) {
          if (e >= count) continue;
          sums[0] += g[u][e] * h[u][e];
          sums[1] += g[u][e];
        }
      });
      cuda::block_sum(sums);
      const C along = sums[0] / n;
      const C mean = b.rms ? C(0) : sums[1] / n;
      each_group<kHeld>(groups, [&](std::int64_t group, int u) {
        if constexpr (kHeld == 0) load(group, u, false);
        const std::int64_t at = base + group * kGroup;
        const int count = count_of<kVectors>(b.length, group);
        C ds[kGroup];
        FUSEREG_UNROLL
        for (int e = 0; e < kGroup; ++e) ds[e] = ((g[u][e] - mean) - h[u][e] * along) * rstd;
        if (b.grad_sum != nullptr) {
          WideGroup<T> more;
          more.template load<kVectors>(b.grad_sum, b.wide_sum, at, count);
          C v[kGroup];
          more.get(b.wide_sum, v);
          FUSEREG_UNROLL
          for (int e = 0; e < kGroup; ++e) ds[e] += v[e];
        }
        if (b.grad_residual != nullptr)
          store_wide<kVectors, T>(b.grad_residual, b.wide_sum, at, count, ds);
        if (b.grad_x != nullptr) {
          if (b.draw.bits != 0)
            drop(ds,
                 keep_mask_at(seed, low, b.index_offset + static_cast<std::uint64_t>(at), b.draw),
                 scale);
          store_group<kVectors>(static_cast<T*>(b.grad_x), at, count, ds);
        }
      });
    }
    if constexpr (kHeld > 0) {
      each_group<kHeld>(groups, [&](std::int64_t group, int u) {
        const std::int64_t column = group * kGroup;
        const int count = count_of<kVectors>(b.length, group);
        if (of_weight != nullptr) store_group<kVectors>(of_weight, column, count, weight_sums[u]);
        if (of_bias != nullptr) store_group<kVectors>(of_bias, column, count, bias_sums[u]);
      });
    }
  }
  if (b.slots() == 0) return;
  cuda::grid_sync(barrier);
  combine<T>(b, chunks.count);
}

// --- launchers ---

unsigned threads_for(std::int64_t length, int held, int most) {
  const std::int64_t wanted = ceil_div(ceil_div(length, kGroup), std::max(held, 1));
  const std::int64_t warps = ceil_div(wanted, cuda::kWarpSize);
  return static_cast<unsigned>(
      std::clamp<std::int64_t>(warps * cuda::kWarpSize, cuda::kWarpSize, most));
}

template <class... P>
bool all_aligned(const P*... pointers) {
  return (cuda::is_aligned(pointers, 16) && ...);
}

}  // namespace

void run_cuda(const Forward& f, int device, void* stream) {
  if (f.rows == 0 || f.length == 0) return;
  const cuda::DeviceGuard guard(device);
  const bool vectors =
      f.length % kGroup == 0 && all_aligned(f.y, f.sum, f.x, f.residual, f.weight, f.bias);
  const bool held = f.length <= kMostHeld;
  cuda::LaunchConfig config;
  config.stream = static_cast<cuda::Stream>(stream);
  config.block = dim3(threads_for(f.length, held ? kForwardGroups : 0, kForwardThreads));
  const std::int64_t most =
      static_cast<std::int64_t>(cuda::device_properties(device).sm_count) * kBlocksPerSm;
  config.grid = dim3(static_cast<unsigned>(std::min(f.rows, most)));
  const char* const op = f.rms ? "fusereg.dropout_add_rms_norm" : "fusereg.dropout_add_layer_norm";
  dispatch_dtype(f.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    const auto launch = [&](auto vectors) {
      constexpr bool kVectors = decltype(vectors)::value;
      const auto kernel = held ? &dropout_norm_forward_kernel<T, kForwardGroups, kVectors>
                               : &dropout_norm_forward_kernel<T, 0, kVectors>;
      cuda::launch(op, kernel, config, f);
    };
    if (vectors) {
      launch(std::true_type{});
    } else {
      launch(std::false_type{});
    }
  });
}

void run_cuda(const Backward& b, unsigned* barrier, int device, void* stream) {
  const bool combines = b.slots() != 0;
  if (b.length == 0 || (b.rows == 0 && !combines)) return;
  const cuda::DeviceGuard guard(device);
  const Chunks chunks = cuda_chunks(b.rows);
  const bool vectors =
      b.length % kGroup == 0 &&
      all_aligned(b.grad_x, b.grad_residual, b.grad_y, b.grad_sum, b.sum, b.weight, b.partials);
  const bool held = b.length <= kMostHeld;
  cuda::LaunchConfig config;
  config.stream = static_cast<cuda::Stream>(stream);
  config.block = dim3(threads_for(b.length, held ? kBackwardGroups : 0, kBackwardThreads));
  const char* const op = b.rms ? "fusereg.dropout_add_rms_norm" : "fusereg.dropout_add_layer_norm";
  dispatch_dtype(b.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    const auto launch = [&](auto vectors) {
      constexpr bool kVectors = decltype(vectors)::value;
      const bool fits = held && config.block.x <= kHeldThreads<T, kVectors>;
      const auto kernel = fits ? &dropout_norm_backward_kernel<T, kBackwardGroups, kVectors>
                               : &dropout_norm_backward_kernel<T, 0, kVectors>;
      std::int64_t blocks = std::max<std::int64_t>(chunks.count, 1);
      if (combines) {
        blocks = std::min<std::int64_t>(
            blocks, cuda::max_resident_blocks(op, kernel, static_cast<int>(config.block.x)));
      }
      blocks = std::clamp<std::int64_t>(blocks, 1, std::int64_t{1} << 30);
      // Any number of blocks gives the same result; one waits for no other.
      do {
        config.grid = dim3(static_cast<unsigned>(blocks));
        config.cooperative = combines && blocks > 1;
        blocks /= 2;
      } while (!cuda::try_launch(op, kernel, config, b, chunks, barrier));
    };
    if (vectors) {
      launch(std::true_type{});
    } else {
      launch(std::false_type{});
    }
  });
}

}  // namespace fusereg::dropout_norm
