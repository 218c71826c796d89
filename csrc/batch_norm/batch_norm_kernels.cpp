// CPU kernels of batch normalization; compiled once per instruction set. Contract: batch_norm.h.
//
// The plain cases have kernels of their own: batch_norm_plain_kernels.cpp. What follows is of all
// others.
//
// A tile is walked line by line: a line is the inner elements of one (o, c), whose coefficients are
// the same for all of them (Same), or with inner = 1 the channels of one o, each with its own
// (Columns). A line is cut into strips, which stay in the first-level cache from one loop over them
// to the next: so each step of an epilogue is a loop of its own, and there is one for each step
// rather than one for each combination of them. Strips are padded to whole blocks of kLanes.
//
// Sums along a line are kept in kLanes columns, element i of a strip in column i % kLanes, whatever
// the vector width: so every instruction set adds the same numbers in the same order and gives the
// same bits.
#include "batch_norm/batch_norm.h"
#include "batch_norm/batch_norm_memory.h"
#include "batch_norm/batch_norm_sums.h"

namespace fusereg::batch_norm::FUSEREG_ISA {
namespace {

// --- sums ---

// What is added for an element: d and d^2 (dz null), or dz and dz * d; d = x - m.
template <bool kMoments, class C>
void add_line(LaneSums<C>& total, const C* x, const C* dz, C m, std::int64_t n) {
  const Vector<C> m0 = broadcast(m);
  // Copies, so that they stay in registers.
  Block<C> first = total.first;
  Block<C> second = total.second;
  int count = total.terms;
  for (std::int64_t i = 0; i < n;) {
    const std::int64_t there = (n - i) / kLanes;
    const std::int64_t blocks = there < kRun - count ? there : kRun - count;
    for (std::int64_t b = 0; b < blocks; ++b, i += kLanes) {
      FUSEREG_EACH_VECTOR(v) {
        const Vector<C> d = load(x + i + v * kWidth<C>) - m0;
        const Vector<C> one = kMoments ? d : load(dz + i + v * kWidth<C>);
        first.v[v] += one;
        second.v[v] += one * d;
      }
    }
    count += static_cast<int>(blocks);
    if (count == kRun) {
      flush(total, first, second);
      count = 0;
    }
  }
  total.first = first;
  total.second = second;
  total.terms = count;
}

template <bool kMoments, class C>
void add_row(ColumnSums<C>& total, const C* x, const C* dz, const C* m, std::int64_t n) {
  C* const first = total.first;
  C* const second = total.second;
  for (std::int64_t i = 0; i < n; i += kWidth<C>) {
    const Vector<C> d = load(x + i) - load(m + i);
    const Vector<C> one = kMoments ? d : load(dz + i);
    store(first + i, load(first + i) + one);
    store(second + i, load(second + i) + one * d);
  }
}

// Both kinds of sums, for one tile.
template <class C>
class TileSums {
 public:
  TileSums(const Tile& tile, const Fold& fold) : fold_(fold), channels_(tile.channels) {
    if (fold.columns) {
      columns_.clear(fold.width);
    } else {
      memset(static_cast<void*>(lines_), 0,
             static_cast<std::size_t>(tile.channels) * sizeof(LaneSums<C>));
    }
  }

  template <bool kMoments>
  void add(const Same<C>& k, std::int64_t channel, const C* x, const C* dz, std::int64_t n) {
    add_line<kMoments>(lines_[channel], x, dz, *k.m_, n);
  }
  template <bool kMoments>
  void add(const Columns<C>& k, std::int64_t, const C* x, const C* dz, std::int64_t n) {
    add_row<kMoments>(columns_, x, dz, k.m_, n);
  }
  void row_done() {
    if (++columns_.terms == kRun) columns_.flush(fold_.width);
  }
  void add_to(Sums sums) {
    if (fold_.columns) columns_.flush(fold_.width);
    for (std::int64_t c = 0; c < channels_; ++c) {
      double first = 0.0;
      double second = 0.0;
      if (fold_.columns) {
        // Four at a time, for one addition would wait for the other.
        double part[2][4] = {};
        for (std::int64_t r = 0; r < fold_.rows; ++r) {
          for (std::int64_t i = 0; i < fold_.inner; ++i) {
            const std::int64_t column = (r * channels_ + c) * fold_.inner + i;
            part[0][(r + i) % 4] += columns_.wide_first[column];
            part[1][(r + i) % 4] += columns_.wide_second[column];
          }
        }
        first = (part[0][0] + part[0][1]) + (part[0][2] + part[0][3]);
        second = (part[1][0] + part[1][1]) + (part[1][2] + part[1][3]);
      } else {
        LaneSums<C>& total = lines_[c];
        flush(total, total.first, total.second);
        first = add_lanes(total.wide_first);
        second = add_lanes(total.wide_second);
      }
      sums.first[c] += first;
      sums.second[c] += second;
    }
  }

 private:
  const Fold& fold_;
  std::int64_t channels_;
  ColumnSums<C> columns_;
  LaneSums<C> lines_[kMaxLines];
};

// Calls on_strip(coefficients, strip, channel in the tile) for each strip of the tile.
template <class C, class OnStrip, class OnMaskedRow>
FUSEREG_INLINE void for_each_strip(const Layout& layout, const std::uint8_t* mask, const Tile& tile,
                                   const Fold& fold, bool reverse, const Numbers<C>& k,
                                   OnStrip& on_strip, OnMaskedRow on_masked_row) {
  auto on_line = [&](const Line& line, std::int64_t channel) {
    if (fold.columns) {
      on_strip(Columns<C>(k, 0), line, channel);
      return;
    }
    for (std::int64_t i = 0; i < line.n; i += kStrip) {
      const std::int64_t n = line.n - i < kStrip ? line.n - i : kStrip;
      on_strip(Same<C>(k, channel),
               Line{line.at + i, n, i, line.bits + i / 8,
                    line.mask == nullptr ? nullptr : line.mask + i},
               channel);
    }
  };
  for_each_line(layout, mask, tile, fold, reverse, on_line, on_masked_row);
}

// A strip's words of the mask.
template <class C>
void mask_words(Word<C>* words, const Line& strip, const Fold& fold) {
  const std::int64_t inner = fold.columns ? fold.inner : strip.n;
  for (std::int64_t i = 0; i < strip.n; i += inner) words_of_bytes<C>(words + i, strip.mask, inner);
}

// Calls f(byte of the strip's bits, element of the strip, elements) for each of its lines of bits.
template <class F>
FUSEREG_INLINE void for_each_bit_line(const Line& strip, const Fold& fold, F f) {
  if (!fold.columns || fold.inner == 1) {
    f(strip.bits, std::int64_t{0}, strip.n);
    return;
  }
  const std::int64_t bytes = (fold.inner + 7) / 8;
  for (std::int64_t i = 0, at = strip.bits; i < strip.n; i += fold.inner, at += bytes)
    f(at, i, fold.inner);
}

// --- forward ---

template <class T>
void moments(const Forward& job, const Tile& tile, const Coefficients& coefficients, Sums sums) {
  using C = Compute<T>;
  const T* const x = static_cast<const T*>(job.x);
  Numbers<C> k;
  const Fold fold(job.layout, tile, job.mask, nullptr);
  convert(k, coefficients, tile.channels, fold, Which::kM);
  TileSums<C> total(tile, fold);
  Buffer<C> buffer;
  Buffer<Word<C>> mask;
  auto on_strip = [&](const auto& co, const Line& strip, std::int64_t channel) {
    const C* from = widen(x + strip.at, strip.n, buffer, &co);
    if (strip.mask != nullptr) {
      mask_words<C>(mask.at, strip, fold);
      from = blank<C>(from, mask.at, padded(strip.n), buffer, &co);
    }
    total.template add<true>(co, channel, from, nullptr, padded(strip.n));
    if (fold.columns) total.row_done();
  };
  for_each_strip<C>(job.layout, job.mask, tile, fold, false, k, on_strip, [](const Line&) {});
  total.add_to(sums);
}

template <class T>
void forward(const Forward& job, const Tile& tile, const Coefficients& coefficients) {
  using C = Compute<T>;
  const T* const x = static_cast<const T*>(job.x);
  const T* const residual = static_cast<const T*>(job.residual);
  T* const y = static_cast<T*>(job.y);
  const Epilogue& e = job.epilogue;
  const bool relu = e.activation == Activation::kRelu && job.bits == nullptr;
  const C slope = static_cast<C>(e.slope);
  const C scale = scale_of<C>(e);
  Numbers<C> k;
  const Fold fold(job.layout, tile, job.mask, job.bits);
  convert(k, coefficients, tile.channels, fold, Which::kAffine);
  Keeper<C> keeper(e, e.dropout);
  Buffer<C> x_buffer, residual_buffer, y_buffer;
  Buffer<Word<C>> mask;
  auto on_strip = [&](const auto& co, const Line& strip, std::int64_t) {
    using K = Plain<decltype(co)>;
    const std::int64_t n = padded(strip.n);
    const C* const from = widen(x + strip.at, strip.n, x_buffer, &co);
    const C* const more = residual == nullptr
                              ? nullptr
                              : widen(residual + strip.at, strip.n, residual_buffer, none<K>());
    C* const z = target(y + strip.at, strip.n, y_buffer);
    affine<C>(z, from, more, n, co, relu);
    if (job.bits != nullptr) {
      for_each_bit_line(strip, fold, [&](std::int64_t byte, std::int64_t i, std::int64_t count) {
        const auto write =
            e.activation == Activation::kRelu ? write_bits<true, C> : write_bits<false, C>;
        write(job.bits + byte, z + i, count, n - i);
      });
    }
    if (!relu && e.activation != Activation::kNone) activate<C>(z, n, e.activation, slope);
    if (e.dropout) keep<C>(z, z, n, keeper.words(strip.at, strip.n), scale);
    if (strip.mask != nullptr) {
      mask_words<C>(mask.at, strip, fold);
      keep<C>(z, z, n, mask.at, C(1));
    }
    narrow(y + strip.at, z, strip.n);
  };
  for_each_strip<C>(job.layout, job.mask, tile, fold, true, k, on_strip, [&](const Line& line) {
    memset(y + line.at, 0, static_cast<std::size_t>(line.n) * sizeof(T));
    if (job.bits != nullptr)
      memset(job.bits + line.bits, 0, static_cast<std::size_t>((line.n + 7) / 8));
  });
}

// --- backward ---

// What both passes of backward make of a strip: x, and dz.
template <class T>
class GradientOfZ {
 public:
  using C = Compute<T>;
  GradientOfZ(const Backward& job, const Fold& fold)
      : job_(job),
        fold_(fold),
        keeper_(job.epilogue, job.epilogue.dropout),
        slope_(static_cast<C>(job.epilogue.slope)),
        scale_(scale_of<C>(job.epilogue)) {}

  template <class K>
  void make(const K& co, const Line& strip) {
    const Epilogue& e = job_.epilogue;
    const std::int64_t n = padded(strip.n);
    x = widen(static_cast<const T*>(job_.x) + strip.at, strip.n, x_, &co);
    const C* g = widen(static_cast<const T*>(job_.grad) + strip.at, strip.n, grad_, none<K>());
    const C* residual = nullptr;
    if (job_.residual != nullptr && job_.bits == nullptr && e.activation != Activation::kNone)
      residual =
          widen(static_cast<const T*>(job_.residual) + strip.at, strip.n, residual_, none<K>());
    words = nullptr;
    if (strip.mask != nullptr) {
      mask_words<C>(mask_.at, strip, fold_);
      words = mask_.at;
      x = blank<C>(x, words, n, x_, &co);
      g = blank<C>(g, words, n, grad_, none<K>());
      if (residual != nullptr) residual = blank<C>(residual, words, n, residual_, none<K>());
    }
    if (e.dropout) {
      keep<C>(grad_.at, g, n, keeper_.words(strip.at, strip.n), scale_);
      g = grad_.at;
    }
    dz = g;
    if (job_.from_y) {
      const C slope = e.activation == Activation::kNone ? C(1) : slope_;
      invert<C>(z_.at, dz_.at, x, g, n, slope);
      x = z_.at;
      dz = dz_.at;
      return;
    }
    if (e.activation == Activation::kNone) return;
    dz = dz_.at;
    const bool relu = e.activation == Activation::kRelu;
    if (job_.bits != nullptr) {
      // A line's last block may reach into the next line, which is then made again.
      for_each_bit_line(strip, fold_, [&](std::int64_t byte, std::int64_t i, std::int64_t count) {
        rectify_by_bits<C>(dz_.at + i, g + i, count, n - i, job_.bits + byte, relu, slope_);
      });
    } else if (relu) {
      rectify<true>(dz_.at, g, x, residual, n, co, slope_);
    } else if (e.activation == Activation::kLeakyRelu) {
      rectify<false>(dz_.at, g, x, residual, n, co, slope_);
    } else {
      affine<C>(z_.at, x, residual, n, co, false);
      multiply_by_derivative<C>(dz_.at, g, z_.at, n, e.activation);
    }
  }

  const C* x = nullptr;  // with from_y: z
  const C* dz = nullptr;
  const Word<C>* words = nullptr;  // of the mask

 private:
  const Backward& job_;
  const Fold& fold_;
  Keeper<C> keeper_;
  C slope_, scale_;
  Buffer<C> x_, grad_, residual_, z_, dz_;
  Buffer<Word<C>> mask_;
};

template <class T>
void reduce(const Backward& job, const Tile& tile, const Coefficients& coefficients, Sums sums) {
  using C = Compute<T>;
  Numbers<C> k;
  const Fold fold(job.layout, tile, job.mask, job.bits);
  convert(k, coefficients, tile.channels, fold, Which::kAffine);
  GradientOfZ<T> from(job, fold);
  TileSums<C> total(tile, fold);
  auto on_strip = [&](const auto& co, const Line& strip, std::int64_t channel) {
    from.make(co, strip);
    total.template add<false>(co, channel, from.x, from.dz, padded(strip.n));
    if (fold.columns) total.row_done();
  };
  for_each_strip<C>(job.layout, job.mask, tile, fold, false, k, on_strip, [](const Line&) {});
  total.add_to(sums);
}

template <class T>
void backward(const Backward& job, const Tile& tile, const Coefficients& coefficients) {
  using C = Compute<T>;
  T* const grad_x = static_cast<T*>(job.grad_x);
  T* const grad_residual = static_cast<T*>(job.grad_residual);
  Numbers<C> k;
  const Fold fold(job.layout, tile, job.mask, job.bits);
  convert(k, coefficients, tile.channels, fold, Which::kGradient);
  GradientOfZ<T> from(job, fold);
  Buffer<C> buffer;
  auto on_strip = [&](const auto& co, const Line& strip, std::int64_t) {
    const std::int64_t n = padded(strip.n);
    from.make(co, strip);
    C* const made = grad_x == nullptr || grad_residual != nullptr
                        ? buffer.at
                        : target(grad_x + strip.at, strip.n, buffer);
    if (grad_x != nullptr) {
      gradient<C>(made, from.dz, from.x, n, co);
      if (from.words != nullptr) keep<C>(made, made, n, from.words, C(1));
    }
    // grad_x or grad_residual may be grad, from which dz may be read until here.
    if (grad_residual != nullptr) narrow(grad_residual + strip.at, from.dz, strip.n);
    if (grad_x != nullptr) narrow(grad_x + strip.at, made, strip.n);
  };
  for_each_strip<C>(job.layout, job.mask, tile, fold, true, k, on_strip, [&](const Line& line) {
    const auto bytes = static_cast<std::size_t>(line.n) * sizeof(T);
    if (grad_residual != nullptr) memset(grad_residual + line.at, 0, bytes);
    if (grad_x != nullptr) memset(grad_x + line.at, 0, bytes);
  });
}

// --- the table ---

void moments_any(const Forward& job, const Tile& tile, const Coefficients& k, Sums sums) {
  if (is_plain(job.dtype, job.mask)) return plain_kernels.moments(job, tile, k, sums);
  dispatch_dtype(job.dtype,
                 [&](auto tag) { moments<typename decltype(tag)::type>(job, tile, k, sums); });
}
void forward_any(const Forward& job, const Tile& tile, const Coefficients& k) {
  if (is_plain(job)) return plain_kernels.forward(job, tile, k);
  dispatch_dtype(job.dtype, [&](auto tag) { forward<typename decltype(tag)::type>(job, tile, k); });
}
void reduce_any(const Backward& job, const Tile& tile, const Coefficients& k, Sums sums) {
  if (is_plain(job)) return plain_kernels.reduce(job, tile, k, sums);
  dispatch_dtype(job.dtype,
                 [&](auto tag) { reduce<typename decltype(tag)::type>(job, tile, k, sums); });
}
void backward_any(const Backward& job, const Tile& tile, const Coefficients& k) {
  if (is_plain(job)) return plain_kernels.backward(job, tile, k);
  dispatch_dtype(job.dtype,
                 [&](auto tag) { backward<typename decltype(tag)::type>(job, tile, k); });
}

}  // namespace

const CpuKernels kernels = {&moments_any, &forward_any, &reduce_any, &backward_any};

}  // namespace fusereg::batch_norm::FUSEREG_ISA
