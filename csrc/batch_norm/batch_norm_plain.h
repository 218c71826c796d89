// For the CPU kernels alone, once per instruction set: the kernels of the plain cases (no mask, no
// dropout, ReLU or no activation), which are those of most networks. Each is one loop that keeps in
// registers what the strips of the others keep in the cache.
//
// Lines (inner > 1): of the sums, a channel's lines follow one another, and its sums stay in
// registers from its first row to its last; element i of a line in lane i % kLanes. Results are
// written in the order of memory, the lines of a row's channels one after the other.
// Columns: batch_norm_columns.h.
#pragma once

#include "batch_norm/batch_norm_columns.h"

namespace fusereg::batch_norm::FUSEREG_ISA {
namespace {

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
