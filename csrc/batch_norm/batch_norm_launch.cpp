// The CPU launcher of batch normalization: tiles, threads, and what is done once for each
// statistic. Contract: batch_norm.h.
//
// What a tile is depends on the shape alone, and the sums of a channel's tiles are added in their
// order. Threads take whole blocks of channels where there are enough of them: sums, then the
// elements, last rows first, so that the second pass finds in the cache what the first one left
// there. Otherwise they share the tiles, and meet between the passes.
#include <algorithm>
#include <cmath>
#include <numeric>
#include <vector>

#include "batch_norm/batch_norm.h"
#include "core/ceil_div.h"
#include "core/pages.h"
#include "core/parallel.h"

namespace fusereg::batch_norm {
namespace {

constexpr std::int64_t kGrain = 1 << 15;          // elements a thread should get at least
constexpr std::int64_t kTileElements = 1 << 17;   // of a tile, at least
constexpr std::int64_t kMaxTiles = 64;            // of the rows of a group
constexpr std::int64_t kLineBytes = 4096;         // of the lines of one row of a tile, about
constexpr std::int64_t kBlockBytes = 128 * 1024;  // of a block of plain lines, about
constexpr std::int64_t kCacheBytes = 768 * 1024;
constexpr std::int64_t kFewColumns = 256;  // fewer in a strip cost more than they save

double get(const PerChannel& values, std::int64_t i) {
  return dispatch_dtype(values.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    return static_cast<double>(to_compute(static_cast<const T*>(values.data)[i]));
  });
}

// The numbers of `n` channels; `absent` for each if there are none.
void read(const PerChannel& values, std::int64_t begin, std::int64_t n, double absent, double* to) {
  if (values.data == nullptr) {
    std::fill_n(to, n, absent);
    return;
  }
  dispatch_dtype(values.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    const T* const from = static_cast<const T*>(values.data) + begin;
    for (std::int64_t i = 0; i < n; ++i) to[i] = static_cast<double>(to_compute(from[i]));
  });
}

void write_numbers(const PerChannel& values, std::int64_t begin, std::int64_t n,
                   const double* from) {
  if (values.data == nullptr) return;
  dispatch_dtype(values.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    T* const to = static_cast<T*>(values.data) + begin;
    for (std::int64_t i = 0; i < n; ++i) to[i] = from_compute<T>(static_cast<Compute<T>>(from[i]));
  });
}

// How many channels' short lines are taken as one: of about kLineBytes, which processors then read
// ahead, and of whole lines of the cache, which may then be written past it; but a few blocks for
// threads to share. Rather fewer blocks than lines in pieces: 7 x 7 elements of 16 bits in 512
// channels take 1.5 times as long where results are read before they are written.
std::int64_t folded_width(const Layout& layout, std::int64_t size) {
  constexpr std::int64_t kCacheLine = 64;
  constexpr std::int64_t kBlocks = 16;
  constexpr std::int64_t kFewBlocks = 8;
  const std::int64_t most = std::min(kLineBytes / (layout.inner * size), kMaxPlainLines);
  std::int64_t width = most;
  while (width > 1 && ceil_div(layout.channels, width) < kBlocks) width = ceil_div(width, 2);
  const std::int64_t whole = kCacheLine / std::gcd(layout.inner * size, kCacheLine);
  if (width >= whole) return width / whole * whole;
  return whole <= most && layout.channels >= kFewBlocks * whole ? whole : width;
}

// How the elements are cut up.
class Tiling {
 public:
  Tiling(const Layout& layout, DType dtype, bool plain, bool bits)
      : layout_(layout), groups_(layout.groups()) {
    const std::int64_t size = dtype_size(dtype);
    const std::int64_t rows = std::min(layout.group_rows, layout.outer);
    if (layout.inner == 1) {
      width_ = std::min(layout.channels, kMaxColumns);
      // Columns whose elements fit the cache, if they are not too narrow for that: blocks of about
      // one size, of which there is an even number for two threads and more.
      const std::int64_t fitting = kCacheBytes / std::max<std::int64_t>(rows * size, 1) / 32 * 32;
      if (fitting < width_ && fitting >= kFewColumns) {
        const std::int64_t blocks = ceil_div(ceil_div(layout.channels, fitting), 2) * 2;
        width_ = std::max(ceil_div(ceil_div(layout.channels, blocks), 32) * 32, kFewColumns);
      }
    } else if (plain && folds(layout, dtype, bits, rows)) {
      width_ = folded_width(layout, size);
    } else if (plain) {
      const std::int64_t bytes = std::max<std::int64_t>(rows * layout.inner * size, 1);
      width_ = std::clamp<std::int64_t>(kBlockBytes / bytes, 1, kMaxPlainLines);
    } else if (layout.inner <= kMaxFolded) {
      width_ = std::min(layout.channels, kMaxColumns / layout.inner);
    } else {
      width_ = std::clamp<std::int64_t>(kLineBytes / (layout.inner * size), 1, kMaxLines);
    }
    width_ = std::max(width_, std::int64_t{1});  // there may be no channels
    fits_ = rows * width_ * layout.inner * size <= kCacheBytes;
    blocks_ = ceil_div(layout.channels, width_);
    tile_rows_ =
        std::max({ceil_div(kTileElements, std::max<std::int64_t>(width_ * layout.inner, 1)),
                  ceil_div(rows, kMaxTiles), std::int64_t{1}});
    tiles_ = ceil_div(rows, tile_rows_);
    // Of one size, so that threads get as much.
    if (tiles_ > 0) tile_rows_ = ceil_div(rows, tiles_);
  }

  std::int64_t groups() const { return groups_; }
  // Of channels.
  std::int64_t blocks() const { return blocks_; }
  // Of a group's rows; the last group may have fewer.
  std::int64_t tiles() const { return tiles_; }

  std::int64_t group_begin(std::int64_t group) const { return group * layout_.group_rows; }
  std::int64_t group_rows(std::int64_t group) const {
    return std::min(layout_.group_rows, layout_.outer - group_begin(group));
  }

  // `rows` is 0 where there is no such tile.
  Tile tile(std::int64_t group, std::int64_t block, std::int64_t index) const {
    Tile t;
    t.channel = block * width_;
    t.channels = std::min(width_, layout_.channels - t.channel);
    t.row = group_begin(group) + index * tile_rows_;
    t.rows = std::clamp<std::int64_t>(group_rows(group) - index * tile_rows_, 0, tile_rows_);
    return t;
  }

  // Whether a thread should do both passes over the rows of a block of channels.
  bool by_blocks() const {
    const std::int64_t pieces = groups_ * blocks_;
    const std::int64_t threads = max_threads();
    if (threads == 1 || pieces * tiles_ == 1) return true;
    const bool balanced = pieces % threads == 0 || pieces >= 4 * threads;
    return balanced && (fits_ || layout_.inner > 1);
  }

  std::int64_t elements_per_block() const {
    return std::max<std::int64_t>(layout_.numel() / std::max<std::int64_t>(groups_ * blocks_, 1),
                                  1);
  }
  std::int64_t elements_per_tile() const {
    return std::max<std::int64_t>(elements_per_block() / std::max<std::int64_t>(tiles_, 1), 1);
  }

 private:
  Layout layout_;
  std::int64_t groups_;
  std::int64_t width_ = 1;
  std::int64_t blocks_ = 0;
  std::int64_t tile_rows_ = 1;
  std::int64_t tiles_ = 0;
  bool fits_ = false;
};

// Two sums for each channel of a block; zeros at first.
struct BlockSums {
  double first[kMaxColumns], second[kMaxColumns];
  explicit BlockSums(std::int64_t channels) {
    std::fill_n(first, channels, 0.0);
    std::fill_n(second, channels, 0.0);
  }
  Sums sums() { return {first, second}; }
};

// What forward and backward have in common: the two passes, by blocks or by tiles. Derived classes
// say what a pass does:
//   begin_sums(group, tile)                    before the first sums of a block
//   prepare_sums(group, tile, coefficients)   what the sums are taken with
//   add(tile, coefficients, sums)             a tile's sums
//   finish_sums(group, tile, sums)            a block's sums are there; true: once more, please
//   prepare(group, tile, coefficients)        what the elements are written with
//   write(tile, coefficients)
template <class Derived>
class Passes {
 public:
  // Job: Forward or Backward.
  template <class Job>
  explicit Passes(const Job& job)
      : tiling_(job.layout, job.dtype, is_plain(job), job.bits != nullptr), layout_(job.layout) {}

  void run(bool with_sums, bool with_elements) {
    if (layout_.numel() == 0) return;
    if (tiling_.by_blocks()) {
      const std::int64_t grain = ceil_div(kGrain, tiling_.elements_per_block());
      parallel_for(tiling_.groups() * tiling_.blocks(), grain,
                   [&](std::int64_t begin, std::int64_t end) {
                     for (std::int64_t i = begin; i < end; ++i) {
                       const std::int64_t group = i / tiling_.blocks();
                       const std::int64_t block = i % tiling_.blocks();
                       if (with_sums) sum_block(group, block);
                       if (with_elements) write_block(group, block);
                     }
                   });
      return;
    }
    if (with_sums) sum_by_tiles();
    if (with_elements) write_by_tiles();
  }

 protected:
  Tiling tiling_;
  Layout layout_;

 private:
  Derived& self() { return *static_cast<Derived*>(this); }

  void sum_block(std::int64_t group, std::int64_t block) {
    const Tile whole = tiling_.tile(group, block, 0);
    self().begin_sums(group, whole);
    bool again = true;
    while (again) {
      Coefficients k;
      self().prepare_sums(group, whole, k);
      BlockSums total(whole.channels);
      for (std::int64_t t = 0; t < tiling_.tiles(); ++t) {
        const Tile tile = tiling_.tile(group, block, t);
        if (tile.rows > 0) self().add(tile, k, total.sums());
      }
      again = self().finish_sums(group, whole, total.sums());
    }
  }

  void write_block(std::int64_t group, std::int64_t block) {
    Coefficients k;
    self().prepare(group, tiling_.tile(group, block, 0), k);
    for (std::int64_t t = tiling_.tiles() - 1; t >= 0; --t) {
      const Tile tile = tiling_.tile(group, block, t);
      if (tile.rows > 0) self().write(tile, k);
    }
  }

  // Tiles in the order of memory: blocks of channels of the same rows are neighbors.
  template <class F>
  void for_each_tile(F f) {
    const std::int64_t blocks = tiling_.blocks();
    const std::int64_t tiles = tiling_.tiles();
    const std::int64_t grain = ceil_div(kGrain, tiling_.elements_per_tile());
    const std::int64_t count = tiling_.groups() * tiles * blocks;
    parallel_for(count, grain, [&](std::int64_t begin, std::int64_t end) { f(begin, end); });
  }

  void sum_by_tiles() {
    const std::int64_t blocks = tiling_.blocks();
    const std::int64_t tiles = tiling_.tiles();
    const std::int64_t channels = layout_.channels;
    // [group, tile, 2, channel]
    std::vector<double> parts(static_cast<std::size_t>(tiling_.groups() * tiles * 2 * channels));
    for (std::int64_t i = 0; i < tiling_.groups() * blocks; ++i)
      self().begin_sums(i / blocks, tiling_.tile(i / blocks, i % blocks, 0));
    bool again = true;
    while (again) {
      std::fill(parts.begin(), parts.end(), 0.0);
      for_each_tile([&](std::int64_t begin, std::int64_t end) {
        Coefficients k;
        for (std::int64_t i = begin; i < end; ++i) {
          const std::int64_t group = i / blocks / tiles;
          const Tile tile = tiling_.tile(group, i % blocks, i / blocks % tiles);
          if (tile.rows == 0) continue;
          self().prepare_sums(group, tile, k);
          double* const part = parts.data() + i / blocks * 2 * channels + tile.channel;
          self().add(tile, k, {part, part + channels});
        }
      });
      again = false;
      for (std::int64_t i = 0; i < tiling_.groups() * blocks; ++i) {
        const std::int64_t group = i / blocks;
        const Tile whole = tiling_.tile(group, i % blocks, 0);
        BlockSums total(whole.channels);
        for (std::int64_t t = 0; t < tiles; ++t) {
          const double* const part =
              parts.data() + (group * tiles + t) * 2 * channels + whole.channel;
          for (std::int64_t c = 0; c < whole.channels; ++c) {
            total.first[c] += part[c];
            total.second[c] += part[channels + c];
          }
        }
        again = self().finish_sums(group, whole, total.sums()) || again;
      }
    }
  }

  void write_by_tiles() {
    const std::int64_t blocks = tiling_.blocks();
    const std::int64_t tiles = tiling_.tiles();
    for_each_tile([&](std::int64_t begin, std::int64_t end) {
      Coefficients k;
      for (std::int64_t i = end - 1; i >= begin; --i) {
        const std::int64_t group = i / blocks / tiles;
        const Tile tile = tiling_.tile(group, i % blocks, i / blocks % tiles);
        if (tile.rows == 0) continue;
        self().prepare(group, tile, k);
        self().write(tile, k);
      }
    });
  }
};

// As a number of the type that computes.
double rounded_for(DType dtype, double value) {
  return dtype == DType::kFloat64 ? value : static_cast<double>(static_cast<float>(value));
}

// What a variance is while its sums are being taken.
constexpr double kFirstTime = -1.0;
constexpr double kSecondTime = -2.0;

// What z and its gradient are made of, for the channels of a tile; Job: Forward or Backward.
struct Parameters {
  double mean[kMaxColumns], variance[kMaxColumns];

  template <class Job>
  Parameters(const Job& job, std::int64_t group, const Tile& tile, Coefficients& k) {
    const std::int64_t n = tile.channels;
    if (job.moments == nullptr) {
      read(job.running_mean, tile.channel, n, 0.0, mean);
      read(job.running_var, tile.channel, n, 1.0, variance);
    } else {
      const std::int64_t s = group * job.layout.channels + tile.channel;
      std::copy_n(job.moments + s, n, mean);
      std::copy_n(job.moments + job.layout.statistics() + s, n, variance);
    }
    read(job.weight, tile.channel, n, 1.0, k.a);
    read(job.bias, tile.channel, n, 0.0, k.b);
    for (std::int64_t i = 0; i < n; ++i) {
      k.m[i] = rounded_for(job.dtype, mean[i]);
      k.a[i] = k.a[i] / std::sqrt(variance[i] + job.eps);
      k.b[i] = k.b[i] - (mean[i] - k.m[i]) * k.a[i];
    }
  }
};

// How many elements of a group's rows count, for each group.
double count_of(const Layout& l, const std::uint8_t* mask, std::int64_t begin, std::int64_t rows) {
  if (mask == nullptr) return static_cast<double>(rows * l.inner);
  std::int64_t count = 0;
  for (std::int64_t i = begin * l.inner; i < (begin + rows) * l.inner; ++i) count += mask[i] != 0;
  return static_cast<double>(count);
}

class ForwardRun : public Passes<ForwardRun> {
 public:
  explicit ForwardRun(const Forward& job) : Passes(job), job_(job), kernels_(cpu_kernels()) {}

  void execute() {
    const bool compute = job_.statistics == Statistics::kCompute;
    if (compute) start();
    run(compute, job_.y != nullptr);
    if (job_.statistics != Statistics::kFixed) update_running();
  }

  // As means the numbers about which the sums are first taken: the mean of a few of a channel's
  // elements.
  void begin_sums(std::int64_t group, const Tile& whole) const {
    constexpr std::int64_t kSamples = 8;
    if (job_.moments[2 * layout_.statistics() + group * layout_.channels] == 0.0) return;
    const std::int64_t inner = std::min(layout_.inner, kSamples);
    const std::int64_t outer =
        layout_.inner == 1 ? std::min(tiling_.group_rows(group), kSamples) : 1;
    double* const mean = job_.moments + group * layout_.channels + whole.channel;
    dispatch_dtype(job_.dtype, [&](auto tag) {
      using T = typename decltype(tag)::type;
      const T* const x = static_cast<const T*>(job_.x);
      double n = 0.0;
      for (std::int64_t o = whole.row; o < whole.row + outer; ++o) {
        for (std::int64_t i = 0; i < inner; ++i) {
          if (job_.mask != nullptr && job_.mask[o * layout_.inner + i] == 0) continue;
          n += 1.0;
          const T* const from = x + (o * layout_.channels + whole.channel) * layout_.inner + i;
          for (std::int64_t c = 0; c < whole.channels; ++c)
            mean[c] += static_cast<double>(to_compute(from[c * layout_.inner]));
        }
      }
      for (std::int64_t c = 0; c < whole.channels; ++c) {
        const double guess = n == 0.0 ? 0.0 : mean[c] / n;
        mean[c] = std::isfinite(guess) ? rounded(guess) : 0.0;
      }
    });
  }

  void prepare_sums(std::int64_t group, const Tile& tile, Coefficients& k) const {
    // m alone, which is a number of the type that computes.
    std::copy_n(job_.moments + group * layout_.channels + tile.channel, tile.channels, k.m);
  }

  void add(const Tile& tile, const Coefficients& k, Sums sums) const {
    kernels_.moments(job_, tile, k, sums);
  }

  // The sums are of x - shift, and exact enough if the shift was within two standard deviations of
  // the mean; else they are taken once more about the mean that they gave. Until a statistic is
  // done, its variance says so.
  bool finish_sums(std::int64_t group, const Tile& whole, Sums sums) const {
    const std::int64_t statistics = layout_.statistics();
    bool again = false;
    for (std::int64_t i = 0; i < whole.channels; ++i) {
      const std::int64_t s = group * layout_.channels + whole.channel + i;
      double& mean = job_.moments[s];
      double& variance = job_.moments[statistics + s];
      const double n = job_.moments[2 * statistics + s];
      if (variance != kFirstTime && variance != kSecondTime) continue;
      if (n == 0.0) {
        mean = variance = 0.0;
        continue;
      }
      const double d = sums.first[i] / n;
      const double v = std::max(0.0, sums.second[i] / n - d * d);
      const bool finite = std::isfinite(sums.second[i]);
      mean += d;
      if (!finite) {
        in_float64(group, whole.channel + i, mean, variance);
      } else if (variance == kFirstTime && d * d > 4.0 * v) {
        mean = rounded(mean);
        variance = kSecondTime;
        again = true;
      } else {
        variance = v;
      }
    }
    return again;
  }

  void prepare(std::int64_t group, const Tile& tile, Coefficients& k) const {
    const Parameters made(job_, group, tile, k);
  }

  void write(const Tile& tile, const Coefficients& k) const { kernels_.forward(job_, tile, k); }

 private:
  void start() const {
    const std::int64_t statistics = layout_.statistics();
    for (std::int64_t group = 0; group < tiling_.groups(); ++group) {
      const std::int64_t rows = layout_.outer == 0 ? 0 : tiling_.group_rows(group);
      const double count = count_of(layout_, job_.mask, tiling_.group_begin(group), rows);
      double* const first = job_.moments + group * layout_.channels;
      std::fill_n(first, layout_.channels, 0.0);
      std::fill_n(first + statistics, layout_.channels, layout_.numel() == 0 ? 0.0 : kFirstTime);
      std::fill_n(first + 2 * statistics, layout_.channels, count);
    }
  }

  double rounded(double value) const { return rounded_for(job_.dtype, value); }

  // Where float32 squares overflow; elements that are not finite give NaN.
  void in_float64(std::int64_t group, std::int64_t channel, double& mean, double& variance) const {
    dispatch_dtype(job_.dtype, [&](auto tag) {
      using T = typename decltype(tag)::type;
      const T* const x = static_cast<const T*>(job_.x);
      const std::int64_t begin = tiling_.group_begin(group);
      const std::int64_t end = begin + tiling_.group_rows(group);
      auto sum = [&](double shift, bool square) {
        double total = 0.0;
        double n = 0.0;
        for (std::int64_t o = begin; o < end; ++o) {
          for (std::int64_t i = 0; i < layout_.inner; ++i) {
            if (job_.mask != nullptr && job_.mask[o * layout_.inner + i] == 0) continue;
            const T element = x[(o * layout_.channels + channel) * layout_.inner + i];
            const double d = static_cast<double>(to_compute(element)) - shift;
            if (!std::isfinite(d)) return std::nan("");
            total += square ? d * d : d;
            n += 1.0;
          }
        }
        return total / n;
      };
      mean = sum(0.0, false);
      variance = std::isnan(mean) ? mean : sum(mean, true);
    });
  }

  void update_running() const {
    if (job_.batches != nullptr) ++*job_.batches;
    if (job_.running_mean.data == nullptr && job_.running_var.data == nullptr) return;
    const double momentum = job_.momentum != kCumulative ? job_.momentum
                            : job_.batches == nullptr    ? 0.0
                                                         : 1.0 / static_cast<double>(*job_.batches);
    // A block of channels at a time: there may be thousands, and this is done by one thread.
    for (std::int64_t begin = 0; begin < layout_.channels; begin += kMaxColumns) {
      const std::int64_t n = std::min(kMaxColumns, layout_.channels - begin);
      double mean[kMaxColumns], square[kMaxColumns];  // of squared deviations, their sum
      const double count = merge_groups(begin, n, mean, square);
      if (count == 0.0) return;
      blend(job_.running_mean, begin, n, mean, momentum);
      if (count == 1.0) continue;
      for (std::int64_t i = 0; i < n; ++i) square[i] /= count - 1.0;
      blend(job_.running_var, begin, n, square, momentum);
    }
  }

  // The groups' statistics as those of all elements; returns how many elements a channel has.
  double merge_groups(std::int64_t begin, std::int64_t n, double* mean, double* square) const {
    const std::int64_t statistics = layout_.statistics();
    double count = 0.0;
    std::fill_n(mean, n, 0.0);
    std::fill_n(square, n, 0.0);
    for (std::int64_t group = 0; group < layout_.groups(); ++group) {
      const double* const moments = job_.moments + group * layout_.channels + begin;
      const double more = moments[2 * statistics];
      if (more == 0.0) continue;
      const double before = count;
      count += more;
      for (std::int64_t i = 0; i < n; ++i) {
        const double d = moments[i] - mean[i];
        mean[i] += d * (more / count);
        square[i] += moments[statistics + i] * more + d * d * (more * before / count);
      }
    }
    return count;
  }

  static void blend(const PerChannel& running, std::int64_t begin, std::int64_t n,
                    const double* values, double momentum) {
    if (running.data == nullptr) return;
    dispatch_dtype(running.dtype, [&](auto tag) {
      using T = typename decltype(tag)::type;
      T* const to = static_cast<T*>(running.data) + begin;
      for (std::int64_t i = 0; i < n; ++i) {
        const auto old = static_cast<double>(to_compute(to[i]));
        const double blended = (1.0 - momentum) * old + momentum * values[i];
        to[i] = from_compute<T>(static_cast<Compute<T>>(blended));
      }
    });
  }

  const Forward& job_;
  const CpuKernels& kernels_;
};

class BackwardRun : public Passes<BackwardRun> {
 public:
  BackwardRun(const Backward& job, double* sums)
      : Passes(job), job_(job), kernels_(cpu_kernels()), sums_(sums) {}

  void execute() {
    if (job_.reduce && layout_.numel() == 0) std::fill_n(sums_, 2 * layout_.statistics(), 0.0);
    run(job_.reduce, job_.grad_x != nullptr || job_.grad_residual != nullptr);
    if (job_.reduce) parameter_gradients();
  }

  void begin_sums(std::int64_t, const Tile&) const {}

  void prepare_sums(std::int64_t group, const Tile& tile, Coefficients& k) const {
    parameters(group, tile, k);
  }

  void add(const Tile& tile, const Coefficients& k, Sums sums) const {
    kernels_.reduce(job_, tile, k, sums);
  }

  bool finish_sums(std::int64_t group, const Tile& whole, Sums sums) const {
    for (std::int64_t i = 0; i < whole.channels; ++i) {
      const std::int64_t c = whole.channel + i;
      const std::int64_t s = group * layout_.channels + c;
      const double center = job_.from_y ? bias(c) : mean(s, c);
      const double low = center - rounded_for(job_.dtype, center);
      const double dot = sums.second[i] - low * sums.first[i];
      sums_[s] = sums.first[i];
      sums_[layout_.statistics() + s] = job_.from_y ? dot * inverse_of_a(s, c) : dot;
    }
    return false;
  }

  void prepare(std::int64_t group, const Tile& tile, Coefficients& k) const {
    const Parameters made = parameters(group, tile, k);
    std::fill_n(k.q, tile.channels, 0.0);
    std::fill_n(k.r, tile.channels, 0.0);
    if (job_.statistics == Statistics::kFixed) return;
    const std::int64_t statistics = layout_.statistics();
    for (std::int64_t i = 0; i < tile.channels; ++i) {
      const std::int64_t s = group * layout_.channels + tile.channel + i;
      const double n = job_.moments[2 * statistics + s];
      if (n == 0.0) continue;
      k.q[i] = -k.a[i] * sums_[statistics + s] / (n * (made.variance[i] + job_.eps));
      if (job_.from_y) k.q[i] *= inverse_of_a(s, tile.channel + i);
      k.r[i] = -k.a[i] * sums_[s] / n - k.q[i] * (made.mean[i] - k.m[i]);
    }
  }

  void write(const Tile& tile, const Coefficients& k) const { kernels_.backward(job_, tile, k); }

 private:
  // With from_y, what the kernels take for x is z = (x - mean) * a + bias: its center is the bias.
  Parameters parameters(std::int64_t group, const Tile& tile, Coefficients& k) const {
    Parameters made(job_, group, tile, k);
    if (job_.from_y) {
      read(job_.bias, tile.channel, tile.channels, 0.0, made.mean);
      for (std::int64_t i = 0; i < tile.channels; ++i)
        k.m[i] = rounded_for(job_.dtype, made.mean[i]);
    }
    return made;
  }
  // From z - bias to x - mean; 0 where the weight has left nothing of x.
  double inverse_of_a(std::int64_t s, std::int64_t c) const {
    const double weight = job_.weight.data == nullptr ? 1.0 : get(job_.weight, c);
    return weight == 0.0 ? 0.0 : std::sqrt(variance(s, c) + job_.eps) / weight;
  }
  double bias(std::int64_t c) const { return job_.bias.data == nullptr ? 0.0 : get(job_.bias, c); }
  double mean(std::int64_t s, std::int64_t c) const {
    return job_.moments == nullptr ? get(job_.running_mean, c) : job_.moments[s];
  }
  double variance(std::int64_t s, std::int64_t c) const {
    return job_.moments == nullptr ? get(job_.running_var, c)
                                   : job_.moments[layout_.statistics() + s];
  }
  void parameter_gradients() const {
    if (job_.grad_weight.data == nullptr && job_.grad_bias.data == nullptr) return;
    const std::int64_t statistics = layout_.statistics();
    for (std::int64_t begin = 0; begin < layout_.channels; begin += kMaxColumns) {
      const std::int64_t n = std::min(kMaxColumns, layout_.channels - begin);
      double weight[kMaxColumns] = {}, bias[kMaxColumns] = {}, variance[kMaxColumns];
      if (job_.moments == nullptr) read(job_.running_var, begin, n, 1.0, variance);
      // Of no elements the variance is 0, and eps may be.
      const std::int64_t groups = layout_.numel() == 0 ? 0 : layout_.groups();
      for (std::int64_t group = 0; group < groups; ++group) {
        const std::int64_t s = group * layout_.channels + begin;
        if (job_.moments != nullptr) std::copy_n(job_.moments + statistics + s, n, variance);
        for (std::int64_t i = 0; i < n; ++i) {
          bias[i] += sums_[s + i];
          weight[i] += sums_[statistics + s + i] / std::sqrt(variance[i] + job_.eps);
        }
      }
      write_numbers(job_.grad_weight, begin, n, weight);
      write_numbers(job_.grad_bias, begin, n, bias);
    }
  }

  const Backward& job_;
  const CpuKernels& kernels_;
  double* sums_;
};

}  // namespace

void run_cpu(const Forward& job) {
  prepare_pages(job.y, job.layout.numel() * dtype_size(job.dtype));
  ForwardRun(job).execute();
}

void run_cpu(const Backward& job) {
  const std::int64_t bytes = job.layout.numel() * dtype_size(job.dtype);
  prepare_pages(job.grad_x, bytes);
  prepare_pages(job.grad_residual, bytes);
  if (job.sums != nullptr) {
    BackwardRun(job, job.sums).execute();
    return;
  }
  constexpr std::int64_t kFew = 512;
  const std::int64_t count = 2 * job.layout.statistics();
  if (count <= kFew) {
    double sums[kFew];
    BackwardRun(job, sums).execute();
    return;
  }
  std::vector<double> sums(static_cast<std::size_t>(count));
  BackwardRun(job, sums.data()).execute();
}

}  // namespace fusereg::batch_norm
