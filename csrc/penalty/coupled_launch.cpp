// The CPU launcher of coupled channels: slices by tasks, then each slot's sums in the order of the
// list. Contract: coupled.h.
#include <algorithm>
#include <cmath>

#include "core/ceil_div.h"
#include "core/parallel.h"
#include "core/soft_threshold.h"
#include "penalty/coupled.h"

namespace fusereg::penalty {
namespace {

// Slices [begin, end) of an item: about a chunk of elements, at least one slice.
struct Task {
  std::size_t item;
  std::int64_t begin;
  std::int64_t end;
};

constexpr std::int64_t kGrainElements = 4 * kChunk;
// Neighboring columns share cache lines, so a task takes at least some lines' width of them.
constexpr std::int64_t kColumnsPerTask = 64;

class CoupledRun {
 public:
  explicit CoupledRun(const CoupledJob& job) : job_(job) {
    for (std::size_t i = 0; i < job.items.size(); ++i) {
      const Item& item = job.items[i];
      if (item.numel == 0) continue;
      const GroupShape& shape = item.shape;
      std::int64_t step = std::max<std::int64_t>(1, kChunk / shape.group_size());
      if (shape.outer > 1) step = std::max(step, ceil_div(kColumnsPerTask, shape.inner));
      for (std::int64_t s = 0; s < shape.groups; s += step)
        tasks_.push_back({i, s, std::min(s + step, shape.groups)});
      elements_ += item.numel;
    }
  }

  void execute() {
    if (job_.pass == CoupledJob::Pass::kSums) {
      sums();
    } else if (job_.pass == CoupledJob::Pass::kGrad) {
      scale(Op::kWriteGrad, job_.first_factor == nullptr ? 0.0 : *job_.first_factor, job_.factors);
    } else {
      std::vector<double> factors(static_cast<std::size_t>(job_.slots));
      for (std::int64_t s = 0; s < job_.slots; ++s) {
        factors[static_cast<std::size_t>(s)] =
            group_prox_factor(job_.factors[s], std::sqrt(job_.squares[s]));
      }
      scale(Op::kProx, job_.l1, factors.data());
    }
  }

 private:
  // Calls on_task(task) for all tasks, those of a thread backwards with `reversed`: the second pass
  // over the tensors begins with what the first has left in the cache.
  template <class F>
  void for_each_task(bool reversed, const F& on_task) const {
    const auto count = static_cast<std::int64_t>(tasks_.size());
    if (count == 0) return;
    const std::int64_t grain = std::max<std::int64_t>(1, kGrainElements * count / elements_);
    parallel_for(count, grain, [&](std::int64_t begin, std::int64_t end) {
      for (std::int64_t i = begin; i < end; ++i)
        on_task(tasks_[static_cast<std::size_t>(reversed ? begin + end - 1 - i : i)]);
    });
  }

  void sums() const {
    auto* const partial = reinterpret_cast<Sums*>(job_.partial);
    const Op op = job_.thresholded ? Op::kProx : Op::kValue;
    for_each_task(false, [&](const Task& task) {
      Item item = job_.items[task.item];
      item.strengths.l1 = job_.l1;
      kernels_.slice_sums(op, item, task.begin, task.end,
                          partial + job_.first[task.item] + task.begin);
    });
    std::fill(job_.sums, job_.sums + 2 * job_.slots, 0.0);
    for (std::size_t i = 0; i < job_.items.size(); ++i) {
      const Item& item = job_.items[i];
      if (item.numel == 0) continue;
      for (std::int64_t e = job_.first[i]; e < job_.first[i] + item.shape.groups; ++e) {
        const std::int64_t slot = job_.slot_of[e];
        if (slot < 0 || slot >= job_.slots) continue;
        job_.sums[slot] += partial[e].absolute;
        job_.sums[job_.slots + slot] += partial[e].square;
      }
    }
  }

  void scale(Op op, double l1, const double* factors) const {
    for_each_task(op == Op::kProx, [&](const Task& task) {
      Item item = job_.items[task.item];
      item.strengths.l1 = l1;
      kernels_.slices(op, item, job_.slot_of + job_.first[task.item], factors, job_.slots,
                      task.begin, task.end);
    });
  }

  const CoupledJob& job_;
  const CpuKernels& kernels_ = cpu_kernels();
  std::vector<Task> tasks_;
  std::int64_t elements_ = 0;
};

}  // namespace

void run_cpu(const CoupledJob& job) { CoupledRun(job).execute(); }

}  // namespace fusereg::penalty
