// The CPU launcher of coupled channels: slices by tasks, then each slot's sums in the order of the
// list; or, for a step of slices that are rows, slot by slot. Contract: coupled.h.
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
    switch (job_.pass) {
      case CoupledJob::Pass::kSums:
        return sums();
      case CoupledJob::Pass::kGrad:
        return scale(Op::kWriteGrad, job_.first_factor == nullptr ? 0.0 : *job_.first_factor,
                     job_.factors);
      case CoupledJob::Pass::kProx:
        return prox();
      case CoupledJob::Pass::kStep:
        if (all_rows()) return by_slots();
        sums();
        return prox();
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

  double factor_of(std::int64_t slot) const {
    return group_prox_factor(job_.factors[slot], std::sqrt(job_.squares[slot]));
  }

  void prox() const {
    std::vector<double> factors(static_cast<std::size_t>(job_.slots));
    for (std::int64_t s = 0; s < job_.slots; ++s)
      factors[static_cast<std::size_t>(s)] = factor_of(s);
    scale(Op::kProx, job_.l1, factors.data());
  }

  // Columns of several slots share cache lines, so they are not taken slot by slot.
  bool all_rows() const {
    return std::all_of(job_.items.begin(), job_.items.end(),
                       [](const Item& item) { return item.numel == 0 || item.shape.outer == 1; });
  }

  // The sums of a slot, in the order of the list, and at once what they scale: a slot's rows are read
  // again from cache.
  void by_slots() const {
    std::vector<Item> items = job_.items;
    for (Item& item : items) item.strengths.l1 = job_.l1;
    std::vector<std::uint32_t> item_of(static_cast<std::size_t>(job_.entries));
    for (std::size_t i = 0; i < items.size(); ++i) {
      const auto first = item_of.begin() + job_.first[i];
      std::fill(first, first + items[i].shape.groups, static_cast<std::uint32_t>(i));
    }
    // Slots of about a chunk of elements.
    std::vector<std::int64_t> ends;
    std::int64_t elements = 0;
    for (std::int64_t s = 0; s < job_.slots; ++s) {
      for_each_slice(s, [&](std::int64_t e) {
        elements += items[item_of[static_cast<std::size_t>(e)]].shape.group_size();
      });
      if (elements >= kChunk || s + 1 == job_.slots) {
        ends.push_back(s + 1);
        elements = 0;
      }
    }
    std::vector<double> factors(static_cast<std::size_t>(job_.slots));
    const auto count = static_cast<std::int64_t>(ends.size());
    const std::int64_t grain = kGrainElements / kChunk;
    parallel_for(count, grain, [&](std::int64_t begin, std::int64_t end) {
      const std::int64_t from = begin == 0 ? 0 : ends[static_cast<std::size_t>(begin - 1)];
      for (std::int64_t s = from; s < ends[static_cast<std::size_t>(end - 1)]; ++s) {
        step_of_slot(s, items, item_of, factors.data());
      }
    });
  }

  void step_of_slot(std::int64_t slot, const std::vector<Item>& items,
                    const std::vector<std::uint32_t>& item_of, double* factors) const {
    const Op op = job_.thresholded ? Op::kProx : Op::kValue;
    Sums total;
    for_each_slice(slot, [&](std::int64_t e) {
      const std::uint32_t i = item_of[static_cast<std::size_t>(e)];
      if (items[i].numel == 0) return;
      const std::int64_t at = e - job_.first[i];
      Sums own;
      kernels_.slice_sums(op, items[i], at, at + 1, &own);
      total.absolute += own.absolute;
      total.square += own.square;
    });
    job_.sums[slot] = total.absolute;
    job_.sums[job_.slots + slot] = total.square;
    factors[slot] = factor_of(slot);
    for_each_slice(slot, [&](std::int64_t e) {
      const std::uint32_t i = item_of[static_cast<std::size_t>(e)];
      if (items[i].numel == 0) return;
      const std::int64_t at = e - job_.first[i];
      kernels_.slices(Op::kProx, items[i], job_.slot_of + job_.first[i], factors, job_.slots, at,
                      at + 1);
    });
  }

  // Calls on_slice(entry) for the slices of a slot. What comes from tensors is not trusted.
  template <class F>
  void for_each_slice(std::int64_t slot, const F& on_slice) const {
    const std::int64_t begin = std::max<std::int64_t>(job_.starts[slot], 0);
    const std::int64_t end = std::min<std::int64_t>(job_.starts[slot + 1], job_.entries);
    for (std::int64_t i = begin; i < end; ++i) {
      const std::int64_t entry = job_.order[i];
      if (entry >= 0 && entry < job_.entries) on_slice(entry);
    }
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
