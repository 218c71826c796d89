// Maps of the plane, of which a sample's geometry is composed.
#pragma once

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>

namespace fusereg::augment::params {

// (x, y) -> (xx x + xy y + x1, yx x + yy y + y1) / (px x + py y + 1)
struct Map {
  double xx = 1.0, xy = 0.0, x1 = 0.0;
  double yx = 0.0, yy = 1.0, y1 = 0.0;
  double px = 0.0, py = 0.0;
};

// First g, then m.
inline Map compose(const Map& m, const Map& g) {
  if (m.px != 0.0 || m.py != 0.0 || g.px != 0.0 || g.py != 0.0) {
    const double from = m.px * g.x1 + m.py * g.y1 + 1.0;
    const double by = 1.0 / (from != 0.0 ? from : 1e-300);
    auto row = [&](double x, double y, double one) {
      return std::array<double, 3>{(x * g.xx + y * g.yx + one * g.px) * by,
                                   (x * g.xy + y * g.yy + one * g.py) * by,
                                   (x * g.x1 + y * g.y1 + one) * by};
    };
    const auto a = row(m.xx, m.xy, m.x1);
    const auto b = row(m.yx, m.yy, m.y1);
    const auto c = row(m.px, m.py, 1.0);
    return {a[0], a[1], a[2], b[0], b[1], b[2], c[0], c[1]};
  }
  return {m.xx * g.xx + m.xy * g.yx,
          m.xx * g.xy + m.xy * g.yy,
          m.xx * g.x1 + m.xy * g.y1 + m.x1,
          m.yx * g.xx + m.yy * g.yx,
          m.yx * g.xy + m.yy * g.yy,
          m.yx * g.x1 + m.yy * g.y1 + m.y1,
          0.0,
          0.0};
}

// The map that takes four points to four others: a linear equation for its eight numbers, by
// elimination. False where there is none, or none back: three of the points are on a line.
inline bool map_of_corners(const double (&from)[4][2], const double (&to)[4][2], Map& map) {
  double a[8][9];
  for (int i = 0; i < 4; ++i) {
    for (int axis = 0; axis < 2; ++axis) {
      double* const row = a[2 * i + axis];
      std::fill_n(row, 9, 0.0);
      const double x = from[i][0];
      const double y = from[i][1];
      const double v = to[i][axis];
      row[3 * axis] = x;
      row[3 * axis + 1] = y;
      row[3 * axis + 2] = 1.0;
      row[6] = -v * x;
      row[7] = -v * y;
      row[8] = v;
    }
  }
  for (int k = 0; k < 8; ++k) {
    int best = k;
    for (int i = k + 1; i < 8; ++i)
      if (std::fabs(a[i][k]) > std::fabs(a[best][k])) best = i;
    if (std::fabs(a[best][k]) < 1e-9) return false;
    std::swap_ranges(a[k], a[k] + 9, a[best]);
    for (int i = 0; i < 8; ++i) {
      const double by = a[i][k] / a[k][k];
      for (int j = k; j < 9 && i != k; ++j) a[i][j] -= by * a[k][j];
    }
  }
  double h[8];
  for (int k = 0; k < 8; ++k) h[k] = a[k][8] / a[k][k];
  map = {h[0], h[1], h[2], h[3], h[4], h[5], h[6], h[7]};
  const double area = map.xx * (map.yy - map.y1 * map.py) - map.xy * (map.yx - map.y1 * map.px) +
                      map.x1 * (map.yx * map.py - map.yy * map.px);
  return std::fabs(area) > 1e-9;
}

// Of the canvas' axis: pixels of the output to those of `length` pixels from `start` on.
inline void stretch(double start, double length, double output, double& factor, double& shift) {
  factor = length / output;
  shift = start + (0.5 * factor - 0.5);
}

inline std::int64_t to_nearest(double x) { return static_cast<std::int64_t>(std::floor(x + 0.5)); }

// As Python's round, in which torchvision's CenterCrop is written: half to even.
inline std::int64_t half_to_even(std::int64_t twice) {
  const std::int64_t below = twice >> 1;
  return below + ((twice & 1) != 0 && (below & 1) != 0 ? 1 : 0);
}

inline std::int64_t central_start(std::int64_t canvas, std::int64_t window) {
  return canvas >= window ? half_to_even(canvas - window) : -((window - canvas) / 2);
}

}  // namespace fusereg::augment::params
