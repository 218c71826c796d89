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

// torchvision's adjust_hue: to hue, saturation and value in float32, and back.
FUSEREG_INLINE void turn_hue(float h, float (&rgb)[3]) {
  constexpr float kUnit = static_cast<float>(1.0 / 255);
  const float r = multiply(rgb[0], kUnit);
  const float g = multiply(rgb[1], kUnit);
  const float b = multiply(rgb[2], kUnit);
  const float rg_high = r > g ? r : g;
  const float rg_low = r < g ? r : g;
  const float high = rg_high > b ? rg_high : b;
  const float low = rg_low < b ? rg_low : b;
  const float range = high - low;
  const float s = range / (range == 0.0f ? 1.0f : high);
  const float divisor = range == 0.0f ? 1.0f : range;
  const float rc = (high - r) / divisor;
  const float gc = (high - g) / divisor;
  const float bc = (high - b) / divisor;
  const float of_r = bc - gc;
  const float of_g = add(rc, 2.0f) - bc;
  const float of_b = add(gc, 4.0f) - rc;
  const float not_r = high == g ? of_g : of_b;
  const float sixths = high == r ? of_r : not_r;
  const float whole = add(multiply(sixths, static_cast<float>(1.0 / 6.0)), 1.0f);
  const float own = whole >= 1.0f ? whole - 1.0f : whole;
  const float moved = add(own, h);
  const float part = moved - static_cast<float>(static_cast<std::int32_t>(moved));
  const float turned = part < 0.0f ? add(part, 1.0f) : part;
  const float h6 = multiply(turned, 6.0f);
  const auto sector = static_cast<std::int32_t>(h6);
  const float f = h6 - static_cast<float>(sector);
  const float sf = multiply(s, f);
  const float rest = 1.0f - s;
  const float q0 = multiply(1.0f - sf, high);
  const float t0 = multiply(add(sf, rest), high);
  const float p0 = multiply(rest, high);
  const float q = q0 < 1.0f ? q0 : 1.0f;  // none is negative but by rounding to zero
  const float t = t0 < 1.0f ? t0 : 1.0f;
  const float p = p0 < 1.0f ? p0 : 1.0f;
  const bool is_1 = sector == 1;
  const bool is_2 = sector == 2;
  const bool is_3 = sector == 3;
  const bool is_4 = sector == 4;
  const bool is_5 = sector == 5;
  const float red = is_1 ? q : is_2 ? p : is_3 ? p : is_4 ? t : high;
  const float green = is_1 ? high : is_2 ? high : is_3 ? q : is_4 ? p : is_5 ? p : t;
  const float blue = is_1 ? p : is_2 ? t : is_3 ? high : is_4 ? high : is_5 ? q : p;
  constexpr float kBack = static_cast<float>(255.999);
  rgb[0] = multiply(red, kBack);
  rgb[1] = multiply(green, kBack);
  rgb[2] = multiply(blue, kBack);
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

// Where a place of the output lies within the image, for `whole_pixels`.
FUSEREG_INLINE bool lies_within(const double* m, std::int64_t x, std::int64_t y, std::int64_t h,
                                std::int64_t w) {
  const auto column = static_cast<double>(x);
  const auto row = static_cast<double>(y);
  const double u = m[0] * column + m[1] * row + m[2];
  const double v = m[3] * column + m[4] * row + m[5];
  return u >= -0.5 && v >= -0.5 && u < static_cast<double>(w) - 0.5 &&
         v < static_cast<double>(h) - 0.5;
}

}  // namespace fusereg::augment
