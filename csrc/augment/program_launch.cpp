// The CPU launcher of programs. Contract: program.h.
#include <algorithm>
#include <atomic>
#include <cstring>
#include <vector>

#include "augment/antialias_launch.h"
#include "augment/program_math.h"
#include "augment/scratch.h"
#include "core/pages.h"
#include "core/parallel.h"

namespace fusereg::augment {
namespace {

struct Columns {
  std::int64_t begin, end;
};

// How many of n columns satisfy a condition that holds for the first of them, or for none.
template <class F>
std::int64_t count_first(std::int64_t n, const F& f) {
  std::int64_t begin = 0;
  while (begin < n) {
    const std::int64_t middle = (begin + n) / 2;
    if (f(middle)) {
      begin = middle + 1;
    } else {
      n = middle;
    }
  }
  return begin;
}

// The columns of a row whose coordinate along an axis is within the image, as lies_within has it:
// with its roundings the coordinate never turns back.
Columns columns_within(const double* m, std::int64_t row, std::int64_t size, std::int64_t width) {
  const double low = -0.5;
  const double high = static_cast<double>(size) - 0.5;
  auto at = [&](std::int64_t column) { return coordinate(m, column, row); };
  if (m[0] >= 0.0) {
    return {count_first(width, [&](std::int64_t i) { return !(at(i) >= low); }),
            count_first(width, [&](std::int64_t i) { return at(i) < high; })};
  }
  return {count_first(width, [&](std::int64_t i) { return !(at(i) < high); }),
          count_first(width, [&](std::int64_t i) { return at(i) >= low; })};
}

// One after the other: what a thread keeps of a sample.
class Runner {
 public:
  Runner(const ProgramJob& job, const RowRunner& rows, char* scratch)
      : job_(job), rows_(rows), kernels_(cpu_program_kernels()), size_{job.x.h, job.x.w, job.c} {
    const std::int64_t bytes = round_up_to_line(job.x.sample);
    first_ = reinterpret_cast<std::uint8_t*>(scratch);
    second_ = first_ + bytes;
    floats_ = reinterpret_cast<float*>(second_ + bytes);
    rows_memory_ = scratch + own_bytes(job);
    if (job.before != nullptr) {
      before_ = *job.before;
      before_.y = planes();
    }
    if (job.after != nullptr) {
      after_ = *job.after;
      after_.x = planes();
    }
    warp_.c = job.c;
    warp_.n = 1;
    warp_.records = record_;
    std::fill_n(warp_.scale, job.c, 1.0);
    std::fill_n(warp_.shift, job.c, job.whole_pixels ? kTowardZero : 0.0);
    for (int c = 0; c < job.c; ++c) warp_.fill[c] = job.fill[c];
    warp_.limit = 255.0;
    record_[14] = -1.0;
    record_[15] = 1.0;
  }

  static std::int64_t scratch_bytes(const ProgramJob& job, const RowRunner& rows) {
    return own_bytes(job) + rows.bytes;
  }

  void run(std::int64_t i) {
    const bool within = job_.after == nullptr && !job_.y.channels_last;  // y itself
    std::uint8_t* const y = static_cast<std::uint8_t*>(job_.y.data) + i * job_.y.sample;
    now_ = within ? y : first_;
    other_ = within ? first_ : second_;
    read(i);
    const double* instruction = job_.programs + i * job_.length * kInstruction;
    for (int k = 0; k < job_.length; ++k, instruction += kInstruction)
      step(static_cast<Code>(instruction[0]), instruction + 1);
    apply_tables();
    if (job_.after != nullptr) {
      after_.x.data = now_;
      cpu_kernels().forward(after_, i * after_.y.h, (i + 1) * after_.y.h);
    } else if (job_.y.channels_last) {
      kernels_.from_planes(now_, y, size_);
    } else if (now_ != y) {
      std::memcpy(y, now_, static_cast<std::size_t>(job_.y.sample));
    }
  }

 private:
  static std::int64_t own_bytes(const ProgramJob& job) {
    const std::int64_t floats = (job.x.h + 1) * (job.x.w + kMaxTaps);
    return 2 * round_up_to_line(job.x.sample) +
           round_up_to_line(floats * static_cast<std::int64_t>(sizeof(float)));
  }

  // The planes of one sample, which is that of every index.
  Images planes() const {
    Images planes;
    planes.type = Element::kUInt8;
    planes.h = size_.h;
    planes.w = size_.w;
    planes.channel = size_.plane();
    planes.row = size_.w;
    planes.pixel = 1;
    return planes;
  }

  // Sample i, to now_.
  void read(std::int64_t i) {
    if (job_.before != nullptr) {
      before_.y.data = now_;
      rows_.run(before_, i * size_.h, (i + 1) * size_.h, rows_memory_);
      return;
    }
    const std::uint8_t* const x = static_cast<const std::uint8_t*>(job_.x.data) + i * job_.x.sample;
    if (job_.x.channels_last) {
      kernels_.to_planes(x, now_, size_);
    } else if (now_ != x) {
      std::memcpy(now_, x, static_cast<std::size_t>(job_.x.sample));
    }
  }

  void step(Code code, const double* a) {
    if (code == Code::kIdentity) return;
    if (is_plain_table(code)) {
      for (int c = 0; c < job_.c; ++c)
        compose(c, [&](std::int32_t v) { return table_entry(code, a, 0.0f, v); });
      return;
    }
    if (code == Code::kAutoContrast || code == Code::kEqualize) return by_histogram(code);
    apply_tables();
    switch (code) {
      case Code::kContrast: {
        const float mean = mean_of_gray();
        for (int c = 0; c < job_.c; ++c)
          compose(c, [&](std::int32_t v) { return table_entry(code, a, mean, v); });
        break;
      }
      case Code::kSaturation:
      case Code::kHue:
      case Code::kGray:
        if (job_.c == 3) kernels_.colors(now_, size_.plane(), code, a[0]);
        break;
      case Code::kSharpness:
        if (size_.h > 2 && size_.w > 2) {
          kernels_.sharpen(now_, other_, size_, a[0]);
          std::swap(now_, other_);
        }
        break;
      case Code::kBlur:
        blur(a);
        break;
      default:
        warp(a);
        break;
    }
  }

  template <class F>
  void compose(int c, const F& f) {
    if (tables_.empty()) {
      tables_.resize(static_cast<std::size_t>(job_.c) * 256);
      for (std::size_t i = 0; i < tables_.size(); ++i) tables_[i] = static_cast<std::uint8_t>(i);
    }
    std::uint8_t* const table = tables_.data() + static_cast<std::size_t>(c) * 256;
    std::uint8_t of[256];
    for (std::int32_t v = 0; v < 256; ++v) of[v] = static_cast<std::uint8_t>(f(v));
    for (int v = 0; v < 256; ++v) table[v] = of[table[v]];
  }

  void apply_tables() {
    if (tables_.empty()) return;
    for (int c = 0; c < job_.c; ++c)
      kernels_.look_up(now_ + c * size_.plane(), size_.plane(),
                       tables_.data() + static_cast<std::size_t>(c) * 256);
    tables_.clear();
  }

  float mean_of_gray() {
    std::uint64_t sum = 0;
    if (job_.c == 3) {
      sum = kernels_.gray_sum(now_, size_.plane());
    } else {
      std::uint32_t counts[256] = {};
      kernels_.histogram(now_, size_.plane(), counts);
      for (std::uint64_t v = 0; v < 256; ++v) sum += v * counts[v];
    }
    return static_cast<float>(static_cast<double>(sum) / static_cast<double>(size_.plane()));
  }

  // Of what the tables will make of the planes: these need not be read again.
  void by_histogram(Code code) {
    for (int c = 0; c < job_.c; ++c) {
      std::uint32_t read[256] = {};
      kernels_.histogram(now_ + c * size_.plane(), size_.plane(), read);
      std::uint32_t counts[256] = {};
      for (int v = 0; v < 256; ++v)
        counts[tables_.empty()
                   ? v
                   : tables_[static_cast<std::size_t>(c) * 256 + static_cast<std::size_t>(v)]] +=
            read[v];
      if (code == Code::kAutoContrast) {
        std::int32_t low = 0;
        std::int32_t high = 255;
        while (low < 255 && counts[low] == 0) ++low;
        while (high > 0 && counts[high] == 0) --high;
        compose(c, [&](std::int32_t v) { return stretched(v, low, high); });
        continue;
      }
      std::uint8_t level[256];
      equalized(counts, level);
      compose(c, [&](std::int32_t v) { return std::int32_t{level[v]}; });
    }
  }

  void equalized(const std::uint32_t* counts, std::uint8_t* level) const {
    int last = 255;
    while (last > 0 && counts[last] == 0) --last;
    const std::int64_t step = (size_.plane() - counts[last]) / 255;
    std::int64_t sum = step / 2;
    for (int v = 0; v < 256; ++v) {
      level[v] = step == 0 ? static_cast<std::uint8_t>(v)
                           : static_cast<std::uint8_t>(std::min<std::int64_t>(sum / step, 255));
      sum += counts[v];
    }
  }

  void blur(const double* a) {
    const auto taps_x = static_cast<int>(a[0]);
    const auto taps_y = static_cast<int>(a[1]);
    float weights[2][kMaxTaps];
    gaussian(taps_x, a[2], weights[0]);
    gaussian(taps_y, a[3], weights[1]);
    for (int c = 0; c < job_.c; ++c) {
      const std::int64_t at = c * size_.plane();
      kernels_.blur(now_ + at, other_ + at, size_, weights[0], taps_x, weights[1], taps_y, floats_);
    }
    std::swap(now_, other_);
  }

  void warp(const double* a) {
    std::memcpy(record_, a, 6 * sizeof(double));
    set_interpolation(warp_, static_cast<int>(a[6]));
    warp_.fill_mode = job_.whole_pixels ? FillMode::kBorder : FillMode::kConstant;
    warp_.outside_unread = job_.whole_pixels;
    warp_.x = warp_.y = planes();
    warp_.x.data = now_;
    warp_.y.data = other_;
    // Where neighbors do not stay neighbors, a pixel's channels are found together.
    const bool along = a[0] == 1.0 && a[3] == 0.0;
    if (job_.c == 3 && !along && warp_.interpolation != Interpolation::kBicubic) {
      kernels_.from_planes(now_, other_, size_);
      std::swap(warp_.x.data, warp_.y.data);
      warp_.x.channels_last = true;
      warp_.x.channel = 1;
      warp_.x.row = size_.w * 3;
      warp_.x.pixel = 3;
      std::swap(now_, other_);
    }
    cpu_kernels().forward(warp_, 0, size_.h);
    std::swap(now_, other_);
    if (job_.whole_pixels) fill_outside(a);
  }

  // In whole pixels: what lies outside is the fill.
  void fill_outside(const double* a) {
    for (std::int64_t row = 0; row < size_.h; ++row) {
      const Columns x = columns_within(a, row, size_.w, size_.w);
      const Columns y = columns_within(a + 3, row, size_.h, size_.w);
      const std::int64_t begin = std::max(x.begin, y.begin);
      const std::int64_t end = std::max(std::min(x.end, y.end), begin);
      std::uint8_t* line = now_ + row * size_.w;
      for (int c = 0; c < job_.c; ++c, line += size_.plane()) {
        std::fill_n(line, begin, job_.fill[c]);
        std::fill_n(line + end, size_.w - end, job_.fill[c]);
      }
    }
  }

  const ProgramJob& job_;
  const RowRunner& rows_;  // of the pass before
  const ProgramKernels& kernels_;
  Planes size_;
  char* rows_memory_;
  Forward before_, after_;  // of now_
  std::uint8_t* first_;
  std::uint8_t* second_;
  std::uint8_t* now_ = nullptr;
  std::uint8_t* other_ = nullptr;
  float* floats_;
  Forward warp_;
  double record_[kRecord] = {};
  std::vector<std::uint8_t> tables_;  // of each channel; empty: nothing to do
};

}  // namespace

void run_cpu(const ProgramJob& job) {
  const Images& y = job.after != nullptr ? job.after->y : job.y;
  prepare_pages(y.data, job.n * y.sample * element_size(y.type));
  const RowRunner rows = job.before != nullptr ? row_runner(*job.before) : RowRunner{};
  const std::int64_t parts = std::clamp<std::int64_t>(max_threads(), 1, job.n);
  const ScratchMemory scratch(Runner::scratch_bytes(job, rows), parts);
  // Samples take their time: a thread that is done takes the next one.
  std::atomic<std::int64_t> next{0};
  parallel_for(parts, 1, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t p = begin; p < end; ++p) {
      Runner runner(job, rows, scratch.of(p));
      for (;;) {
        const std::int64_t i = next.fetch_add(1, std::memory_order_relaxed);
        if (i >= job.n) break;
        runner.run(i);
      }
    }
  });
}

}  // namespace fusereg::augment
