// What the streaming and the resident kernels of batch normalization share: partial results,
// numbers for each channel, sums over columns, and meeting points of blocks. See batch_norm_plan.h
// for slabs, shares and octets.
#pragma once

#include "batch_norm/batch_norm_walk.cuh"

namespace fusereg::batch_norm {

inline constexpr int kWarps = kThreads / cuda::kWarpSize;
static_assert(kMaxPack <= kThreads, "a thread for each channel of a slab");

// A kernel's only parameter.
template <class Job>
struct Arguments {
  Job job;
  Tiling tiling;
  void* partials;
  unsigned* semaphores;
  std::int64_t teams;
};

// --- statistics that are put together ---

// Where all of what is loaded is to be under way before the first is used.
template <class... D>
FUSEREG_DEVICE_INLINE void join_registers(D&... values) {
#if !defined(FUSEREG_CUDA_ON_HOST)
  (([&] { asm volatile("" : "+d"(values)); }()), ...);
#endif
}

struct Moments {
  double count = 0.0;
  double mean = 0.0;
  double m2 = 0.0;  // sum of squared deviations
  // Chan, Golub and LeVeque 1979.
  FUSEREG_DEVICE_INLINE void add(const Moments& o) {
    if (o.count == 0.0) return;
    const double total = count + o.count;
    const double delta = o.mean - mean;
    const double weight = o.count / total;
    mean += delta * weight;
    m2 += o.m2 + delta * delta * count * weight;
    count = total;
  }
  FUSEREG_DEVICE_INLINE void join() { join_registers(count, mean, m2); }
};

// From sums of x - shift and of its square.
FUSEREG_DEVICE_INLINE Moments shifted_moments(double count, double shift, double sum,
                                              double squares) {
  Moments m;
  if (count == 0.0) return m;
  m.count = count;
  const double mean = sum / count;
  m.mean = shift + mean;
  m.m2 = squares - sum * mean;
  // Rounding may leave a constant channel just below zero. NaN stays NaN.
  if (m.m2 < 0.0) m.m2 = 0.0;
  return m;
}

struct GradientSums {
  double sum = 0.0;
  double dot = 0.0;
  FUSEREG_DEVICE_INLINE void add(const GradientSums& o) {
    sum += o.sum;
    dot += o.dot;
  }
  FUSEREG_DEVICE_INLINE void join() { join_registers(sum, dot); }
  // To one that is aligned to its size, as partial results are.
  FUSEREG_DEVICE_INLINE void store(GradientSums* to) const { cuda::store_pair(&to->sum, sum, dot); }
};

FUSEREG_DEVICE_INLINE Moments exchange(const Moments& v, int offset) {
  return {__shfl_xor_sync(cuda::kFullMask, v.count, offset),
          __shfl_xor_sync(cuda::kFullMask, v.mean, offset),
          __shfl_xor_sync(cuda::kFullMask, v.m2, offset)};
}
FUSEREG_DEVICE_INLINE GradientSums exchange(const GradientSums& v, int offset) {
  return {__shfl_xor_sync(cuda::kFullMask, v.sum, offset),
          __shfl_xor_sync(cuda::kFullMask, v.dot, offset)};
}

// The partial results of a slab's shares, in their order whoever asks; every lane gets the same
// bits. `first` is that of split 0, the others follow `stride` apart.
template <class P>
FUSEREG_DEVICE_INLINE P combine(const P* first, std::int64_t count) {
  P total;
  const int shares = static_cast<int>(count);
  constexpr int kAtOnce = 4;
  FUSEREG_NO_UNROLL
  for (int k = static_cast<int>(cuda::lane_id()); k < shares; k += kAtOnce * cuda::kWarpSize) {
    P parts[kAtOnce];
    FUSEREG_UNROLL
    for (int u = 0; u < kAtOnce; ++u) {
      if (k + u * cuda::kWarpSize < shares) parts[u] = first[k + u * cuda::kWarpSize];
    }
    FUSEREG_UNROLL
    for (int u = 0; u < kAtOnce; ++u) {
      parts[u].join();
      total.add(parts[u]);
    }
  }
  for (int offset = cuda::kWarpSize / 2; offset > 0; offset /= 2) {
    // The lower lane's comes first in both lanes: so they get the same bits.
    const P other = exchange(total, offset);
    if ((cuda::lane_id() & static_cast<unsigned>(offset)) == 0) {
      total.add(other);
    } else {
      P sum = other;
      sum.add(total);
      total = sum;
    }
  }
  return total;
}

// --- numbers for each channel ---

FUSEREG_DEVICE_INLINE double read_number(const PerChannel& p, std::int64_t c) {
  switch (p.dtype) {
    case DType::kFloat64:
      return static_cast<const double*>(p.data)[c];
    case DType::kFloat32:
      return static_cast<const float*>(p.data)[c];
    case DType::kFloat16:
      return to_float(static_cast<const Half*>(p.data)[c]);
    default:
      return to_float(static_cast<const BFloat16*>(p.data)[c]);
  }
}
FUSEREG_DEVICE_INLINE double number_or(const PerChannel& p, std::int64_t c, double absent) {
  return p.data == nullptr ? absent : read_number(p, c);
}
FUSEREG_DEVICE_INLINE void write_number(const PerChannel& p, std::int64_t c, double v) {
  switch (p.dtype) {
    case DType::kFloat64:
      static_cast<double*>(p.data)[c] = v;
      break;
    case DType::kFloat32:
      static_cast<float*>(p.data)[c] = static_cast<float>(v);
      break;
    case DType::kFloat16:
      static_cast<Half*>(p.data)[c] = to_half(static_cast<float>(v));
      break;
    default:
      static_cast<BFloat16*>(p.data)[c] = to_bfloat16(static_cast<float>(v));
  }
}

struct Statistic {
  double mean, variance, count;
};

template <class Job>
FUSEREG_DEVICE_INLINE Statistic read_statistic(const Job& job, const Tiling& t, std::int64_t group,
                                               std::int64_t c) {
  if (job.moments == nullptr) {
    return {read_number(job.running_mean, c), read_number(job.running_var, c), 0.0};
  }
  const std::int64_t all = t.groups * t.channels;
  const double* const p = job.moments + group * t.channels + c;
  return {p[0], p[all], p[2 * all]};
}

// z = (x - m) * a + b;  grad_x = a * dz + q * (x - m) + r. For the channels of a slab.
template <class C>
struct ChannelNumbers {
  C m[kMaxPack], a[kMaxPack], b[kMaxPack], q[kMaxPack], r[kMaxPack];
};

template <class Job, class C>
FUSEREG_DEVICE_INLINE void set_coefficients(ChannelNumbers<C>& k, int i, const Job& job,
                                            std::int64_t c, const Statistic& s) {
  const double a = number_or(job.weight, c, 1.0) / sqrt(s.variance + job.eps);
  k.m[i] = static_cast<C>(s.mean);
  k.a[i] = static_cast<C>(a);
  k.b[i] = static_cast<C>(number_or(job.bias, c, 0.0) - (s.mean - static_cast<double>(k.m[i])) * a);
}

// With from_y, what is taken for x is z = (x - mean) * a + bias: its center is the bias.
FUSEREG_DEVICE_INLINE double center_of(const Backward& job, std::int64_t c, const Statistic& s) {
  return job.from_y ? number_or(job.bias, c, 0.0) : s.mean;
}
// From z - bias to x - mean; 0 where the weight has left nothing of x. Without from_y nothing.
FUSEREG_DEVICE_INLINE double inverse_of_a(const Backward& job, std::int64_t c, const Statistic& s) {
  if (!job.from_y) return 1.0;
  const double weight = number_or(job.weight, c, 1.0);
  return weight == 0.0 ? 0.0 : sqrt(s.variance + job.eps) / weight;
}
template <class C>
FUSEREG_DEVICE_INLINE void set_backward_coefficients(ChannelNumbers<C>& k, int i,
                                                     const Backward& job, std::int64_t c,
                                                     const Statistic& s) {
  set_coefficients(k, i, job, c, s);
  if (job.from_y) k.m[i] = static_cast<C>(center_of(job, c, s));
}

// fixed: the statistics are constants.
template <class C>
FUSEREG_DEVICE_INLINE void set_gradient(ChannelNumbers<C>& k, int i, const Backward& job,
                                        std::int64_t c, const Statistic& s,
                                        const GradientSums& sums) {
  double q = 0.0;
  double r = 0.0;
  if (job.statistics != Statistics::kFixed && s.count > 0.0) {
    const double variance = s.variance + job.eps;
    const double a = number_or(job.weight, c, 1.0) / sqrt(variance);
    q = -a * (sums.dot / variance) / s.count * inverse_of_a(job, c, s);
    r = -a * sums.sum / s.count - q * (center_of(job, c, s) - static_cast<double>(k.m[i]));
  }
  k.q[i] = static_cast<C>(q);
  k.r[i] = static_cast<C>(r);
}

// What a thread keeps of them: one set where all its elements are of one channel.
template <class C, int kSets>
struct Kept {
  C m[kSets], a[kSets], b[kSets];
};

// --- sums over columns ---

// What the threads of a block leave for the sums over their columns: number e of a thread at
// (e * width + octet) * stride + lane, with an odd stride where many lanes would meet in one bank.
template <class C>
struct ColumnBuffer {
  static constexpr int kNumbers = sizeof(C) == 4 ? kColumnNumbers : kNarrowColumnNumbers;
  C first[kNumbers], second[kNumbers];
  int count[kThreads];
  FUSEREG_DEVICE_INLINE static int stride(const Tiling& t) {
    return t.rows_at_once >= 4 ? t.rows_at_once | 1 : t.rows_at_once;
  }
  template <bool kWide>
  FUSEREG_DEVICE_INLINE void put(const Tiling& t, const Columns<kWide>& walk, const C (&a)[kOctet],
                                 const C (&b)[kOctet], int rows) {
    if (walk.lane() >= t.rows_at_once) return;
    if (walk.octet() == 0) count[walk.lane()] = rows;
    FUSEREG_UNROLL
    for (int e = 0; e < kOctet; ++e) {
      const int at = (e * static_cast<int>(t.width) + walk.octet()) * stride(t) + walk.lane();
      first[at] = a[e];
      second[at] = b[e];
    }
  }
  // A channel's, by a warp; every lane gets them.
  FUSEREG_DEVICE_INLINE void get(const Tiling& t, int channel, double& a, double& b,
                                 double& rows) const {
    const int inner = static_cast<int>(t.inner);
    const int lanes = t.rows_at_once;
    a = b = 0.0;
    int n = 0;
    for (int i = static_cast<int>(cuda::lane_id()); i < inner * lanes; i += cuda::kWarpSize) {
      const int column = channel * inner + i / lanes;
      const int at =
          (column % kOctet * static_cast<int>(t.width) + column / kOctet) * stride(t) + i % lanes;
      a += static_cast<double>(first[at]);
      b += static_cast<double>(second[at]);
      n += count[i % lanes];
    }
    a = cuda::warp_sum(a);
    b = cuda::warp_sum(b);
    rows = static_cast<double>(cuda::warp_sum(n));
  }
};

// Channels that a slab has: the last one may have fewer.
FUSEREG_DEVICE_INLINE int slab_channels(const Tiling& t, std::int64_t slab) {
  const std::int64_t rest = t.channels - slab * t.pack;
  return static_cast<int>(rest < t.pack ? rest : t.pack);
}

// --- between blocks ---

// is_last_block() for those of the grid's blocks that share a counter, `expected` of them.
FUSEREG_DEVICE_INLINE bool is_last_of(unsigned* counter, std::int64_t expected) {
  FUSEREG_SHARED(is_last, bool);
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) {
    const auto last = static_cast<unsigned>(expected - 1);
    is_last = atomicInc(counter, last) == last;
  }
  __syncthreads();
  const bool result = is_last;
  if (result) __threadfence();
  __syncthreads();  // is_last is free again
  return result;
}

// Slabs share a counter where there are more of them than counters.
struct Bundle {
  std::int64_t index, first_slab, slabs, bundles;
};
FUSEREG_DEVICE_INLINE Bundle bundle_of(const Tiling& t, std::int64_t slab) {
  const std::int64_t size = t.bundle;
  const std::int64_t index = slab / size;
  const std::int64_t first = index * size;
  return {index, first, t.slabs - first < size ? t.slabs - first : size,
          (t.slabs + size - 1) / size};
}

// The blocks of a team wait until all of them are here for the round-th time. All of them must be
// resident.
FUSEREG_DEVICE_INLINE void team_sync(unsigned* counter, std::int64_t blocks, std::int64_t round) {
  __syncthreads();
  if (threadIdx.x == 0) {
    __threadfence();
    atomicAdd(counter, 1u);
    const auto wanted = static_cast<unsigned>(blocks * round);
    // The difference stays right where the counter wraps.
    while (static_cast<int>(cuda::load_acquire(counter) - wanted) < 0) {
    }
    __threadfence();
  }
  __syncthreads();
}
// The last of a team's blocks to leave puts its counters back to zero.
FUSEREG_DEVICE_INLINE void team_leave(unsigned* counters, std::int64_t blocks) {
  if (threadIdx.x == 0 && atomicAdd(counters + 1, 1u) == static_cast<unsigned>(blocks - 1)) {
    counters[0] = 0;
    counters[1] = 0;
  }
}

}  // namespace fusereg::batch_norm
