// Antialiased rows of samples whose matrix is axis-aligned, in float32: strip by strip along both
// axes, as antialiased resizing. Every pixel has the bits that augment_sampling.h's `filtered` gives it,
// for some 2 (bicubic: 4) multiplications an axis and pixel instead of their product. For the CPU
// kernels, once per instruction set.
#pragma once

#include "augment/augment_vector.h"
#include "augment/resize_strip.h"

namespace fusereg::augment::FUSEREG_ISA {
namespace {

// The weights of all outputs of an axis, and what of their extents lies within the image.
struct Axis {
  Band band;
  const float* coverage = nullptr;
  std::int64_t begin = 0, end = 0;  // what is read
  bool covered = true;              // by all outputs
};

// Memory that is given out piece by piece; filter_bytes() says how much there must be.
struct Memory {
  char* at;
  template <class V>
  V* take(std::int64_t count) {
    auto* const p = reinterpret_cast<V*>(at);
    at += round_up_to_line(count * static_cast<std::int64_t>(sizeof(V)));
    return p;
  }
};

// False if a tap lies outside the image, under a fill mode that reads another pixel there.
bool make_axis(const Job& job, FillMode mode, double step, double start, double extent,
               std::int64_t size, std::int64_t count, Memory& memory, Axis& axis) {
  auto* const first = memory.take<std::int32_t>(count);
  auto* const coverage = memory.take<float>(count);
  auto* const spans = memory.take<Span<float>>(count);
  auto* const weights = memory.take<float>(count * most_taps(extent, job.interpolation, size));
  std::int64_t taps = 1;
  axis.covered = true;
  for (std::int64_t i = 0; i < count; ++i) {
    Span<float>& span = spans[i];
    span = make_span<float>(add(multiply(step, static_cast<double>(i)), start), extent,
                            static_cast<std::int32_t>(size), job.interpolation, mode);
    coverage[i] = span.coverage;
    axis.covered = axis.covered && span.coverage == 1.0f;
    if (span.last < span.first) continue;
    if (span.first < 0 || span.last >= size) return false;
    const std::int64_t own = span.last - span.first + 1;
    taps = taps > own ? taps : own;
  }
  axis.band = {first, weights, taps};
  axis.coverage = coverage;
  axis.begin = size;
  axis.end = 0;
  for (std::int64_t i = 0; i < count; ++i) {
    const Span<float>& span = spans[i];
    std::int64_t begin = span.first < size - taps ? span.first : size - taps;
    begin = begin > 0 ? begin : 0;
    first[i] = static_cast<std::int32_t>(begin);
    float* const own = weights + i * taps;
    for (std::int64_t k = 0; k < taps; ++k) own[k] = 0.0f;
    for (std::int32_t k = span.first; k <= span.last; ++k)
      own[k - begin] = weight_in(span, k, job.interpolation);
    axis.begin = axis.begin < begin ? axis.begin : begin;
    axis.end = axis.end > begin + taps ? axis.end : begin + taps;
  }
  return true;
}

// A sample's axes, and the strip of its rows that was made last: [c][kLanes][pitch].
struct Filtered {
  Axis x, y;
  float* values;
};

template <class T>
class FilteredRows {
 public:
  FilteredRows(const Job& job, void* scratch)
      : job_(job), pitch_((job.y.w + kBlock - 1) / kBlock * kBlock) {
    Memory memory{static_cast<char*>(scratch)};
    strip_ = memory.take<float>(job.x.w * (job.x.channels_last ? job.c : 1) * kLanes);
    own_.values = memory.take<float>(job.c * kLanes * pitch_);
    other_.values = memory.take<float>(job.c * kLanes * pitch_);
    left_ = memory.at;
  }

  // Whether the rows of this sample can be computed so.
  bool start(const Frame& f, const Frame& partner) {
    Memory memory{left_};
    row_ = job_.y.h;
    return make_axes(f, memory, own_) && (f.partner < 0 || make_axes(partner, memory, other_));
  }
  void find(const Frame& f, const Frame& partner, std::int64_t row, std::int64_t) {
    if (row >= row_ && row < row_ + kLanes) return;
    row_ = row;
    make_strip(f, own_);
    if (f.partner >= 0) make_strip(partner, other_);
  }
  void own(const Frame&, std::int64_t row, std::int64_t first, float* out) {
    copy(own_, row, first, out);
  }
  void other(const Frame&, std::int64_t row, std::int64_t first, float* out) {
    copy(other_, row, first, out);
  }

 private:
  bool make_axes(const Frame& f, Memory& memory, Filtered& filtered) const {
    const double* const m = f.m;
    return is_axis_aligned(m) && !f.view.projective &&
           make_axis(job_, f.view.mode, m[0], row_start(m, 0), extent_of(m), f.view.x.w, job_.y.w,
                     memory, filtered.x) &&
           make_axis(job_, f.view.mode, m[4], m[5], extent_of(m + 3), f.view.x.h, job_.y.h, memory,
                     filtered.y);
  }

  void make_strip(const Frame& f, const Filtered& s) {
    const Images& x = f.view.x;
    const bool last = x.channels_last;
    const std::int64_t left = job_.y.h - row_;
    const int rows = left < kLanes ? static_cast<int>(left) : kLanes;
    const std::int64_t step = (last ? job_.c : 1) * std::int64_t{kLanes};
    const T* const image = static_cast<const T*>(x.data) + f.view.offset;
    auto block = [&](int c, std::int64_t e) __attribute__((always_inline)) {
      const float* const strip = strip_ + (last ? c * kLanes : 0);
      Floats v[kLanes];
      for (int q = 0; q < kLanes; ++q) {
        const std::int64_t column = e + q;
        v[q] = Floats{};
        if (column >= job_.y.w) continue;
        v[q] = along_row(strip, s.x.band, column, x.w, s.x.begin, step);
        if (!s.x.covered || !s.y.covered) v[q] = with_fill(v[q], s, column, rows, c);
      }
      turn<kLanes / 2, float>(v);
      for (int q = 0; q < kLanes; ++q) store(s.values + (c * kLanes + q) * pitch_ + e, v[q]);
    };
    if (last) {
      along_columns<T>(image, x, s.y.band, row_, rows, s.x.begin * job_.c, s.x.end * job_.c,
                       strip_);
      // The strip of all channels is larger than the first cache: each part of it is read once.
      for (std::int64_t e = 0; e < job_.y.w; e += kLanes) {
        for (int c = 0; c < job_.c; ++c) block(c, e);
      }
      return;
    }
    for (int c = 0; c < job_.c; ++c) {
      along_columns<T>(image + c * x.channel, x, s.y.band, row_, rows, s.x.begin, s.x.end, strip_);
      for (std::int64_t e = 0; e < job_.y.w; e += kLanes) block(c, e);
    }
  }

  // What covers the pixel's extent in part.
  Floats with_fill(Floats sum, const Filtered& s, std::int64_t column, int rows, int c) const {
    Floats coverage = {};
    for (int q = 0; q < rows; ++q) coverage[q] = s.x.coverage[column] * s.y.coverage[row_ + q];
    const Floats fill = broadcast(static_cast<float>(job_.fill[c]));
    const Floats inside = select(coverage == 1.0f, sum, lerp(fill, sum, coverage));
    return select(coverage > 0.0f, inside, fill);
  }

  void copy(const Filtered& s, std::int64_t row, std::int64_t first, float* out) const {
    const float* from = s.values + (row - row_) * pitch_ + first;
    for (int c = 0; c < job_.c; ++c, from += kLanes * pitch_, out += kBlock) {
      for (int p = 0; p < kBlock; p += kLanes) store(out + p, load(from + p));
    }
  }

  const Job& job_;
  const std::int64_t pitch_;
  float* strip_;
  char* left_;
  Filtered own_, other_;
  std::int64_t row_ = 0;
};

}  // namespace
}  // namespace fusereg::augment::FUSEREG_ISA
