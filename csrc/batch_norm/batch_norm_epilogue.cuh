// What becomes of an octet, forward and backward, and the sums that a block makes of its share.
// Comes after batch_norm_device.cuh.
#pragma once

#include "batch_norm/batch_norm_device.cuh"
#include "core/activation.h"

namespace fusereg::batch_norm {

// float32 terms that are added before they go to float64: octets of lines, rows of columns.
inline constexpr int kRunOctets = 8;
inline constexpr int kRunRows = 64;

// Octets that a thread has under way at once.
template <class T>
inline constexpr int kAhead = sizeof(T) == 2 ? 4 : 2;

// ---- Epilogues ----
// What a call does is decided by branches that go the same way for the whole grid, once an octet.
// kHeavy: with the code for SiLU, GELU and dropout, which would cost the others registers.

inline bool is_heavy(const Epilogue& e) {
  return e.dropout || e.activation == Activation::kSilu || e.activation == Activation::kGelu;
}

template <class C>
struct Plain {
  C slope, scale;
  std::uint64_t seed, low;
  FUSEREG_DEVICE_INLINE explicit Plain(const Epilogue& e)
      : slope(static_cast<C>(e.slope)),
        scale(static_cast<C>(e.dropout && e.draw.keep > 0.0 ? 1.0 / e.draw.keep : 0.0)),
        seed(e.dropout ? e.random.key() : 0),
        low(e.dropout ? e.random.low() : 0) {}
};

// Which elements of the octet dropout keeps.
template <class C>
FUSEREG_DEVICE_INLINE unsigned kept_bits(const Epilogue& e, const Plain<C>& plain,
                                         std::int64_t at) {
  const std::uint64_t index = e.index_offset + static_cast<std::uint64_t>(at);
  const auto draw = [&](std::uint64_t group) {
    return e.draw.bits == 16 ? keep_mask<16>(plain.seed, plain.low, group, e.draw.threshold)
                             : keep_mask<32>(plain.seed, plain.low, group, e.draw.threshold);
  };
  const auto shift = static_cast<unsigned>(index % kGroup);
  unsigned bits = draw(index / kGroup) >> shift;
  if (shift != 0) bits |= draw(index / kGroup + 1) << (kGroup - shift);
  return bits & kAllInside;
}

template <bool kHeavy, class C>
FUSEREG_DEVICE_INLINE void activate(C (&z)[kOctet], Activation activation, C slope) {
  switch (activation) {
    case Activation::kRelu:
      FUSEREG_UNROLL
      for (int e = 0; e < kOctet; ++e) z[e] = z[e] < C(0) ? C(0) : z[e];
      break;
    case Activation::kLeakyRelu:
      FUSEREG_UNROLL
      for (int e = 0; e < kOctet; ++e) z[e] = z[e] < C(0) ? z[e] * slope : z[e];
      break;
    case Activation::kSilu:
      if constexpr (kHeavy) {
        FUSEREG_UNROLL
        for (int e = 0; e < kOctet; ++e) z[e] = silu(z[e]);
      }
      break;
    case Activation::kGelu:
      if constexpr (kHeavy) {
        FUSEREG_UNROLL
        for (int e = 0; e < kOctet; ++e) z[e] = gelu(z[e]);
      }
      break;
    default:
      break;
  }
}

// dz *= activation'(z); of ReLU and leaky ReLU, `positive` tells.
template <bool kHeavy, class C>
FUSEREG_DEVICE_INLINE void activate_backward(C (&dz)[kOctet], const C (&z)[kOctet],
                                             unsigned positive, Activation activation, C slope) {
  switch (activation) {
    case Activation::kRelu:
      FUSEREG_UNROLL
      for (int e = 0; e < kOctet; ++e) dz[e] = (positive >> e & 1u) != 0 ? dz[e] : C(0);
      break;
    case Activation::kLeakyRelu:
      FUSEREG_UNROLL
      for (int e = 0; e < kOctet; ++e) dz[e] = (positive >> e & 1u) != 0 ? dz[e] : dz[e] * slope;
      break;
    case Activation::kSilu:
      if constexpr (kHeavy) {
        FUSEREG_UNROLL
        for (int e = 0; e < kOctet; ++e) dz[e] *= silu_derivative(z[e]);
      }
      break;
    case Activation::kGelu:
      if constexpr (kHeavy) {
        FUSEREG_UNROLL
        for (int e = 0; e < kOctet; ++e) dz[e] *= gelu_derivative(z[e]);
      }
      break;
    default:
      break;
  }
}

// ---- Forward ----

template <class T>
struct ForwardData {
  Octet<T> x, residual;
};

template <class Walk, class T>
FUSEREG_DEVICE_INLINE void finish_octet_inputs(const Forward& job, const Place& place,
                                               ForwardData<T>& data) {
  if (job.residual != nullptr) {
    data.residual = load_octet<Walk::kWide>(static_cast<const T*>(job.residual), place);
  }
}

template <bool kHeavy, class Walk, class T, class C>
FUSEREG_DEVICE_INLINE void write_forward(const Forward& job, const Plain<C>& plain,
                                         const Kept<C, Walk::kSets>& k, const Place& place,
                                         const ForwardData<T>& data) {
  C z[kOctet];
  FUSEREG_UNROLL
  for (int e = 0; e < kOctet; ++e) {
    const int i = Walk::kSets == 1 ? 0 : e;
    z[e] = multiply_add(to_compute(data.x[e]) - k.m[i], k.a[i], k.b[i]);
  }
  if (job.residual != nullptr) {
    FUSEREG_UNROLL
    for (int e = 0; e < kOctet; ++e) z[e] += to_compute(data.residual[e]);
  }
  if (job.bits != nullptr) {
    unsigned positive = 0;
    FUSEREG_UNROLL
    for (int e = 0; e < kOctet; ++e) positive |= static_cast<unsigned>(z[e] > C(0)) << e;
    job.bits[place.bits_at] = static_cast<std::uint8_t>(positive & place.live);
  }
  activate<kHeavy>(z, job.epilogue.activation, plain.slope);
  unsigned live = place.live;
  if constexpr (kHeavy) {
    if (job.epilogue.dropout) {
      live &= kept_bits(job.epilogue, plain, place.at);
      FUSEREG_UNROLL
      for (int e = 0; e < kOctet; ++e) z[e] *= plain.scale;
    }
  }
  Octet<T> y;
  FUSEREG_UNROLL
  for (int e = 0; e < kOctet; ++e) {
    y[e] = from_compute<T>((live >> e & 1u) != 0 ? z[e] : C(0));
  }
  store_octet<Walk::kWide>(static_cast<T*>(job.y), place, y);
}

// ---- Backward ----

template <class T>
struct BackwardData {
  Octet<T> grad, x, residual;
  unsigned positive;
};

// What is not kept on the chip: the residual, where one is needed, and the bits.
template <class Walk, class T>
FUSEREG_DEVICE_INLINE void finish_octet_inputs(const Backward& job, const Place& place,
                                               BackwardData<T>& data) {
  data.positive = 0;
  if (job.bits != nullptr) {
    data.positive = place.inside != 0 ? job.bits[place.bits_at] : 0u;
  } else if (job.residual != nullptr) {
    data.residual = load_octet<Walk::kWide>(static_cast<const T*>(job.residual), place);
  }
}

template <class Walk, class T>
FUSEREG_DEVICE_INLINE BackwardData<T> load_backward(const Backward& job, const Place& place) {
  BackwardData<T> data{};
  data.grad = load_octet<Walk::kWide>(static_cast<const T*>(job.grad), place);
  if (job.x != nullptr) data.x = load_octet<Walk::kWide>(static_cast<const T*>(job.x), place);
  finish_octet_inputs<Walk>(job, place, data);
  return data;
}

// dz, and d = x - m; both zero for elements that do not count.
template <bool kHeavy, class Walk, class T, class C>
FUSEREG_DEVICE_INLINE void gradient_of_z(const Backward& job, const Plain<C>& plain,
                                         const Kept<C, Walk::kSets>& k, const Place& place,
                                         const BackwardData<T>& data, C (&dz)[kOctet],
                                         C (&d)[kOctet]) {
  FUSEREG_UNROLL
  for (int e = 0; e < kOctet; ++e) {
    const int i = Walk::kSets == 1 ? 0 : e;
    dz[e] = to_compute(data.grad[e]);
    d[e] = job.x != nullptr ? to_compute(data.x[e]) - k.m[i] : C(0);
  }
  unsigned kept = place.live;
  if constexpr (kHeavy) {
    if (job.epilogue.dropout) {
      kept &= kept_bits(job.epilogue, plain, place.at);
      FUSEREG_UNROLL
      for (int e = 0; e < kOctet; ++e) dz[e] *= plain.scale;
    }
  }
  if (job.epilogue.activation != Activation::kNone) {
    C z[kOctet];
    unsigned positive = data.positive;
    if (job.bits == nullptr) {
      FUSEREG_UNROLL
      for (int e = 0; e < kOctet; ++e) {
        const int i = Walk::kSets == 1 ? 0 : e;
        z[e] = multiply_add(d[e], k.a[i], k.b[i]);
        if (job.residual != nullptr) z[e] += to_compute(data.residual[e]);
        positive |= static_cast<unsigned>(z[e] > C(0)) << e;
      }
    } else {
      FUSEREG_UNROLL
      for (int e = 0; e < kOctet; ++e) z[e] = C(0);
    }
    activate_backward<kHeavy>(dz, z, positive, job.epilogue.activation, plain.slope);
  }
  if (kept != kAllInside) {
    FUSEREG_UNROLL
    for (int e = 0; e < kOctet; ++e) {
      if ((kept >> e & 1u) == 0) dz[e] = C(0);
      if ((place.live >> e & 1u) == 0) d[e] = C(0);
    }
  }
}

template <bool kHeavy, class Walk, class T, class C>
FUSEREG_DEVICE_INLINE void write_backward(const Backward& job, const Plain<C>& plain,
                                          const Kept<C, Walk::kSets>& k, const C (&q)[Walk::kSets],
                                          const C (&r)[Walk::kSets], const Place& place,
                                          const BackwardData<T>& data) {
  C dz[kOctet];
  C d[kOctet];
  gradient_of_z<kHeavy, Walk>(job, plain, k, place, data, dz, d);
  Octet<T> out;
  if (job.grad_residual != nullptr) {
    FUSEREG_UNROLL
    for (int e = 0; e < kOctet; ++e) out[e] = from_compute<T>(dz[e]);
    store_octet<Walk::kWide>(static_cast<T*>(job.grad_residual), place, out);
  }
  if (job.grad_x == nullptr) return;
  // Constant statistics: no 0 * (x - m), which would be NaN where x is infinite.
  const bool fixed = job.statistics == Statistics::kFixed;
  FUSEREG_UNROLL
  for (int e = 0; e < kOctet; ++e) {
    const int i = Walk::kSets == 1 ? 0 : e;
    const C v =
        fixed ? dz[e] * k.a[i] : multiply_add(dz[e], k.a[i], multiply_add(d[e], q[i], r[i]));
    out[e] = from_compute<T>((place.live >> e & 1u) != 0 ? v : C(0));
  }
  store_octet<Walk::kWide>(static_cast<T*>(job.grad_x), place, out);
}

template <class Walk, class C>
FUSEREG_DEVICE_INLINE Kept<C, Walk::kSets> kept_coefficients(const Walk& walk,
                                                             const ChannelNumbers<C>& all) {
  Kept<C, Walk::kSets> k;
  FUSEREG_UNROLL
  for (int e = 0; e < Walk::kSets; ++e) {
    const int c = walk.channel(e);
    k.m[e] = all.m[c];
    k.a[e] = all.a[c];
    k.b[e] = all.b[c];
  }
  return k;
}

template <class Walk, class C>
FUSEREG_DEVICE_INLINE void kept_gradient(const Walk& walk, const ChannelNumbers<C>& all,
                                         C (&q)[Walk::kSets], C (&r)[Walk::kSets]) {
  FUSEREG_UNROLL
  for (int e = 0; e < Walk::kSets; ++e) {
    q[e] = all.q[walk.channel(e)];
    r[e] = all.r[walk.channel(e)];
  }
}

// ---- A block's sums ----

template <class C>
FUSEREG_DEVICE_INLINE C sum_of(const C (&v)[kOctet]) {
  return ((v[0] + v[1]) + (v[2] + v[3])) + ((v[4] + v[5]) + (v[6] + v[7]));
}

// Two sums over the octets of a line: float32 over kRunOctets of them, then float64.
template <class C>
struct LineSums {
  C first = 0, second = 0;
  double wide_first = 0.0, wide_second = 0.0;
  int terms = 0;
  FUSEREG_DEVICE_INLINE void flush() {
    wide_first += static_cast<double>(first);
    wide_second += static_cast<double>(second);
    first = second = 0;
    terms = 0;
  }
  FUSEREG_DEVICE_INLINE void add(const C (&a)[kOctet], const C (&b)[kOctet]) {
    first += sum_of(a);
    second += sum_of(b);
    if (++terms == kRunOctets) flush();
  }
};

// Of the first element that counts; zero if there is none. Every thread finds the same.
template <class T, class Walk>
FUSEREG_DEVICE_INLINE Compute<T> first_live(const Forward& job, Walk walk) {
  for (; walk.valid(); walk.next()) {
    const Place p = walk.place();
    if (p.live == 0) continue;
    return to_compute(static_cast<const T*>(job.x)[p.at + __ffs(static_cast<int>(p.live)) - 1]);
  }
  return Compute<T>(0);
}

// float32 squares overflow from 1.8e19 on although the variance may not: such sums are taken again
// in float64. So are those of elements that are not finite, with the same result as before.
template <class C>
FUSEREG_DEVICE_INLINE bool overflowed(double squares) {
  return sizeof(C) == 4 && !(squares - squares == 0.0);
}
FUSEREG_DEVICE_INLINE double term(double x, double center, bool square) {
  const double d = x - center;
  return square ? d * d : d;
}
// sum(center, square): the sum over all elements of term().
template <class F>
FUSEREG_DEVICE_INLINE Moments moments_in_float64(double count, const F& sum) {
  const double mean = sum(0.0, false) / count;
  return {count, mean, sum(mean, true)};
}

// Moments of the block's share: calls keep(octet) for each octet in the order of the walk, and
// emit(channel of the slab, moments) in one thread for each channel.
//
// Each sum is that of x - shift, shift being an element of the channel: so float32 is enough for
// short runs, whatever the mean.
template <class T, bool kWide, class Keep, class Emit>
__device__ void block_moments(TypeTag<Lines<kWide>>, const Forward& job, const Tiling& t,
                              const Share& share, const Keep& keep, const Emit& emit) {
  using C = Compute<T>;
  using Walk = Lines<kWide>;
  const T* const x = static_cast<const T*>(job.x);
  const C shift = first_live<T>(job, Walk(t, share, job.mask, 0, 1));
  LineSums<C> sums;
  std::int64_t count = 0;
  Walk walk(t, share, job.mask, static_cast<int>(threadIdx.x), kThreads);
  for_each_octet<kAhead<T>>(
      walk, [&](const Place& place) { return load_octet<kWide>(x, place); },
      [&](const Place& place, const Octet<T>& octet) {
        keep(octet);
        C d[kOctet];
        C square[kOctet];
        FUSEREG_UNROLL
        for (int e = 0; e < kOctet; ++e) {
          d[e] = to_compute(octet[e]) - shift;
          if (place.live != kAllInside && (place.live >> e & 1u) == 0) d[e] = C(0);
          square[e] = d[e] * d[e];
        }
        sums.add(d, square);
        count += __popc(place.live);
      });
  sums.flush();
  double v[3] = {sums.wide_first, sums.wide_second, static_cast<double>(count)};
  cuda::block_sum(v);
  Moments moments = shifted_moments(v[2], static_cast<double>(shift), v[0], v[1]);
  if (overflowed<C>(v[1])) {
    const auto sum = [&](double center, bool square) {
      double s = 0.0;
      for (Walk again(t, share, job.mask, static_cast<int>(threadIdx.x), kThreads); again.valid();
           again.next()) {
        const Place p = again.place();
        for (int e = 0; e < kOctet; ++e) {
          if ((p.live >> e & 1u) != 0) s += term(to_compute(x[p.at + e]), center, square);
        }
      }
      return cuda::block_sum(s);
    };
    moments = moments_in_float64(v[2], sum);
  }
  if (threadIdx.x == 0) emit(0, moments);
}

// Rows of a share of columns, the same for all threads of the block.
struct RowRange {
  std::int64_t begin, end;
};
FUSEREG_DEVICE_INLINE RowRange rows_of(const Tiling& t, const Share& share) {
  const std::int64_t end = first_row(t, share.group + 1);
  const std::int64_t begin = first_row(t, share.group) + share.split * t.share;
  return {begin, begin + t.share < end ? begin + t.share : end};
}

template <class T, bool kWide, class Keep, class Emit>
__device__ void block_moments(TypeTag<Columns<kWide>>, const Forward& job, const Tiling& t,
                              const Share& share, const Keep& keep, const Emit& emit) {
  using C = Compute<T>;
  using Walk = Columns<kWide>;
  FUSEREG_SHARED(buffer, ColumnBuffer<C>);
  FUSEREG_SHARED(shifts, C[kMaxPack]);
  FUSEREG_SHARED(totals, Moments[kMaxPack]);
  const T* const x = static_cast<const T*>(job.x);
  const int channels = slab_channels(t, share.slab);
  const RowRange rows = rows_of(t, share);
  const std::int64_t step = static_cast<std::int64_t>(kRunRows) * t.rows_at_once;
  for (int c = static_cast<int>(threadIdx.x); c < channels; c += kThreads) totals[c] = Moments{};
  Walk walk(t, share, job.mask, threadIdx.x);
  for (std::int64_t begin = rows.begin; begin < rows.end; begin += step) {
    const std::int64_t end = begin + step < rows.end ? begin + step : rows.end;
    std::int64_t row = begin;
    if (job.mask != nullptr) {
      while (row + 1 < end && job.mask[row] == 0) ++row;
    }
    __syncthreads();  // the last run's sums have been read
    for (int c = static_cast<int>(threadIdx.x); c < channels; c += kThreads) {
      shifts[c] = to_compute(x[(row * t.channels + share.slab * t.pack + c) * t.inner]);
    }
    __syncthreads();
    C shift[kOctet];
    C first[kOctet];
    C second[kOctet];
    FUSEREG_UNROLL
    for (int e = 0; e < kOctet; ++e) {
      const int c = walk.channel(e);
      shift[e] = shifts[c < channels ? c : 0];
      first[e] = second[e] = C(0);
    }
    int count = 0;
    walk.run(kRunRows);
    for_each_octet<kAhead<T>>(
        walk, [&](const Place& place) { return load_octet<kWide>(x, place); },
        [&](const Place& place, const Octet<T>& octet) {
          keep(octet);
          if (place.live == 0) return;
          ++count;
          FUSEREG_UNROLL
          for (int e = 0; e < kOctet; ++e) {
            const C d = to_compute(octet[e]) - shift[e];
            first[e] += d;
            second[e] = multiply_add(d, d, second[e]);
          }
        });
    buffer.put(t, walk, first, second, count);
    __syncthreads();
    for (int c = static_cast<int>(cuda::warp_id()); c < channels; c += kWarps) {
      double sum, squares, n;
      buffer.get(t, c, sum, squares, n);
      Moments moments = shifted_moments(n, static_cast<double>(shifts[c]), sum, squares);
      if (overflowed<C>(squares)) {
        const auto inner = static_cast<std::int64_t>(t.inner);
        const auto again = [&](double center, bool square) {
          double s = 0.0;
          for (std::int64_t i = cuda::lane_id(); i < (end - begin) * inner; i += cuda::kWarpSize) {
            const std::int64_t o = begin + i / inner;
            if (job.mask != nullptr && job.mask[o] == 0) continue;
            const std::int64_t line = o * t.channels + share.slab * t.pack + c;
            s += term(to_compute(x[line * inner + i % inner]), center, square);
          }
          return cuda::warp_sum(s);
        };
        moments = moments_in_float64(n, again);
      }
      if (cuda::lane_id() == 0) totals[c].add(moments);
    }
  }
  __syncthreads();
  for (int c = static_cast<int>(threadIdx.x); c < channels; c += kThreads) emit(c, totals[c]);
}

// The two sums of backward, of the block's share: keep(octets) and emit(channel, sums) as above.
// The coefficients must be there.
template <bool kHeavy, class T, bool kWide, class Keep, class Emit>
__device__ void block_sums(TypeTag<Lines<kWide>>, const Backward& job, const Tiling& t,
                           const Share& share, const ChannelNumbers<Compute<T>>& coefficients,
                           const Keep& keep, const Emit& emit) {
  using C = Compute<T>;
  using Walk = Lines<kWide>;
  const Plain<C> plain(job.epilogue);
  Walk walk(t, share, job.mask, static_cast<int>(threadIdx.x), kThreads);
  const auto k = kept_coefficients(walk, coefficients);
  LineSums<C> sums;
  for_each_octet<kAhead<T> / 2>(
      walk, [&](const Place& place) { return load_backward<Walk, T>(job, place); },
      [&](const Place& place, const BackwardData<T>& data) {
        keep(data);
        C dz[kOctet];
        C d[kOctet];
        gradient_of_z<kHeavy, Walk>(job, plain, k, place, data, dz, d);
        FUSEREG_UNROLL
        for (int e = 0; e < kOctet; ++e) d[e] *= dz[e];
        sums.add(dz, d);
      });
  sums.flush();
  double v[2] = {sums.wide_first, sums.wide_second};
  cuda::block_sum(v);
  if (threadIdx.x == 0) emit(0, GradientSums{v[0], v[1]});
}

template <bool kHeavy, class T, bool kWide, class Keep, class Emit>
__device__ void block_sums(TypeTag<Columns<kWide>>, const Backward& job, const Tiling& t,
                           const Share& share, const ChannelNumbers<Compute<T>>& coefficients,
                           const Keep& keep, const Emit& emit) {
  using C = Compute<T>;
  using Walk = Columns<kWide>;
  FUSEREG_SHARED(buffer, ColumnBuffer<C>);
  FUSEREG_SHARED(totals, GradientSums[kMaxPack]);
  const Plain<C> plain(job.epilogue);
  const int channels = slab_channels(t, share.slab);
  const RowRange rows = rows_of(t, share);
  const std::int64_t step = static_cast<std::int64_t>(kRunRows) * t.rows_at_once;
  for (int c = static_cast<int>(threadIdx.x); c < channels; c += kThreads)
    totals[c] = GradientSums{};
  Walk walk(t, share, job.mask, threadIdx.x);
  const auto k = kept_coefficients(walk, coefficients);
  for (std::int64_t begin = rows.begin; begin < rows.end; begin += step) {
    C first[kOctet];
    C second[kOctet];
    FUSEREG_UNROLL
    for (int e = 0; e < kOctet; ++e) first[e] = second[e] = C(0);
    walk.run(kRunRows);
    for_each_octet<kAhead<T> / 2>(
        walk, [&](const Place& place) { return load_backward<Walk, T>(job, place); },
        [&](const Place& place, const BackwardData<T>& data) {
          keep(data);
          C dz[kOctet];
          C d[kOctet];
          gradient_of_z<kHeavy, Walk>(job, plain, k, place, data, dz, d);
          FUSEREG_UNROLL
          for (int e = 0; e < kOctet; ++e) {
            first[e] += dz[e];
            second[e] = multiply_add(dz[e], d[e], second[e]);
          }
        });
    __syncthreads();  // the last run's sums have been read
    buffer.put(t, walk, first, second, 0);
    __syncthreads();
    for (int c = static_cast<int>(cuda::warp_id()); c < channels; c += kWarps) {
      GradientSums sums;
      double rows_unused;
      buffer.get(t, c, sums.sum, sums.dot, rows_unused);
      if (cuda::lane_id() == 0) totals[c].add(sums);
    }
  }
  __syncthreads();
  for (int c = static_cast<int>(threadIdx.x); c < channels; c += kThreads) emit(c, totals[c]);
}

}  // namespace fusereg::batch_norm
