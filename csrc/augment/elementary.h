// sin, cos, log and exp from the four operations alone, each rounded by itself: the same bits on
// every processor, where a library picks its code (and its last bit) by the processor it finds.
// Within 2 units in the last place.
#pragma once

#include <cmath>

namespace fusereg::augment {

// Sine and cosine of an angle in degrees; multiples of 90 give 0, 1 and -1 themselves.
inline void sine_cosine(double degrees, double& sine, double& cosine) {
  double turn = std::fmod(degrees, 360.0);  // exact
  if (turn < 0.0) turn += 360.0;
  const int quarter = static_cast<int>(turn / 90.0 + 0.5);
  // Exact: both are within a factor of 2 of each other, or the second is 0.
  const double rest = turn - 90.0 * quarter;
  const double x = rest * 0.017453292519943295;
  const double z = x * x;
  // Taylor's series, |x| <= pi / 4: the first term left out is below 1e-17.
  double s = 1.0 / 355687428096000.0;
  s = s * z - 1.0 / 1307674368000.0;
  s = s * z + 1.0 / 6227020800.0;
  s = s * z - 1.0 / 39916800.0;
  s = s * z + 1.0 / 362880.0;
  s = s * z - 1.0 / 5040.0;
  s = s * z + 1.0 / 120.0;
  s = s * z - 1.0 / 6.0;
  s = x + x * z * s;
  double c = 1.0 / 20922789888000.0;
  c = c * z - 1.0 / 87178291200.0;
  c = c * z + 1.0 / 479001600.0;
  c = c * z - 1.0 / 3628800.0;
  c = c * z + 1.0 / 40320.0;
  c = c * z - 1.0 / 720.0;
  c = c * z + 1.0 / 24.0;
  c = c * z - 0.5;
  c = 1.0 + z * c;
  switch (quarter % 4) {
    case 0:
      sine = s, cosine = c;
      break;
    case 1:
      sine = c, cosine = 0.0 - s;
      break;
    case 2:
      sine = 0.0 - s, cosine = 0.0 - c;
      break;
    default:
      sine = 0.0 - c, cosine = s;
      break;
  }
}

// ln 2 in two parts, the first with so few bits that its product with an exponent is exact.
inline constexpr double kLog2High = 0.693147180369123816490;
inline constexpr double kLog2Low = 1.90821492927058770002e-10;

// x > 0 and finite.
inline double natural_log(double x) {
  int exponent = 0;
  double m = std::frexp(x, &exponent);
  if (m < 0.70710678118654752) {
    m *= 2.0;
    --exponent;
  }
  // log m = 2 artanh f; f^2 <= 0.0295.
  const double f = (m - 1.0) / (m + 1.0);
  const double z = f * f;
  double sum = 0.0;
  for (int k = 25; k >= 3; k -= 2) sum = z * (1.0 / k + sum);
  return exponent * kLog2High + (2.0 * f + (2.0 * f * sum + exponent * kLog2Low));
}

inline double exponential(double x) {
  if (x > 709.0) x = 709.0;
  if (x < -745.0) return 0.0;
  const double k = std::floor(x * 1.4426950408889634 + 0.5);
  const double r = (x - k * kLog2High) - k * kLog2Low;
  double sum = 1.0;
  for (int n = 14; n >= 1; --n) sum = 1.0 + r * sum / n;
  return std::ldexp(sum, static_cast<int>(k));
}

}  // namespace fusereg::augment
