// The CPU launcher of dropout. Contract: dropout.h.
#include <algorithm>

#include "core/ceil_div.h"
#include "core/pages.h"
#include "core/parallel.h"
#include "dropout/dropout.h"

namespace fusereg::dropout {
namespace {

// Elements a thread should get at least, and the unit in which they are handed out: whole blocks of
// every instruction set, where the index starts at one.
constexpr std::int64_t kGrain = 1 << 15;
constexpr std::int64_t kUnit = 4096;
constexpr std::int64_t kSegment = 1 << 14;

class CpuRun {
 public:
  explicit CpuRun(const Job& job)
      : job_(job),
        kernels_(cpu_kernels()),
        x_(static_cast<const char*>(job.x)),
        y_(static_cast<char*>(job.y)),
        size_(dtype_size(job.dtype)) {
    stream_.seed = job.random.key();
    stream_.low = job.random.low();
    stream_.draw = job.draw;
    stream_.affine = job.affine;
  }

  void execute() const {
    if (job_.numel == 0) return;
    if (job_.rows.repeat == 1) {
      elements();
    } else if (job_.rows.inner == 1) {
      rows();
    } else {
      columns();
    }
  }

 private:
  void elements() const {
    parallel_for(
        ceil_div(job_.numel, kUnit), kGrain / kUnit, [this](std::int64_t begin, std::int64_t end) {
          const std::int64_t first = begin * kUnit;
          const std::int64_t last = std::min(end * kUnit, job_.numel);
          kernels_.elements(job_.dtype, x_ + first * size_, y_ + first * size_, last - first,
                            job_.index_offset + static_cast<std::uint64_t>(first), stream_);
        });
  }

  void rows() const {
    const std::int64_t length = job_.rows.repeat;
    const std::int64_t pieces = ceil_div(length, kSegment);
    const std::int64_t piece = std::min(length, kSegment);
    parallel_for(job_.rows.outer * pieces, std::max<std::int64_t>(1, kGrain / piece),
                 [&](std::int64_t begin, std::int64_t end) {
                   std::uint64_t known_group = 0;
                   std::uint32_t mask = 0;
                   for (std::int64_t task = begin; task < end; ++task) {
                     const std::int64_t row = task / pieces;
                     const std::int64_t from = task % pieces * kSegment;
                     const std::uint64_t index =
                         job_.index_offset + static_cast<std::uint64_t>(row);
                     if (task == begin || index / kGroup != known_group) {
                       known_group = index / kGroup;
                       mask = keep_mask(stream_.seed, stream_.low, known_group, job_.draw);
                     }
                     const std::int64_t at = (row * length + from) * size_;
                     kernels_.row(job_.dtype, x_ + at, y_ + at, std::min(kSegment, length - from),
                                  (mask >> (index % kGroup) & 1u) != 0, job_.affine);
                   }
                 });
  }

  void columns() const {
    const Rows& rows = job_.rows;
    const std::int64_t width = std::min(rows.inner, kMaxColumns);
    const std::int64_t tiles = ceil_div(rows.inner, width);
    const std::int64_t height = std::min(rows.repeat, std::max<std::int64_t>(1, kSegment / width));
    const std::int64_t bands = ceil_div(rows.repeat, height);
    parallel_for(
        rows.outer * bands * tiles, std::max<std::int64_t>(1, kGrain / (width * height)),
        [&](std::int64_t begin, std::int64_t end) {
          for (std::int64_t task = begin; task < end; ++task) {
            const std::int64_t column = task % tiles * width;
            const std::int64_t line = task / tiles % bands * height;
            const std::int64_t outer = task / tiles / bands;
            const std::int64_t at = ((outer * rows.repeat + line) * rows.inner + column) * size_;
            kernels_.columns(
                job_.dtype, x_ + at, y_ + at, std::min(width, rows.inner - column),
                std::min(height, rows.repeat - line), rows.inner,
                job_.index_offset + static_cast<std::uint64_t>(outer * rows.inner + column),
                stream_);
          }
        });
  }

  const Job& job_;
  const CpuKernels& kernels_;
  const char* x_;
  char* y_;
  std::int64_t size_;
  Stream stream_{};
};

}  // namespace

void run_cpu(const Job& job) {
  prepare_pages(job.y, job.numel * dtype_size(job.dtype));
  CpuRun(job).execute();
}

}  // namespace fusereg::dropout
