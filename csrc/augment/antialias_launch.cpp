// The CPU launcher of antialiased warps: a sample that is filtered along its axes goes to
// augment_filter.h. Of one that turns, a thread makes what its rows read of the reduced image, as
// antialiased resizing does (resize.h), and interpolates that at points. The bits are those of
// augment_math.h. Contract: augment.h.
#include "augment/antialias_launch.h"

#include <algorithm>
#include <cstring>
#include <memory>
#include <vector>

#include "augment/augment_math.h"
#include "augment/resize.h"
#include "augment/scratch.h"
#include "core/ceil_div.h"
#include "core/parallel.h"

namespace fusereg::augment {
namespace {

// What a thread should get at least: elements of the result.
constexpr std::int64_t kGrain = 1 << 13;
constexpr auto kFloat = static_cast<std::int64_t>(sizeof(float));

// Whether a sample is filtered along its axes.
bool is_filtered(const double* record) { return is_axis_aligned(record) && !is_projective(record); }

// Memory for one of them and a partner (augment_filter.h); 0 if there is none.
std::int64_t filter_bytes(const Job& job, std::int64_t lanes) {
  std::int64_t taps[2] = {0, 0};
  for (std::int64_t i = 0; i < job.n; ++i) {
    const double* const m = job.records + i * kRecord;
    if (!is_filtered(m)) continue;
    taps[0] = std::max(taps[0], most_taps(extent_of(m), job.interpolation, job.x.w));
    taps[1] = std::max(taps[1], most_taps(extent_of(m + 3), job.interpolation, job.x.h));
  }
  if (taps[0] == 0) return 0;
  auto axis = [](std::int64_t count, std::int64_t most) {
    return round_up_to_line(count * static_cast<std::int64_t>(sizeof(std::int32_t))) +
           round_up_to_line(count * kFloat) +
           round_up_to_line(count * static_cast<std::int64_t>(sizeof(Span<float>))) +
           round_up_to_line(count * most * kFloat);
  };
  const std::int64_t pitch = filter_pitch(job.y.w);
  return round_up_to_line(filter_strip(job, lanes) * kFloat) +
         2 * (round_up_to_line(job.c * lanes * pitch * kFloat) + axis(job.y.w, taps[0]) +
              axis(job.y.h, taps[1]) + round_up_to_line(pitch * taps[0] * kFloat));
}

// --- turned samples ---
struct Range {
  std::int64_t begin, end;
};

// What is read along an axis of `size` pixels by output pixels of a box (up to and with its last
// corner), and a pixel more: places are rounded.
Range range_read(const Job& job, const double* m, const Box& box, std::int64_t size) {
  double low = 2.0 * kFarthest;
  double high = -low;
  bool finite = true;
  for (const std::int64_t row : {box.y0, box.y1}) {
    for (const std::int64_t column : {box.x0, box.x1}) {
      const double v = m[0] * static_cast<double>(column) + row_start(m, row);
      finite = finite && v > -kFarthest && v < kFarthest;
      low = std::min(low, v);
      high = std::max(high, v);
    }
  }
  if (!finite) return {0, size};
  const std::int64_t reach = job.interpolation == Interpolation::kBicubic ? 2 : 1;
  Range r = {static_cast<std::int64_t>(floor_of(low)) - reach,
             static_cast<std::int64_t>(floor_of(high)) + reach + 2};
  if (r.begin >= 0 && r.end <= size) return r;
  const FillMode mode = job.fill_mode;
  if (mode != FillMode::kConstant && mode != FillMode::kBorder && mode != FillMode::kWindow)
    return {0, size};
  // Where nothing is read, the pixel at the edge is loaded.
  r.begin = std::clamp<std::int64_t>(r.begin, 0, size - 1);
  r.end = std::clamp<std::int64_t>(r.end, r.begin + 1, size);
  return r;
}

// The filters of a part of an axis, and what of the image they read.
class Filters {
 public:
  void make(double by, std::int64_t size, Interpolation how, const Range& part) {
    const std::int64_t count = part.end - part.begin;
    spans_.resize(static_cast<std::size_t>(count));
    first_.resize(spans_.size());
    read = {size, 0};
    std::int64_t taps = 1;
    for (std::int64_t i = 0; i < count; ++i) {
      const auto span =
          reduced_span<float>(static_cast<std::int32_t>(part.begin + i), by, size, how);
      spans_[static_cast<std::size_t>(i)] = span;
      taps = std::max<std::int64_t>(taps, span.last - span.first + 1);
      read.begin = std::min<std::int64_t>(read.begin, span.first);
      read.end = std::max<std::int64_t>(read.end, span.last + 1);
    }
    weights_.assign(static_cast<std::size_t>(count * taps), 0.0f);
    for (std::int64_t i = 0; i < count; ++i) {
      const Span<float>& span = spans_[static_cast<std::size_t>(i)];
      const std::int64_t first = std::min<std::int64_t>(span.first, read.end - taps);
      first_[static_cast<std::size_t>(i)] = static_cast<std::int32_t>(first - read.begin);
      float* const own = weights_.data() + i * taps;
      for (std::int32_t k = span.first; k <= span.last; ++k)
        own[k - first] = weight_in(span, k, how);
    }
    band = {first_.data(), weights_.data(), taps};
  }
  Band band;
  Range read{};

 private:
  std::vector<Span<float>> spans_;
  std::vector<std::int32_t> first_;
  std::vector<float> weights_;
};

std::int64_t reduced_bytes(const Job& job, const Reduced& z) {
  // Words that are read may reach beyond the last pixel.
  return round_up_to_line(std::int64_t{z.h} * z.w * job.c * element_size(job.x.type) + 8);
}

// A thread's reduced images: of a sample, and of its partner.
class Reducer {
 public:
  Reducer(const Job& job, const ResizeKernels& kernels, std::int64_t bytes, char* memory)
      : kernels_(kernels), lanes_(kernels.lanes[0]), bytes_(bytes), memory_(memory) {
    part_.n = 1;
    part_.c = job.c;
    std::fill_n(part_.scale, job.c, 1.0);
  }

  // What output pixels of a box read; x becomes the image that it is of.
  void reduce(const Job& job, const Reduced& z, const Box& box, int slot, Images& x) {
    const Range columns = range_read(job, z.m, box, z.w);
    const Range rows = range_read(job, z.m + 3, box, z.h);
    across_.make(z.by_x, x.w, job.interpolation, columns);
    down_.make(z.by_y, x.h, job.interpolation, rows);
    const std::int64_t size = element_size(x.type);
    part_.x = x;
    part_.x.w = across_.read.end - across_.read.begin;
    part_.x.h = down_.read.end - down_.read.begin;
    part_.x.data = static_cast<char*>(x.data) +
                   (down_.read.begin * x.row + across_.read.begin * x.pixel) * size;
    part_.columns = across_.band;
    part_.rows = down_.band;
    const std::int64_t w = columns.end - columns.begin;
    const std::int64_t h = rows.end - rows.begin;
    char* const own = memory_ + slot * bytes_;
    part_.y = {own, x.type, x.channels_last, h, w, 0, h * w, w, 1};
    if (x.channels_last) {
      part_.y.channel = 1;
      part_.y.row = w * job.c;
      part_.y.pixel = job.c;
    }
    const int channels = x.channels_last ? job.c : 1;
    for (int c = 0; c < job.c; c += channels) {
      for (std::int64_t row = 0; row < h; row += lanes_)
        kernels_.strip(part_, 0, c, channels, row, memory_ + 2 * bytes_);
    }
    x = part_.y;
    x.h = z.h;
    x.w = z.w;
    x.data = own - (rows.begin * x.row + columns.begin * x.pixel) * size;
  }

 private:
  const ResizeKernels& kernels_;
  const std::int64_t lanes_;
  const std::int64_t bytes_;  // of a reduced image
  char* const memory_;        // two of them, and a strip
  ResizeJob part_;
  Filters across_, down_;
};

// A batch of which samples turn.
class Turned {
 public:
  Turned(const Job& job, const CpuKernels& kernels)
      : kernels_(kernels), records_(job.records, job.records + job.n * kRecord) {
    for (std::int64_t i = 0; i < job.n; ++i) {
      View view;
      view_of(job, job.x, i, view);
      Images x = view.x;
      if (job.each == nullptr)
        x.data = static_cast<char*>(x.data) + i * x.sample * element_size(x.type);
      images_.push_back(x);
      reduces_.push_back(view.reduces ? 1 : 0);
      reduced_.push_back(reduced_of(view.m, x));
      if (!view.reduces) continue;
      std::copy_n(reduced_.back().m, 6, records_.data() + i * kRecord);
      bytes_ = std::max(bytes_, reduced_bytes(job, reduced_.back()));
      widest_ = std::max(widest_, x.w);
    }
    filter_bytes_ = filter_bytes(job, kernels.lanes);
    const std::int64_t lanes = cpu_resize_kernels().lanes[0];
    strip_bytes_ = round_up_to_line(widest_ * (job.x.channels_last ? job.c : 1) * lanes * kFloat);
  }

  std::int64_t scratch() const { return std::max(filter_bytes_, 2 * bytes_ + strip_bytes_); }

  void run(const Job& job, std::int64_t begin, std::int64_t end, char* memory) const {
    std::vector<Images> each = images_;
    Job points = job;
    points.antialias = false;
    points.records = records_.data();
    points.each = each.data();
    Reducer reducer(job, cpu_resize_kernels(), bytes_, memory);
    const std::int64_t h = job.y.h;
    while (begin < end) {
      const std::int64_t sample = begin / h;
      const std::int64_t next = std::min(end, (sample + 1) * h);
      const double* const record = job.records + sample * kRecord;
      const std::int64_t partner = partner_of(record, job.n);
      const double* const other = partner < 0 ? record : job.records + partner * kRecord;
      if (is_filtered(record) && is_filtered(other)) {
        kernels_.filtered(job, begin, next, memory);
      } else if (is_filtered(record) || is_filtered(other)) {
        kernels_.forward(job, begin, next);  // pixel by pixel
      } else {
        // Whole blocks of pixels are read.
        Box box = {0, begin - sample * h, ceil_div(job.y.w, kBlock) * kBlock - 1,
                   next - sample * h - 1};
        auto prepare = [&](std::int64_t i, int slot) {
          each[static_cast<std::size_t>(i)] = images_[static_cast<std::size_t>(i)];
          if (reduces_[static_cast<std::size_t>(i)] == 0) return;
          reducer.reduce(job, reduced_[static_cast<std::size_t>(i)], box, slot,
                         each[static_cast<std::size_t>(i)]);
        };
        prepare(sample, 0);
        if (partner >= 0 && partner != sample) {
          const Box mixed = box_of(record + 10, job.y);
          box = {mixed.x0 / kBlock * kBlock, std::max(mixed.y0, box.y0),
                 ceil_div(mixed.x1, kBlock) * kBlock - 1, std::min(mixed.y1 - 1, box.y1)};
          if (box.x0 <= box.x1 && box.y0 <= box.y1) prepare(partner, 1);
        }
        kernels_.forward(points, begin, next);
      }
      begin = next;
    }
  }

 private:
  const CpuKernels& kernels_;
  std::vector<double> records_;  // those of turned samples: to the reduced images
  std::vector<Images> images_;
  std::vector<Reduced> reduced_;
  std::vector<char> reduces_;
  std::int64_t bytes_ = 0, widest_ = 0, filter_bytes_ = 0, strip_bytes_ = 0;
};

}  // namespace

RowRunner row_runner(const Job& job) {
  const CpuKernels& kernels = cpu_kernels();
  if (!job.antialias || job.x.type == Element::kFloat64) {
    return {0, [&kernels](const Job& own, std::int64_t begin, std::int64_t end, char*) {
              kernels.forward(own, begin, end);
            }};
  }
  bool filtered = true;
  for (std::int64_t i = 0; i < job.n; ++i)
    filtered = filtered && is_filtered(job.records + i * kRecord);
  if (filtered) {
    return {filter_bytes(job, kernels.lanes),
            [&kernels](const Job& own, std::int64_t begin, std::int64_t end, char* memory) {
              kernels.filtered(own, begin, end, memory);
            }};
  }
  const auto turned = std::make_shared<const Turned>(job, kernels);
  return {turned->scratch(), [turned](const Job& own, std::int64_t begin, std::int64_t end,
                                      char* memory) { turned->run(own, begin, end, memory); }};
}

void run_antialiased(const Job& job) {
  const std::int64_t rows = job.n * job.y.h;
  const std::int64_t parts =
      std::clamp<std::int64_t>(rows * job.y.w * job.c / kGrain, 1, max_threads());
  const RowRunner runner = row_runner(job);
  const ScratchMemory scratch(runner.bytes, parts);
  parallel_for(parts, 1, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t p = begin; p < end; ++p)
      runner.run(job, rows * p / parts, rows * (p + 1) / parts, scratch.of(p));
  });
}

}  // namespace fusereg::augment
