// For the CPU kernels alone, once per instruction set: the kernels of the plain cases (no mask, no
// dropout, ReLU or no activation), which are those of most networks. Each is one loop that keeps in
// registers what the strips of the others keep in the cache.
//
// Lines (inner > 1): of the sums, a channel's lines follow one another, and its sums stay in
// registers from its first row to its last; element i of a line in lane i % kLanes. Results are
// written in the order of memory, the lines of a row's channels one after the other.
// Columns (inner = 1, or the short lines of several channels as one): a band of rows by kChunk vectors at a time, downwards, with the coefficients
// and sums of these columns in registers. So a column's terms are added in the order of the rows.
#pragma once

#include "batch_norm/batch_norm_memory.h"
#include "batch_norm/batch_norm_sums.h"
#include "core/ask_ahead.h"

namespace fusereg::batch_norm::FUSEREG_ISA {
namespace {

constexpr int kPlainRun = 64;  // float32 terms that are added before they go to float64
constexpr std::int64_t kSumBand = 8;
constexpr std::int64_t kWriteBand = 4;
constexpr int kChunk = 4;

// What becomes of z, or of its gradient; and as a type.
enum class After { kNothing, kRelu, kReluBits };
template <After kAfter>
struct AfterTag {
  static constexpr After kValue = kAfter;
};

// --- vectors ---

FUSEREG_INLINE Vector<float> relu(Vector<float> z) {
  const Vector<float> zero{};
  return z < zero ? zero : z;
}

// The bits of n <= kWidth elements, of which the first is element i of a line of bits.
FUSEREG_INLINE void put_bits(std::uint8_t* line, std::int64_t i, std::uint32_t bits,
                             std::int64_t n) {
  constexpr int kW = kWidth<float>;
  if (n < kW) bits &= (1u << n) - 1u;
  if constexpr (kW >= 8) {
    for (std::int64_t j = 0; j < n; j += 8)
      line[(i + j) / 8] = static_cast<std::uint8_t>(bits >> j);
  } else {
    // Half a byte; its other half is there already, or follows.
    std::uint8_t& byte = line[i / 8];
    byte = i % 8 == 0 ? static_cast<std::uint8_t>(bits)
                      : static_cast<std::uint8_t>(byte | (bits << (i % 8)));
  }
}
FUSEREG_INLINE std::uint32_t get_bits(const std::uint8_t* line, std::int64_t i, std::int64_t n) {
  constexpr int kW = kWidth<float>;
  std::uint32_t bits = 0;
  if constexpr (kW >= 8) {
    for (std::int64_t j = 0; j < n; j += 8)
      bits |= static_cast<std::uint32_t>(line[(i + j) / 8]) << j;
  } else {
    bits = static_cast<std::uint32_t>(line[i / 8]) >> (i % 8) & ((1u << kW) - 1u);
  }
  return bits;
}

// A channel's coefficients, or a vector of columns'.
struct Coefficient {
  Vector<float> m, a, b, q, r;
};

// --- what is done to a vector of elements; `i`: of memory; `line`, `e`: its bits ---

struct At {
  std::int64_t i;
  std::int64_t line;  // first byte of the line of bits
  std::int64_t e;     // element of that line
};

// A vector's elements are all there, or some of them; kStream: all, and the results go past the
// cache, straight to memory.
enum class How { kWhole, kPart, kStream };
template <How kHow>
struct HowTag {
  static constexpr How kValue = kHow;
};

template <How kHow, class T>
FUSEREG_INLINE Vector<float> get(const T* p, std::int64_t n) {
  return kHow == How::kPart ? load_some(p, n) : load(p);
}
template <How kHow, class T>
FUSEREG_INLINE void put(T* p, Vector<float> v, std::int64_t n) {
  if (kHow == How::kPart) {
    store_some(p, v, n);
  } else if (kHow == How::kStream) {
    store_past_the_cache(p, v);
  } else {
    store(p, v);
  }
}

template <class T, After kAfter, bool kResidual>
struct Write {
  const T* x;
  const T* residual;
  T* y;
  std::uint8_t* bits;
  explicit Write(const Forward& job)
      : x(static_cast<const T*>(job.x)),
        residual(static_cast<const T*>(job.residual)),
        y(static_cast<T*>(job.y)),
        bits(job.bits) {}
  std::uint8_t* lines_of_bits() const { return bits; }
  void set_bits(std::uint8_t* lines) { bits = lines; }
  static constexpr bool kBits = kAfter == After::kReluBits;
  static constexpr bool kMakesBits = kBits;
  const T* result() const { return y; }
  bool streams() const { return y != x && y != residual; }
  template <How kHow>
  FUSEREG_ALWAYS_INLINE void apply(const At& at, const Coefficient& k, std::int64_t n) const {
    Vector<float> z = (get<kHow>(x + at.i, n) - k.m) * k.a + k.b;
    if constexpr (kResidual) z += get<kHow>(residual + at.i, n);
    if constexpr (kAfter == After::kReluBits)
      put_bits(bits + at.line, at.e, positive_bits(z), kHow == How::kPart ? n : kWidth<float>);
    if constexpr (kAfter != After::kNothing) z = relu(z);
    put<kHow>(y + at.i, z, n);
  }
  template <Cache kCache>
  FUSEREG_ALWAYS_INLINE void ahead(std::int64_t i) const {
    ask_for<kCache>(x, i);
    if constexpr (kResidual) ask_for<kCache>(residual, i);
  }
};

template <class T, After kAfter>
struct GradientOf {
  const T* x;
  const T* grad;
  const std::uint8_t* bits;
  explicit GradientOf(const Backward& job)
      : x(static_cast<const T*>(job.x)), grad(static_cast<const T*>(job.grad)), bits(job.bits) {}
  // x - m, and returns dz
  template <How kHow>
  FUSEREG_ALWAYS_INLINE Vector<float> make(const At& at, const Coefficient& k, std::int64_t n,
                                           Vector<float>& d) const {
    d = get<kHow>(x + at.i, n) - k.m;
    const Vector<float> g = get<kHow>(grad + at.i, n);
    if constexpr (kAfter == After::kNothing) return g;
    if constexpr (kAfter == After::kRelu) {
      const Vector<float> zero{};
      return d * k.a + k.b > zero ? g : zero;
    }
    return masked<float>(g, mask_of_bits<float>(get_bits(bits + at.line, at.e,
                                                         kHow == How::kPart ? n : kWidth<float>)));
  }
  template <Cache kCache>
  FUSEREG_ALWAYS_INLINE void ahead(std::int64_t i) const {
    ask_for<kCache>(x, i);
    ask_for<kCache>(grad, i);
  }
};

template <class T, After kAfter, bool kResidual>
struct WriteGradient {
  GradientOf<T, kAfter> from;
  T* grad_x;
  T* grad_residual;
  explicit WriteGradient(const Backward& job)
      : from(job),
        grad_x(static_cast<T*>(job.grad_x)),
        grad_residual(static_cast<T*>(job.grad_residual)) {}
  const std::uint8_t* lines_of_bits() const { return from.bits; }
  void set_bits(const std::uint8_t* lines) { from.bits = lines; }
  static constexpr bool kBits = kAfter == After::kReluBits;
  static constexpr bool kMakesBits = false;
  const T* result() const { return grad_x; }
  // The second result has to lie as the first one does, for both to begin a line at once.
  bool streams() const {
    if (grad_x == from.grad || grad_x == from.x) return false;
    return !kResidual ||
           (grad_residual != from.grad && to_next_line(grad_x) == to_next_line(grad_residual));
  }
  template <How kHow>
  FUSEREG_ALWAYS_INLINE void apply(const At& at, const Coefficient& k, std::int64_t n) const {
    Vector<float> d;
    const Vector<float> dz = from.template make<kHow>(at, k, n, d);
    if constexpr (kResidual) put<kHow>(grad_residual + at.i, dz, n);
    put<kHow>(grad_x + at.i, k.a * dz + k.q * d + k.r, n);
  }
  template <Cache kCache>
  FUSEREG_ALWAYS_INLINE void ahead(std::int64_t i) const {
    from.template ahead<kCache>(i);
  }
};

// The two terms of an element.
struct Terms {
  Vector<float> first, second;
};

template <class T>
struct MomentTerms {
  const T* x;
  explicit MomentTerms(const Forward& job) : x(static_cast<const T*>(job.x)) {}
  const std::uint8_t* lines_of_bits() const { return nullptr; }
  static constexpr bool kBits = false;
  template <How kHow>
  FUSEREG_ALWAYS_INLINE Terms get(const At& at, const Coefficient& k, std::int64_t n) const {
    Vector<float> d = FUSEREG_ISA::get<kHow>(x + at.i, n) - k.m;
    if constexpr (kHow == How::kPart) d = masked<float>(d, first_lanes(n));
    return {d, d * d};
  }
  template <Cache kCache>
  FUSEREG_ALWAYS_INLINE void ahead(std::int64_t i) const {
    ask_for<kCache>(x, i);
  }
};

template <class T, After kAfter>
struct GradientTerms {
  GradientOf<T, kAfter> from;
  explicit GradientTerms(const Backward& job) : from(job) {}
  const std::uint8_t* lines_of_bits() const { return from.bits; }
  void set_bits(const std::uint8_t* lines) { from.bits = lines; }
  static constexpr bool kBits = kAfter == After::kReluBits;
  template <How kHow>
  FUSEREG_ALWAYS_INLINE Terms get(const At& at, const Coefficient& k, std::int64_t n) const {
    Vector<float> d;
    Vector<float> dz = from.template make<kHow>(at, k, n, d);
    if constexpr (kHow == How::kPart) {
      dz = masked<float>(dz, first_lanes(n));
      d = masked<float>(d, first_lanes(n));
    }
    return {dz, dz * d};
  }
  template <Cache kCache>
  FUSEREG_ALWAYS_INLINE void ahead(std::int64_t i) const {
    from.template ahead<kCache>(i);
  }
};

// --- lines ---

// Asks for what a block of kLanes elements will need in its time. A line that is no longer than
// kShortLine is over before the processor's own prefetching has come to speed, and the next one of
// the channel is elsewhere; what follows in memory is another channel's, whose turn comes soon. So
// that is asked for into the second cache, unless everything may well be in the third one. Longer
// lines are left to the processor, but for kAsk.
template <class T>
class LineAhead {
 public:
  explicit LineAhead(const Layout& l) {
    constexpr std::int64_t kShortLine = 16 << 10;             // bytes
    constexpr std::int64_t kInCache = std::int64_t{4} << 20;  // bytes of a tensor
    short_lines_ = l.inner * kSize <= kShortLine && l.numel() * kSize > kInCache;
  }
  template <class F>
  FUSEREG_ALWAYS_INLINE void ask(const F& f, std::int64_t i) const {
    if (short_lines_) {
      for (std::int64_t j = 0; j < kLanes; j += kLineElements<T>)
        f.template ahead<Cache::kSecond>(i + kFar + j);
    } else if constexpr (kAsk<T>) {
      f.template ahead<Cache::kFirst>(i + kNear);
    }
  }

 private:
  static constexpr auto kSize = static_cast<std::int64_t>(sizeof(T));
  static constexpr std::int64_t kNear = 2048 / kSize;
  static constexpr std::int64_t kFar = 4096 / kSize;
  bool short_lines_;
};

// The coefficients of a tile's channels, as numbers that a line's vectors are filled with.
class OfChannels {
 public:
  OfChannels(const Coefficients& k, std::int64_t n, Which which) : which_(which) {
    convert(m_, k.m, n);
    if (which == Which::kM) return;
    convert(a_, k.a, n);
    convert(b_, k.b, n);
    if (which == Which::kAffine) return;
    convert(q_, k.q, n);
    convert(r_, k.r, n);
  }
  FUSEREG_ALWAYS_INLINE Coefficient of(std::int64_t c) const {
    Coefficient v{};
    v.m = broadcast(m_[c]);
    if (which_ == Which::kM) return v;
    v.a = broadcast(a_[c]);
    v.b = broadcast(b_[c]);
    if (which_ == Which::kAffine) return v;
    v.q = broadcast(q_[c]);
    v.r = broadcast(r_[c]);
    return v;
  }

 private:
  static void convert(float* to, const double* from, std::int64_t n) {
    for (std::int64_t i = 0; i < n; ++i) to[i] = static_cast<float>(from[i]);
  }
  Which which_;
  float m_[kMaxPlainLines], a_[kMaxPlainLines], b_[kMaxPlainLines];
  float q_[kMaxPlainLines], r_[kMaxPlainLines];
};

// What is left of a line behind its whole blocks: how many elements each vector of it has.
struct Rest {
  using C = float;
  static constexpr int kW = kWidth<C>;
  std::int64_t n[kVectors<C>];
  explicit Rest(std::int64_t left) {
    for (int v = 0; v < kVectors<C>; ++v, left -= kW) n[v] = left < 0 ? 0 : left < kW ? left : kW;
  }
  // Calls f(vector, elements, how) for each vector that has some.
  template <class F>
  FUSEREG_ALWAYS_INLINE void each(const F& f) const {
    FUSEREG_EACH_VECTOR(v) {
      if (n[v] == kW) {
        f(v, n[v], HowTag<How::kWhole>{});
      } else if (n[v] > 0) {
        f(v, n[v], HowTag<How::kPart>{});
      }
    }
  }
};

template <Which kWhich, class T, class F>
void sum_lines(const Layout& l, const Tile& t, const Coefficients& coefficients, Sums sums,
               const F f) {
  using C = float;
  constexpr int kW = kWidth<float>;
  const LineAhead<T> ahead(l);
  const OfChannels numbers(coefficients, t.channels, kWhich);
  const Rest rest(l.inner % kLanes);
  const std::int64_t bit_line = (l.inner + 7) / 8;
  for (std::int64_t c = 0; c < t.channels; ++c) {
    const Coefficient k = numbers.of(c);
    LaneSums<float> total{};
    Block<float> first{}, second{};
    int room = kPlainRun;
    for (std::int64_t row = t.row; row < t.row + t.rows; ++row) {
      const std::int64_t line = row * l.channels + t.channel + c;
      At at{line * l.inner, line * bit_line, 0};
      for (std::int64_t blocks = l.inner / kLanes; blocks > 0;) {
        const std::int64_t run = blocks < room ? blocks : room;
        for (std::int64_t j = 0; j < run; ++j) {
          ahead.ask(f, at.i);
          FUSEREG_EACH_VECTOR(v) {
            const Terms add = f.template get<How::kWhole>(at, k, kW);
            first.v[v] += add.first;
            second.v[v] += add.second;
            at.i += kW;
            at.e += kW;
          }
        }
        blocks -= run;
        room -= static_cast<int>(run);
        if (room == 0) {
          flush(total, first, second);
          room = kPlainRun;
        }
      }
      if (rest.n[0] == 0) continue;
      ahead.ask(f, at.i);
      rest.each([&](int v, std::int64_t n, auto how) {
        const Terms add =
            f.template get<decltype(how)::kValue>({at.i + v * kW, at.line, at.e + v * kW}, k, n);
        first.v[v] += add.first;
        second.v[v] += add.second;
      });
      if (--room == 0) {
        flush(total, first, second);
        room = kPlainRun;
      }
    }
    flush(total, first, second);
    sums.first[c] += add_lanes(total.wide_first);
    sums.second[c] += add_lanes(total.wide_second);
  }
}

template <Which kWhich, class T, class F>
void write_lines(const Layout& l, const Tile& t, const Coefficients& coefficients, const F f) {
  using C = float;
  constexpr int kW = kWidth<float>;
  const LineAhead<T> ahead(l);
  const OfChannels numbers(coefficients, t.channels, kWhich);
  constexpr std::int64_t kWorthStreaming = 2048;  // bytes of a line
  const std::int64_t bit_line = (l.inner + 7) / 8;
  const auto size = static_cast<std::int64_t>(sizeof(T));
  const bool streams =
      f.streams() && l.numel() * size >= kStreamBytes && l.inner * size >= kWorthStreaming;
  const Rest rest(l.inner % kLanes);
  for (std::int64_t row = t.row; row < t.row + t.rows; ++row) {
    for (std::int64_t c = 0; c < t.channels; ++c) {
      const Coefficient k = numbers.of(c);
      const std::int64_t line = row * l.channels + t.channel + c;
      At at{line * l.inner, line * bit_line, 0};
      std::int64_t left = l.inner;
      auto next = [&](std::int64_t n) {
        at.i += n;
        at.e += n;
        left -= n;
      };
      auto blocks = [&](auto how) {
        constexpr How kHow = decltype(how)::kValue;
        while (left >= kLanes) {
          ahead.ask(f, at.i);
          FUSEREG_EACH_VECTOR(v) {
            f.template apply<kHow>(at, k, kW);
            next(kW);
          }
        }
      };
      // Bits are written by whole bytes: with them, only lines that begin where they should.
      std::int64_t head = streams ? to_next_line(f.result() + at.i) : 0;
      if (streams && (head == 0 || !F::kBits)) {
        for (; head >= kW; head -= kW) {
          f.template apply<How::kWhole>(at, k, kW);
          next(kW);
        }
        if (head > 0) {
          f.template apply<How::kPart>(at, k, head);
          next(head);
        }
        blocks(HowTag<How::kStream>{});
      } else {
        blocks(HowTag<How::kWhole>{});
      }
      // Of lines that do not begin with a head, the rest is the same.
      if (!streams) {
        if (rest.n[0] == 0) continue;
        ahead.ask(f, at.i);
        rest.each([&](int v, std::int64_t n, auto how) {
          f.template apply<decltype(how)::kValue>({at.i + v * kW, at.line, at.e + v * kW}, k, n);
        });
        continue;
      }
      while (left >= kW) {
        f.template apply<How::kWhole>(at, k, kW);
        next(kW);
      }
      if (left > 0) f.template apply<How::kPart>(at, k, left);
    }
  }
  if (streams) finish_streams();
}

// --- columns ---

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

// --- which of them ---

// Whether a tile is of columns. A job that is not plain may have any tile.
template <class T>
FUSEREG_INLINE bool as_columns(const Layout& l, const Tile& t, const std::uint8_t* bits) {
  if (l.inner == 1) return true;
  return folds(l, Traits<T>::kDType, bits != nullptr, t.rows) &&
         t.channels * l.inner <= kMaxPlainColumns;
}
template <Which kWhich, class T, class F>
void sum_plain(const Layout& l, const Tile& t, const Coefficients& k, Sums sums, const F& f) {
  if (as_columns<T>(l, t, f.lines_of_bits())) {
    sum_columns<kWhich, T>(l, t, k, sums, f);
  } else {
    sum_lines<kWhich, T>(l, t, k, sums, f);
  }
}
template <Which kWhich, class T, class F>
void write_plain(const Layout& l, const Tile& t, const Coefficients& k, const F& f) {
  if (as_columns<T>(l, t, f.lines_of_bits())) {
    write_columns<kWhich, T>(l, t, k, f);
  } else {
    write_lines<kWhich, T>(l, t, k, f);
  }
}

template <class T>
void plain_moments(const Forward& job, const Tile& t, const Coefficients& k, Sums sums) {
  sum_plain<Which::kM, T>(job.layout, t, k, sums, MomentTerms<T>(job));
}

template <class T, After kAfter>
void plain_forward(const Forward& job, const Tile& t, const Coefficients& k) {
  if (job.residual != nullptr) {
    write_plain<Which::kAffine, T>(job.layout, t, k, Write<T, kAfter, true>(job));
  } else if constexpr (kAfter != After::kReluBits) {
    write_plain<Which::kAffine, T>(job.layout, t, k, Write<T, kAfter, false>(job));
  }
}
template <class T>
void plain_forward(const Forward& job, const Tile& t, const Coefficients& k) {
  if (job.epilogue.activation == Activation::kNone) {
    plain_forward<T, After::kNothing>(job, t, k);
  } else if (job.bits == nullptr) {
    plain_forward<T, After::kRelu>(job, t, k);
  } else {
    plain_forward<T, After::kReluBits>(job, t, k);
  }
}

// Calls f with what becomes of the gradient.
template <class F>
FUSEREG_INLINE void with_gradient(const Backward& job, F f) {
  if (job.epilogue.activation == Activation::kNone) {
    f(AfterTag<After::kNothing>{});
  } else if (job.bits == nullptr) {
    f(AfterTag<After::kRelu>{});
  } else {
    f(AfterTag<After::kReluBits>{});
  }
}
template <class T>
void plain_reduce(const Backward& job, const Tile& t, const Coefficients& k, Sums sums) {
  with_gradient(job, [&](auto after) {
    constexpr After kAfter = decltype(after)::kValue;
    sum_plain<Which::kAffine, T>(job.layout, t, k, sums, GradientTerms<T, kAfter>(job));
  });
}
template <class T>
void plain_backward(const Backward& job, const Tile& t, const Coefficients& k) {
  with_gradient(job, [&](auto after) {
    constexpr After kAfter = decltype(after)::kValue;
    if (job.grad_residual == nullptr) {
      write_plain<Which::kGradient, T>(job.layout, t, k, WriteGradient<T, kAfter, false>(job));
    } else {
      write_plain<Which::kGradient, T>(job.layout, t, k, WriteGradient<T, kAfter, true>(job));
    }
  });
}

}  // namespace
}  // namespace fusereg::batch_norm::FUSEREG_ISA
