// The CPU launcher of the fused dropouts. Contract: fused_dropout.h.
#include <algorithm>
#include <cstring>

#include "core/ceil_div.h"
#include "core/pages.h"
#include "core/parallel.h"
#include "fused_dropout/fused_dropout.h"

namespace fusereg::fused_dropout {
namespace {

// Elements a thread should get at least, and the unit in which they are handed out: whole words,
// where the index starts at one.
constexpr std::int64_t kGrain = 1 << 15;
constexpr std::int64_t kUnit = 4096;
constexpr std::int64_t kSegment = 1 << 14;

class CpuRun {
 public:
  explicit CpuRun(const Job& job)
      : job_(job),
        kernels_(cpu_kernels()),
        x_(static_cast<const char*>(job.x)),
        other_(static_cast<const char*>(job.other)),
        y_(static_cast<char*>(job.y)),
        size_(dtype_size(job.dtype)) {
    stream_.seed = job.random.key();
    stream_.low = job.random.low();
    stream_.draw = job.draw;
    stream_.scale = job.scale;
  }

  void execute() const {
    if (job_.form == Form::kBiasBackward) {
      bias_backward();
    } else if (job_.numel == 0) {
      return;
    } else if (job_.form == Form::kRows) {
      rows();
    } else {
      elements();
    }
  }

 private:
  Span span(std::int64_t first, std::int64_t n) const {
    const char* const other = other_ == nullptr ? nullptr : other_ + first * size_;
    return {
        x_ + first * size_,   job_.bias,   other,
        y_ + first * size_,   n,           job_.index_offset + static_cast<std::uint64_t>(first),
        first % job_.columns, job_.columns};
  }

  void elements() const {
    parallel_for(ceil_div(job_.numel, kUnit), kGrain / kUnit,
                 [this](std::int64_t begin, std::int64_t end) {
                   const std::int64_t first = begin * kUnit;
                   const Span s = span(first, std::min(end * kUnit, job_.numel) - first);
                   if (job_.form == Form::kAdd) {
                     kernels_.add(job_.dtype, s, stream_);
                   } else if (job_.form == Form::kActivate) {
                     kernels_.activate(job_.dtype, job_.activation, s, stream_);
                   } else {
                     kernels_.activate_backward(job_.dtype, job_.activation, s, stream_);
                   }
                 });
  }

  bool row_is_kept(std::int64_t row) const {
    const std::uint64_t index = job_.index_offset + static_cast<std::uint64_t>(row);
    return (keep_mask_at(stream_.seed, stream_.low, index, job_.draw) & 1u) != 0;
  }

  void rows() const {
    const std::int64_t length = job_.numel / job_.rows;
    const std::int64_t pieces = ceil_div(length, kSegment);
    const std::int64_t piece = std::min(length, kSegment);
    parallel_for(job_.rows * pieces, std::max<std::int64_t>(1, kGrain / piece),
                 [&](std::int64_t begin, std::int64_t end) {
                   for (std::int64_t task = begin; task < end; ++task) {
                     const std::int64_t row = task / pieces;
                     const std::int64_t from = task % pieces * kSegment;
                     const std::int64_t n = std::min(kSegment, length - from);
                     const std::int64_t at = (row * length + from) * size_;
                     if (row_is_kept(row)) {
                       kernels_.row(job_.dtype, x_ + at, other_ + at, y_ + at, n, job_.scale);
                     } else if (other_ != y_) {
                       std::memcpy(y_ + at, other_ + at, static_cast<std::size_t>(n * size_));
                     }
                   }
                 });
  }

  void bias_backward() const {
    Chunks c{};
    if (job_.numel > 0) {
      c = make_chunks(job_.numel, job_.columns, kCpuRule);
      const std::int64_t tile = std::min(c.width, kCpuRule.tile);
      const std::int64_t tiles = ceil_div(c.width, tile);
      parallel_for(c.count * tiles, 1, [&](std::int64_t begin, std::int64_t end) {
        for (std::int64_t task = begin; task < end; ++task) {
          add_chunk(c, task / tiles, task % tiles * tile, tile);
        }
      });
    }
    dispatch_dtype(job_.dtype, [&](auto tag) {
      using T = typename decltype(tag)::type;
      parallel_for(job_.columns, 2048, [&](std::int64_t begin, std::int64_t end) {
        combine(c, static_cast<T*>(job_.grad_bias), begin, end);
      });
    });
  }

  void add_chunk(const Chunks& c, std::int64_t chunk, std::int64_t column,
                 std::int64_t tile) const {
    double* const sums = job_.partials + chunk * c.width + column;
    const std::int64_t width = std::min(tile, c.width - column);
    std::fill(sums, sums + width, 0.0);
    const std::int64_t first = chunk * c.chunk_rows;
    const std::int64_t last = std::min(first + c.chunk_rows, c.rows);
    // Whole rows lie one after the other: one walk.
    const bool whole = width == c.width;
    const std::int64_t step = whole ? last - first : 1;
    for (std::int64_t row = first; row < last; row += step) {
      const std::int64_t at = row * c.width + column;
      const std::int64_t end = whole ? std::min(last * c.width, job_.numel) : at + width;
      Span s = span(at, end - at);
      s.column = 0;
      s.columns = width;
      kernels_.bias_backward(job_.dtype, s, sums, stream_);
    }
  }

  template <class T>
  void combine(const Chunks& c, T* out, std::int64_t begin, std::int64_t end) const {
    constexpr std::int64_t kTogether = 256;
    for (std::int64_t first = begin; first < end; first += kTogether) {
      const std::int64_t n = std::min(kTogether, end - first);
      double sums[kTogether] = {};
      for (std::int64_t k = 0; k < c.count; ++k) {
        for (std::int64_t column = first; column < c.width; column += job_.columns) {
          const double* const slot = job_.partials + k * c.width + column;
          for (std::int64_t i = 0; i < n; ++i) sums[i] += slot[i];
        }
      }
      for (std::int64_t i = 0; i < n; ++i)
        out[first + i] = from_compute<T>(static_cast<Compute<T>>(sums[i]));
    }
  }

  const Job& job_;
  const CpuKernels& kernels_;
  const char* x_;
  const char* other_;
  char* y_;
  std::int64_t size_;
  Stream stream_{};
};

}  // namespace

void run_cpu(const Job& job) {
  prepare_pages(job.y, job.numel * dtype_size(job.dtype));
  CpuRun(job).execute();
}

}  // namespace fusereg::fused_dropout
