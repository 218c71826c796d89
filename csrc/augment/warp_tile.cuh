// The forward kernel of warps that read at points: without antialiasing, and of samples that turn, whose
// resized images lie in job.reduced. Contract: augment.h; the same bits as augmented().
//
// A block takes a tile of a sample's output, a thread four pixels of a row. What the tile has in
// common is worked out once, in shared memory: the blocks' first coordinates and the steps within
// them (all of the float64 arithmetic), boxes, color. Then coordinates are integers, four pixels'
// taps are under way at once where all are inside the image, and what is stored is a vector.
#pragma once

#include "augment/augment.h"
#include "augment/augment_math.h"
#include "augment/launch.cuh"
#include "augment/tiles.cuh"

namespace fusereg::augment {

// Pixels of a thread: of one channel more, as each then loads less.
template <int kGroup>
inline constexpr int kRun = kGroup == 1 ? 8 : 4;
inline constexpr int kTileWidth = 2 * kBlock;
template <int kGroup>
inline constexpr int kTileRows = kThreads * kRun<kGroup> / kTileWidth;

// What of a View a tile needs; in shared memory, where initializers are not run.
struct TileView {
  std::int64_t sample;
  std::int64_t offset;
  std::int32_t w, h;
  FillMode mode;
  double m[6];
  bool projective;
  bool reduced;
};

template <Antialias kAntialias>
__device__ void put_view(const Job& job, std::int64_t sample, TileView& to) {
  View v;
  view_to_warp<kAntialias>(job, sample, v);
  to.sample = sample;
  to.reduced = v.x.data != job.x.data;
  to.offset = v.offset;
  to.w = static_cast<std::int32_t>(v.x.w);
  to.h = static_cast<std::int32_t>(v.x.h);
  to.mode = v.mode;
  for (int i = 0; i < 6; ++i) to.m[i] = v.m[i];
  to.projective = v.projective;
}

// A sample as a tile needs it.
template <int kGroup>
struct TileSource {
  TileView view;
  Fixed start[2][kTileRows<kGroup>][2];  // of each axis, row and block
  std::int32_t step[2][kBlock];
  float color[12];
  std::int32_t erase[4];
  int bits;    // fraction_bits()
  bool whole;  // all coordinates are whole numbers
};

struct TileMix {
  std::int64_t partner;  // -1: none, and nothing else is set
  std::int32_t box[4];
  float lam, rest;
  bool partner_alone;
};

struct TileChannels {
  float fill[kMaxChannels], scale[kMaxChannels], shift[kMaxChannels];
};

// Columns and rows [x, x + width) and [y, y + height) against a box x0 y0 x1 y1.
FUSEREG_DEVICE_INLINE bool touches(const std::int32_t* box, std::int32_t x, std::int32_t y,
                                   int width, int height) {
  return x < box[2] && x + width > box[0] && y < box[3] && y + height > box[1];
}
FUSEREG_DEVICE_INLINE void put_box(const double* r, const Images& y, std::int32_t* box) {
  const Box b = box_of(r, y);
  box[0] = static_cast<std::int32_t>(b.x0);
  box[1] = static_cast<std::int32_t>(b.y0);
  box[2] = static_cast<std::int32_t>(b.x1);
  box[3] = static_cast<std::int32_t>(b.y1);
}

__device__ inline void put_mix(const Job& job, std::int64_t sample, TileMix& to) {
  const double* const record = job.records + sample * kRecord;
  to.partner = partner_of(record, job.n);
  if (to.partner < 0) return;
  put_box(record + 10, job.y, to.box);
  to.lam = static_cast<float>(record[15]);
  to.rest = static_cast<float>(1.0 - record[15]);
  to.partner_alone = record[15] == 0.0;
}
// Of a sample's value and its partner's, inside the box.
FUSEREG_DEVICE_INLINE float mixed(const TileMix& mix, float own, float other) {
  return mix.partner_alone ? other : add(multiply(mix.lam, own), multiply(mix.rest, other));
}

// Each thread has its part of it; the view is there.
template <int kGroup>
__device__ void prepare(const Job& job, std::int32_t row0, std::int32_t col0,
                        TileSource<kGroup>& s) {
  constexpr int kSteps = 2 * kBlock;
  static_assert(kSteps + 12 + 2 <= kThreads, "a value for each thread");
  const double* const record = job.records + s.view.sample * kRecord;
  const int bits = fraction_bits(s.view.m[0], s.view.m[3]);
  auto i = static_cast<int>(threadIdx.x);
  const double* const m = s.view.m + 3 * (i & 1);
  for (int at = i; at < 2 * 2 * kTileRows<kGroup>; at += kThreads) {
    const int block = at >> 1 & 1;
    const int row = at >> 2;
    s.start[i & 1][row][block] =
        block_start(m[0], row_start(m, row0 + row), col0 + block * kBlock, bits);
  }
  // The last warps, which have fewer of those, if any.
  i = kThreads - 1 - i;
  if (i < kSteps) {
    const int axis = i & 1;
    s.step[axis][i >> 1] = lane_step(s.view.m[3 * axis], i >> 1, bits);
    return;
  }
  i -= kSteps;
  if (i < 12) {
    s.color[i] = static_cast<float>(record[16 + i]);
  } else if (i == 12) {
    put_box(record + 6, job.y, s.erase);
  } else if (i == 13) {
    bool whole = true;
    for (const double v : s.view.m) whole = whole && floor_of(v) == v;
    s.whole = whole;
    s.bits = bits;
  }
}

// Where a thread's pixels are in the input.
template <int kGroup>
struct RunPlaces {
  std::int32_t x[kRun<kGroup>], y[kRun<kGroup>];
  float tx[kRun<kGroup>], ty[kRun<kGroup>];
};

// The strides of the input within a sample.
template <int kGroup, bool kLast>
struct TileStrides {
  std::int64_t row, channel_stride, pixel_stride;
  FUSEREG_DEVICE_INLINE std::int64_t pixel() const {
    return kGroup == 1 ? pixel_stride : kLast ? kGroup : 1;
  }
  FUSEREG_DEVICE_INLINE std::int64_t channel() const { return kLast ? 1 : channel_stride; }
};

// lerp() of pixels. Between bytes nothing is infinite and zeros have no sign, so that no choice is
// left to make.
template <class T>
FUSEREG_DEVICE_INLINE float lerp_pixels(float a, float b, float t) {
  if constexpr (sizeof(T) == 1) {
    return add(a, multiply(t, b - a));
  } else {
    return lerp(a, b, t);
  }
}

// All taps of all pixels are inside: no tap is asked for its place.
template <class T, int kGroup, bool kLast, int kTaps>
FUSEREG_DEVICE_INLINE void run_inside(const T* data, const TileStrides<kGroup, kLast>& strides,
                                      const RunPlaces<kGroup>& p,
                                      float (&v)[kGroup][kRun<kGroup>]) {
  T taps[kRun<kGroup>][kGroup][kTaps][kTaps];
  FUSEREG_UNROLL
  for (int k = 0; k < kRun<kGroup>; ++k) {
    const T* const at = data + p.y[k] * strides.row + p.x[k] * strides.pixel();
    FUSEREG_UNROLL
    for (int c = 0; c < kGroup; ++c) {
      FUSEREG_UNROLL
      for (int j = 0; j < kTaps; ++j) {
        FUSEREG_UNROLL
        for (int i = 0; i < kTaps; ++i)
          taps[k][c][j][i] = at[c * strides.channel() + j * strides.row + i * strides.pixel()];
      }
    }
  }
  FUSEREG_UNROLL
  for (int k = 0; k < kRun<kGroup>; ++k) {
    FUSEREG_UNROLL
    for (int c = 0; c < kGroup; ++c) {
      const auto& at = taps[k][c];
      if constexpr (kTaps == 1) {
        v[c][k] = tap(&at[0][0]);
      } else {
        const float top = lerp_pixels<T>(tap(&at[0][0]), tap(&at[0][1]), p.tx[k]);
        const float low = lerp_pixels<T>(tap(&at[1][0]), tap(&at[1][1]), p.tx[k]);
        v[c][k] = lerp_pixels<T>(top, low, p.ty[k]);
      }
    }
  }
}

// Pixels with two or four taps along each axis, the first of them `kBefore` before their places.
template <class T, int kGroup, bool kLast, int kTaps, int kPixels>
FUSEREG_DEVICE_INLINE void pixels_anywhere(const TileView& view, const T* data,
                                           const TileStrides<kGroup, kLast>& strides,
                                           const Place<float> (&places)[kPixels], float cubic,
                                           const float* fill, float (&v)[kPixels][kGroup]) {
  constexpr int kBefore = kTaps == 4 ? 1 : 0;
  // Where a tap is outside the first pixel is loaded: a load within a branch would be waited for there.
  std::int32_t xs[kPixels][kTaps];
  const T* lines[kPixels][kTaps];
  FUSEREG_UNROLL
  for (int p = 0; p < kPixels; ++p) {
    FUSEREG_UNROLL
    for (int i = 0; i < kTaps; ++i) {
      const std::int32_t column = fold(places[p].x - kBefore + i, view.w, view.mode);
      const std::int32_t row = fold(places[p].y - kBefore + i, view.h, view.mode);
      xs[p][i] = column;
      lines[p][i] = row < 0 ? nullptr : data + row * strides.row;
    }
  }
  FUSEREG_UNROLL
  for (int c = 0; c < kGroup; ++c) {
    T taps[kPixels][kTaps][kTaps];
    FUSEREG_UNROLL
    for (int p = 0; p < kPixels; ++p) {
      FUSEREG_UNROLL
      for (int j = 0; j < kTaps; ++j) {
        FUSEREG_UNROLL
        for (int i = 0; i < kTaps; ++i)
          taps[p][j][i] = *(xs[p][i] < 0 || lines[p][j] == nullptr
                                ? data
                                : lines[p][j] + xs[p][i] * strides.pixel() + c * strides.channel());
      }
    }
    FUSEREG_UNROLL
    for (int p = 0; p < kPixels; ++p) {
      float at[kTaps][kTaps];
      FUSEREG_UNROLL
      for (int j = 0; j < kTaps; ++j) {
        FUSEREG_UNROLL
        for (int i = 0; i < kTaps; ++i)
          at[j][i] = xs[p][i] < 0 || lines[p][j] == nullptr ? fill[c] : tap(&taps[p][j][i]);
      }
      if constexpr (kTaps == 2) {
        const float top = lerp(at[0][0], at[0][1], places[p].tx);
        v[p][c] = lerp(top, lerp(at[1][0], at[1][1], places[p].tx), places[p].ty);
      } else {
        const Cubic<float> wx = cubic_weights(places[p].tx, cubic);
        const Cubic<float> wy = cubic_weights(places[p].ty, cubic);
        float line[4];
        FUSEREG_UNROLL
        for (int j = 0; j < 4; ++j) line[j] = cubic_of(at[j][0], at[j][1], at[j][2], at[j][3], wx);
        v[p][c] = cubic_of(line[0], line[1], line[2], line[3], wy);
      }
    }
  }
}

// v[c][k] = one[c], for a k that is not known when this is compiled.
template <int kGroup>
FUSEREG_DEVICE_INLINE void put_pixel(float (&v)[kGroup][kRun<kGroup>], int k,
                                     const float (&one)[kGroup]) {
  FUSEREG_UNROLL
  for (int at = 0; at < kRun<kGroup>; ++at) {
    FUSEREG_UNROLL
    for (int c = 0; c < kGroup; ++c) v[c][at] = at == k ? one[c] : v[c][at];
  }
}

// Puts the pixels that stand for those of a run in their places; a bit for each that is outside.
template <int kGroup>
FUSEREG_DEVICE_INLINE unsigned fold_places(const TileView& view, RunPlaces<kGroup>& p) {
  unsigned outside = 0;
  FUSEREG_NO_UNROLL
  for (int k = 0; k < kRun<kGroup>; ++k) {
    const std::int32_t x = fold(element_at(p.x, k), view.w, view.mode);
    const std::int32_t y = fold(element_at(p.y, k), view.h, view.mode);
    const bool is_outside = x < 0 || y < 0;
    outside |= static_cast<unsigned>(is_outside) << k;
    set_channel(p.x, k, is_outside ? 0 : x);
    set_channel(p.y, k, is_outside ? 0 : y);
  }
  return outside;
}
template <int kGroup>
FUSEREG_DEVICE_INLINE void put_fill(float (&v)[kGroup][kRun<kGroup>], unsigned outside,
                                    const float* fill) {
  FUSEREG_UNROLL
  for (int k = 0; k < kRun<kGroup>; ++k) {
    FUSEREG_UNROLL
    for (int c = 0; c < kGroup; ++c) v[c][k] = (outside >> k & 1) != 0 ? fill[c] : v[c][k];
  }
}

template <class T, int kGroup, bool kLast, int kTaps>
FUSEREG_DEVICE_INLINE void run_warped(const Job& job, const T* data, const TileSource<kGroup>& s,
                                      int row, int lane, int bits, bool nearest, const float* fill,
                                      float (&v)[kGroup][kRun<kGroup>]) {
  const TileStrides<kGroup, kLast> strides{job.x.row, job.x.channel, job.x.pixel};
  const int block = lane / kBlock;
  lane %= kBlock;
  const Fixed x = s.start[0][row][block];
  const Fixed y = s.start[1][row][block];
  auto place_of = [&](int k, std::int32_t& at_x, std::int32_t& at_y, float& tx, float& ty) {
    place_on_axis(x, s.step[0][lane + k], bits, nearest, at_x, tx);
    place_on_axis(y, s.step[1][lane + k], bits, nearest, at_y, ty);
  };
  if constexpr (kTaps <= 2) {
    RunPlaces<kGroup> p;
    FUSEREG_UNROLL
    for (int k = 0; k < kRun<kGroup>; ++k) place_of(k, p.x[k], p.y[k], p.tx[k], p.ty[k]);
    // Steps go one way, so that the pixels between are between.
    auto inside = [](std::int32_t a, std::int32_t b, std::int32_t size) {
      const std::int32_t most = size - kTaps;
      return a >= 0 && b >= 0 && a <= most && b <= most;
    };
    unsigned outside = 0;
    bool loads = inside(p.x[0], p.x[kRun<kGroup> - 1], s.view.w) &&
                 inside(p.y[0], p.y[kRun<kGroup> - 1], s.view.h);
    if constexpr (kTaps == 1) {
      if (!loads) outside = fold_places(s.view, p);
      loads = true;
    }
    if (loads) {
      run_inside<T, kGroup, kLast, kTaps>(data, strides, p, v);
      if (outside != 0) put_fill(v, outside, fill);
      return;
    }
  }
  if constexpr (kTaps > 1) {
    constexpr int kPixels = kGroup == 1 && kTaps == 2 ? 2 : 1;
    FUSEREG_NO_UNROLL
    for (int k = 0; k < kRun<kGroup>; k += kPixels) {
      Place<float> places[kPixels];
      float found[kPixels][kGroup];
      FUSEREG_UNROLL
      for (int i = 0; i < kPixels; ++i)
        place_of(k + i, places[i].x, places[i].y, places[i].tx, places[i].ty);
      pixels_anywhere<T, kGroup, kLast, kTaps, kPixels>(s.view, data, strides, places,
                                                        static_cast<float>(job.cubic), fill, found);
      FUSEREG_UNROLL
      for (int i = 0; i < kPixels; ++i) put_pixel(v, k + i, found[i]);
    }
  }
}

// A(sample) at the run's pixels: see unmixed().
template <class T, int kGroup, bool kLast>
FUSEREG_DEVICE_INLINE void run_unmixed(const Job& job, const TileSource<kGroup>& s,
                                       const TileChannels& channels, int row, int lane,
                                       std::int32_t out_row, std::int32_t out_col, int channel,
                                       float (&v)[kGroup][kRun<kGroup>]) {
  // Of the kernel's arguments, so that the compiler knows it to be global memory.
  const auto* const images = static_cast<const T*>(s.view.reduced ? job.reduced : job.x.data);
  const T* const data = images + s.view.offset + channel * job.x.channel;
  const int bits = s.bits;
  const float* const fill = channels.fill + channel;
  const bool nearest = job.interpolation == Interpolation::kNearest;
  if (nearest || s.whole) {
    run_warped<T, kGroup, kLast, 1>(job, data, s, row, lane, bits, nearest, fill, v);
  } else if (job.interpolation == Interpolation::kBilinear) {
    run_warped<T, kGroup, kLast, 2>(job, data, s, row, lane, bits, false, fill, v);
  } else {
    run_warped<T, kGroup, kLast, 4>(job, data, s, row, lane, bits, false, fill, v);
  }
  const auto limit = static_cast<float>(job.limit);
  FUSEREG_UNROLL
  for (int k = 0; k < kRun<kGroup>; ++k) {
    if (job.color) {
      const float* const m = s.color;
      if constexpr (kGroup == 3) {
        const float v0 = v[0][k], v1 = v[1][k], v2 = v[2][k];
        FUSEREG_UNROLL
        for (int c = 0; c < 3; ++c) v[c][k] = clamped(color_sum(m + 4 * c, v0, v1, v2), limit);
      } else {
        v[0][k] = clamped(add(multiply(m[0], v[0][k]), m[3]), limit);
      }
    }
    FUSEREG_UNROLL
    for (int c = 0; c < kGroup; ++c) {
      v[c][k] = add(multiply(v[c][k], channels.scale[channel + c]), channels.shift[channel + c]);
    }
  }
  if (!touches(s.erase, out_col, out_row, kRun<kGroup>, 1)) return;
  FUSEREG_NO_UNROLL
  for (int k = 0; k < kRun<kGroup>; ++k) {
    float one[kGroup];
    if (erased<T, kGroup>(job, s.view.sample, out_col + k, out_row, channel, one))
      put_pixel(v, k, one);
  }
}

// The run in y's type: vectors where all of it is inside and they fit.
template <class U, int kGroup>
FUSEREG_DEVICE_INLINE void store_run(const Job& job, std::int64_t at, int count,
                                     const float (&v)[kGroup][kRun<kGroup>]) {
  constexpr Element kType = sizeof(U) == 1                ? Element::kUInt8
                            : std::is_same_v<U, Half>     ? Element::kFloat16
                            : std::is_same_v<U, BFloat16> ? Element::kBFloat16
                            : std::is_same_v<U, double>   ? Element::kFloat64
                                                          : Element::kFloat32;
  U* const to = static_cast<U*>(job.y.data) + at;
  if constexpr (sizeof(U) <= 4) {
    constexpr int kPart = kRun<kGroup> < cuda::kVecSize<U> ? kRun<kGroup> : cuda::kVecSize<U>;
    using V = cuda::Vec<U, kPart>;
    if (count == kRun<kGroup> && job.y.pixel == 1 && cuda::is_aligned(to, sizeof(V)) &&
        (kGroup == 1 || (cuda::is_aligned(to + job.y.channel, sizeof(V)) &&
                         cuda::is_aligned(to + 2 * job.y.channel, sizeof(V))))) {
      FUSEREG_UNROLL
      for (int c = 0; c < kGroup; ++c) {
        FUSEREG_UNROLL
        for (int part = 0; part < kRun<kGroup>; part += kPart) {
          V out;
          FUSEREG_UNROLL
          for (int k = 0; k < kPart; ++k) write(&out.values[0], kType, k, v[c][part + k]);
          cuda::store(to + c * job.y.channel + part, out);
        }
      }
      return;
    }
    if constexpr (kGroup == 3) {
      if (count == kRun<kGroup> && job.y.pixel == 3 && job.y.channel == 1 &&
          cuda::is_aligned(to, sizeof(V))) {
        FUSEREG_UNROLL
        for (int part = 0; part < 3; ++part) {
          V out;
          FUSEREG_UNROLL
          for (int i = 0; i < kRun<kGroup>; ++i) {
            const int element = part * kRun<kGroup> + i;
            write(&out.values[0], kType, i, v[element % 3][element / 3]);
          }
          cuda::store(to + part * kRun<kGroup>, out);
        }
        return;
      }
    }
  }
  FUSEREG_UNROLL
  for (int k = 0; k < kRun<kGroup>; ++k) {
    if (k >= count) break;
    FUSEREG_UNROLL
    for (int c = 0; c < kGroup; ++c) write(to, kType, k * job.y.pixel + c * job.y.channel, v[c][k]);
  }
}

// A run of a sample with a perspective, or whose partner has one: pixel by pixel.
template <class T, int kGroup>
FUSEREG_STATIC void run_by_pixels(const Job& job, std::int64_t sample, std::int32_t row,
                                  std::int32_t first, int count) {
  for (int k = 0; k < count; ++k) {
    const std::int64_t at = sample * job.y.sample + row * job.y.row + (first + k) * job.y.pixel;
    for (int c = 0; c < job.c; c += kGroup) {
      float v[kGroup];
      augmented<T, kGroup, Antialias::kNever>(job, sample, first + k, row, c, v);
      FUSEREG_UNROLL
      for (int i = 0; i < kGroup; ++i)
        write(job.y.data, job.y.type, at + (c + i) * job.y.channel, v[i]);
    }
  }
}

template <class T, int kGroup, bool kLast>
__global__ void __launch_bounds__(kThreads, 2)
    augment_tile_kernel(FUSEREG_GRID_CONSTANT(Job, job)) {
  using Source = TileSource<kGroup>;
  FUSEREG_SHARED(sources, Source[2]);
  FUSEREG_SHARED(mix, TileMix);
  FUSEREG_SHARED(channels, TileChannels);
  FUSEREG_SHARED(tiles, Tiles);
  const auto thread = static_cast<int>(threadIdx.x);
  for (int c = thread; c < job.c; c += kThreads) {
    channels.fill[c] = static_cast<float>(job.fill[c]);
    channels.scale[c] = static_cast<float>(job.scale[c]);
    channels.shift[c] = static_cast<float>(job.shift[c]);
  }
  constexpr unsigned kRuns = kTileWidth / kRun<kGroup>;  // of a row
  const auto row = static_cast<int>(threadIdx.x / kRuns);
  const auto lane = static_cast<int>(threadIdx.x % kRuns) * kRun<kGroup>;
  // Of the output, from the run's first pixel to the end of the row.
  auto left_of = [&](const Tiles& at) {
    return static_cast<std::int32_t>(job.y.w) - static_cast<std::int32_t>(at.col) * kTileWidth -
           lane;
  };
  bool more =
      first_tile(tiles, ceil_div(job.y.w, kTileWidth), ceil_div(job.y.h, kTileRows<kGroup>), job.n);
  for (; more; more = next_tile(tiles)) {
    const std::int64_t sample = tiles.sample;
    if (job.antialias && way_of(job, sample) != Way::kPoints) continue;
    const auto row0 = static_cast<std::int32_t>(tiles.row) * kTileRows<kGroup>;
    const auto col0 = static_cast<std::int32_t>(tiles.col) * kTileWidth;
    // What all threads read stays in shared memory, where it takes no registers.
    if (thread == 0) put_view<Antialias::kReduced>(job, sample, sources[0].view);
    if (thread == cuda::kWarpSize) {
      put_mix(job, sample, mix);
      if (mix.partner >= 0) put_view<Antialias::kReduced>(job, mix.partner, sources[1].view);
    }
    __syncthreads();
    prepare(job, row0, col0, sources[0]);
    if (mix.partner >= 0) prepare(job, row0, col0, sources[1]);
    __syncthreads();
    const std::int32_t out_row = row0 + row;
    const std::int32_t out_col = col0 + lane;
    // Sides fit 32 bits, and nothing here is negative: numbers of 64 bits would take twice the registers.
    if (out_row >= static_cast<std::int32_t>(job.y.h) || left_of(tiles) <= 0) continue;
    const bool mixes = mix.partner >= 0 && touches(mix.box, out_col, out_row, kRun<kGroup>, 1);
    if (sources[0].view.projective || (mix.partner >= 0 && sources[1].view.projective)) {
      run_by_pixels<T, kGroup>(job, sources[0].view.sample, out_row, out_col,
                               left_of(tiles) < kRun<kGroup> ? left_of(tiles) : kRun<kGroup>);
      continue;
    }
    FUSEREG_NO_UNROLL
    for (int c = 0; c < job.c; c += kGroup) {
      float v[kGroup][kRun<kGroup>];
      FUSEREG_NO_UNROLL
      for (int which = 0; which <= static_cast<int>(mixes); ++which) {
        float found[kGroup][kRun<kGroup>];
        run_unmixed<T, kGroup, kLast>(job, sources[which], channels, row, lane, out_row, out_col, c,
                                      found);
        // Else the compiler asks what is in the box ahead of the loop, and also where nothing mixes.
        if (which == 1) compiler_barrier();
        FUSEREG_UNROLL
        for (int k = 0; k < kRun<kGroup>; ++k) {
          const bool mixes_here = which == 1 && touches(mix.box, out_col + k, out_row, 1, 1);
          FUSEREG_UNROLL
          for (int i = 0; i < kGroup; ++i) {
            if (which == 0) {
              v[i][k] = found[i][k];
            } else if (mixes_here) {
              v[i][k] = mixed(mix, v[i][k], found[i][k]);
            }
          }
        }
      }
      compiler_barrier();
      const std::int32_t left = left_of(tiles);
      const std::int64_t at = sources[0].view.sample * job.y.sample + c * job.y.channel +
                              static_cast<std::uint32_t>(out_row) * job.y.row +
                              static_cast<std::uint32_t>(out_col) * job.y.pixel;
      dispatch_element(job.y.type, [&](auto tag) {
        using U = typename decltype(tag)::type;
        store_run<U, kGroup>(job, at, left < kRun<kGroup> ? left : kRun<kGroup>, v);
      });
    }
  }
}

template <class T>
void launch_tiles(const char* op, const Job& job, int device, void* stream) {
  const int rows = job.c == 3 ? kTileRows<3> : kTileRows<1>;
  const std::int64_t tiles = job.n * ceil_div(job.y.h, rows) * ceil_div(job.y.w, kTileWidth);
  const cuda::LaunchConfig config = config_for(tiles * kThreads, device, stream);
  if (job.c != 3) {
    cuda::launch(op, augment_tile_kernel<T, 1, false>, config, job);
  } else if (job.x.channels_last) {
    cuda::launch(op, augment_tile_kernel<T, 3, true>, config, job);
  } else {
    cuda::launch(op, augment_tile_kernel<T, 3, false>, config, job);
  }
}

}  // namespace fusereg::augment
