// Where an output pixel of augment.h lies, and what is read there: coordinates, taps, weights,
// filters. For the host and the device.
#pragma once

#include "augment/augment.h"
#include "core/dtype.h"
#include "core/normal.h"

namespace fusereg::augment {

using normal::add;
using normal::multiply;

// Before functions that are too large to be part of each of their callers. Internal linkage, for
// the same reason as FUSEREG_INLINE.
#define FUSEREG_STATIC [[maybe_unused]] static FUSEREG_HD
#if defined(__CUDACC__)
#define FUSEREG_STATIC_CALL FUSEREG_STATIC __noinline__
#else
#define FUSEREG_STATIC_CALL FUSEREG_STATIC
#endif

// --- elements ---
template <class T>
struct NumberOf {
  using type = Compute<T>;
};
template <>
struct NumberOf<std::uint8_t> {
  using type = float;
};
// The type in which arithmetic on pixels of type T is done.
template <class T>
using Number = typename NumberOf<T>::type;

template <class T>
FUSEREG_INLINE Number<T> read(const T* p) {
  if constexpr (sizeof(T) == 1) {
    return static_cast<float>(*p);
  } else {
    return to_compute(*p);
  }
}

// To nearest, halves to even, within [0, 255]; NaN becomes 0. Adding 1.5 * 2^23 leaves no bits
// after the point.
template <class C>
FUSEREG_INLINE std::uint8_t to_uint8(C v) {
  const C low = v > C{0} ? v : C{0};
  const auto within = static_cast<float>(low < C{255} ? low : C{255});
  return static_cast<std::uint8_t>(bit_cast<std::uint32_t>(add(within, 12582912.0f)));
}

template <class C>
FUSEREG_INLINE void write(void* data, Element type, std::int64_t at, C v) {
  switch (type) {
    case Element::kFloat64:
      static_cast<double*>(data)[at] = static_cast<double>(v);
      break;
    case Element::kFloat32:
      static_cast<float*>(data)[at] = static_cast<float>(v);
      break;
    case Element::kFloat16:
      static_cast<Half*>(data)[at] = to_half(static_cast<float>(v));
      break;
    case Element::kBFloat16:
      static_cast<BFloat16*>(data)[at] = to_bfloat16(static_cast<float>(v));
      break;
    case Element::kUInt8:
      static_cast<std::uint8_t*>(data)[at] = to_uint8(v);
      break;
  }
}

// --- coordinates ---
inline constexpr double kFarthest = 536870912.0;  // 2^29

// NaN is far outside as well.
FUSEREG_INLINE double within_reach(double v) {
  return v > -kFarthest ? (v < kFarthest ? v : kFarthest) : -kFarthest;
}

FUSEREG_INLINE double floor_of(double v) { return __builtin_floor(v); }

// 2^e
FUSEREG_INLINE double power_of_two(int e) {
  return bit_cast<double>(static_cast<std::uint64_t>(e + 1023) << 52);
}
FUSEREG_INLINE float power_of_two_float(int e) {
  return bit_cast<float>(static_cast<std::uint32_t>(e + 127) << 23);
}

// F such that 16 steps stay below 2^30 units.
FUSEREG_INLINE int fraction_bits(double step_x, double step_y) {
  const double x = __builtin_fabs(step_x);
  const double y = __builtin_fabs(step_y);
  const double largest = x > y ? x : y;
  const int exponent = static_cast<int>(bit_cast<std::uint64_t>(largest) >> 52) - 1022;
  const int bits = 26 - exponent;
  return bits > 22 ? 22 : bits < 0 ? 0 : bits;
}

// A coordinate in units of 2^-F: the integer part, and what is left of it.
struct Fixed {
  std::int32_t whole;
  std::int32_t rest;
};

// Of a block's first pixel.
FUSEREG_INLINE Fixed block_start(double step, double v, std::int64_t first, int bits) {
  const double at = within_reach(add(multiply(step, static_cast<double>(first)), v));
  const auto units = static_cast<std::int64_t>(floor_of(add(at * power_of_two(bits), 0.5)));
  return {static_cast<std::int32_t>(units >> bits),
          static_cast<std::int32_t>(units & ((std::int64_t{1} << bits) - 1))};
}

// From there to the block's pixel `lane`.
FUSEREG_INLINE std::int32_t lane_step(double step, int lane, int bits) {
  const double by = multiply(step, static_cast<double>(lane)) * power_of_two(bits);
  const double least = by > -2.0 * kFarthest ? by : -2.0 * kFarthest;
  return static_cast<std::int32_t>(
      floor_of(add(least < 2.0 * kFarthest ? least : 2.0 * kFarthest, 0.5)));
}

// m1 y + m2: the row's part of a coordinate.
FUSEREG_INLINE double row_start(const double* m, std::int64_t row) {
  return add(multiply(m[1], static_cast<double>(row)), m[2]);
}

// The pixel at or before a coordinate, and the distance to it; for nearest the nearest pixel.
template <class C>
struct Place {
  std::int32_t x, y;
  C tx, ty;
};

FUSEREG_INLINE void place_on_axis(Fixed start, std::int32_t step, int bits, bool nearest,
                                  std::int32_t& at, float& t) {
  const std::int32_t units = start.rest + step + (nearest ? (1 << bits) >> 1 : 0);
  at = start.whole + (units >> bits);
  t = static_cast<float>(units & ((1 << bits) - 1)) * power_of_two_float(-bits);
}
FUSEREG_INLINE void place_on_axis(double v, bool nearest, std::int32_t& at, double& t) {
  v = within_reach(v);
  if (nearest) v = add(v, 0.5);
  const double whole = floor_of(v);
  at = static_cast<std::int32_t>(whole);
  t = v - whole;
}

FUSEREG_STATIC void place(const double* m, std::int64_t col, std::int64_t row, bool nearest,
                          Place<float>& p) {
  const int bits = fraction_bits(m[0], m[3]);
  const auto lane = static_cast<int>(col % kBlock);
  const Fixed x = block_start(m[0], row_start(m, row), col - lane, bits);
  const Fixed y = block_start(m[3], row_start(m + 3, row), col - lane, bits);
  place_on_axis(x, lane_step(m[0], lane, bits), bits, nearest, p.x, p.tx);
  place_on_axis(y, lane_step(m[3], lane, bits), bits, nearest, p.y, p.ty);
}
FUSEREG_INLINE void place(const double* m, std::int64_t col, std::int64_t row, bool nearest,
                          Place<double>& p) {
  const auto c = static_cast<double>(col);
  place_on_axis(add(multiply(m[0], c), row_start(m, row)), nearest, p.x, p.tx);
  place_on_axis(add(multiply(m[3], c), row_start(m + 3, row)), nearest, p.y, p.ty);
}

// --- taps ---
// The pixel that stands for `at`; negative under constant fill outside the image.
FUSEREG_STATIC std::int32_t fold(std::int32_t at, std::int32_t size, FillMode mode) {
  if (at >= 0 && at < size) return at;
  switch (mode) {
    case FillMode::kConstant:
      return -1;
    case FillMode::kBorder:
      return at < 0 ? 0 : size - 1;
    case FillMode::kWrap: {
      const std::int32_t r = at % size;
      return r < 0 ? r + size : r;
    }
    case FillMode::kSymmetric: {
      std::int32_t r = at % (2 * size);
      if (r < 0) r += 2 * size;
      return r < size ? r : 2 * size - 1 - r;
    }
    default: {
      if (size == 1) return 0;
      std::int32_t r = at % (2 * (size - 1));
      if (r < 0) r += 2 * (size - 1);
      return r < size ? r : 2 * (size - 1) - r;
    }
  }
}

// One channel of a sample.
template <class T>
struct Plane {
  const T* data;
  std::int64_t row, pixel;
  std::int32_t h, w;
  FillMode mode;
  Number<T> fill;
};
template <class T>
FUSEREG_STATIC Number<T> pixel_at(const Plane<T>& p, std::int32_t x, std::int32_t y) {
  const std::int32_t i = fold(x, p.w, p.mode);
  const std::int32_t j = fold(y, p.h, p.mode);
  return i < 0 || j < 0 ? p.fill : read(p.data + j * p.row + i * p.pixel);
}

// --- interpolation ---
// a + t (b - a), and a itself where t is zero or there is no difference: infinities and constants
// stay, and what has no weight does not count.
template <class C>
FUSEREG_INLINE C lerp(C a, C b, C t) {
  return t != C{0} && a != b ? add(a, multiply(t, b - a)) : a;
}

// Weights of the pixels before and after the one at or before, and of the one after that; the
// remaining weight makes the sum one. All vanish at t = 0. a is the weight's slope at one.
template <class C>
struct Cubic {
  C before, next, last;
};
template <class C>
FUSEREG_INLINE Cubic<C> cubic_weights(C t, C a) {
  const C s = add(C{1}, -t);
  Cubic<C> w;
  w.before = multiply(multiply(t, a), multiply(s, s));
  w.next = add(multiply(multiply(add(multiply(s, add(a, C{2})), -add(a, C{3})), s), s), C{1});
  w.last = multiply(multiply(s, a), multiply(t, t));
  return w;
}
template <class C>
FUSEREG_INLINE C cubic_term(C sum, C v, C center, C weight) {
  return weight != C{0} && v != center ? add(sum, multiply(weight, v - center)) : sum;
}
template <class C>
FUSEREG_INLINE C cubic_of(C before, C center, C next, C last, const Cubic<C>& w) {
  return cubic_term(cubic_term(cubic_term(center, before, center, w.before), next, center, w.next),
                    last, center, w.last);
}

// pixel(x, y) is the value of a pixel, or of what stands for it.
template <class C, class F>
FUSEREG_INLINE C interpolate(const F& pixel, const Place<C>& p, Interpolation how, C cubic) {
  if (how == Interpolation::kNearest) return pixel(p.x, p.y);
  if (how == Interpolation::kBilinear) {
    const C top = lerp(pixel(p.x, p.y), pixel(p.x + 1, p.y), p.tx);
    if (p.ty == C{0}) return top;
    return lerp(top, lerp(pixel(p.x, p.y + 1), pixel(p.x + 1, p.y + 1), p.tx), p.ty);
  }
  const Cubic<C> wx = cubic_weights(p.tx, cubic);
  const Cubic<C> wy = cubic_weights(p.ty, cubic);
  C line[4];
  FUSEREG_UNROLL_10
  for (int j = 0; j < 4; ++j) {
    const std::int32_t y = p.y - 1 + j;
    line[j] = cubic_of(pixel(p.x - 1, y), pixel(p.x, y), pixel(p.x + 1, y), pixel(p.x + 2, y), wx);
  }
  return cubic_of(line[0], line[1], line[2], line[3], wy);
}

// --- antialiasing ---
// The filters of antialiased interpolation: a tent, and Keys' cubic with a = -1/2.
template <class C>
FUSEREG_INLINE C filter_weight(C distance, Interpolation how) {
  const C t = distance < C{0} ? -distance : distance;
  if (how == Interpolation::kBilinear) return t < C{1} ? add(C{1}, -t) : C{0};
  if (t < C{1}) return add(multiply(multiply(add(multiply(t, C{1.5}), C{-2.5}), t), t), C{1});
  if (t >= C{2}) return C{0};
  return add(multiply(add(multiply(add(multiply(t, C{-0.5}), C{2.5}), t), C{-4}), t), C{2});
}

// The taps [first, last] of one axis, 1 / the sum of their weights, and the share of the output
// pixel's extent that is covered.
template <class C>
struct Span {
  C center;
  C inverse_width;
  std::int32_t first, last;
  C inverse_total;
  C coverage;
};

FUSEREG_INLINE double extent_of(const double* m) {
  return ::fusereg::square_root(add(multiply(m[0], m[0]), multiply(m[1], m[1])));
}

template <class C>
FUSEREG_STATIC Span<C> make_span(double v, double extent, std::int32_t size, Interpolation how,
                                 FillMode mode) {
  Span<C> span;
  v = within_reach(v);
  const double width = extent > 1.0 ? (extent < 0x1p24 ? extent : 0x1p24) : 1.0;
  const double radius = how == Interpolation::kBicubic ? 2.0 * width : width;
  double low = floor_of(v - radius + 1.0);
  double high = floor_of(v + radius + 1.0) - 1.0;
  span.coverage = C{1};
  if (mode == FillMode::kConstant) {
    const double last = static_cast<double>(size) - 1.0;
    low = low > 0.0 ? low : 0.0;
    high = high < last ? high : last;
    const double e = extent > 0x1p-20 ? extent : 0x1p-20;
    const double from = v - e / 2.0 > -0.5 ? v - e / 2.0 : -0.5;
    const double to = v + e / 2.0 < last + 0.5 ? v + e / 2.0 : last + 0.5;
    const double share = (to - from) / e;
    span.coverage = static_cast<C>(share > 0.0 ? (share < 1.0 ? share : 1.0) : 0.0);
  }
  span.center = static_cast<C>(v - low);
  span.inverse_width = static_cast<C>(1.0 / width);
  if (!(low <= high)) high = low - 1.0;
  span.first = static_cast<std::int32_t>(within_reach(low));
  span.last = static_cast<std::int32_t>(within_reach(high));
  C total{0};
  for (std::int32_t i = span.first; i <= span.last; ++i) {
    const C distance = add(static_cast<C>(i - span.first), -span.center);
    total = add(total, filter_weight(multiply(distance, span.inverse_width), how));
  }
  span.inverse_total = total > C{0} ? C{1} / total : C{0};
  if (!(total > C{0})) span.coverage = C{0};
  return span;
}

// How many taps a span of make_span() has at most.
FUSEREG_INLINE std::int64_t most_taps(double extent, Interpolation how, std::int64_t size) {
  const double width = extent > 1.0 ? (extent < 0x1p24 ? extent : 0x1p24) : 1.0;
  const auto most =
      static_cast<std::int64_t>((how == Interpolation::kBicubic ? 4.0 : 2.0) * width) + 2;
  return most < size ? most : size;
}

// Whether rows stay rows, without a turn; false for what is not finite.
FUSEREG_INLINE bool is_axis_aligned(const double* m) {
  bool finite = true;
  for (int i = 0; i < 6; ++i) finite = finite && m[i] - m[i] == 0.0;
  return finite && m[1] == 0.0 && m[3] == 0.0;
}

FUSEREG_INLINE bool is_projective(const double* record) {
  return record[28] != 0.0 || record[29] != 0.0;
}

FUSEREG_INLINE std::int64_t round_up_to_line(std::int64_t bytes) { return (bytes + 63) / 64 * 64; }

template <class C>
FUSEREG_STATIC C weight_in(const Span<C>& span, std::int32_t i, Interpolation how) {
  const C distance = add(static_cast<C>(i - span.first), -span.center);
  return multiply(filter_weight(multiply(distance, span.inverse_width), how), span.inverse_total);
}

// The widths are the same for a whole sample; the spans are an output pixel's.
template <class C>
struct Spans {
  Span<C> x, y;
};
template <class C>
FUSEREG_INLINE Spans<C> make_spans(const double* m, std::int64_t col, std::int64_t row,
                                   const Images& x, Interpolation how, FillMode mode) {
  const auto c = static_cast<double>(col);
  return {make_span<C>(add(multiply(m[0], c), row_start(m, row)), extent_of(m),
                       static_cast<std::int32_t>(x.w), how, mode),
          make_span<C>(add(multiply(m[3], c), row_start(m + 3, row)), extent_of(m + 3),
                       static_cast<std::int32_t>(x.h), how, mode)};
}

template <class T, class C>
FUSEREG_STATIC C filtered(const Plane<T>& plane, const Spans<C>& s, Interpolation how) {
  const C coverage = multiply(s.x.coverage, s.y.coverage);
  if (!(coverage > C{0})) return plane.fill;
  // Along the columns first, as in resize.h.
  C sum{0};
  for (std::int32_t i = s.x.first; i <= s.x.last; ++i) {
    const C wx = weight_in(s.x, i, how);
    if (wx == C{0}) continue;
    C column{0};
    for (std::int32_t j = s.y.first; j <= s.y.last; ++j) {
      const C wy = weight_in(s.y, j, how);
      if (wy != C{0}) column = add(column, multiply(wy, pixel_at(plane, i, j)));
    }
    sum = add(sum, multiply(wx, column));
  }
  if (coverage == C{1}) return sum;
  return lerp(plane.fill, sum, coverage);
}

// --- turned samples under antialiasing ---
// The image, resized to about a pixel for each pixel of the output, and the map from output pixels to
// that: it is interpolated at points.
struct Reduced {
  std::int32_t w, h;
  double by_x, by_y;  // pixels of the image for one of this
  double m[6];
};

FUSEREG_INLINE std::int64_t reduced_side(std::int64_t size, double extent) {
  const double side = floor_of(add(static_cast<double>(size) / extent, 0.5));
  if (!(side < static_cast<double>(size))) return size;
  return side > 1.0 ? static_cast<std::int64_t>(side) : 1;
}

FUSEREG_STATIC Reduced reduced_of(const double* m, const Images& x) {
  const std::int64_t sides[2] = {reduced_side(x.w, extent_of(m)),
                                 reduced_side(x.h, extent_of(m + 3))};
  const double sizes[2] = {static_cast<double>(x.w), static_cast<double>(x.h)};
  Reduced z;
  z.w = static_cast<std::int32_t>(sides[0]);
  z.h = static_cast<std::int32_t>(sides[1]);
  z.by_x = sizes[0] / static_cast<double>(sides[0]);
  z.by_y = sizes[1] / static_cast<double>(sides[1]);
  for (int i = 0; i < 6; ++i) {
    const int axis = i / 3;
    const double share = static_cast<double>(sides[axis]) / sizes[axis];
    const bool whole = share == 1.0 || i % 3 != 2;
    z.m[i] = whole ? multiply(m[i], share) : add(multiply(add(m[i], 0.5), share), -0.5);
  }
  return z;
}

// The filter of pixel i: weights within the image alone.
template <class C>
FUSEREG_STATIC Span<C> reduced_span(std::int32_t i, double by, std::int64_t size,
                                    Interpolation how) {
  const double v = add(multiply(by, static_cast<double>(i)), add(multiply(by, 0.5), -0.5));
  Span<C> span = make_span<C>(v, by, static_cast<std::int32_t>(size), how, FillMode::kConstant);
  span.coverage = C{1};
  return span;
}

// As a pixel of type T holds it.
template <class T>
FUSEREG_INLINE Number<T> rounded_to(Number<T> v) {
  if constexpr (sizeof(T) == 1) {
    return static_cast<float>(to_uint8(v));
  } else {
    return to_compute(from_compute<T>(v));
  }
}

// A call on the device: its loops in the place of each of up to 16 taps would be most of a kernel.
template <class T>
FUSEREG_STATIC_CALL Number<T> reduced_pixel(const Plane<T>& plane, const Reduced& z,
                                            Interpolation how, std::int32_t x, std::int32_t y) {
  using C = Number<T>;
  const std::int32_t i = fold(x, z.w, plane.mode);
  const std::int32_t j = fold(y, z.h, plane.mode);
  if (i < 0 || j < 0) return plane.fill;
  const Spans<C> spans = {reduced_span<C>(i, z.by_x, plane.w, how),
                          reduced_span<C>(j, z.by_y, plane.h, how)};
  return rounded_to<T>(filtered(plane, spans, how));
}

}  // namespace fusereg::augment
