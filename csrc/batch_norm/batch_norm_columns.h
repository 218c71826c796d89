// For the CPU kernels alone, once per instruction set: the plain cases whose elements are columns, one
// channel beside the other (inner = 1), or the short lines of several channels as one (`folds`). A
// band of rows by kChunk vectors at a time, downwards, with the coefficients and sums of these columns
// in registers. So a column's terms are added in the order of the rows.
#pragma once

#include "batch_norm/batch_norm_elements.h"
#include "batch_norm/batch_norm_sums.h"
#include "core/ask_ahead.h"

namespace fusereg::batch_norm::FUSEREG_ISA {
namespace {

constexpr std::int64_t kSumBand = 8;
constexpr std::int64_t kWriteBand = 4;
constexpr int kChunk = 4;

FUSEREG_INLINE Coefficient of_columns(const Numbers<float, kMaxPlainColumns>& k, std::int64_t i,
                                      Which which) {
  Coefficient v{};
  v.m = load(k.m + i);
  if (which == Which::kM) return v;
  v.a = load(k.a + i);
  v.b = load(k.b + i);
  if (which == Which::kAffine) return v;
  v.q = load(k.q + i);
  v.r = load(k.r + i);
  return v;
}

// A channel's sum of its columns'.
FUSEREG_INLINE double add_columns(const double* sums, std::int64_t n) {
  if (n == 1) return sums[0];
  // Eight at a time, for one addition would wait for the other.
  double part[8] = {};
  std::int64_t i = 0;
  for (; i + 8 <= n; i += 8) {
    for (int j = 0; j < 8; ++j) part[j] += sums[i + j];
  }
  for (int j = 0; i < n; ++i, ++j) part[j] += sums[i];
  return ((part[0] + part[4]) + (part[2] + part[6])) + ((part[1] + part[5]) + (part[3] + part[7]));
}

// A tile of columns as a matrix: lines of `width` columns, of which the last may be shorter.
struct Matrix {
  std::int64_t begin, lines, step;  // element of memory; elements from line to line
  std::int64_t width, last;         // columns; those of the last line
  std::int64_t next;                // elements to the tile that comes next
  std::int64_t bits, bit_step;      // bytes
  bool folded;                      // the bits are a band's alone, see FoldedBits
  bool asks;                        // for lines further below
  // `one_chunk`: the columns of a chunk; wider lines are not read from end to end. Lines of one
  // chunk are, and Intel's processors read them 1.1 to 1.2 times as fast if asked (measured on
  // Sapphire Rapids, 64 float32 columns from memory).
  Matrix(const Layout& l, const Tile& t, const Fold& fold, bool ask, std::int64_t one_chunk) {
    asks = ask || fold.width > one_chunk || asking_ahead_pays();
    begin = (t.row * l.channels + t.channel) * l.inner;
    lines = (t.rows + fold.rows - 1) / fold.rows;
    step = fold.rows * l.channels * l.inner;
    width = fold.width;
    last = (t.rows - (lines - 1) * fold.rows) * t.channels * l.inner;
    next = t.rows == l.group_rows ? width : lines * step;
    const std::int64_t bit_line = (l.channels + 7) / 8;
    folded = l.inner > 1;
    bits = folded ? 0 : t.row * bit_line + t.channel / 8;
    bit_step = folded ? kMaxPlainColumns / 8 : fold.rows * bit_line;
  }
  // Where the bits of a band begin.
  std::int64_t bits_of(std::int64_t line) const { return folded ? 0 : bits + line * bit_step; }
};

// Calls f(first line, lines, columns) for each band of lines of the same length.
template <std::int64_t kBand, class F>
FUSEREG_INLINE void for_each_band(const Matrix& m, F f) {
  const std::int64_t whole = m.last == m.width ? m.lines : m.lines - 1;
  for (std::int64_t line = 0; line < whole; line += kBand)
    f(line, whole - line < kBand ? whole - line : kBand, m.width);
  if (whole < m.lines) f(whole, std::int64_t{1}, m.last);
}

// The bits of a band whose lines are those of several channels: a channel's line of bits begins with
// a byte of its own, these follow one another.
class FoldedBits {
 public:
  FoldedBits(const Layout& l, const Tile& t) : l_(l), t_(t), bytes_((l.inner + 7) / 8) {}
  std::uint8_t* lines() { return lines_; }

  void read(const std::uint8_t* from, std::int64_t line, std::int64_t lines) {
    each(line, lines, [&](std::int64_t at, std::uint8_t* to) {
      std::uint64_t bits = 0;  // that are to be written yet
      std::int64_t there = 0;
      for (std::int64_t c = 0; c < t_.channels; ++c) {
        for (std::int64_t i = 0; i < l_.inner; i += 32) {
          const std::int64_t n = l_.inner - i < 32 ? l_.inner - i : 32;
          std::uint32_t piece = 0;
          const std::uint8_t* const byte = from + at + c * bytes_ + i / 8;
          if (n == 32) {
            memcpy(&piece, byte, sizeof(piece));
          } else {
            for (std::int64_t j = 0; j < n; j += 8)
              piece |= static_cast<std::uint32_t>(byte[j / 8]) << j;
          }
          bits |= static_cast<std::uint64_t>(piece) << there;
          there += n;
          if (there < 32) continue;
          to = put(to, bits);
          bits >>= 32;
          there -= 32;
        }
      }
      put(to, bits);
    });
  }
  void write(std::uint8_t* to, std::int64_t line, std::int64_t lines) {
    each(line, lines, [&](std::int64_t at, const std::uint8_t* from) {
      for (std::int64_t c = 0; c < t_.channels; ++c) {
        for (std::int64_t i = 0; i < l_.inner; i += 32) {
          const std::int64_t n = l_.inner - i < 32 ? l_.inner - i : 32;
          const std::int64_t first = c * l_.inner + i;
          std::uint64_t bits;
          memcpy(&bits, from + first / 8, sizeof(bits));
          bits = bits >> (first % 8) & ((std::uint64_t{1} << n) - 1);
          std::uint8_t* const byte = to + at + c * bytes_ + i / 8;
          if (n == 32) {
            put(byte, bits);
          } else {
            for (std::int64_t j = 0; j < n; j += 8)
              byte[j / 8] = static_cast<std::uint8_t>(bits >> j);
          }
        }
      }
    });
  }

 private:
  static std::uint8_t* put(std::uint8_t* to, std::uint64_t bits) {
    const auto piece = static_cast<std::uint32_t>(bits);
    memcpy(to, &piece, sizeof(piece));
    return to + sizeof(piece);
  }
  // Calls f(byte of the tensor's bits, the line's here) for each line of the band.
  template <class F>
  FUSEREG_ALWAYS_INLINE void each(std::int64_t line, std::int64_t lines, F f) {
    for (std::int64_t j = 0; j < lines; ++j) {
      const std::int64_t first = (t_.row + line + j) * l_.channels + t_.channel;
      f(first * bytes_, lines_ + j * (kMaxPlainColumns / 8));
    }
  }
  const Layout& l_;
  const Tile& t_;
  std::int64_t bytes_;
  std::uint8_t lines_[kSumBand * (kMaxPlainColumns / 8) + sizeof(std::uint64_t)];
};

// Asks for what the lines some way below a band need, or below the last one the next tile, a piece
// of kChunk vectors for each piece of the band. The band goes from chunk to chunk, which the processor's own prefetching cannot follow;
// this goes from end to end of each line, as memory lies, and so brings it along (measured on
// Zen 4, 256 float32 columns from memory: sums of backward 1.8 times as fast).
template <Cache kCache, class T>
class ColumnAhead {
 public:
  ColumnAhead(const Matrix& m, std::int64_t line) : asks_(m.asks), width_(m.width), step_(m.step) {
    constexpr std::int64_t kAhead = 16 << 10;  // bytes
    const std::int64_t bytes = m.width * static_cast<std::int64_t>(sizeof(T));
    line += (kAhead + bytes - 1) / bytes;
    at_ = m.begin + (line < m.lines ? line * m.step : m.next + (line - m.lines) * m.step);
  }
  template <class F>
  FUSEREG_ALWAYS_INLINE void ask(const F& f) {
    if (!asks_) return;
    for (std::int64_t i = 0; i < kPiece; i += kLineElements<T>)
      f.template ahead<kCache>(at_ + column_ + i);
    column_ += kPiece;
    if (column_ < width_) return;
    column_ = 0;
    at_ += step_;
  }

 private:
  static constexpr std::int64_t kPiece = kChunk * kWidth<float>;
  bool asks_;
  std::int64_t width_, step_;
  std::int64_t at_, column_ = 0;  // element of memory where the line begins; of the line
};

// kN vectors of columns from `column` on, or with How::kPart n < kWidth columns; of `lines` lines.
template <Which kWhich, int kN, How kHow, class A, class F>
FUSEREG_INLINE void sum_columns(const Matrix& m, A& ahead, std::int64_t line, std::int64_t lines,
                                std::int64_t column, std::int64_t n,
                                const Numbers<float, kMaxPlainColumns>& numbers,
                                ColumnSums<float, kMaxPlainColumns>& total, const F& f) {
  constexpr int kW = kWidth<float>;
  Coefficient k[kN];
  Vector<float> first[kN], second[kN];
  FUSEREG_UNROLL_10
  for (int v = 0; v < kN; ++v) {
    k[v] = of_columns(numbers, column + v * kW, kWhich);
    first[v] = load(total.first + column + v * kW);
    second[v] = load(total.second + column + v * kW);
  }
  std::int64_t bits = m.bits_of(line);
  for (std::int64_t j = line; j < line + lines; ++j, bits += m.bit_step) {
    const At at{m.begin + j * m.step + column, bits, column};
    ahead.ask(f);
    FUSEREG_UNROLL_10
    for (int v = 0; v < kN; ++v) {
      const Terms add = f.template get<kHow>({at.i + v * kW, at.line, at.e + v * kW}, k[v], n);
      first[v] += add.first;
      second[v] += add.second;
    }
  }
  FUSEREG_UNROLL_10
  for (int v = 0; v < kN; ++v) {
    store(total.first + column + v * kW, first[v]);
    store(total.second + column + v * kW, second[v]);
  }
}

template <Which kWhich, class T, class F>
void sum_columns(const Layout& l, const Tile& t, const Coefficients& coefficients, Sums sums, F f) {
  constexpr int kW = kWidth<float>;
  constexpr int kLong = kChunk * kW;
  const Fold fold(l, t, std::int64_t{64}, f.lines_of_bits());
  Numbers<float, kMaxPlainColumns> k;
  convert(k, coefficients, t.channels, fold, kWhich);
  ColumnSums<float, kMaxPlainColumns> total;
  total.clear(fold.width);
  const Matrix m(l, t, fold, kAsk<T>, kLong);
  const std::uint8_t* const all_bits = f.lines_of_bits();
  FoldedBits folded(l, t);
  if constexpr (F::kBits) {
    if (m.folded) f.set_bits(folded.lines());
  }
  for_each_band<kSumBand>(m, [&](std::int64_t line, std::int64_t lines, std::int64_t n) {
    if (F::kBits && m.folded) folded.read(all_bits, line, lines);
    ColumnAhead<Cache::kSecond, T> ahead(m, line);
    std::int64_t i = 0;
    for (; i + kLong <= n; i += kLong)
      sum_columns<kWhich, kChunk, How::kWhole>(m, ahead, line, lines, i, kW, k, total, f);
    for (; i + kW <= n; i += kW)
      sum_columns<kWhich, 1, How::kWhole>(m, ahead, line, lines, i, kW, k, total, f);
    if (i < n) sum_columns<kWhich, 1, How::kPart>(m, ahead, line, lines, i, n - i, k, total, f);
    total.terms += static_cast<int>(lines);
    if (total.terms > kPlainRun - kSumBand) total.flush(fold.width);
  });
  total.flush(fold.width);
  for (std::int64_t r = 0; r < fold.rows; ++r) {
    for (std::int64_t c = 0; c < t.channels; ++c) {
      const std::int64_t column = (r * t.channels + c) * fold.inner;
      sums.first[c] += add_columns(total.wide_first + column, fold.inner);
      sums.second[c] += add_columns(total.wide_second + column, fold.inner);
    }
  }
}

template <Which kWhich, int kN, How kHow, class A, class F>
FUSEREG_INLINE void write_columns(const Matrix& m, A& ahead, std::int64_t line, std::int64_t lines,
                                  std::int64_t column, std::int64_t n,
                                  const Numbers<float, kMaxPlainColumns>& numbers, const F& f) {
  constexpr int kW = kWidth<float>;
  Coefficient k[kN];
  FUSEREG_UNROLL_10
  for (int v = 0; v < kN; ++v) k[v] = of_columns(numbers, column + v * kW, kWhich);
  std::int64_t bits = m.bits_of(line);
  for (std::int64_t j = line; j < line + lines; ++j, bits += m.bit_step) {
    const At at{m.begin + j * m.step + column, bits, column};
    ahead.ask(f);
    FUSEREG_UNROLL_10
    for (int v = 0; v < kN; ++v) {
      f.template apply<kHow>({at.i + v * kW, at.line, at.e + v * kW}, k[v], n);
    }
  }
}

template <Which kWhich, class T, class F>
void write_columns(const Layout& l, const Tile& t, const Coefficients& coefficients, F f) {
  constexpr int kW = kWidth<float>;
  constexpr int kLong = kChunk * kW;
  const Fold fold(l, t, std::int64_t{64}, f.lines_of_bits());
  Numbers<float, kMaxPlainColumns> k;
  convert(k, coefficients, t.channels, fold, kWhich);
  const Matrix m(l, t, fold, kAsk<T>, kLong);
  const auto size = static_cast<std::int64_t>(sizeof(T));
  const bool streams = f.streams() && l.numel() * size >= kStreamBytes &&
                       to_next_line(f.result() + m.begin) == 0 && m.step * size % kLineBytes == 0;
  // Conversions of 16-bit types leave no time to wait for the second cache.
  constexpr Cache kCache = sizeof(T) == 2 ? Cache::kFirst : Cache::kSecond;
  auto* const all_bits = f.lines_of_bits();
  FoldedBits folded(l, t);
  if constexpr (F::kBits) {
    if (m.folded) f.set_bits(folded.lines());
  }
  for_each_band<kWriteBand>(m, [&](std::int64_t line, std::int64_t lines, std::int64_t n) {
    if constexpr (F::kBits && !F::kMakesBits) {
      if (m.folded) folded.read(all_bits, line, lines);
    }
    ColumnAhead<kCache, T> ahead(m, line);
    std::int64_t i = 0;
    if (streams) {
      for (; i + kLong <= n; i += kLong)
        write_columns<kWhich, kChunk, How::kStream>(m, ahead, line, lines, i, kW, k, f);
    }
    for (; i + kLong <= n; i += kLong)
      write_columns<kWhich, kChunk, How::kWhole>(m, ahead, line, lines, i, kW, k, f);
    for (; i + kW <= n; i += kW)
      write_columns<kWhich, 1, How::kWhole>(m, ahead, line, lines, i, kW, k, f);
    if (i < n) write_columns<kWhich, 1, How::kPart>(m, ahead, line, lines, i, n - i, k, f);
    if constexpr (F::kMakesBits) {
      if (m.folded) folded.write(all_bits, line, lines);
    }
  });
  if (streams) finish_streams();
}

}  // namespace
}  // namespace fusereg::batch_norm::FUSEREG_ISA
