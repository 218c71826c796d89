// The arithmetic of programs, value by value, for the CPU and CUDA. Contract: program.h.
#pragma once

#include "augment/augment_math.h"
#include "augment/program.h"

namespace fusereg::augment {

// a b + c, rounded once. Where there is no such instruction, in float64: it holds the product of two
// float32, and what is lost of the sum is too little to change a whole number.
FUSEREG_INLINE float fused(float a, float b, float c) {
#if defined(__CUDA_ARCH__)
  return __fmaf_rn(a, b, c);
#elif defined(__FMA__)
  return __builtin_fmaf(a, b, c);
#else
  return static_cast<float>(static_cast<double>(a) * static_cast<double>(b) +
                            static_cast<double>(c));
#endif
}

// Toward zero, within [0, 255].
FUSEREG_INLINE std::int32_t level(float v) {
  const float low = v > 0.0f ? v : 0.0f;
  return static_cast<std::int32_t>(low < 255.0f ? low : 255.0f);
}

FUSEREG_INLINE std::int32_t gray_of(float r, float g, float b) {
  return static_cast<std::int32_t>(fused(b, 0.114f, fused(g, 0.587f, multiply(r, 0.2989f))));
}

FUSEREG_INLINE std::int32_t blended(float v, float other, float f, float g) {
  return level(fused(other, g, multiply(v, f)));
}

FUSEREG_INLINE std::int32_t sharpened(std::int32_t v, std::int32_t neighbors, float g) {
  // (8 neighbors + 5 v) / 13 to nearest: division by 13 is exact for these.
  const std::uint32_t sum = static_cast<std::uint32_t>(neighbors + 5 * v + 6);
  const auto d = static_cast<std::int32_t>(sum * 5042u >> 16);
  return level(fused(static_cast<float>(d - v), g, static_cast<float>(v)));
}

// Toward zero, as a number.
FUSEREG_INLINE float whole_of(float v) { return static_cast<float>(static_cast<std::int32_t>(v)); }

#if defined(FUSEREG_ISA)
FUSEREG_INLINE normal::FloatVector whole_of(normal::FloatVector v) {
  typedef std::int32_t Whole __attribute__((vector_size(sizeof(v))));
  return __builtin_convertvector(__builtin_convertvector(v, Whole), normal::FloatVector);
}
#endif

// torchvision's adjust_hue: to hue, saturation and value in float32, and back. F is float, or a
// vector of them, for which `whole_of` is defined; nothing is contracted on either side. Every
// branch is a choice between values that are there.
template <class F>
FUSEREG_INLINE void turn_hue(F h, F (&rgb)[3]) {
  const F zero = h - h;
  const F one = add(zero, 1.0f);
  const F r = multiply(rgb[0], static_cast<float>(1.0 / 255));
  const F g = multiply(rgb[1], static_cast<float>(1.0 / 255));
  const F b = multiply(rgb[2], static_cast<float>(1.0 / 255));
  const F rg_high = r > g ? r : g;
  const F rg_low = r < g ? r : g;
  const F high = rg_high > b ? rg_high : b;
  const F low = rg_low < b ? rg_low : b;
  const F range = high - low;
  const F s = range / (range == zero ? one : high);
  const F divisor = range == zero ? one : range;
  const F rc = (high - r) / divisor;
  const F gc = (high - g) / divisor;
  const F bc = (high - b) / divisor;
  const F of_r = bc - gc;
  const F of_g = add(rc, 2.0f) - bc;
  const F of_b = add(gc, 4.0f) - rc;
  const F not_r = high == g ? of_g : of_b;
  const F sixths = high == r ? of_r : not_r;
  const F sixth = multiply(sixths, static_cast<float>(1.0 / 6.0));
  const F above = add(sixth, 1.0f);
  const F own = above - whole_of(above);
  const F moved = add(own, h);
  const F part = moved - whole_of(moved);
  const F up = add(part, 1.0f);
  const F turned = part < zero ? up : part;
  const F h6 = multiply(turned, 6.0f);
  const F sector = whole_of(h6);
  const F f = h6 - sector;
  const F sf = multiply(s, f);
  const F rest = 1.0f - s;
  const F kept = 1.0f - sf;
  const F sum = add(sf, rest);
  const F q0 = multiply(kept, high);
  const F t0 = multiply(sum, high);
  const F p0 = multiply(rest, high);
  const F q = q0 < one ? q0 : one;  // none is negative
  const F t = t0 < one ? t0 : one;
  const F p = p0 < one ? p0 : one;
  // Sectors 0 to 5; 6 is 0 again.
  const F two = add(zero, 2.0f);
  const F three = add(zero, 3.0f);
  const F four = add(zero, 4.0f);
  const F five = add(zero, 5.0f);
  const F red_3 = sector == four ? t : high;
  const F red_2 = sector == three ? p : red_3;
  const F red_1 = sector == two ? p : red_2;
  const F red = sector == one ? q : red_1;
  const F green_4 = sector == five ? p : t;
  const F green_3 = sector == four ? p : green_4;
  const F green_2 = sector == three ? q : green_3;
  const F green_1 = sector == two ? high : green_2;
  const F green = sector == one ? high : green_1;
  const F blue_4 = sector == five ? q : p;
  const F blue_3 = sector == four ? high : blue_4;
  const F blue_2 = sector == three ? high : blue_3;
  const F blue_1 = sector == two ? t : blue_2;
  const F blue = sector == one ? p : blue_1;
  rgb[0] = multiply(red, static_cast<float>(255.999));
  rgb[1] = multiply(green, static_cast<float>(255.999));
  rgb[2] = multiply(blue, static_cast<float>(255.999));
}

// The entry of a table for i; `a` are the arguments of the instruction. contrast: mean is m.
FUSEREG_INLINE std::int32_t table_entry(Code code, const double* a, float mean, std::int32_t i) {
  const auto v = static_cast<float>(i);
  switch (code) {
    case Code::kBrightness:
      return level(multiply(v, static_cast<float>(a[0])));
    case Code::kContrast:
      return blended(v, mean, static_cast<float>(a[0]), static_cast<float>(1.0 - a[0]));
    case Code::kInvert:
      return 255 - i;
    case Code::kPosterize:
      return i & (0xff00 >> static_cast<std::int32_t>(a[0])) & 0xff;
    case Code::kSolarize:
      return static_cast<double>(i) >= a[0] ? 255 - i : i;
    case Code::kSolarizeAdd: {
      const std::int32_t sum = i + static_cast<std::int32_t>(a[0]);
      return static_cast<double>(i) < a[1] ? (sum < 255 ? sum : 255) : i;
    }
    default:
      return i;
  }
}

FUSEREG_INLINE bool is_plain_table(Code code) {
  return code == Code::kBrightness || code == Code::kInvert || code == Code::kPosterize ||
         code == Code::kSolarize || code == Code::kSolarizeAdd;
}

// The table of a channel from its histogram: autocontrast's entry for i.
FUSEREG_INLINE std::int32_t stretched(std::int32_t i, std::int32_t low, std::int32_t high) {
  if (low >= high) return i;
  const float inverse = multiply(static_cast<float>(high - low), static_cast<float>(1.0 / 255.0));
  return level(static_cast<float>(i - low) / inverse);
}

// Beyond the edge, the first pixel inside it comes first.
FUSEREG_INLINE std::int64_t reflected(std::int64_t i, std::int64_t size) {
  const std::int64_t at = i < 0 ? -i : i;
  return at < size ? at : 2 * (size - 1) - at;
}

// exp(-x) for x >= 0, from operations that round by themselves: 0 beyond 700.
FUSEREG_INLINE double decay(double x) {
  if (!(x < 700.0)) return 0.0;
  // exp(-x / 1024)^1024, the first by its series.
  const double part = multiply(x, -1.0 / 1024);
  double sum = 1.0;
  for (int n = 14; n >= 1; --n) sum = add(1.0, multiply(part, sum) / n);
  for (int n = 0; n < 10; ++n) sum = multiply(sum, sum);
  return sum;
}

// The weights of a Gaussian blur.
FUSEREG_INLINE void gaussian(int taps, double sigma, float* weights) {
  auto value = [&](int k) {
    const double d = (k - taps / 2) / sigma;
    return decay(multiply(multiply(d, d), 0.5));
  };
  double sum = 0.0;
  for (int k = 0; k < taps; ++k) sum = add(sum, value(k));
  for (int k = 0; k < taps; ++k) weights[k] = static_cast<float>(value(k) / sum);
}

// Where a place of the output lies along an axis of the image, whose row of the matrix is m.
FUSEREG_INLINE double coordinate(const double* m, std::int64_t column, std::int64_t row) {
  return add(
      add(multiply(m[0], static_cast<double>(column)), multiply(m[1], static_cast<double>(row))),
      m[2]);
}

// Whether that is within the image, for `whole_pixels`.
FUSEREG_INLINE bool lies_within(const double* m, std::int64_t x, std::int64_t y, std::int64_t h,
                                std::int64_t w) {
  const double u = coordinate(m, x, y);
  const double v = coordinate(m + 3, x, y);
  return u >= -0.5 && v >= -0.5 && u < static_cast<double>(w) - 0.5 &&
         v < static_cast<double>(h) - 0.5;
}

}  // namespace fusereg::augment
