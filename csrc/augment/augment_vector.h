// Vectors of neighbouring output pixels: float32 arithmetic, no antialiasing. The operations and
// their order are those of augment_math.h, lane by lane. For augment.cpp, once per instruction set.
//
// A row is done in blocks of 16 pixels, whose coordinates have one float64 base. Where all taps of
// a block lie inside the image, none is checked. uint8 taps that are neighbours in memory come in
// one gathered word: a whole pair (or, bicubic, all four) of one channel, or with three channels
// last a pair of all channels.
#pragma once

#include "augment/augment_math.h"
#include "core/simd.h"

namespace fusereg::augment::FUSEREG_ISA {
namespace {

using namespace ::fusereg::FUSEREG_ISA;

using Floats = Vector<float>;
using Ints = Vector<std::int32_t>;
inline constexpr int kLanes = kWidth<float>;
inline constexpr int kParts = kBlock / kLanes;

FUSEREG_INLINE Ints load_ints(const std::int32_t* p) {
  Ints v;
  memcpy(&v, p, sizeof(v));
  return v;
}
FUSEREG_INLINE void store_ints(std::int32_t* p, Ints v) { memcpy(p, &v, sizeof(v)); }

FUSEREG_INLINE Floats to_floats(Ints v) {
#if defined(__AVX512F__)
  return _mm512_maskz_cvtepi32_ps(0xffff, bit_cast<__m512i>(v));
#else
  return __builtin_convertvector(v, Floats);
#endif
}

// `yes` where the mask is set.
FUSEREG_INLINE Floats select(Ints mask, Floats yes, Floats no) {
  return bit_cast<Floats>((bit_cast<Ints>(yes) & mask) | (bit_cast<Ints>(no) & ~mask));
}

FUSEREG_INLINE Floats lerp(Floats a, Floats b, Floats t) {
#if defined(__AVX512F__)
  const __mmask16 moved =
      _mm512_mask_cmp_ps_mask(_mm512_cmp_ps_mask(t, Floats{}, _CMP_NEQ_UQ), a, b, _CMP_NEQ_UQ);
  return _mm512_mask_add_ps(a, moved, a, t * (b - a));
#else
  return select((t != 0.0f) & (a != b), a + t * (b - a), a);
#endif
}
// For numbers that are all finite: adding zero changes nothing.
FUSEREG_INLINE Floats finite_lerp(Floats a, Floats b, Floats t) { return a + t * (b - a); }

FUSEREG_INLINE Cubic<Floats> cubic_weights(Floats t) {
  const Floats s = 1.0f - t;
  Cubic<Floats> w;
  w.before = (t * -0.75f) * (s * s);
  w.next = ((s * 1.25f + -2.25f) * s) * s + 1.0f;
  w.last = (s * -0.75f) * (t * t);
  return w;
}
FUSEREG_INLINE Floats cubic_term(Floats sum, Floats v, Floats centre, Floats weight) {
  return select((weight != 0.0f) & (v != centre), sum + weight * (v - centre), sum);
}
FUSEREG_INLINE Floats cubic_of(Floats before, Floats centre, Floats next, Floats last,
                               const Cubic<Floats>& w) {
  return cubic_term(cubic_term(cubic_term(centre, before, centre, w.before), next, centre, w.next),
                    last, centre, w.last);
}

// --- a sample
// -------------------------------------------------------------------------------------

// What a record says, worked out once for many rows.
struct Frame {
  const double* m;
  const double* record;
  std::int64_t sample;
  int bits;
  bool copies;  // a whole-pixel shift, with flips or without
  std::int32_t step_x[kBlock], step_y[kBlock];
  std::int32_t least_x, most_x, least_y, most_y;  // of the steps
  Box erase;
  Box mix;
  std::int64_t partner;
};

bool is_whole(double v) { return within_reach(v) == v && floor_of(v) == v; }

void make_frame(const Job& job, std::int64_t sample, Frame& f) {
  f.sample = sample;
  f.record = job.records + sample * kRecord;
  f.m = f.record;
  f.bits = fraction_bits(f.m[0], f.m[3]);
  f.least_x = f.most_x = f.least_y = f.most_y = 0;
  for (int i = 0; i < kBlock; ++i) {
    const std::int32_t x = f.step_x[i] = lane_step(f.m[0], i, f.bits);
    const std::int32_t y = f.step_y[i] = lane_step(f.m[3], i, f.bits);
    f.least_x = x < f.least_x ? x : f.least_x;
    f.most_x = x > f.most_x ? x : f.most_x;
    f.least_y = y < f.least_y ? y : f.least_y;
    f.most_y = y > f.most_y ? y : f.most_y;
  }
  f.copies = (f.m[0] == 1.0 || f.m[0] == -1.0) && f.m[1] == 0.0 && is_whole(f.m[2]) &&
             f.m[3] == 0.0 && (f.m[4] == 1.0 || f.m[4] == -1.0) && is_whole(f.m[5]);
  f.erase = box_of(f.record + 6, job.y);
  f.mix = box_of(f.record + 10, job.y);
  f.partner = partner_of(f.record, job.n);
}

// --- taps
// -----------------------------------------------------------------------------------------

// Where the pixels of a part of a block are.
struct Spot {
  Ints x, y;
  Floats tx, ty;
};

struct Start {
  Fixed x, y;
};

FUSEREG_INLINE Spot spot_of(const Frame& f, const Start& start, int part, std::int32_t half) {
  const std::int32_t mask = (1 << f.bits) - 1;
  const float unit = power_of_two_float(-f.bits);
  const Ints ux = load_ints(f.step_x + part * kLanes) + (start.x.rest + half);
  const Ints uy = load_ints(f.step_y + part * kLanes) + (start.y.rest + half);
  return {(ux >> f.bits) + start.x.whole, (uy >> f.bits) + start.y.whole,
          to_floats(ux & mask) * unit, to_floats(uy & mask) * unit};
}

#if defined(__AVX512F__)
#define FUSEREG_GATHERS 1
FUSEREG_INLINE Ints gather_words(const std::uint8_t* p, Ints at) {
  return bit_cast<Ints>(
      _mm512_mask_i32gather_epi32(__m512i{}, 0xffff, bit_cast<__m512i>(at), p, 1));
}
#elif defined(__AVX2__)
#define FUSEREG_GATHERS 1
FUSEREG_INLINE Ints gather_words(const std::uint8_t* p, Ints at) {
  return bit_cast<Ints>(
      _mm256_i32gather_epi32(reinterpret_cast<const int*>(p), bit_cast<__m256i>(at), 1));
}
#else
#define FUSEREG_GATHERS 0
#endif

#if FUSEREG_GATHERS
// The low and the high words of the 8 bytes at each place.
FUSEREG_INLINE void gather_pairs(const std::uint8_t* p, Ints at, Ints& low, Ints& high) {
#if defined(__AVX512F__)
  const auto index = bit_cast<__m512i>(at);
  const __m512i a =
      _mm512_mask_i32gather_epi64(__m512i{}, 0xff, _mm512_castsi512_si256(index), p, 1);
  const __m512i b = _mm512_mask_i32gather_epi64(
      __m512i{}, 0xff, _mm512_maskz_extracti64x4_epi64(0xf, index, 1), p, 1);
  const __m512i even = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
  const __m512i odd = _mm512_setr_epi32(1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31);
  low = bit_cast<Ints>(_mm512_permutex2var_epi32(a, even, b));
  high = bit_cast<Ints>(_mm512_permutex2var_epi32(a, odd, b));
#else
  const auto index = bit_cast<__m256i>(at);
  const auto* words = reinterpret_cast<const long long*>(p);
  const __m256i a = _mm256_i32gather_epi64(words, _mm256_castsi256_si128(index), 1);
  const __m256i b = _mm256_i32gather_epi64(words, _mm256_extracti128_si256(index, 1), 1);
  const auto fa = bit_cast<__m256>(a);
  const auto fb = bit_cast<__m256>(b);
  low = bit_cast<Ints>(
      _mm256_permute4x64_epi64(bit_cast<__m256i>(_mm256_shuffle_ps(fa, fb, 0x88)), 0xd8));
  high = bit_cast<Ints>(
      _mm256_permute4x64_epi64(bit_cast<__m256i>(_mm256_shuffle_ps(fa, fb, 0xdd)), 0xd8));
#endif
}
FUSEREG_INLINE Floats byte_of(Ints words, int i) { return to_floats((words >> (8 * i)) & 255); }
#endif

FUSEREG_INLINE Ints minimum(Ints a, Ints b) {
  const Ints less = a < b;
  return (a & less) | (b & ~less);
}

// One channel after the other; every tap by itself. `at` are element offsets within a channel,
// whose last one is `last`.
template <class T>
FUSEREG_INLINE Floats take(const T* plane, Ints at, std::int32_t last) {
#if defined(__AVX512F__)
  if constexpr (sizeof(T) == 4)
    return _mm512_mask_i32gather_ps(Floats{}, 0xffff, bit_cast<__m512i>(at), plane, 4);
#elif defined(__AVX2__)
  if constexpr (sizeof(T) == 4) return _mm256_i32gather_ps(plane, bit_cast<__m256i>(at), 4);
#endif
#if FUSEREG_GATHERS
  if constexpr (sizeof(T) == 1) {
    if (last >= 3) {
      // Words end with the last element at the latest.
      const Ints base = minimum(at, Ints{} + (last - 3));
      return to_floats((gather_words(plane, base) >> ((at - base) << 3)) & 255);
    }
  }
#endif
  if constexpr (sizeof(T) != 4 || kVectorBytes == 16) {
    std::int32_t where[kLanes];
    store_ints(where, at);
    float v[kLanes];
    for (int i = 0; i < kLanes; ++i) v[i] = read(plane + where[i]);
    return load(v);
  }
}

// fold() of each lane. Where that is the fill, `filled` is set and the place is some pixel's.
FUSEREG_INLINE Ints fold_lanes(Ints at, std::int32_t size, FillMode mode, Ints& filled) {
  if (mode == FillMode::kConstant || mode == FillMode::kBorder) {
    const Ints below = at < 0;
    if (mode == FillMode::kConstant) filled |= below | (at >= size);
    return minimum(at & ~below, Ints{} + (size - 1));
  }
  for (int lane = 0; lane < kLanes; ++lane) at[lane] = fold(at[lane], size, mode);
  return at;
}

// The images that a sample's rows are made of, and the plane of its first channel.
template <class T>
struct Source {
  const T* data;
  std::int64_t channel;
  std::int32_t row, pixel, w, h;
};

// --- interpolation
// --------------------------------------------------------------------------------

template <class T, Interpolation kHow>
FUSEREG_INLINE Floats combine(const Floats (&tap)[4][4], const Spot& s, const Cubic<Floats>& wx,
                              const Cubic<Floats>& wy) {
  if constexpr (kHow == Interpolation::kNearest) {
    return tap[0][0];
  } else if constexpr (kHow == Interpolation::kBilinear) {
    return lerp(lerp(tap[0][0], tap[0][1], s.tx), lerp(tap[1][0], tap[1][1], s.tx), s.ty);
  } else {
    Floats line[4];
    for (int j = 0; j < 4; ++j) line[j] = cubic_of(tap[j][0], tap[j][1], tap[j][2], tap[j][3], wx);
    return cubic_of(line[0], line[1], line[2], line[3], wy);
  }
}

// Every tap by itself, all channels of a part. kChecked: some may lie outside the image.
template <class T, Interpolation kHow, bool kChecked>
void part_by_taps(const Job& job, const Source<T>& x, const Spot& s, float* out,
                  std::int64_t stride) {
  constexpr int kTaps = kHow == Interpolation::kNearest    ? 1
                        : kHow == Interpolation::kBilinear ? 2
                                                           : 4;
  constexpr int kBefore = kTaps == 4 ? 1 : 0;
  Ints column[kTaps], line[kTaps];
  Ints no_column[kTaps] = {}, no_line[kTaps] = {};  // the fill's
  for (int i = 0; i < kTaps; ++i) {
    column[i] = s.x + (i - kBefore);
    line[i] = s.y + (i - kBefore);
    if constexpr (kChecked) {
      column[i] = fold_lanes(column[i], x.w, job.fill_mode, no_column[i]);
      line[i] = fold_lanes(line[i], x.h, job.fill_mode, no_line[i]);
    }
    column[i] *= x.pixel;
    line[i] *= x.row;
  }
  const std::int32_t last = (x.h - 1) * x.row + (x.w - 1) * x.pixel;
  const Cubic<Floats> wx = cubic_weights(s.tx);
  const Cubic<Floats> wy = cubic_weights(s.ty);
  const T* plane = x.data;
  for (int c = 0; c < job.c; ++c, plane += x.channel, out += stride) {
    const auto fill = static_cast<float>(job.fill[c]);
    Floats tap[4][4];
    for (int j = 0; j < kTaps; ++j) {
      for (int i = 0; i < kTaps; ++i) {
        tap[j][i] = take(plane, line[j] + column[i], last);
        if constexpr (kChecked)
          tap[j][i] = select(no_line[j] | no_column[i], broadcast(fill), tap[j][i]);
      }
    }
    store(out, combine<T, kHow>(tap, s, wx, wy));
  }
}

#if FUSEREG_GATHERS
// uint8, neighbours of a channel beside each other in memory.
template <Interpolation kHow>
FUSEREG_INLINE void part_by_words(const Job& job, const Source<std::uint8_t>& x, const Spot& s,
                                  float* out, std::int64_t stride) {
  const std::uint8_t* plane = x.data;
  if constexpr (kHow == Interpolation::kBilinear) {
    const Ints at = s.y * x.row + s.x;
    for (int c = 0; c < job.c; ++c, plane += x.channel, out += stride) {
      const Ints above = gather_words(plane, at);
      const Ints below = gather_words(plane + x.row, at);
      store(out, finite_lerp(finite_lerp(byte_of(above, 0), byte_of(above, 1), s.tx),
                             finite_lerp(byte_of(below, 0), byte_of(below, 1), s.tx), s.ty));
    }
  } else {
    const Ints at = (s.y - 1) * x.row + (s.x - 1);
    const Cubic<Floats> wx = cubic_weights(s.tx);
    const Cubic<Floats> wy = cubic_weights(s.ty);
    for (int c = 0; c < job.c; ++c, plane += x.channel, out += stride) {
      Floats tap[4][4];
      for (int j = 0; j < 4; ++j) {
        const Ints line = gather_words(plane + j * x.row, at);
        for (int i = 0; i < 4; ++i) tap[j][i] = byte_of(line, i);
      }
      store(out, combine<std::uint8_t, kHow>(tap, s, wx, wy));
    }
  }
}

// uint8, bilinear, three channels last: the 6 bytes of two neighbours, in 8.
FUSEREG_INLINE void part_by_pixels(const Source<std::uint8_t>& x, const Spot& s, float* out,
                                   std::int64_t stride) {
  const Ints at = s.y * x.row + s.x * 3;
  Ints a, b, c, d;
  gather_pairs(x.data, at, a, b);
  gather_pairs(x.data + x.row, at, c, d);
  auto blend = [&](Floats v00, Floats v01, Floats v10, Floats v11) {
    return finite_lerp(finite_lerp(v00, v01, s.tx), finite_lerp(v10, v11, s.tx), s.ty);
  };
  store(out, blend(byte_of(a, 0), byte_of(a, 3), byte_of(c, 0), byte_of(c, 3)));
  store(out + stride, blend(byte_of(a, 1), byte_of(b, 0), byte_of(c, 1), byte_of(d, 0)));
  store(out + 2 * stride, blend(byte_of(a, 2), byte_of(b, 1), byte_of(c, 2), byte_of(d, 1)));
}
#endif

// --- whole-pixel shifts and flips
// -----------------------------------------------------------------

// kLanes neighbours in memory.
template <class T>
FUSEREG_INLINE Floats load_run(const T* p) {
  if constexpr (sizeof(T) == 1) {
#if defined(__AVX512F__)
    return to_floats(bit_cast<Ints>(
        _mm512_maskz_cvtepu8_epi32(0xffff, _mm_loadu_si128(reinterpret_cast<const __m128i*>(p)))));
#elif defined(__AVX2__)
    return to_floats(
        bit_cast<Ints>(_mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)))));
#else
    Ints v;
    for (int i = 0; i < kLanes; ++i) v[i] = p[i];
    return to_floats(v);
#endif
  } else {
    return load(p);
  }
}

// Lane i takes element index(i) of a and b together.
template <class F>
FUSEREG_INLINE Floats shuffled(Floats a, Floats b, const F& index) {
  Ints mask;
  for (int i = 0; i < kLanes; ++i) mask[i] = index(i);
  return __builtin_shuffle(a, b, mask);
}

FUSEREG_INLINE Floats reversed(Floats v) {
  return shuffled(v, v, [](int i) { return kLanes - 1 - i; });
}

// Three planes of kLanes pixels as pixels of three channels.
FUSEREG_INLINE void interleave(Floats v0, Floats v1, Floats v2, Floats (&out)[3]) {
  FUSEREG_UNROLL_10
  for (int k = 0; k < 3; ++k) {
    const int base = k * kLanes;
    const Floats two = shuffled(v0, v1, [base](int i) {
      const int channel = (base + i) % 3;
      return channel < 2 ? channel * kLanes + (base + i) / 3 : 0;
    });
    out[k] = shuffled(two, v2,
                      [base](int i) { return (base + i) % 3 < 2 ? i : kLanes + (base + i) / 3; });
  }
}
// The other way.
FUSEREG_INLINE void separate(const Floats (&in)[3], Floats (&out)[3]) {
  FUSEREG_UNROLL_10
  for (int k = 0; k < 3; ++k) {
    const Floats two =
        shuffled(in[0], in[1], [k](int i) { return 3 * i + k < 2 * kLanes ? 3 * i + k : 0; });
    out[k] = shuffled(two, in[2],
                      [k](int i) { return 3 * i + k < 2 * kLanes ? i : 3 * i + k - kLanes; });
  }
}

// Whether the block is a run of pixels inside the image; its values then.
template <class T>
FUSEREG_INLINE bool copy_block(const Job& job, const Frame& f, const Source<T>& x, std::int64_t row,
                               std::int64_t first, float* out, std::int64_t stride) {
  const bool mirrored = f.m[0] < 0.0;
  const auto from = static_cast<std::int64_t>(f.m[2]) + (mirrored ? -first - kBlock + 1 : first);
  const auto line = static_cast<std::int64_t>(f.m[5]) + (f.m[4] < 0.0 ? -row : row);
  if (from < 0 || from + kBlock > x.w || line < 0 || line >= x.h) return false;
  const T* at = x.data + line * x.row + from * x.pixel;
  if (x.pixel == 1) {
    for (int c = 0; c < job.c; ++c, at += x.channel, out += stride) {
      for (int p = 0; p < kParts; ++p) {
        if (mirrored) {
          store(out + (kParts - 1 - p) * kLanes, reversed(load_run(at + p * kLanes)));
        } else {
          store(out + p * kLanes, load_run(at + p * kLanes));
        }
      }
    }
    return true;
  }
  if (x.pixel != 3 || x.channel != 1) return false;
  for (int p = 0; p < kParts; ++p, at += 3 * kLanes) {
    const Floats mixed[3] = {load_run(at), load_run(at + kLanes), load_run(at + 2 * kLanes)};
    Floats planes[3];
    separate(mixed, planes);
    float* const to = out + (mirrored ? kParts - 1 - p : p) * kLanes;
    for (int c = 0; c < 3; ++c) store(to + c * stride, mirrored ? reversed(planes[c]) : planes[c]);
  }
  return true;
}

// The block's warped values: 16 of each channel, `stride` apart.
template <class T, Interpolation kHow>
FUSEREG_INLINE void warp_block(const Job& job, const Frame& f, std::int64_t row, std::int64_t first,
                               float* out, std::int64_t stride) {
  constexpr int kBefore = kHow == Interpolation::kBicubic ? 1 : 0;
  constexpr int kAfter = kHow == Interpolation::kNearest    ? 0
                         : kHow == Interpolation::kBilinear ? 1
                                                            : 2;
  const Source<T> x = {static_cast<const T*>(job.x.data) + f.sample * job.x.sample,
                       job.x.channel,
                       static_cast<std::int32_t>(job.x.row),
                       static_cast<std::int32_t>(job.x.pixel),
                       static_cast<std::int32_t>(job.x.w),
                       static_cast<std::int32_t>(job.x.h)};
  if (f.copies && copy_block(job, f, x, row, first, out, stride)) return;
  const Start start = {block_start(f.m[0], row_start(f.m, row), first, f.bits),
                       block_start(f.m[3], row_start(f.m + 3, row), first, f.bits)};
  const std::int32_t half = kHow == Interpolation::kNearest ? (1 << f.bits) >> 1 : 0;
  // The first and the last column and row that any tap is in.
  const std::int32_t left = start.x.whole + ((start.x.rest + half + f.least_x) >> f.bits) - kBefore;
  const std::int32_t right = start.x.whole + ((start.x.rest + half + f.most_x) >> f.bits) + kAfter;
  const std::int32_t top = start.y.whole + ((start.y.rest + half + f.least_y) >> f.bits) - kBefore;
  const std::int32_t bottom = start.y.whole + ((start.y.rest + half + f.most_y) >> f.bits) + kAfter;
  if (left >= 0 && top >= 0 && right < x.w && bottom < x.h) {
#if FUSEREG_GATHERS
    if constexpr (sizeof(T) == 1 && kHow != Interpolation::kNearest) {
      // Words reach beyond the second tap: by 2 bytes, which must be there in the image.
      const bool room = bottom < x.h - 1 || right + 2 < x.w;
      if (x.pixel == 1 && (kHow == Interpolation::kBicubic || room)) {
        for (int p = 0; p < kParts; ++p)
          part_by_words<kHow>(job, x, spot_of(f, start, p, half), out + p * kLanes, stride);
        return;
      }
      if (kHow == Interpolation::kBilinear && x.pixel == 3 && x.channel == 1 && room) {
        for (int p = 0; p < kParts; ++p)
          part_by_pixels(x, spot_of(f, start, p, half), out + p * kLanes, stride);
        return;
      }
    }
#endif
    for (int p = 0; p < kParts; ++p)
      part_by_taps<T, kHow, false>(job, x, spot_of(f, start, p, half), out + p * kLanes, stride);
    return;
  }
  if (job.fill_mode == FillMode::kConstant &&
      (right < 0 || bottom < 0 || left >= x.w || top >= x.h)) {
    for (int c = 0; c < job.c; ++c) {
      for (int i = 0; i < kBlock; ++i) out[c * stride + i] = static_cast<float>(job.fill[c]);
    }
    return;
  }
  for (int p = 0; p < kParts; ++p)
    part_by_taps<T, kHow, true>(job, x, spot_of(f, start, p, half), out + p * kLanes, stride);
}

}  // namespace
}  // namespace fusereg::augment::FUSEREG_ISA
