// The gradient of one output pixel of augment.h, for the host and the device.
#pragma once

#include "augment/augment_math.h"

namespace fusereg::augment {

// f(x, y, weight) for every pixel of an image of this size that interpolation at a place has a weight
// in and whose row(y) and column(x) are asked for, row by row.
template <class C, class Row, class Column, class F>
FUSEREG_INLINE void for_point_taps(const Place<C>& p, std::int32_t w, std::int32_t h, FillMode mode,
                                   const Job& job, const Row& row, const Column& column,
                                   const F& f) {
  // Along each axis, from the first tap on.
  C wx[4] = {C{1}, C{0}, C{0}, C{0}};
  C wy[4] = {C{1}, C{0}, C{0}, C{0}};
  int before = 0;
  int count = 1;
  if (job.interpolation == Interpolation::kBilinear) {
    count = 2;
    wx[0] = add(C{1}, -p.tx);
    wx[1] = p.tx;
    wy[0] = add(C{1}, -p.ty);
    wy[1] = p.ty;
  } else if (job.interpolation == Interpolation::kBicubic) {
    count = 4;
    before = 1;
    const auto cubic = static_cast<C>(job.cubic);
    auto fill = [&](C t, C(&weights)[4]) {
      const Cubic<C> k = cubic_weights(t, cubic);
      weights[0] = k.before;
      weights[1] = add(add(add(C{1}, -k.before), -k.next), -k.last);
      weights[2] = k.next;
      weights[3] = k.last;
    };
    fill(p.tx, wx);
    fill(p.ty, wy);
  }
  for (int j = 0; j < count; ++j) {
    const std::int32_t y = fold(p.y - before + j, h, mode);
    const C down = element_at(wy, j);
    if (y < 0 || !row(y) || down == C{0}) continue;
    for (int i = 0; i < count; ++i) {
      const std::int32_t x = fold(p.x - before + i, w, mode);
      if (x < 0 || !column(x)) continue;
      const C weight = multiply(down, element_at(wx, i));
      if (weight != C{0}) f(x, y, weight);
    }
  }
}

// f(x, y, weight) for every pixel of the image, which a view is of, that an output pixel has a weight
// in and whose in_row(y) and in_column(x) are asked for: row by row; of a reduced image (z, read where
// view.reduces), those of each of its pixels in turn.
template <class C, Antialias kAntialias, class Row, class Column, class F>
FUSEREG_STATIC void for_taps(const Job& job, const View& view, const Reduced& z, std::int64_t col,
                             std::int64_t row, const Row& in_row, const Column& in_column,
                             const F& f) {
  const Interpolation how = job.interpolation;
  const auto w = static_cast<std::int32_t>(view.x.w);
  const auto h = static_cast<std::int32_t>(view.x.h);
  const auto left = static_cast<std::int32_t>(view.left);
  const auto top = static_cast<std::int32_t>(view.top);
  auto own_row = [&](std::int32_t y) { return in_row(top + y); };
  auto own_column = [&](std::int32_t x) { return in_column(left + x); };
  auto filter_taps = [&](const Spans<C>& s, C share) {
    for (std::int32_t j = s.y.first; j <= s.y.last; ++j) {
      const std::int32_t y = fold(j, h, view.mode);
      if (y < 0 || !own_row(y)) continue;
      const C wy = multiply(share, weight_in(s.y, j, how));
      if (wy == C{0}) continue;
      for (std::int32_t i = s.x.first; i <= s.x.last; ++i) {
        const std::int32_t x = fold(i, w, view.mode);
        if (x < 0 || !own_column(x)) continue;
        const C weight = multiply(wy, weight_in(s.x, i, how));
        if (weight != C{0}) f(left + x, top + y, weight);
      }
    }
  };
  if (kAntialias != Antialias::kNever && view.filters) {
    const Spans<C> s = make_spans<C>(view.m, col, row, view.x, how, view.mode);
    return filter_taps(s, multiply(s.x.coverage, s.y.coverage));
  }
  Place<C> p;
  if (kAntialias != Antialias::kNever && view.reduces) {
    place(z.m, col, row, false, p);
    auto any = [](std::int32_t) { return true; };
    for_point_taps(
        p, z.w, z.h, view.mode, job, any, any, [&](std::int32_t x, std::int32_t y, C weight) {
          filter_taps({reduced_span<C>(x, z.by_x, w, how), reduced_span<C>(y, z.by_y, h, how)},
                      weight);
        });
    return;
  }
  place_in(view, col, row, how == Interpolation::kNearest, p);
  for_point_taps(p, w, h, view.mode, job, own_row, own_column,
                 [&](std::int32_t x, std::int32_t y, C weight) { f(left + x, top + y, weight); });
}

// What the gradient of y[out] at a pixel is for the warped values of `sample`: `out` itself, or
// (as_partner) the sample that is mixed into it. False if it is nothing. `values`: of view_to_warp(), read
// with job.color.
template <class T, int kGroup, Antialias kAntialias>
FUSEREG_STATIC bool gradient_at(const Job& job, const View& values, std::int64_t sample,
                                std::int64_t out, bool as_partner, std::int64_t col,
                                std::int64_t row, int channel, Number<T> (&g)[kGroup]) {
  using C = Number<T>;
  const double* const record = job.records + sample * kRecord;
  const double* const mixing = job.records + out * kRecord;
  // All of it is loaded before any is asked about, so that one load doesn't wait for another.
  const C* const grad =
      static_cast<const C*>(job.y.data) + out * job.y.sample + row * job.y.row + col * job.y.pixel;
  for (int k = 0; k < kGroup; ++k) g[k] = grad[(channel + k) * job.y.channel];
  const bool in_mix = has(box_of(mixing + 10, job.y), col, row);
  const bool in_erased = has(box_of(record + 6, job.y), col, row);
  const double lam = partner_of(mixing, job.n) >= 0 && in_mix ? mixing[15] : 1.0;
  const auto share = static_cast<C>(as_partner ? 1.0 - lam : lam);
  if (share == C{0} || in_erased) return false;
  for (int k = 0; k < kGroup; ++k) {
    g[k] = multiply(multiply(g[k], share), static_cast<C>(job.scale[channel + k]));
  }
  if (!job.color) return true;
  const double* const m = record + 16;
  const auto limit = static_cast<C>(job.limit);
  C v[kGroup];
  warped<T, kGroup, kAntialias>(job, values, col, row, channel, v);
  auto passed = [&](C value, C gradient) {
    return value >= C{0} && value <= limit ? gradient : C{0};
  };
  if constexpr (kGroup == 3) {
    for (int k = 0; k < 3; ++k) g[k] = passed(color_sum(m + 4 * k, v[0], v[1], v[2]), g[k]);
    const C g0 = g[0], g1 = g[1], g2 = g[2];
    for (int k = 0; k < 3; ++k) {
      C sum = multiply(static_cast<C>(m[k]), g0);
      sum = add(sum, multiply(static_cast<C>(m[4 + k]), g1));
      g[k] = add(sum, multiply(static_cast<C>(m[8 + k]), g2));
    }
  } else {
    const C k = static_cast<C>(m[0]);
    g[0] = multiply(k, passed(add(multiply(k, v[0]), static_cast<C>(m[3])), g[0]));
  }
  return true;
}

}  // namespace fusereg::augment
