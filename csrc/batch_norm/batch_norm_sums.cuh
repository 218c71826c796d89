// The sums that a block makes of its share: for the moments forward, of the gradients backward.
#pragma once

#include "batch_norm/batch_norm_epilogue.cuh"

namespace fusereg::batch_norm {

// float32 terms that are added before they go to float64: octets of lines, rows of columns.
inline constexpr int kRunOctets = 8;
inline constexpr int kRunRows = 64;

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

// Whether such sums are to be taken again, in float64. Squares of float32 overflow from 1.8e19 on
// although the variance may not. And a shift that is far from all others, an outlier, leaves too
// few digits to them: farther than 8 standard deviations from the mean, which is rare. Elements
// that are not finite give the same result as before.
template <class C>
FUSEREG_DEVICE_INLINE bool inaccurate(double count, double sum, double squares) {
  if (sizeof(C) == 8 || count == 0.0) return false;
  if (!(squares - squares == 0.0)) return true;
  // (sum / count)^2 > 64 (squares / count - (sum / count)^2)
  return 65.0 * sum * sum > 64.0 * squares * count;
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
      walk, [&](const Place& place) { return load_octet<Walk>(x, place); },
      [&](const Place& place, const Octet<T, kWide>& octet) {
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
  if (inaccurate<C>(v[2], v[0], v[1])) {
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
    if (const int c = static_cast<int>(threadIdx.x); c < channels) {
      shifts[c] = to_compute(x[(row * t.channels + first_channel(t, share) + c) * t.inner]);
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
        walk, [&](const Place& place) { return load_octet<Walk>(x, place); },
        [&](const Place& place, const Octet<T, kWide>& octet) {
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
      if (inaccurate<C>(n, sum, squares)) {
        const auto inner = static_cast<std::int64_t>(t.inner);
        const auto again = [&](double center, bool square) {
          double s = 0.0;
          for (std::int64_t i = cuda::lane_id(); i < (end - begin) * inner; i += cuda::kWarpSize) {
            const std::int64_t o = begin + i / inner;
            if (job.mask != nullptr && job.mask[o] == 0) continue;
            const std::int64_t line = o * t.channels + first_channel(t, share) + c;
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
  if (const int c = static_cast<int>(threadIdx.x); c < channels) emit(c, totals[c]);
}

// The two sums of backward, of the block's share: keep(octets) and emit(channel, sums) as above.
// The coefficients must be there.
template <bool kHeavy, class T, bool kWide, class Keep, class Emit>
__device__ void block_sums(TypeTag<Lines<kWide>>, const Backward& job, const Tiling& t,
                           const Share& share, const Plain<Compute<T>>& plain,
                           const ChannelNumbers<Compute<T>>& coefficients, const Keep& keep,
                           const Emit& emit) {
  using C = Compute<T>;
  using Walk = Lines<kWide>;
  Walk walk(t, share, job.mask, static_cast<int>(threadIdx.x), kThreads);
  const auto k = kept_coefficients(walk, coefficients);
  LineSums<C> sums;
  for_each_octet<kAheadBackward<T, Walk>>(
      walk, [&](const Place& place) { return load_backward<kHeavy, Walk, T>(job, plain, place); },
      [&](const Place& place, const BackwardData<T, Walk::kWide>& data) {
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
                           const Share& share, const Plain<Compute<T>>& plain,
                           const ChannelNumbers<Compute<T>>& coefficients, const Keep& keep,
                           const Emit& emit) {
  using C = Compute<T>;
  using Walk = Columns<kWide>;
  FUSEREG_SHARED(buffer, ColumnBuffer<C>);
  FUSEREG_SHARED(totals, GradientSums[kMaxPack]);
  const int channels = slab_channels(t, share.slab);
  // Every thread takes part in each run.
  const RowRange rows = rows_of(t, share);
  int runs = rows.begin < rows.end
                 ? static_cast<int>((rows.end - rows.begin - 1) / (kRunRows * t.rows_at_once)) + 1
                 : 0;
  for (int c = static_cast<int>(threadIdx.x); c < channels; c += kThreads)
    totals[c] = GradientSums{};
  Walk walk(t, share, job.mask, threadIdx.x);
  const auto k = kept_coefficients(walk, coefficients);
  for (; runs > 0; --runs) {
    C first[kOctet];
    C second[kOctet];
    FUSEREG_UNROLL
    for (int e = 0; e < kOctet; ++e) first[e] = second[e] = C(0);
    walk.run(kRunRows);
    for_each_octet<kAheadBackward<T, Walk>>(
        walk, [&](const Place& place) { return load_backward<kHeavy, Walk, T>(job, plain, place); },
        [&](const Place& place, const BackwardData<T, Walk::kWide>& data) {
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
#if !defined(FUSEREG_CUDA_ON_HOST)
    // Compared here, not before the run, which would have to keep the answer.
    asm volatile("" : "+r"(runs));
#endif
  }
  __syncthreads();
  if (const int c = static_cast<int>(threadIdx.x); c < channels) emit(c, totals[c]);
}

}  // namespace fusereg::batch_norm
