// Pixels that are copied as they are: uint8, nearest, values unchanged. What a mask of another dtype
// has in a pixel are the bytes of 2, 4 or 8 channels, which move as one word. For the CPU kernels,
// once per instruction set.
#pragma once

#include "augment/augment_vector.h"

namespace fusereg::augment::FUSEREG_ISA {
namespace {

// Whether all pixels are copied, and are words; a sample's erased box or blend is looked at later.
bool copies_words(const Job& job) {
  bool words = job.interpolation == Interpolation::kNearest && !job.antialias && !job.color &&
               job.y.type == Element::kUInt8;
  for (int c = 0; c < job.c; ++c) words = words && job.scale[c] == 1.0 && job.shift[c] == 0.0;
  const int c = job.c;
  return words && (c == 1 || c == 2 || c == 4 || c == 8) && job.x.pixel == c && job.y.pixel == c;
}

// A pixel; those of an image of uint8 may begin at any byte.
template <int kBytes>
struct Word {
  std::uint8_t byte[kBytes];
};

// A sample's pixels of type W. Without a turn, the columns of all its rows are found once.
template <class W>
class Words {
 public:
  void start(const Job& job, std::int64_t sample) {
    make_frame(job, sample, f);
    at_ = static_cast<const std::uint8_t*>(f.view.x.data) + f.view.offset;
    aligned_ = is_axis_aligned(f.m) && !f.view.projective && job.y.w <= kMost;
    if (!aligned_) return;
    inside_ = forward_ = true;
    for (std::int64_t first = 0; first < job.y.w; first += kBlock) {
      const Fixed start = block_start(f.m[0], f.m[2], first, f.bits);
      for (int i = 0; i < kBlock && first + i < job.y.w; ++i) {
        std::int32_t* const to = columns_ + first + i;
        *to = fold(pixel(start, f.step_x[i]), static_cast<std::int32_t>(f.view.x.w), f.view.mode);
        inside_ = inside_ && *to >= 0;
        forward_ = forward_ && (to == columns_ || to[0] == to[-1] + 1);
      }
    }
  }

  // Whether every pixel is one of its own or of its partner.
  bool only_copied() const {
    const bool erased = f.erase.x0 < f.erase.x1 && f.erase.y0 < f.erase.y1;
    return !erased && (f.partner < 0 || f.record[15] == 0.0);
  }

  // Columns [begin, end) of a row; `to` is the row's first pixel.
  void row(std::int64_t row, std::int64_t begin, std::int64_t end, W fill, W* to) const {
    if (!aligned_) return turned_row(row, begin, end, fill, to);
    const Fixed start = block_start(f.m[3], row_start(f.m + 3, row), 0, f.bits);
    const std::int32_t line =
        fold(pixel(start, 0), static_cast<std::int32_t>(f.view.x.h), f.view.mode);
    if (line < 0) {
      for (std::int64_t i = begin; i < end; ++i) to[i] = fill;
      return;
    }
    const W* const from = line_of(line);
    if (inside_ && forward_) {
      memcpy(to + begin, from + columns_[begin], static_cast<std::size_t>(end - begin) * sizeof(W));
    } else if (inside_) {
      for (std::int64_t i = begin; i < end; ++i) to[i] = from[columns_[i]];
    } else {
      for (std::int64_t i = begin; i < end; ++i) to[i] = columns_[i] < 0 ? fill : from[columns_[i]];
    }
  }

  Frame f;

 private:
  static constexpr std::int64_t kMost = 4096;

  std::int32_t pixel(const Fixed& start, std::int32_t step) const {
    return start.whole + ((start.rest + step + ((1 << f.bits) >> 1)) >> f.bits);
  }
  const W* line_of(std::int32_t line) const {
    return reinterpret_cast<const W*>(at_ + line * f.view.x.row);
  }

  void turned_row(std::int64_t row, std::int64_t begin, std::int64_t end, W fill, W* to) const {
    constexpr int kPlaces = 64;
    Place16 places[kPlaces];
    const std::int64_t from = begin / kBlock;
    const std::int64_t past = (end + kBlock - 1) / kBlock;
    for (std::int64_t b = from; b < past; ++b) {
      const auto at = static_cast<int>((b - from) % kPlaces);
      const std::int64_t left = past - b;
      if (at == 0)
        find_blocks<Interpolation::kNearest>(
            f, row, b * kBlock, left < kPlaces ? static_cast<int>(left) : kPlaces, places);
      const std::int64_t first = b * kBlock;
      block(places[at], row, first, begin > first ? begin : first,
            end < first + kBlock ? end : first + kBlock, fill, to);
    }
  }
  void block(const Place16& place, std::int64_t row, std::int64_t first, std::int64_t begin,
             std::int64_t end, W fill, W* to) const {
    alignas(kVectorBytes) std::int32_t x[kBlock], y[kBlock], inside[kBlock] = {};
    for (int p = 0; p < kParts && place.where != Where::kOutside; ++p) {
      const Spot s = f.view.projective ? projective_spot(f, row, first + p * kLanes, true)
                                       : spot_of(f, place.start, p, (1 << f.bits) >> 1);
      Folded line = {s.y, ~Ints{}}, column = {s.x, ~Ints{}};
      if (place.where == Where::kPartly) {
        line = folded(s.y, static_cast<std::int32_t>(f.view.x.h), f.view.mode);
        column = folded(s.x, static_cast<std::int32_t>(f.view.x.w), f.view.mode);
      }
      store_ints(x + p * kLanes, column.at);
      store_ints(y + p * kLanes, line.at);
      store_ints(inside + p * kLanes, line.inside & column.inside);
    }
    for (std::int64_t i = begin; i < end; ++i) {
      const std::int64_t lane = i - first;
      to[i] = inside[lane] != 0 ? line_of(y[lane])[x[lane]] : fill;
    }
  }

  const std::uint8_t* at_;
  bool aligned_, inside_, forward_;
  std::int32_t columns_[kMost];
};

// Does the rows of samples of which there is more to do.
using OtherRows = void (*)(const Job& job, std::int64_t begin, std::int64_t end);

template <class W>
void word_rows(const Job& job, std::int64_t begin, std::int64_t end, OtherRows other) {
  W fill;
  for (int c = 0; c < job.c; ++c) fill.byte[c] = to_uint8(job.fill[c]);
  Words<W> own, partner;
  std::int64_t sample = -1;
  for (std::int64_t i = begin; i < end; ++i) {
    const std::int64_t row = i % job.y.h;
    if (i / job.y.h != sample) {
      sample = i / job.y.h;
      own.start(job, sample);
      if (own.f.partner >= 0) partner.start(job, own.f.partner);
    }
    // Runs of bytes, mirrored ones as well, are copied by vectors there.
    if (!own.only_copied() || (sizeof(W) == 1 && own.f.copies)) {
      const std::int64_t next = (sample + 1) * job.y.h < end ? (sample + 1) * job.y.h : end;
      other(job, i, next);
      i = next - 1;
      continue;
    }
    auto* const to = reinterpret_cast<W*>(static_cast<std::uint8_t*>(job.y.data) +
                                          sample * job.y.sample + row * job.y.row);
    own.row(row, 0, job.y.w, fill, to);
    const Box& mix = own.f.mix;
    if (own.f.partner >= 0 && row >= mix.y0 && row < mix.y1 && mix.x0 < mix.x1)
      partner.row(row, mix.x0, mix.x1, fill, to);
  }
}

// What forward() does for such a job.
void copy_rows(const Job& job, std::int64_t begin, std::int64_t end, OtherRows other) {
  switch (job.c) {
    case 1:
      return word_rows<Word<1>>(job, begin, end, other);
    case 2:
      return word_rows<Word<2>>(job, begin, end, other);
    case 4:
      return word_rows<Word<4>>(job, begin, end, other);
    default:
      return word_rows<Word<8>>(job, begin, end, other);
  }
}

}  // namespace
}  // namespace fusereg::augment::FUSEREG_ISA
