// One output pixel of augment.h, for the host and the device. The vector code of augment_vector.h does
// the same operations in the same order.
#pragma once

#include "augment/augment_sampling.h"

namespace fusereg::augment {

// --- a pixel's values ---
// A box of a record, cut to the output.
struct Box {
  std::int64_t x0, y0, x1, y1;
};
FUSEREG_INLINE bool has(const Box& b, std::int64_t col, std::int64_t row) {
  return col >= b.x0 && col < b.x1 && row >= b.y0 && row < b.y1;
}
FUSEREG_INLINE std::int64_t cut(double v, std::int64_t size) {
  return v > 0.0 ? (v < static_cast<double>(size) ? static_cast<std::int64_t>(v) : size) : 0;
}
FUSEREG_INLINE Box box_of(const double* r, const Images& y) {
  return {cut(r[0], y.w), cut(r[1], y.h), cut(r[2], y.w), cut(r[3], y.h)};
}

// The sample that is mixed in, or -1.
FUSEREG_INLINE std::int64_t partner_of(const double* record, std::int64_t n) {
  const double p = record[14];
  return p >= 0.0 && p < static_cast<double>(n) && record[15] != 1.0 ? static_cast<std::int64_t>(p)
                                                                     : -1;
}

// The normals of the elements 4 * group to 4 * group + 3: one call of Philox.
FUSEREG_STATIC void four_normals(const std::int64_t* key, std::uint64_t group, float (&n)[4]) {
  const PhiloxWords w = philox<kNumberRounds>(static_cast<std::uint64_t>(key[0]),
                                              static_cast<std::uint64_t>(key[1]), group);
  normal::normal_pair<float, std::uint32_t>(w.word[0], w.word[1], n[0], n[1]);
  normal::normal_pair<float, std::uint32_t>(w.word[2], w.word[3], n[2], n[3]);
}

// The normal of an element.
FUSEREG_STATIC float normal_at(const std::int64_t* key, std::uint64_t index) {
  const PhiloxWords w = philox<kNumberRounds>(static_cast<std::uint64_t>(key[0]),
                                              static_cast<std::uint64_t>(key[1]), index / 4);
  const bool second = (index & 2) != 0;
  float n[2];
  normal::normal_pair<float, std::uint32_t>(second ? w.word[2] : w.word[0],
                                            second ? w.word[3] : w.word[1], n[0], n[1]);
  return (index & 1) != 0 ? n[1] : n[0];
}

template <class C>
FUSEREG_INLINE C clamped(C v, C limit) {
  return v < C{0} ? C{0} : v > limit ? limit : v;
}

template <class R, class C>
FUSEREG_INLINE C color_sum(const R* row, C v0, C v1, C v2) {
  C sum = multiply(static_cast<C>(row[0]), v0);
  sum = add(sum, multiply(static_cast<C>(row[1]), v1));
  sum = add(sum, multiply(static_cast<C>(row[2]), v2));
  return add(sum, static_cast<C>(row[3]));
}

// Where a sample is read: its image, or (FillMode::kWindow) what of it its output covers, which begins
// at (left, top); the map from output pixels to that.
struct View {
  Images x;
  std::int64_t offset;  // of its first pixel, in elements from x.data
  std::int64_t left, top;
  FillMode mode;
  double m[6];
  double p[2];  // the perspective
  bool projective;
  bool filters;  // along its axes
  bool reduces;  // Reduced is another image
};

// Where an output pixel lies, with or without a perspective. Beyond the horizon nothing is special, as
// in torchvision; on it a place is infinitely far.
template <class C>
FUSEREG_INLINE void place_in(const View& v, std::int64_t col, std::int64_t row, bool nearest,
                             Place<C>& to) {
  if (!v.projective) return place(v.m, col, row, nearest, to);
  const auto c = static_cast<double>(col);
  const auto r = static_cast<double>(row);
  const double w = add(add(multiply(v.p[0], c), multiply(v.p[1], r)), 1.0);
  double tx, ty;
  place_on_axis(add(multiply(v.m[0], c), row_start(v.m, row)) / w, nearest, to.x, tx);
  place_on_axis(add(multiply(v.m[3], c), row_start(v.m + 3, row)) / w, nearest, to.y, ty);
  to.tx = static_cast<C>(tx);
  to.ty = static_cast<C>(ty);
}

// What outputs of an axis cover of it, cut to whole pixels; false if that is nothing.
FUSEREG_INLINE bool limit_axis(double& start, double step, std::int64_t count, std::int64_t& size,
                               std::int64_t& first) {
  const double a = add(start, -0.5 * step);
  const double b = add(start, multiply(step, static_cast<double>(count) - 0.5));
  const std::int64_t begin = cut(floor_of(add(a < b ? a : b, 1.0)), size);
  const std::int64_t end = cut(floor_of(add(a < b ? b : a, 1.0)), size);
  if (begin >= end) return false;
  size = end - begin;
  first = begin;
  start = add(start, -static_cast<double>(begin));
  return true;
}

FUSEREG_STATIC void view_of(const Job& job, const Images& images, std::int64_t sample, View& v) {
  const double* const record = job.records + sample * kRecord;
  for (int i = 0; i < 6; ++i) v.m[i] = record[i];
  v.p[0] = record[28];
  v.p[1] = record[29];
  v.projective = is_projective(record);
  v.x = job.each != nullptr ? job.each[sample] : images;
  v.offset = job.each != nullptr ? 0 : sample * images.sample;
  v.left = v.top = 0;
  v.mode = job.fill_mode;
  const bool aligned = is_axis_aligned(record) && !v.projective;
  v.filters = job.antialias && aligned;
  v.reduces = job.antialias && !aligned && !v.projective &&
              (reduced_side(v.x.w, extent_of(record)) < v.x.w ||
               reduced_side(v.x.h, extent_of(record + 3)) < v.x.h);
  if (v.mode != FillMode::kWindow) return;
  v.mode = FillMode::kBorder;
  if (!aligned) return;
  if (limit_axis(v.m[2], v.m[0], job.y.w, v.x.w, v.left) &&
      limit_axis(v.m[5], v.m[4], job.y.h, v.x.h, v.top)) {
    v.offset += v.top * v.x.row + v.left * v.x.pixel;
    if (job.antialias) v.mode = FillMode::kConstant;
  }
}

// As samples of job.x are read: turned ones where job.reduced has them.
FUSEREG_STATIC void view_to_read(const Job& job, std::int64_t sample, View& v) {
  view_of(job, job.x, sample, v);
  if (job.reduced == nullptr || !v.reduces) return;
  const Reduced z = reduced_of(v.m, v.x);
  v.x.data = job.reduced;
  v.x.w = z.w;
  v.x.h = z.h;
  for (int i = 0; i < 6; ++i) v.m[i] = z.m[i];
  v.reduces = false;
}

// The samples that code is for: without antialiasing; with it, where job.reduced has the turned ones;
// all. What is not needed would be most of a kernel.
enum class Antialias : std::uint8_t { kNever, kReduced, kAny };

// v[k] = value. What an index that isn't known when this is compiled chooses would lie in local memory on
// the device, and the loops that call this are too large to be unrolled.
template <class C, int kGroup>
FUSEREG_INLINE void set_channel(C (&v)[kGroup], int k, C value) {
#if defined(__CUDACC__)
  FUSEREG_UNROLL_10
  for (int i = 0; i < kGroup; ++i) v[i] = i == k ? value : v[i];
#else
  v[k] = value;
#endif
}

// v[i], as set_channel().
template <class C, int kSize>
FUSEREG_INLINE C element_at(const C (&v)[kSize], int i) {
#if defined(__CUDACC__)
  C found = v[0];
  FUSEREG_UNROLL_10
  for (int k = 1; k < kSize; ++k) found = i == k ? v[k] : found;
  return found;
#else
  return v[i];
#endif
}

// Where warped() reads.
template <Antialias kAntialias>
FUSEREG_STATIC void view_to_warp(const Job& job, std::int64_t sample, View& v) {
  if constexpr (kAntialias == Antialias::kReduced) {
    view_to_read(job, sample, v);
  } else {
    view_of(job, job.x, sample, v);
  }
}

// kGroup channels from `channel` on, warped: all three of three channels, or one.
template <class T, int kGroup, Antialias kAntialias>
FUSEREG_STATIC void warped(const Job& job, const View& view, std::int64_t col, std::int64_t row,
                           int channel, Number<T> (&v)[kGroup]) {
  using C = Number<T>;
  const Images& x = view.x;
  Plane<T> plane;
  plane.data = static_cast<const T*>(x.data) + view.offset;
  plane.row = x.row;
  plane.pixel = x.pixel;
  plane.h = static_cast<std::int32_t>(x.h);
  plane.w = static_cast<std::int32_t>(x.w);
  plane.mode = view.mode;
  plane.data += channel * x.channel;
  if (kAntialias != Antialias::kNever && view.filters) {
    const Spans<C> spans = make_spans<C>(view.m, col, row, x, job.interpolation, view.mode);
    for (int k = 0; k < kGroup; ++k, plane.data += x.channel) {
      plane.fill = static_cast<C>(job.fill[channel + k]);
      set_channel(v, k, filtered(plane, spans, job.interpolation));
    }
    return;
  }
  const auto cubic = static_cast<C>(job.cubic);
  Place<C> p;
  if (kAntialias == Antialias::kAny && view.reduces) {
    const Reduced z = reduced_of(view.m, x);
    place(z.m, col, row, false, p);
    auto pixel = [&](std::int32_t at_x, std::int32_t at_y) {
      return reduced_pixel(plane, z, job.interpolation, at_x, at_y);
    };
    for (int k = 0; k < kGroup; ++k, plane.data += x.channel) {
      plane.fill = static_cast<C>(job.fill[channel + k]);
      set_channel(v, k, interpolate(pixel, p, job.interpolation, cubic));
    }
    return;
  }
  place_in(view, col, row, job.interpolation == Interpolation::kNearest, p);
  auto pixel = [&](std::int32_t at_x, std::int32_t at_y) { return pixel_at(plane, at_x, at_y); };
  for (int k = 0; k < kGroup; ++k, plane.data += x.channel) {
    plane.fill = static_cast<C>(job.fill[channel + k]);
    set_channel(v, k, interpolate(pixel, p, job.interpolation, cubic));
  }
}

// What stands inside the erase box; false outside.
template <class T, int kGroup>
FUSEREG_STATIC bool erased(const Job& job, std::int64_t sample, std::int64_t col, std::int64_t row,
                           int channel, Number<T> (&v)[kGroup]) {
  using C = Number<T>;
  if (!has(box_of(job.records + sample * kRecord + 6, job.y), col, row)) return false;
  std::int64_t key[2] = {};
  for (int i = 0; i < 2 && job.erase_noise; ++i) key[i] = job.keys[2 * sample + i];
  for (int k = 0; k < kGroup; ++k) {
    const int c = channel + k;
    const std::int64_t index = (c * job.y.h + row) * job.y.w + col;
    set_channel(v, k,
                job.erase_noise ? static_cast<C>(normal_at(key, static_cast<std::uint64_t>(index)))
                                : static_cast<C>(job.erase[c]));
  }
  return true;
}

// Warped values, colored and normalized.
template <class T, int kGroup>
FUSEREG_STATIC void finished(const Job& job, std::int64_t sample, int channel,
                             Number<T> (&v)[kGroup]) {
  using C = Number<T>;
  if (job.color) {
    const double* const m = job.records + sample * kRecord + 16;
    const auto limit = static_cast<C>(job.limit);
    if constexpr (kGroup == 3) {
      const C v0 = v[0], v1 = v[1], v2 = v[2];
      for (int k = 0; k < 3; ++k) v[k] = clamped(color_sum(m + 4 * k, v0, v1, v2), limit);
    } else {
      v[0] = clamped(add(multiply(static_cast<C>(m[0]), v[0]), static_cast<C>(m[3])), limit);
    }
  }
  for (int k = 0; k < kGroup; ++k) {
    v[k] = add(multiply(v[k], static_cast<C>(job.scale[channel + k])),
               static_cast<C>(job.shift[channel + k]));
  }
}

// A(sample) at an output pixel.
template <class T, int kGroup, Antialias kAntialias>
FUSEREG_STATIC void unmixed(const Job& job, std::int64_t sample, std::int64_t col, std::int64_t row,
                            int channel, Number<T> (&v)[kGroup]) {
  if (erased<T, kGroup>(job, sample, col, row, channel, v)) return;
  View view;
  view_to_warp<kAntialias>(job, sample, view);
  warped<T, kGroup, kAntialias>(job, view, col, row, channel, v);
  finished<T, kGroup>(job, sample, channel, v);
}

// y[sample] at an output pixel, before it is rounded.
template <class T, int kGroup, Antialias kAntialias>
FUSEREG_STATIC void augmented(const Job& job, std::int64_t sample, std::int64_t col,
                              std::int64_t row, int channel, Number<T> (&v)[kGroup]) {
  using C = Number<T>;
  const double* const record = job.records + sample * kRecord;
  const std::int64_t partner = partner_of(record, job.n);
  const bool mixes = partner >= 0 && has(box_of(record + 10, job.y), col, row);
  if (!mixes || record[15] != 0.0) {
    unmixed<T, kGroup, kAntialias>(job, sample, col, row, channel, v);
  }
  if (!mixes) return;
  C other[kGroup];
  unmixed<T, kGroup, kAntialias>(job, partner, col, row, channel, other);
  const auto lam = static_cast<C>(record[15]);
  const auto rest = static_cast<C>(1.0 - record[15]);
  for (int k = 0; k < kGroup; ++k) {
    v[k] = record[15] == 0.0 ? other[k] : add(multiply(lam, v[k]), multiply(rest, other[k]));
  }
}

// dispatch_element(type, [&](auto tag) { using T = typename decltype(tag)::type; ... });
#if defined(__CUDACC__)
#pragma nv_exec_check_disable
#endif
template <class F>
FUSEREG_HD inline auto dispatch_element(Element type, F&& f) {
  switch (type) {
    case Element::kFloat64:
      return f(TypeTag<double>{});
    case Element::kFloat32:
      return f(TypeTag<float>{});
    case Element::kFloat16:
      return f(TypeTag<Half>{});
    case Element::kBFloat16:
      return f(TypeTag<BFloat16>{});
    default:
      return f(TypeTag<std::uint8_t>{});
  }
}

}  // namespace fusereg::augment
