// Antialiased rows of samples whose matrix is axis-aligned, in float32: strip by strip along both
// axes, as antialiased resizing. Every pixel has the bits that augment_sampling.h's `filtered` gives it,
// for some 2 (bicubic: 4) multiplications an axis and pixel instead of their product. Where a vector
// of a row's outputs reads no more of it than two vectors hold, that is shuffled, row by row. For the
// CPU kernels, once per instruction set.
#pragma once

#include "augment/antialias_launch.h"
#include "augment/augment_vector.h"
#include "augment/resize_strip.h"

namespace fusereg::augment::FUSEREG_ISA {
namespace {

// The weights of all outputs of an axis, and what of their extents lies within the image.
struct Axis {
  Band band;
  const float* across = nullptr;  // weights, [taps, filter_pitch()]; null where they are not needed
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

// Whether each vector of outputs reads from two vectors of pixels at most; the weights for that.
[[maybe_unused]] bool lay_across(Axis& axis, std::int64_t count, Memory& memory) {
  const std::int64_t taps = axis.band.taps;
  const std::int32_t* const first = axis.band.first;
  for (std::int64_t e = 0; e < count; e += kLanes) {
    const std::int64_t last = e + kLanes < count ? e + kLanes - 1 : count - 1;
    const std::int64_t apart =
        first[last] > first[e] ? first[last] - first[e] : first[e] - first[last];
    if (apart + taps > 2 * kLanes) return false;
  }
  const std::int64_t pitch = filter_pitch(count);
  auto* const across = memory.take<float>(taps * pitch);
  for (std::int64_t k = 0; k < taps; ++k) {
    for (std::int64_t i = 0; i < pitch; ++i)
      across[k * pitch + i] =
          i < count ? static_cast<const float*>(axis.band.weights)[i * taps + k] : 0.0f;
  }
  axis.across = across;
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
  static constexpr bool kWhole = true;
  FilteredRows(const Job& job, void* scratch)
      : job_(job), pitch_(filter_pitch(job.y.w)), three_(job.x.channels_last && job.c == 3) {
    Memory memory{static_cast<char*>(scratch)};
    const std::int64_t strip = filter_strip(job, kLanes);
    strip_ = memory.take<float>(strip);
    memset(strip_, 0, static_cast<std::size_t>(strip) * sizeof(float));  // finite, see along()
    own_.values = memory.take<float>(job.c * kLanes * pitch_);
    other_.values = memory.take<float>(job.c * kLanes * pitch_);
    left_ = memory.at;
  }

  // Whether the rows of this sample can be computed so.
  bool start(const Frame& f, const Frame& partner) {
    Memory memory{left_};
    row_ = job_.y.h;
    if (!make_axes(f, memory, own_) || (f.partner >= 0 && !make_axes(partner, memory, other_)))
      return false;
    height_ =
        row_by_row(own_, memory) && (f.partner < 0 || row_by_row(other_, memory)) ? 1 : kLanes;
    return true;
  }
  void find(const Frame& f, const Frame& partner, std::int64_t row, std::int64_t) {
    if (row >= row_ && row < row_ + height_) return;
    row_ = row;
    make(f, own_);
    if (f.partner >= 0) make(partner, other_);
  }
  void own(const Frame&, std::int64_t row, std::int64_t first, float* out) {
    copy(own_, row, first, out);
  }
  void other(const Frame&, std::int64_t row, std::int64_t first, float* out) {
    copy(other_, row, first, out);
  }
  // The sample's own row, once it is found: a channel every stride() floats.
  const float* line(std::int64_t row) const { return own_.values + (row - row_) * pitch_; }
  std::int64_t stride() const { return kLanes * pitch_; }

 private:
  bool make_axes(const Frame& f, Memory& memory, Filtered& filtered) const {
    const double* const m = f.m;
    return is_axis_aligned(m) && !f.view.projective &&
           make_axis(job_, f.view.mode, m[0], row_start(m, 0), extent_of(m), f.view.x.w, job_.y.w,
                     memory, filtered.x) &&
           make_axis(job_, f.view.mode, m[4], m[5], extent_of(m + 3), f.view.x.h, job_.y.h, memory,
                     filtered.y);
  }

  bool row_by_row(Filtered& s, Memory& memory) const {
#if defined(__AVX2__)
    return (three_ || !job_.x.channels_last) && s.x.covered && s.y.covered &&
           lay_across(s.x, job_.y.w, memory);
#else
    (void)s, (void)memory;
    return false;
#endif
  }

  void make(const Frame& f, const Filtered& s) {
    if (height_ == 1) {
      make_row(f, s);
    } else {
      make_strip(f, s);
    }
  }

  // The strip is one row: a weighted sum of rows of the image, and then of its own neighbors.
  void make_row(const Frame& f, const Filtered& s) {
    const Images& x = f.view.x;
    const T* const image =
        static_cast<const T*>(x.data) + f.view.offset + first_tap(s.y.band, row_, x.h) * x.row;
    const float* const weights = static_cast<const float*>(s.y.band.weights) + row_ * s.y.band.taps;
    const std::int64_t begin = s.x.begin * x.pixel;
    const std::int64_t width = s.x.end - s.x.begin;
    const std::int64_t count = width * x.pixel;
    const std::int64_t room = filter_pitch(width) + kBlock;  // what is shuffled ends later
    Floats sums[kTogether][kLanes];
    for (int c = 0; c < (three_ ? 1 : job_.c); ++c) {
      const T* const p = image + c * x.channel + begin;
      float* const line = three_ ? strip_ + 3 * room : strip_;
      std::int64_t e = 0;
      for (; e + kTogether * kLanes <= count; e += kTogether * kLanes) {
        sum_of_rows<T, kTogether>(p + e, x.row, weights, s.y.band.taps, kLanes, sums, 0);
        for (int i = 0; i < kTogether; ++i) store(line + e + i * kLanes, sums[i][0]);
      }
      for (; e < count; e += kLanes) {
        // The last vector ends with the row, where that is long enough.
        const std::int64_t at = count < kLanes || e + kLanes <= count ? e : count - kLanes;
        sum_of_rows<T, 1>(p + at, x.row, weights, s.y.band.taps, count - at, sums, 0);
        store(line + at, sums[0][0]);
      }
      if (!three_) {
        along(s, strip_, c);
        continue;
      }
      for (std::int64_t e = 0; e < width; e += kLanes) {
        Floats planes[3];
        separate({load(line + 3 * e), load(line + 3 * e + kLanes), load(line + 3 * e + 2 * kLanes)},
                 planes);
        for (int k = 0; k < 3; ++k) store(strip_ + k * room + e, planes[k]);
      }
      for (int k = 0; k < 3; ++k) along(s, strip_ + k * room, k);
    }
  }

  void along(const Filtered& s, const float* line, int c) const {
    const std::int32_t* const first = s.x.band.first;
    float* const to = s.values + c * kLanes * pitch_;
    for (std::int64_t e = 0; e < job_.y.w; e += kLanes) {
      const std::int64_t last = e + kLanes < job_.y.w ? e + kLanes - 1 : job_.y.w - 1;
      const std::int32_t least = first[e] < first[last] ? first[e] : first[last];
      const Ints index = load_ints(first + e) - least;
      const float* const p = line + (least - s.x.begin);
      const Floats low = load(p);
      const Floats high = load(p + kLanes);
      const float* weights = s.x.across + e;
      Floats sum = {};
      for (int k = 0; k < s.x.band.taps; ++k, weights += pitch_) {
        const Floats w = load(weights);
        const Floats more = sum + __builtin_shuffle(low, high, index + k) * w;
        // Of bytes all numbers there are finite: adding zero changes nothing.
        sum = sizeof(T) == 1 ? more : select(w != 0.0f, more, sum);
      }
      store(to + e, sum);
    }
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
  const bool three_;  // channels, that are last
  float* strip_;
  char* left_;
  Filtered own_, other_;
  std::int64_t row_ = 0;
  int height_ = kLanes;  // of the strip
};

}  // namespace
}  // namespace fusereg::augment::FUSEREG_ISA
