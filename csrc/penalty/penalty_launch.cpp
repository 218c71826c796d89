// The CPU launcher: cuts a list of tensors into chunks, hands them to the kernels of the chosen
// instruction set, and adds what they return in the order of the list.
#include <algorithm>
#include <cmath>
#include <utility>

#include "core/ceil_div.h"
#include "core/parallel.h"
#include "core/soft_threshold.h"
#include "penalty/penalty.h"

namespace fusereg::penalty {
namespace {

// Consecutive elements that share their coefficients: a tensor, or one large group of it.
struct Run {
  char* w;
  char* g;
  std::int64_t numel;
  DType dtype;
  Strengths value;  // what its sums count for
  Coefficients gradient;
};

// Groups [begin, end) of an item: about a chunk of elements, at least one group.
struct GroupTask {
  const Item* item;
  std::int64_t begin;
  std::int64_t end;
};

// Elements that one thread should get at least: below that, waking a thread costs more than it
// saves.
constexpr std::int64_t kGrainElements = 4 * kChunk;

constexpr std::int64_t kColumnsPerTask = 64;

char* at(void* base, std::int64_t index, DType dtype) {
  return base == nullptr ? nullptr : static_cast<char*>(base) + index * dtype_size(dtype);
}

// Its first lines, until the processor notices that they are read one after the other.
void ask_for(const Run& run) {
  for (int line = 0; line < 4; ++line) {
    __builtin_prefetch(run.w + 64 * line);
    if (run.g != nullptr) __builtin_prefetch(run.g + 64 * line, 1);
  }
}

double read_scale(const Job& job) {
  if (job.scale == nullptr) return job.host_scale;
  return dispatch_dtype(job.scale_dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    return job.host_scale * static_cast<double>(to_compute(*static_cast<const T*>(job.scale)));
  });
}

class CpuRun {
 public:
  explicit CpuRun(const Job& job) : job_(job), kernels_(cpu_kernels()), scale_(read_scale(job)) {
    runs_.reserve(job.items.size());
    for (const Item& item : job.items) add(item);
  }

  double execute() {
    double value = 0.0;
    if (!large_.empty()) value += large_groups();
    value += elementwise();
    value += small_groups();
    return value;
  }

 private:
  void add(const Item& item) {
    if (item.numel == 0) return;
    const Strengths& s = item.strengths;
    if (s.group == 0.0) {
      // Nothing to add, nothing to shrink; but kWriteGrad must still write its zeros.
      if (s.l1 == 0.0 && s.l2 == 0.0 && job_.op != Op::kWriteGrad) return;
      runs_.push_back({at(item.w, 0, item.dtype), at(item.g, 0, item.dtype), item.numel, item.dtype,
                       s, coefficients(s.l1, s.l2, 1.0 / (1.0 + s.l2))});
      return;
    }
    const GroupShape& shape = item.shape;
    if (shape.outer == 1 && shape.inner > kLargeGroup && (job_.op != Op::kProx || s.l1 == 0.0)) {
      large_.push_back(&item);
      return;
    }
    std::int64_t step = std::max<std::int64_t>(1, kChunk / shape.group_size());
    // Neighboring columns share cache lines, so a task takes at least some lines' width of them.
    if (shape.outer > 1) step = std::max(step, ceil_div(kColumnsPerTask, shape.inner));
    for (std::int64_t g = 0; g < shape.groups; g += step) {
      tasks_.push_back({&item, g, std::min(g + step, shape.groups)});
      group_elements_ += step * shape.group_size();
    }
  }

  // A tensor that needs no gradient counts in the value only.
  Op op_for(const void* g) const {
    return job_.op == Op::kAddGrad && g == nullptr ? Op::kValue : job_.op;
  }

  Coefficients coefficients(double l1, double l2, double prox_factor) const {
    return job_.op == Op::kProx ? Coefficients{l1, 0.0, prox_factor} : Coefficients{l1, l2, scale_};
  }

  // Runs op over all chunks of `runs`, keeping each chunk's sums in its slot.
  template <class OnChunk>
  void for_each_chunk(const std::vector<Run>& runs, const OnChunk& on_chunk) {
    starts_.assign(1, 0);
    std::int64_t elements = 0;
    for (const Run& run : runs) {
      starts_.push_back(starts_.back() + ceil_div(run.numel, kChunk));
      elements += run.numel;
    }
    const std::int64_t chunks = starts_.back();
    if (chunks == 0) return;
    slots_.resize(static_cast<std::size_t>(chunks));
    const std::int64_t grain = std::max<std::int64_t>(1, kGrainElements * chunks / elements);
    const std::int64_t* const starts = starts_.data();
    const std::size_t count = starts_.size();
    parallel_for(chunks, grain, [&](std::int64_t begin, std::int64_t end) {
      auto index =
          static_cast<std::size_t>(std::upper_bound(starts, starts + count, begin) - starts - 1);
      for (std::int64_t chunk = begin; chunk < end; ++chunk) {
        while (chunk >= starts[index + 1]) ++index;
        const Run& run = runs[index];
        // The next tensor lies elsewhere, of which the processor knows nothing.
        if (index + 1 < runs.size() && chunk + 1 == starts[index + 1]) ask_for(runs[index + 1]);
        const std::int64_t offset = (chunk - starts[index]) * kChunk;
        slots_[static_cast<std::size_t>(chunk)] =
            on_chunk(run, at(run.w, offset, run.dtype), at(run.g, offset, run.dtype),
                     std::min(kChunk, run.numel - offset));
      }
    });
  }

  double elementwise() {
    for_each_chunk(runs_, [this](const Run& run, char* w, char* g, std::int64_t n) {
      return kernels_.elements(op_for(run.g), run.dtype, w, g, n, run.gradient);
    });
    double value = 0.0;
    for (std::size_t i = 0; i < runs_.size(); ++i) {
      for (std::int64_t chunk = starts_[i]; chunk < starts_[i + 1]; ++chunk) {
        const Sums& sums = slots_[static_cast<std::size_t>(chunk)];
        const Strengths& s = runs_[i].value;
        if (s.l1 != 0.0) value += s.l1 * sums.absolute;
        if (s.l2 != 0.0) value += 0.5 * s.l2 * sums.square;
      }
    }
    return value;
  }

  // A contiguous group too large for one task: its norm by chunks first, then it joins the
  // elementwise runs with its factor known.
  double large_groups() {
    std::vector<Run> groups;
    for (const Item* item : large_) {
      for (std::int64_t index = 0; index < item->shape.groups; ++index) {
        const std::int64_t first = index * item->shape.inner;
        groups.push_back({at(item->w, first, item->dtype),
                          at(item->g, first, item->dtype),
                          item->shape.inner,
                          item->dtype,
                          item->strengths,
                          {}});
      }
    }
    for_each_chunk(groups, [this](const Run& run, char* w, char*, std::int64_t n) {
      const Coefficients square_only{0.0, 1.0, 1.0};
      return kernels_.elements(Op::kValue, run.dtype, w, nullptr, n, square_only);
    });
    double value = 0.0;
    for (std::size_t i = 0; i < groups.size(); ++i) {
      Run& run = groups[i];
      double square = 0.0;
      for (std::int64_t chunk = starts_[i]; chunk < starts_[i + 1]; ++chunk) {
        square += slots_[static_cast<std::size_t>(chunk)].square;
      }
      const double norm = std::sqrt(square);
      const double group_sqrt_n = run.value.group * std::sqrt(static_cast<double>(run.numel));
      value += group_sqrt_n * norm;
      run.gradient =
          coefficients(run.value.l1, run.value.l2 + group_gradient_factor(group_sqrt_n, norm),
                       group_prox_factor(group_sqrt_n, norm) / (1.0 + run.value.l2));
    }
    runs_.insert(runs_.end(), groups.begin(), groups.end());
    return value;
  }

  double small_groups() {
    if (tasks_.empty()) return 0.0;
    const auto count = static_cast<std::int64_t>(tasks_.size());
    std::vector<double> values(tasks_.size());
    const std::int64_t grain = std::max<std::int64_t>(1, kGrainElements * count / group_elements_);
    parallel_for(count, grain, [&](std::int64_t begin, std::int64_t end) {
      for (std::int64_t i = begin; i < end; ++i) {
        const GroupTask& task = tasks_[static_cast<std::size_t>(i)];
        values[static_cast<std::size_t>(i)] =
            kernels_.groups(op_for(task.item->g), *task.item, scale_, task.begin, task.end);
      }
    });
    return ordered_sum(values.data(), count);
  }

  const Job& job_;
  const CpuKernels& kernels_;
  const double scale_;
  std::vector<Run> runs_;
  std::vector<const Item*> large_;
  std::vector<GroupTask> tasks_;
  std::int64_t group_elements_ = 0;
  std::vector<std::int64_t> starts_{0};
  std::vector<Sums> slots_;
};

}  // namespace

void run_cpu(const Job& job) {
  const double value = CpuRun(job).execute();
  if (job.value == nullptr) return;
  if (job.value_dtype == DType::kFloat64) {
    *static_cast<double*>(job.value) = value;
  } else {
    *static_cast<float*>(job.value) = static_cast<float>(value);
  }
}

}  // namespace fusereg::penalty
