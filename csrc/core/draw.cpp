#include "core/draw.h"

#include <algorithm>
#include <cmath>

namespace fusereg {

Draw make_draw(double p) {
  constexpr double k16 = 65536.0;
  constexpr double k32 = 4294967296.0;
  if (p >= 1.0) return {16, 0, 0.0};
  const double keep = 1.0 - p;
  for (int digits = 1; digits <= kMostDigits; ++digits) {
    const double m = std::ldexp(keep, digits);
    if (keep < 1.0 && m == std::nearbyint(m)) return {digits, static_cast<std::uint32_t>(m), keep};
  }
  const double coarse = std::nearbyint(keep * k16);
  if (keep < 1.0 && std::abs(coarse - keep * k16) <= std::min(p, keep) * (k16 / 1024)) {
    return {16, static_cast<std::uint32_t>(coarse), coarse / k16};
  }
  const double fine = std::clamp(std::nearbyint(keep * k32), 1.0, k32 - 1.0);
  return {32, static_cast<std::uint32_t>(fine), fine / k32};
}

}  // namespace fusereg
