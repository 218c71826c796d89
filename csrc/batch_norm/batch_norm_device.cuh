// What the streaming and the resident kernels of batch normalization share: how a block walks its
// share of x, loads and stores, epilogues, and how sums become statistics. See batch_norm_plan.h
// for slabs, shares and octets.
#pragma once

#include "batch_norm/batch_norm_plan.h"
#include "core/cuda.cuh"

namespace fusereg::batch_norm {

inline constexpr int kWarps = kThreads / cuda::kWarpSize;

// A kernel's only parameter.
template <class Job>
struct Arguments {
  Job job;
  Tiling tiling;
  void* partials;
  unsigned* semaphores;
  std::int64_t teams;
  int steps;
};

// ---- Statistics that are put together ----

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
  for (std::int64_t k = cuda::lane_id(); k < count; k += cuda::kWarpSize) total.add(first[k]);
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

// ---- Numbers for each channel ----

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
FUSEREG_DEVICE_INLINE Statistic set_coefficients(ChannelNumbers<C>& k, int i, const Job& job,
                                                 std::int64_t c, const Statistic& s) {
  const double a = number_or(job.weight, c, 1.0) / sqrt(s.variance + job.eps);
  k.m[i] = static_cast<C>(s.mean);
  k.a[i] = static_cast<C>(a);
  k.b[i] = static_cast<C>(number_or(job.bias, c, 0.0) - (s.mean - static_cast<double>(k.m[i])) * a);
  return s;
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
    q = -a * (sums.dot / variance) / s.count;
    r = -a * sums.sum / s.count - q * (s.mean - static_cast<double>(k.m[i]));
  }
  k.q[i] = static_cast<C>(q);
  k.r[i] = static_cast<C>(r);
}

// What a thread keeps of them: one set where all its elements are of one channel.
template <class C, int kSets>
struct Kept {
  C m[kSets], a[kSets], b[kSets];
};

// ---- Elements ----

template <class T>
struct Octet {
  cuda::Vec<T, (cuda::kVecSize<T> < kOctet ? cuda::kVecSize<T> : kOctet)>
      parts[kOctet / (cuda::kVecSize<T> < kOctet ? cuda::kVecSize<T> : kOctet)];
  static constexpr int kPart = cuda::kVecSize<T> < kOctet ? cuda::kVecSize<T> : kOctet;
  static constexpr int kParts = kOctet / kPart;
  FUSEREG_DEVICE_INLINE T& operator[](int e) { return parts[e / kPart][e % kPart]; }
  FUSEREG_DEVICE_INLINE const T& operator[](int e) const { return parts[e / kPart][e % kPart]; }
};

// An octet of memory from element `at` on: which of its elements are inside the line, and which of
// those count (the mask).
struct Place {
  std::int64_t at = 0;
  std::int64_t bits_at = 0;
  unsigned inside = 0;
  unsigned live = 0;
};

inline constexpr unsigned kAllInside = 0xffu;

template <bool kWide, class T>
FUSEREG_DEVICE_INLINE Octet<T> load_octet(const T* p, const Place& place) {
  Octet<T> v{};
  if (kWide && place.inside == kAllInside) {
    FUSEREG_UNROLL
    for (int i = 0; i < Octet<T>::kParts; ++i) {
      v.parts[i] = cuda::load<Octet<T>::kPart>(p + place.at + i * Octet<T>::kPart);
    }
  } else {
    FUSEREG_UNROLL
    for (int e = 0; e < kOctet; ++e) {
      if ((place.inside >> e & 1u) != 0) v[e] = p[place.at + e];
    }
  }
  return v;
}

template <bool kWide, class T>
FUSEREG_DEVICE_INLINE void store_octet(T* p, const Place& place, const Octet<T>& v) {
  if (kWide && place.inside == kAllInside) {
    FUSEREG_UNROLL
    for (int i = 0; i < Octet<T>::kParts; ++i) {
      cuda::store_streaming(p + place.at + i * Octet<T>::kPart, v.parts[i]);
    }
  } else {
    FUSEREG_UNROLL
    for (int e = 0; e < kOctet; ++e) {
      if ((place.inside >> e & 1u) != 0) p[place.at + e] = v[e];
    }
  }
}

FUSEREG_DEVICE_INLINE float multiply_add(float x, float a, float b) { return fmaf(x, a, b); }
FUSEREG_DEVICE_INLINE double multiply_add(double x, double a, double b) { return fma(x, a, b); }

struct Ignore {
  template <class V>
  FUSEREG_DEVICE_INLINE void operator()(const V&) const {}
};

// ---- Walking a share ----

// A block's place in the work: its slab, group and share.
struct Share {
  std::int64_t slab, group, split;
};
FUSEREG_DEVICE_INLINE Share share_of(const Tiling& t, std::int64_t item, std::int64_t split) {
  return {item % t.slabs, item / t.slabs, split};
}

FUSEREG_DEVICE_INLINE std::int64_t first_row(const Tiling& t, std::int64_t group) {
  const std::int64_t row = group * t.group_rows;
  return row < t.outer ? row : t.outer;
}

FUSEREG_DEVICE_INLINE unsigned mask_bits(const std::uint8_t* mask, unsigned inside) {
  unsigned bits = 0;
  FUSEREG_UNROLL
  for (int e = 0; e < kOctet; ++e) {
    if ((inside >> e & 1u) != 0 && mask[e] != 0) bits |= 1u << e;
  }
  return bits;
}

// Lines: one channel; the thread's octets are `step` apart.
template <bool kWide_>
class Lines {
 public:
  static constexpr bool kColumns = false;
  static constexpr bool kWide = kWide_;
  static constexpr int kSets = 1;

  FUSEREG_DEVICE_INLINE Lines(const Tiling& t, const Share& s, const std::uint8_t* mask, int first,
                              int step)
      : t_(t), mask_(mask) {
    const std::int64_t begin = first_row(t, s.group);
    const std::int64_t octets = (first_row(t, s.group + 1) - begin) * t.width;
    const std::int64_t at = s.split * t.share + first;
    const std::int64_t end = (s.split + 1) * t.share < octets ? (s.split + 1) * t.share : octets;
    left_ = at < end ? static_cast<int>((end - at + step - 1) / step) : 0;
    line_ = (begin + at / t.width) * t.channels + s.slab;
    octet_ = static_cast<int>(at % t.width);
    const int width = static_cast<int>(t.width);
    step_line_ = step / width * t.channels;
    step_octet_ = step % width;
  }

  FUSEREG_DEVICE_INLINE bool valid() const { return left_ > 0; }
  FUSEREG_DEVICE_INLINE void next() {
    --left_;
    line_ += step_line_;
    octet_ += step_octet_;
    if (octet_ >= static_cast<int>(t_.width)) {
      octet_ -= static_cast<int>(t_.width);
      line_ += t_.channels;
    }
  }
  FUSEREG_DEVICE_INLINE Place place() const {
    const std::int64_t start = line_ * t_.inner;
    // Wide octets lie at multiples of 8 elements, in lines that may begin anywhere.
    const std::int64_t position =
        std::int64_t{octet_} * kOctet - (kWide ? start & (kOctet - 1) : 0);
    Place p;
    p.at = start + position;
    p.bits_at = line_ * ((t_.inner + kOctet - 1) / kOctet) + octet_;
    p.inside = kAllInside;
    if (position < 0) p.inside = kAllInside << -position;
    const std::int64_t rest = t_.inner - position;
    if (rest < kOctet) p.inside &= rest > 0 ? (1u << rest) - 1u : 0u;
    p.inside &= kAllInside;
    p.live = p.inside;
    if (mask_ != nullptr) {
      p.live = mask_bits(mask_ + line_ / t_.channels * t_.inner + position, p.inside);
    }
    return p;
  }
  // Of an element of the octet, within the slab.
  FUSEREG_DEVICE_INLINE int channel(int) const { return 0; }

 private:
  const Tiling& t_;
  const std::uint8_t* mask_;
  std::int64_t line_, step_line_;
  int left_, octet_, step_octet_;
};

// Columns: the thread stays in one octet of the row.
template <bool kWide_>
class Columns {
 public:
  static constexpr bool kColumns = true;
  static constexpr bool kWide = kWide_;
  static constexpr int kSets = kOctet;

  FUSEREG_DEVICE_INLINE Columns(const Tiling& t, const Share& s, const std::uint8_t* mask,
                                unsigned thread)
      : t_(t), mask_(mask), width_(static_cast<int>(t.width)) {
    octet_ = static_cast<int>(thread) % width_;
    lane_ = static_cast<int>(thread) / width_;
    pitch_ = t.channels * t.inner;
    column_ = s.slab * t.width * kOctet + octet_ * kOctet;
    inside_ = 0;
    if (lane_ < t.rows_at_once && column_ < pitch_) {
      inside_ = pitch_ - column_ < kOctet ? (1u << (pitch_ - column_)) - 1u : kAllInside;
    }
    const std::int64_t begin = first_row(t, s.group);
    const std::int64_t end = first_row(t, s.group + 1);
    first_ = begin + s.split * t.share;
    end_ = first_ + t.share < end ? first_ + t.share : end;
    if (inside_ == 0) first_ = end_ = 0;  // has no part in it
    row_ = first_ + lane_;
    limit_ = end_;
  }

  FUSEREG_DEVICE_INLINE bool valid() const { return row_ < limit_; }
  FUSEREG_DEVICE_INLINE void next() { row_ += t_.rows_at_once; }
  // Stops after so many rows of each thread; the next call goes on from there.
  FUSEREG_DEVICE_INLINE void run(int rows) {
    first_ = row_ - lane_;
    limit_ = first_ + static_cast<std::int64_t>(rows) * t_.rows_at_once;
    if (limit_ > end_) limit_ = end_;
  }
  FUSEREG_DEVICE_INLINE Place place() const {
    Place p;
    p.at = row_ * pitch_ + column_;
    p.bits_at = row_ * ((pitch_ + kOctet - 1) / kOctet) + column_ / kOctet;
    p.inside = p.live = inside_;
    // A mask comes with inner = 1 only: one byte for the row.
    if (mask_ != nullptr && mask_[row_] == 0) p.live = 0;
    return p;
  }
  FUSEREG_DEVICE_INLINE int channel(int e) const {
    const int column = octet_ * kOctet + e;
    const int c = t_.inner == 1 ? column : column / static_cast<int>(t_.inner);
    return c < t_.pack ? c : 0;
  }
  FUSEREG_DEVICE_INLINE int octet() const { return octet_; }
  FUSEREG_DEVICE_INLINE int lane() const { return lane_; }

 private:
  const Tiling& t_;
  const std::uint8_t* mask_;
  int width_, octet_, lane_;
  unsigned inside_;
  std::int64_t pitch_, column_, first_, end_, row_, limit_;
};

template <bool kWide>
FUSEREG_DEVICE_INLINE Lines<kWide> walk_share(TypeTag<Lines<kWide>>, const Tiling& t,
                                              const Share& s, const std::uint8_t* mask) {
  return Lines<kWide>(t, s, mask, static_cast<int>(threadIdx.x), kThreads);
}
template <bool kWide>
FUSEREG_DEVICE_INLINE Columns<kWide> walk_share(TypeTag<Columns<kWide>>, const Tiling& t,
                                                const Share& s, const std::uint8_t* mask) {
  return Columns<kWide>(t, s, mask, threadIdx.x);
}

// Calls load(place) for up to kAhead octets before use(place, loaded) for the first of them.
template <int kAhead, class Walk, class Load, class Use>
FUSEREG_DEVICE_INLINE void for_each_octet(Walk& walk, const Load& load, const Use& use) {
  while (walk.valid()) {
    Place places[kAhead];
    decltype(load(places[0])) data[kAhead];
    FUSEREG_UNROLL
    for (int u = 0; u < kAhead; ++u) {
      if (walk.valid()) {
        places[u] = walk.place();
        data[u] = load(places[u]);
        walk.next();
      }
    }
    FUSEREG_UNROLL
    for (int u = 0; u < kAhead; ++u) {
      if (places[u].inside != 0) use(places[u], data[u]);
    }
  }
}

// ---- GradientSums over columns ----

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

// ---- Between blocks ----

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
