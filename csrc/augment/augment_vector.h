// Vectors of neighboring output pixels: float32 arithmetic, no antialiasing. The operations and
// their order are those of augment_math.h, lane by lane. For the CPU kernels, once per instruction set.
//
// A row is done in blocks of 16 pixels, whose coordinates have one float64 base. Where all taps of
// a block lie inside the image, none is checked. Taps that are neighbors in memory come in one
// word: a pair of one channel (uint8, bicubic: all four), or of uint8 with three channels last a
// pair of all channels.
#pragma once

#include "augment/augment_gather.h"
#include "augment/augment_store.h"

namespace fusereg::augment::FUSEREG_ISA {
namespace {

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
// Of bytes: their difference is exact in integers, and one conversion takes a subtraction's place.
FUSEREG_INLINE Floats finite_lerp(Ints a, Ints b, Floats t) {
  return to_floats(a) + t * to_floats(b - a);
}

FUSEREG_INLINE Cubic<Floats> cubic_weights(Floats t, float a) {
  const Floats s = 1.0f - t;
  Cubic<Floats> w;
  w.before = (t * a) * (s * s);
  w.next = ((s * (a + 2.0f) + -(a + 3.0f)) * s) * s + 1.0f;
  w.last = (s * a) * (t * t);
  return w;
}
FUSEREG_INLINE Floats cubic_term(Floats sum, Floats v, Floats center, Floats weight) {
  return select((weight != 0.0f) & (v != center), sum + weight * (v - center), sum);
}
FUSEREG_INLINE Floats cubic_of(Floats before, Floats center, Floats next, Floats last,
                               const Cubic<Floats>& w) {
  return cubic_term(cubic_term(cubic_term(center, before, center, w.before), next, center, w.next),
                    last, center, w.last);
}

// --- a sample ---
// What a record says, worked out once for many rows.
struct Frame {
  View view;
  const double* m;  // the view's
  const double* record;
  std::int64_t sample;
  int bits;
  bool copies;  // a whole-pixel shift, with flips or without
  bool runs;    // rows of planes, each moved along: neighbors stay neighbors in memory
  bool fills;   // pixels that no tap is inside for are the fill
  std::int32_t step_x[kBlock], step_y[kBlock];
  std::int32_t least_x, most_x, least_y, most_y;  // of the steps
  Box erase;
  Box mix;
  std::int64_t partner;
};

// Columns of a box that are in a block, as places in the block; nothing in other rows.
struct Cut {
  int begin, end;
};
FUSEREG_INLINE Cut cut_block(const Box& box, std::int64_t row, std::int64_t first, int count) {
  if (row < box.y0 || row >= box.y1 || box.x1 <= first || box.x0 >= first + count) return {0, 0};
  const std::int64_t begin = box.x0 - first;
  const std::int64_t end = box.x1 - first;
  return {begin > 0 ? static_cast<int>(begin) : 0, end < count ? static_cast<int>(end) : count};
}

bool is_whole(double v) { return within_reach(v) == v && floor_of(v) == v; }

void make_frame(const Job& job, std::int64_t sample, Frame& f) {
  f.sample = sample;
  f.record = job.records + sample * kRecord;
  view_of(job, job.x, sample, f.view);
  f.m = f.view.m;
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
  f.copies = !f.view.projective && (f.m[0] == 1.0 || f.m[0] == -1.0) && f.m[1] == 0.0 &&
             is_whole(f.m[2]) && f.m[3] == 0.0 && (f.m[4] == 1.0 || f.m[4] == -1.0) &&
             is_whole(f.m[5]);
  f.runs = !f.view.projective && f.m[0] == 1.0 && f.m[3] == 0.0 && f.view.x.pixel == 1;
  f.fills = f.view.mode == FillMode::kConstant || job.outside_unread;
  f.erase = box_of(f.record + 6, job.y);
  f.mix = box_of(f.record + 10, job.y);
  f.partner = partner_of(f.record, job.n);
}

// --- taps ---
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

// Under a perspective: each pixel by itself.
Spot projective_spot(const Frame& f, std::int64_t row, std::int64_t first, bool nearest) {
  alignas(kVectorBytes) std::int32_t x[kLanes], y[kLanes];
  alignas(kVectorBytes) float tx[kLanes], ty[kLanes];
  for (int i = 0; i < kLanes; ++i) {
    Place<float> p;
    place_in(f.view, first + i, row, nearest, p);
    x[i] = p.x;
    y[i] = p.y;
    tx[i] = p.tx;
    ty[i] = p.ty;
  }
  return {load_ints(x), load_ints(y), load(tx), load(ty)};
}

// The images that a sample's rows are made of, and the plane of its first channel.
template <class T>
struct Source {
  const T* data;
  std::int64_t channel;
  std::int32_t row, pixel, w, h;
  FillMode mode;
};

// --- interpolation ---
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

// Pixels of the image that stand for others, and the lanes in which they are these themselves or,
// unless the fill is constant, count as well.
struct Folded {
  Ints at;
  Ints inside;
};
FUSEREG_INLINE Folded folded(Ints at, std::int32_t size, FillMode mode) {
  const Ints least = at & (at >= 0);
  const Ints above = least >= size;
  const Ints nearest = (least & ~above) | (above & (size - 1));
  if (mode == FillMode::kConstant) return {nearest, nearest == at};
  if (mode == FillMode::kBorder) return {nearest, ~Ints{}};
  std::int32_t lanes[kLanes];
  store_ints(lanes, at);
  for (int i = 0; i < kLanes; ++i) lanes[i] = fold(lanes[i], size, mode);
  return {load_ints(lanes), ~Ints{}};
}

// Every tap by itself, all channels of a part. kChecked: some may lie outside the image.
template <class T, Interpolation kHow, bool kChecked>
void part_by_taps(const Job& job, const Source<T>& x, const Spot& s, float* out) {
  constexpr int kTaps = kHow == Interpolation::kNearest    ? 1
                        : kHow == Interpolation::kBilinear ? 2
                                                           : 4;
  constexpr int kBefore = kTaps == 4 ? 1 : 0;
  alignas(kVectorBytes) std::int32_t at[kTaps][kTaps][kLanes];
  Ints inside[kTaps][kTaps];
  Folded column[kTaps];
  for (int i = 0; i < kTaps; ++i) {
    const Ints px = s.x + (i - kBefore);
    column[i] = kChecked ? folded(px, x.w, x.mode) : Folded{px, ~Ints{}};
  }
  for (int j = 0; j < kTaps; ++j) {
    const Ints py = s.y + (j - kBefore);
    const Folded line = kChecked ? folded(py, x.h, x.mode) : Folded{py, ~Ints{}};
    for (int i = 0; i < kTaps; ++i) {
      store_ints(at[j][i], line.at * x.row + column[i].at * x.pixel);
      inside[j][i] = line.inside & column[i].inside;
    }
  }
  const auto cubic = static_cast<float>(job.cubic);
  const Cubic<Floats> wx = cubic_weights(s.tx, cubic);
  const Cubic<Floats> wy = cubic_weights(s.ty, cubic);
  const T* plane = x.data;
  for (int c = 0; c < job.c; ++c, plane += x.channel, out += kBlock) {
    const Floats fill = broadcast(static_cast<float>(job.fill[c]));
    Floats tap[4][4];
    for (int j = 0; j < kTaps; ++j) {
      for (int i = 0; i < kTaps; ++i) {
        tap[j][i] = take(plane, at[j][i]);
        if constexpr (kChecked) tap[j][i] = select(inside[j][i], tap[j][i], fill);
      }
    }
    store(out, combine<T, kHow>(tap, s, wx, wy));
  }
}

// The elements at the places and the ones after them, and what is between.
template <class T>
FUSEREG_INLINE Floats lerp_of_two(const T* plane, const std::int32_t* at, Floats t) {
  if constexpr (sizeof(T) == 1) {
    const Ints words = words_at<2>(plane, at);
    return finite_lerp(words & 255, words >> 8, t);
  } else {
    Floats first, second;
    take_two(plane, at, first, second);
    return lerp(first, second, t);
  }
}

// Bilinear, neighbors of a channel beside each other in memory.
template <class T>
FUSEREG_INLINE void part_by_pairs(const Job& job, const Source<T>& x, const Spot& s, float* out) {
  alignas(kVectorBytes) std::int32_t at[kLanes];
  store_ints(at, s.y * x.row + s.x);
  const T* plane = x.data;
  for (int c = 0; c < job.c; ++c, plane += x.channel, out += kBlock) {
    const Floats above = lerp_of_two(plane, at, s.tx);
    const Floats below = lerp_of_two(plane + x.row, at, s.tx);
    store(out, sizeof(T) == 1 ? finite_lerp(above, below, s.ty) : lerp(above, below, s.ty));
  }
}

// Byte i of each word.
template <int i>
FUSEREG_INLINE Ints byte_of(Ints words) {
  if constexpr (i == 0) return words & 255;
  if constexpr (i == 3) return bit_cast<Ints>(bit_cast<U32Vector>(words) >> 24);
#if defined(__AVX2__)
  // One shuffle, where a shift and a mask take two instructions.
  constexpr std::int32_t kByte = static_cast<std::int32_t>(0x80808000u);
  const Ints from = Ints{} + kByte + i;
#if defined(__AVX512F__)
  const auto lane = bit_cast<__m512i>(from + bit_cast<Ints>(_mm512_set4_epi32(12, 8, 4, 0)));
  return bit_cast<Ints>(_mm512_shuffle_epi8(bit_cast<__m512i>(words), lane));
#else
  const auto lane =
      bit_cast<__m256i>(from + bit_cast<Ints>(_mm256_set_epi32(12, 8, 4, 0, 12, 8, 4, 0)));
  return bit_cast<Ints>(_mm256_shuffle_epi8(bit_cast<__m256i>(words), lane));
#endif
#else
  return (words >> (8 * i)) & 255;
#endif
}

// For numbers that are all finite: what is multiplied by zero changes nothing.
FUSEREG_INLINE Floats finite_cubic(Floats before, Floats center, Floats next, Floats last,
                                   const Cubic<Floats>& w) {
  return ((center + w.before * (before - center)) + w.next * (next - center)) +
         w.last * (last - center);
}
// The four taps of a line of bytes.
FUSEREG_INLINE Floats finite_cubic(Ints before, Ints center, Ints next, Ints last,
                                   const Cubic<Floats>& w) {
  return finite_cubic(to_floats(before), to_floats(center), to_floats(next), to_floats(last), w);
}

// Bicubic, uint8, likewise.
FUSEREG_INLINE void cubic_part_by_words(const Job& job, const Source<std::uint8_t>& x,
                                        const Spot& s, float* out) {
  alignas(kVectorBytes) std::int32_t at[kLanes];
  store_ints(at, (s.y - 1) * x.row + (s.x - 1));
  const auto cubic = static_cast<float>(job.cubic);
  const Cubic<Floats> wx = cubic_weights(s.tx, cubic);
  const Cubic<Floats> wy = cubic_weights(s.ty, cubic);
  const std::uint8_t* plane = x.data;
  for (int c = 0; c < job.c; ++c, plane += x.channel, out += kBlock) {
    Floats line[4];
    for (int j = 0; j < 4; ++j) {
      const Ints w = words_at<4>(plane + j * x.row, at);
      line[j] = finite_cubic(byte_of<0>(w), byte_of<1>(w), byte_of<2>(w), byte_of<3>(w), wx);
    }
    store(out, finite_cubic(line[0], line[1], line[2], line[3], wy));
  }
}

// uint8, three channels last. Nearest: the 3 bytes of a pixel, in 4. Bilinear: the 6 bytes of two
// neighbors, in 8. Bicubic: the 12 bytes of four.
template <Interpolation kHow>
FUSEREG_INLINE void part_by_pixels(const Source<std::uint8_t>& x, const Spot& s,
                                   [[maybe_unused]] float cubic, float* out) {
  alignas(kVectorBytes) std::int32_t at[kLanes];
  if constexpr (kHow == Interpolation::kNearest) {
    store_ints(at, s.y * x.row + s.x * 3);
    const Ints w = words_at<4>(x.data, at);
    store(out, to_floats(byte_of<0>(w)));
    store(out + kBlock, to_floats(byte_of<1>(w)));
    store(out + 2 * kBlock, to_floats(byte_of<2>(w)));
  } else if constexpr (kHow == Interpolation::kBilinear) {
    store_ints(at, s.y * x.row + s.x * 3);
    Ints a, b, c, d;
    wide_words_at(x.data, at, a, b);
    wide_words_at(x.data + x.row, at, c, d);
    auto blend = [&](Ints v00, Ints v01, Ints v10, Ints v11) {
      return finite_lerp(finite_lerp(v00, v01, s.tx), finite_lerp(v10, v11, s.tx), s.ty);
    };
    store(out, blend(byte_of<0>(a), byte_of<3>(a), byte_of<0>(c), byte_of<3>(c)));
    store(out + kBlock, blend(byte_of<1>(a), byte_of<0>(b), byte_of<1>(c), byte_of<0>(d)));
    store(out + 2 * kBlock, blend(byte_of<2>(a), byte_of<1>(b), byte_of<2>(c), byte_of<1>(d)));
  } else {
    store_ints(at, (s.y - 1) * x.row + (s.x - 1) * 3);
    const Cubic<Floats> wx = cubic_weights(s.tx, cubic);
    const Cubic<Floats> wy = cubic_weights(s.ty, cubic);
    Floats line[3][4];
    for (int j = 0; j < 4; ++j) {
      const std::uint8_t* const p = x.data + j * x.row;
      const Ints a = words_at<4>(p, at), b = words_at<4>(p + 4, at), c = words_at<4>(p + 8, at);
      line[0][j] = finite_cubic(byte_of<0>(a), byte_of<3>(a), byte_of<2>(b), byte_of<1>(c), wx);
      line[1][j] = finite_cubic(byte_of<1>(a), byte_of<0>(b), byte_of<3>(b), byte_of<2>(c), wx);
      line[2][j] = finite_cubic(byte_of<2>(a), byte_of<1>(b), byte_of<0>(c), byte_of<3>(c), wx);
    }
    for (int k = 0; k < 3; ++k)
      store(out + k * kBlock, finite_cubic(line[k][0], line[k][1], line[k][2], line[k][3], wy));
  }
}

// uint8, three channels last, where some taps may lie outside the image; not for what reads the last
// row: a pixel is taken as 4 bytes.
template <Interpolation kHow>
void checked_part_by_pixels(const Job& job, const Source<std::uint8_t>& x, const Spot& s,
                            float* out) {
  constexpr int kTaps = kHow == Interpolation::kNearest ? 1 : 2;
  Floats tap[3][4][4];
  for (int j = 0; j < kTaps; ++j) {
    const Folded line = folded(s.y + j, x.h, x.mode);
    for (int i = 0; i < kTaps; ++i) {
      const Folded column = folded(s.x + i, x.w, x.mode);
      alignas(kVectorBytes) std::int32_t at[kLanes];
      store_ints(at, line.at * x.row + column.at * 3);
      const Ints inside = line.inside & column.inside;
      const Ints w = words_at<4>(x.data, at);
      const Ints bytes[3] = {byte_of<0>(w), byte_of<1>(w), byte_of<2>(w)};
      for (int c = 0; c < 3; ++c) {
        const Floats fill = broadcast(static_cast<float>(job.fill[c]));
        tap[c][j][i] = select(inside, to_floats(bytes[c]), fill);
      }
    }
  }
  for (int c = 0; c < 3; ++c, out += kBlock)
    store(out, combine<std::uint8_t, kHow>(tap[c], s, Cubic<Floats>{}, Cubic<Floats>{}));
}

// --- whole-pixel shifts and flips ---
// Whether the block is a run of pixels inside the image; its values then.
template <class T>
FUSEREG_INLINE bool copy_block(const Job& job, const Frame& f, const Source<T>& x, std::int64_t row,
                               std::int64_t first, float* out) {
  const bool mirrored = f.m[0] < 0.0;
  const auto from = static_cast<std::int64_t>(f.m[2]) + (mirrored ? -first - kBlock + 1 : first);
  const auto line = static_cast<std::int64_t>(f.m[5]) + (f.m[4] < 0.0 ? -row : row);
  if (from < 0 || from + kBlock > x.w || line < 0 || line >= x.h) return false;
  const T* at = x.data + line * x.row + from * x.pixel;
  // Where part p of the result is.
  auto to = [&](int p) { return out + (mirrored ? kParts - 1 - p : p) * kLanes; };
  if (x.pixel == 1) {
    for (int c = 0; c < job.c; ++c, at += x.channel, out += kBlock) {
      for (int p = 0; p < kParts; ++p) {
        const Floats v = load_run(at + p * kLanes);
        store(to(p), mirrored ? reversed(v) : v);
      }
    }
    return true;
  }
  if (x.pixel != 3 || x.channel != 1) return false;
  for (int p = 0; p < kParts; ++p, at += 3 * kLanes) {
    Floats planes[3];
    if (mirrored) {
      load_planes<true>(at, planes);
    } else {
      load_planes<false>(at, planes);
    }
    for (int c = 0; c < 3; ++c) store(to(p) + c * kBlock, planes[c]);
  }
  return true;
}

// --- rows that are moved along ---
// Between two or four taps, tap(0) at or before the place.
template <bool kFinite, Interpolation kHow, class F>
FUSEREG_INLINE Floats between(const F& tap, Floats t, const Cubic<Floats>& w) {
  if constexpr (kHow == Interpolation::kBilinear) {
    return kFinite ? finite_lerp(tap(0), tap(1), t) : lerp(tap(0), tap(1), t);
  } else {
    return kFinite ? finite_cubic(tap(-1), tap(0), tap(1), tap(2), w)
                   : cubic_of(tap(-1), tap(0), tap(1), tap(2), w);
  }
}

// Pixels of a row of the image and beside it, as floats.
template <class T>
void lay_line(const Source<T>& x, const T* plane, double fill, std::int32_t row, std::int32_t first,
              int count, float* to) {
  const std::int32_t y = fold(row, x.h, x.mode);
  const T* const line = plane + (y < 0 ? 0 : y) * x.row;
  auto beside = [&](int i) {
    const std::int32_t at = fold(first + i, x.w, x.mode);
    return y < 0 || at < 0 ? static_cast<float>(fill) : read(line + at);
  };
  const int begin = first < 0 ? (-first < count ? -first : count) : 0;
  const int inside = x.w - first < count ? x.w - first : count;
  const int end = y < 0 || inside < begin ? begin : inside;
  for (int i = begin; i < end; ++i) to[i] = read(line + first + i);
  const bool alike = x.mode == FillMode::kConstant || x.mode == FillMode::kBorder;
  const float before = begin > 0 ? beside(0) : 0.0f;
  const float after = end < count ? beside(count - 1) : 0.0f;
  for (int i = 0; i < begin; ++i) to[i] = alike ? before : beside(i);
  for (int i = end; i < count; ++i) to[i] = alike ? after : beside(i);
}

// A block of a run: one place between pixels for all of it. kChecked: some of its taps may lie
// outside the image; they are put together in memory first.
template <class T, Interpolation kHow, bool kChecked>
void run_block(const Job& job, const Frame& f, const Source<T>& x, const Start& start,
               std::int32_t half, float* out) {
  constexpr bool kFinite = sizeof(T) == 1 && !kChecked;
  constexpr int kBefore = kHow == Interpolation::kBicubic ? 1 : 0;
  constexpr int kAfter = kHow == Interpolation::kNearest    ? 0
                         : kHow == Interpolation::kBilinear ? 1
                                                            : 2;
  constexpr int kPitch = 2 * kBlock;
  const std::int32_t mask = (1 << f.bits) - 1;
  const float unit = power_of_two_float(-f.bits);
  const std::int32_t ux = start.x.rest + half;
  const std::int32_t uy = start.y.rest + half;
  const bool moves_x = kHow != Interpolation::kNearest && (ux & mask) != 0;
  const bool moves_y = kHow != Interpolation::kNearest && (uy & mask) != 0;
  const Floats tx = broadcast(static_cast<float>(ux & mask) * unit);
  const Floats ty = broadcast(static_cast<float>(uy & mask) * unit);
  const Cubic<Floats> wx = cubic_weights(tx, static_cast<float>(job.cubic));
  const Cubic<Floats> wy = cubic_weights(ty, static_cast<float>(job.cubic));
  const std::int32_t column = start.x.whole + (ux >> f.bits);
  const std::int32_t row = start.y.whole + (uy >> f.bits);
  float edge[(kBefore + 1 + kAfter) * kPitch];
  const T* plane = x.data;
  for (int c = 0; c < job.c; ++c, plane += x.channel, out += kBlock) {
    if constexpr (kChecked) {
      for (int j = moves_y ? -kBefore : 0; j <= (moves_y ? kAfter : 0); ++j)
        lay_line(x, plane, job.fill[c], row + j, column - kBefore, kBlock + kBefore + kAfter,
                 edge + (j + kBefore) * kPitch);
    }
    for (int i = 0; i < kBlock; i += kLanes) {
      auto value = [&](int j, int k) {
        if constexpr (kChecked) {
          return load(edge + (j + kBefore) * kPitch + kBefore + i + k);
        } else {
          return load_run(plane + (row + j) * x.row + column + i + k);
        }
      };
      auto line = [&](int j) {
        if constexpr (kHow != Interpolation::kNearest) {
          if (moves_x) return between<kFinite, kHow>([&](int k) { return value(j, k); }, tx, wx);
        }
        return value(j, 0);
      };
      Floats v = {};
      if constexpr (kHow == Interpolation::kNearest) {
        v = line(0);
      } else {
        v = moves_y ? between<kFinite, kHow>(line, ty, wy) : line(0);
      }
      store(out + i, v);
    }
  }
}

// --- blocks ---
enum class Where : std::uint8_t {
  kInside,  // every tap
  kAtEnd,   // likewise, but words would reach beyond the image
  kPartly,
  kOutside  // none, and the fill is constant
};

struct Place16 {
  Start start;
  Where where;
  std::int32_t top, bottom;  // the first and the last row that a tap is in
};

template <Interpolation kHow>
inline constexpr std::int32_t kHalfBit = kHow == Interpolation::kNearest ? 1 : 0;

// Where the blocks of a row from column `first` on are. In a pass of its own: each takes long from
// its first operation to its last, and nothing waits for it here.
template <Interpolation kHow>
void find_blocks(const Frame& f, std::int64_t row, std::int64_t first, int count, Place16* places) {
  constexpr int kBefore = kHow == Interpolation::kBicubic ? 1 : 0;
  constexpr int kAfter = kHow == Interpolation::kNearest    ? 0
                         : kHow == Interpolation::kBilinear ? 1
                                                            : 2;
  const std::int32_t half = (kHalfBit<kHow> << f.bits) >> 1;
  const auto w = static_cast<std::int32_t>(f.view.x.w);
  const auto h = static_cast<std::int32_t>(f.view.x.h);
  if (f.view.projective) {
    for (int i = 0; i < count; ++i) places[i] = {{}, Where::kPartly, 0, h - 1};
    return;
  }
  const double row_x = row_start(f.m, row);
  const double row_y = row_start(f.m + 3, row);
  for (int i = 0; i < count; ++i, first += kBlock) {
    const Start start = {block_start(f.m[0], row_x, first, f.bits),
                         block_start(f.m[3], row_y, first, f.bits)};
    // The first and the last column and row that any tap is in; a run reads none whose weight is 0.
    const std::int32_t x = start.x.rest + half;
    const std::int32_t y = start.y.rest + half;
    const int along = f.runs && start.x.rest == 0 ? 0 : 1;
    const int down = f.runs && start.y.rest == 0 ? 0 : 1;
    const std::int32_t left = start.x.whole + ((x + f.least_x) >> f.bits) - kBefore * along;
    const std::int32_t right = start.x.whole + ((x + f.most_x) >> f.bits) + kAfter * along;
    const std::int32_t top = start.y.whole + ((y + f.least_y) >> f.bits) - kBefore * down;
    const std::int32_t bottom = start.y.whole + ((y + f.most_y) >> f.bits) + kAfter * down;
    Where where = Where::kPartly;
    if (left >= 0 && top >= 0 && right < w && bottom < h) {
      where = bottom < h - 1 || right < w - 1 ? Where::kInside : Where::kAtEnd;
    } else if (f.fills && (right < 0 || bottom < 0 || left >= w || top >= h)) {
      where = Where::kOutside;
    }
    places[i] = {start, where, top, bottom};
  }
}

// A block's warped values: 16 of each channel.
template <class T, Interpolation kHow>
FUSEREG_INLINE void warp_block(const Job& job, const Frame& f, const Place16& place,
                               std::int64_t row, std::int64_t first, float* out) {
  const Images& image = f.view.x;
  const Source<T> x = {static_cast<const T*>(image.data) + f.view.offset,
                       image.channel,
                       static_cast<std::int32_t>(image.row),
                       static_cast<std::int32_t>(image.pixel),
                       static_cast<std::int32_t>(image.w),
                       static_cast<std::int32_t>(image.h),
                       f.view.mode};
  if (f.copies && copy_block(job, f, x, row, first, out)) return;
  const std::int32_t half = (kHalfBit<kHow> << f.bits) >> 1;
  auto spot = [&](int p) {
    if (f.view.projective)
      return projective_spot(f, row, first + p * kLanes, kHow == Interpolation::kNearest);
    return spot_of(f, place.start, p, half);
  };
  if (place.where == Where::kOutside) {
    for (int c = 0; c < job.c; ++c) {
      for (int i = 0; i < kBlock; ++i) out[c * kBlock + i] = static_cast<float>(job.fill[c]);
    }
    return;
  }
  if (f.runs) {
    if (place.where == Where::kPartly) {
      run_block<T, kHow, true>(job, f, x, place.start, half, out);
    } else {
      run_block<T, kHow, false>(job, f, x, place.start, half, out);
    }
    return;
  }
  if (place.where == Where::kPartly) {
    if constexpr (sizeof(T) == 1 && kHow != Interpolation::kBicubic) {
      const bool clamps = x.mode == FillMode::kConstant || x.mode == FillMode::kBorder;
      if (x.pixel == 3 && x.channel == 1 && clamps && place.bottom < x.h - 1 && x.h > 1) {
        for (int p = 0; p < kParts; ++p)
          checked_part_by_pixels<kHow>(job, x, spot(p), out + p * kLanes);
        return;
      }
    }
    for (int p = 0; p < kParts; ++p) part_by_taps<T, kHow, true>(job, x, spot(p), out + p * kLanes);
    return;
  }
  if constexpr (sizeof(T) == 1) {
    // Words reach beyond the last tap's pixel by a byte or two; not so bicubic ones.
    const bool room = kHow == Interpolation::kBicubic || place.where == Where::kInside;
    if (x.pixel == 3 && x.channel == 1 && room) {
      for (int p = 0; p < kParts; ++p)
        part_by_pixels<kHow>(x, spot(p), static_cast<float>(job.cubic), out + p * kLanes);
      return;
    }
    if (kHow == Interpolation::kBicubic && x.pixel == 1) {
      for (int p = 0; p < kParts; ++p) cubic_part_by_words(job, x, spot(p), out + p * kLanes);
      return;
    }
  }
  if (kHow == Interpolation::kBilinear && x.pixel == 1) {
    for (int p = 0; p < kParts; ++p) part_by_pairs(job, x, spot(p), out + p * kLanes);
    return;
  }
  for (int p = 0; p < kParts; ++p) part_by_taps<T, kHow, false>(job, x, spot(p), out + p * kLanes);
}

}  // namespace
}  // namespace fusereg::augment::FUSEREG_ISA
