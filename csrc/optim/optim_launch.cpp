// The CPU launcher: cuts the parameters into chunks, hands them to the kernels of the chosen
// instruction set, and adds what they return in the order of the list.
#include <algorithm>
#include <cmath>

#include "core/parallel.h"
#include "optim/coefficients.h"
#include "optim/optim.h"

namespace fusereg::optim {
namespace {

// Elements that one thread should get at least: below that, waking a thread costs more than it
// saves.
constexpr std::int64_t kGrainElements = 2 * kChunk;

struct Chunk {
  const Item* item;
  std::uint32_t coefficients;  // index
  std::int64_t begin;
  std::int64_t n;
};

// Where a chunk begins in each of its tensors, for the first lines of which the processor's own
// prefetching comes too late: of small tensors that is much of what they have.
void prefetch(const Chunk& c) {
  const Item& item = *c.item;
  const auto begin = [&c](const void* tensor, DType dtype) {
    constexpr int kLine = 64;
    if (tensor == nullptr) return;
    const char* const at = static_cast<const char*>(tensor) + c.begin * dtype_size(dtype);
    for (int i = 0; i < 4; ++i) __builtin_prefetch(at + kLine * i);
  };
  begin(item.p, item.p_dtype);
  begin(item.g, item.g_dtype);
  for (const void* const state : item.state) begin(state, item.state_dtype);
  begin(item.copy, item.copy_dtype);
  begin(item.average, item.p_dtype);
}

class CpuRun {
 public:
  explicit CpuRun(const Job& job) : job_(job), kernels_(cpu_kernels()) {
    for (const Hyper& h : job.hypers) hypers_.push_back(read_hyper(h));
    if (job.algorithm != Algorithm::kFtrl) return;
    for (HyperValues& h : hypers_) h.group = 0.0;
  }

  void execute() {
    const bool skip = read_scalar(job_.found_inf) != 0.0;
    if (skip && norms_) return;
    gradient_ =
        gradient_factor(read_scalar(job_.grad_scale), read_scalar(job_.norm), job_.max_norm);
    cut(skip);
    if (skip) {
      run([this](const Chunk& c) { return value_of(c); });
    } else {
      run([this](const Chunk& c) { return updated(c); });
    }
    if (norms_) add_norms();
    if (job_.value == nullptr) return;
    const double value = add();
    if (job_.value_dtype == DType::kFloat64) {
      *static_cast<double*>(job_.value) = value;
    } else {
      *static_cast<float*>(job_.value) = static_cast<float>(value);
    }
  }

 private:
  static bool same(const LastStep& a, const LastStep& b) {
    return a.l1 == b.l1 && a.l2 == b.l2 && a.lr == b.lr && a.beta == b.beta;
  }

  const HyperValues& values_of(const Item& item) const {
    return hypers_[static_cast<std::size_t>(item.hyper)];
  }

  bool penalized(const Item& item) const {
    const HyperValues& h = values_of(item);
    return h.l1 != 0.0 || h.l2 != 0.0 || h.group != 0.0;
  }

  // Consecutive parameters mostly share their coefficients.
  std::uint32_t coefficients_of(const Item& item, double step, const LastStep& last) {
    const bool known = last_ != nullptr && last_->hyper == item.hyper && last_->row == item.row &&
                       last_->fresh == item.fresh && last_->p_dtype == item.p_dtype &&
                       last_step_ == step && same(before_, last);
    if (!known) {
      last_ = &item;
      last_step_ = step;
      before_ = last;
      const auto h = static_cast<std::size_t>(item.hyper);
      coefficients_.push_back(coefficients(job_.algorithm, hypers_[h], job_.hypers[h].flags, step,
                                           gradient_, item.row, item.fresh, item.p_dtype, last));
    }
    return static_cast<std::uint32_t>(coefficients_.size() - 1);
  }

  void cut(bool skip) {
    chunks_.reserve(job_.items.size() + 16);
    for (const Item& item : job_.items) {
      double step = 1.0;
      LastStep last;
      if (item.step != nullptr && !skip) {
        if (job_.algorithm == Algorithm::kFtrl) {
          const HyperValues& h = values_of(item);
          last = read_last(item.step, item.p_dtype);
          if (h.lr != 0.0) write_last(item.step, item.p_dtype, h);
        } else {
          if (norms_) step += read_count(item.step, item.step_dtype);
          if (!norms_) count_step(job_.algorithm, item, values_of(item));
          if (!norms_) step = read_count(item.step, item.step_dtype);
          if (job_.algorithm == Algorithm::kNadam) {
            last.l1 = read_count(item.state[2], item.step_dtype);
          } else if (job_.algorithm == Algorithm::kLamb) {
            const double* const norms = job_.norms + 2 * (&item - job_.items.data());
            last.l1 = norms[0];
            last.l2 = norms[1];
          }
        }
      }
      if (item.numel == 0) continue;
      const std::uint32_t c = coefficients_of(item, step, last);
      std::int64_t size = kChunk;
      if (item.row > 1 && !norms_) size = std::max<std::int64_t>(1, kChunk / item.row) * item.row;
      for (std::int64_t begin = 0; begin < item.numel; begin += size) {
        chunks_.push_back({&item, c, begin, std::min(size, item.numel - begin)});
      }
      elements_ += item.numel;
    }
    slots_.resize(chunks_.size());
  }

  template <class F>
  void run(const F& f) {
    const auto count = static_cast<std::int64_t>(chunks_.size());
    if (count == 0) return;
    const std::int64_t grain = std::max<std::int64_t>(1, kGrainElements * count / elements_);
    parallel_for(count, grain, [&](std::int64_t begin, std::int64_t end) {
      for (std::int64_t i = begin; i < end; ++i) {
        if (i + 1 < end) prefetch(chunks_[static_cast<std::size_t>(i + 1)]);
        slots_[static_cast<std::size_t>(i)] = f(chunks_[static_cast<std::size_t>(i)]);
      }
    });
  }

  bool wants_sums(const Item& item) const {
    return norms_ || (job_.value != nullptr && penalized(item));
  }

  Sums updated(const Chunk& c) const {
    const Item& item = *c.item;
    if (rests(job_.algorithm, values_of(item).lr)) {
      const double weight = coefficients_[c.coefficients].average;
      if (item.copy != nullptr) kernels_.take_changed(item, c.begin, c.n);
      if (item.average != nullptr) kernels_.average(item, c.begin, c.n, weight);
      return value_of(c);
    }
    const Flags& flags = job_.hypers[static_cast<std::size_t>(item.hyper)].flags;
    const auto kernel = item.row > 1 && !norms_ ? kernels_.rows : kernels_.elements;
    return kernel(job_.algorithm, item, flags, coefficients_[c.coefficients], c.begin, c.n,
                  wants_sums(item));
  }

  // The value alone, where an overflow of the gradients forbids the step, or a rate of zero.
  Sums value_of(const Chunk& c) const {
    const Item& item = *c.item;
    Sums sums;
    if (!wants_sums(item)) return sums;
    if (item.copy != nullptr) kernels_.take_changed(item, c.begin, c.n);
    const std::int64_t size = dtype_size(item.p_dtype);
    const auto* const p = static_cast<const char*>(item.p);
    sums.absolute = kernels_.norm(Norm::kOne, item.p_dtype, p + c.begin * size, c.n);
    sums.square = kernels_.norm(Norm::kTwo, item.p_dtype, p + c.begin * size, c.n);
    for (std::int64_t at = c.begin; item.row > 1 && at < c.begin + c.n; at += item.row) {
      const double square = kernels_.norm(Norm::kTwo, item.p_dtype, p + at * size, item.row);
      sums.groups += std::sqrt(static_cast<double>(item.row)) * std::sqrt(square);
    }
    return sums;
  }

  void add_norms() const {
    std::fill_n(job_.norms, 2 * job_.items.size(), 0.0);
    for (std::size_t i = 0; i < chunks_.size(); ++i) {
      double* const norms = job_.norms + 2 * (chunks_[i].item - job_.items.data());
      norms[0] += slots_[i].square;
      norms[1] += slots_[i].update;
    }
  }

  double add() const {
    double value = 0.0;
    for (std::size_t i = 0; i < chunks_.size(); ++i) {
      const Item& item = *chunks_[i].item;
      if (!wants_sums(item)) continue;
      const HyperValues& h = values_of(item);
      const Sums& sums = slots_[i];
      // sqrt(1) * |p| for rows of one element.
      const double l1 = item.row == 1 ? h.l1 + h.group : h.l1;
      if (l1 != 0.0) value += l1 * sums.absolute;
      if (h.l2 != 0.0) value += 0.5 * h.l2 * sums.square;
      if (item.row > 1) value += h.group * sums.groups;
    }
    return value;
  }

  const Job& job_;
  const CpuKernels& kernels_;
  const bool norms_ = !is_whole(job_.algorithm);  // LAMB's first pass
  std::vector<HyperValues> hypers_;
  std::vector<Coefficients<double>> coefficients_;
  const Item* last_ = nullptr;
  double last_step_ = 0.0;
  LastStep before_;
  double gradient_ = 1.0;
  std::vector<Chunk> chunks_;
  std::int64_t elements_ = 0;
  std::vector<Sums> slots_;
};

// Calls f(item, begin, n, slot) for all chunks of a list.
template <class F>
void for_each_chunk(const std::vector<NormItem>& items, const F& f) {
  struct Part {
    const NormItem* item;
    std::int64_t begin;
  };
  std::vector<Part> parts;
  parts.reserve(items.size() + 16);
  std::int64_t elements = 0;
  for (const NormItem& item : items) {
    for (std::int64_t begin = 0; begin < item.numel; begin += kChunk) {
      parts.push_back({&item, begin});
    }
    elements += item.numel;
  }
  const auto count = static_cast<std::int64_t>(parts.size());
  if (count == 0) return;
  const std::int64_t grain = std::max<std::int64_t>(1, kGrainElements * count / elements);
  f.reserve(count);
  parallel_for(count, grain, [&](std::int64_t first, std::int64_t last) {
    for (std::int64_t i = first; i < last; ++i) {
      const Part& part = parts[static_cast<std::size_t>(i)];
      char* const x =
          static_cast<char*>(part.item->data) + part.begin * dtype_size(part.item->dtype);
      f(part.item->dtype, x, std::min(kChunk, part.item->numel - part.begin), i);
    }
  });
}

struct NormChunks {
  Norm norm;
  const CpuKernels& kernels;
  std::vector<double>& slots;
  void reserve(std::int64_t count) const { slots.resize(static_cast<std::size_t>(count)); }
  void operator()(DType dtype, const void* x, std::int64_t n, std::int64_t slot) const {
    slots[static_cast<std::size_t>(slot)] = kernels.norm(norm, dtype, x, n);
  }
};

struct ScaleChunks {
  const CpuKernels& kernels;
  double factor;
  void reserve(std::int64_t) const {}
  void operator()(DType dtype, void* x, std::int64_t n, std::int64_t) const {
    kernels.scale(dtype, x, n, factor);
  }
};

struct ClampChunks {
  const CpuKernels& kernels;
  double limit;
  void reserve(std::int64_t) const {}
  void operator()(DType dtype, void* x, std::int64_t n, std::int64_t) const {
    kernels.clamp(dtype, x, n, limit);
  }
};

}  // namespace

void run_cpu(const Job& job) { CpuRun(job).execute(); }

void run_cpu(const AdaptiveJob& job) {
  struct Part {
    const AdaptiveItem* item;
    char* grad;
    std::int64_t begin;
    std::int64_t end;
  };
  std::vector<Part> parts;
  std::int64_t elements = 0;
  for (std::size_t i = 0; i < job.items.size(); ++i) {
    const AdaptiveItem& item = job.items[i];
    const std::int64_t size = std::max<std::int64_t>(1, kChunk / item.row) * item.row;
    for (std::int64_t begin = 0; begin < item.numel; begin += size) {
      parts.push_back(
          {&item, static_cast<char*>(job.grads[i]), begin, std::min(begin + size, item.numel)});
    }
    elements += item.numel;
  }
  if (parts.empty()) return;
  const CpuKernels& kernels = cpu_kernels();
  const auto count = static_cast<std::int64_t>(parts.size());
  const std::int64_t grain = std::max<std::int64_t>(1, kGrainElements * count / elements);
  parallel_for(count, grain, [&](std::int64_t first, std::int64_t last) {
    for (std::int64_t i = first; i < last; ++i) {
      const Part& part = parts[static_cast<std::size_t>(i)];
      const AdaptiveItem& item = *part.item;
      const auto norm = [&](DType dtype, const char* x, std::int64_t at) {
        const void* const row = x + at * dtype_size(dtype);
        return std::sqrt(kernels.norm(Norm::kTwo, dtype, row, item.row));
      };
      for (std::int64_t at = part.begin; at < part.end; at += item.row) {
        const double factor = adaptive_factor(
            norm(item.g_dtype, part.grad, at),
            norm(item.p_dtype, static_cast<const char*>(item.p), at), job.factor, job.eps);
        if (factor == 1.0) continue;
        kernels.scale(item.g_dtype, part.grad + at * dtype_size(item.g_dtype), item.row, factor);
      }
    }
  });
}

void run_cpu(const NormJob& job) {
  std::vector<double> slots;
  for_each_chunk(job.items, NormChunks{job.norm, cpu_kernels(), slots});
  double norm = 0.0;
  for (const double x : slots) {
    if (job.norm == Norm::kInfinity) {
      norm = std::isnan(x) || x > norm ? x : norm;
      if (std::isnan(norm)) break;
    } else {
      norm += x;
    }
  }
  if (job.norm == Norm::kTwo) norm = std::sqrt(norm);
  if (job.out_dtype == DType::kFloat64) {
    *static_cast<double*>(job.out) = norm;
  } else {
    *static_cast<float*>(job.out) = static_cast<float>(norm);
  }
}

void run_cpu(const ClipJob& job) {
  if (job.limit >= 0.0) {
    for_each_chunk(job.items, ClampChunks{cpu_kernels(), job.limit});
    return;
  }
  const double factor = clip_factor(read_scalar(job.norm), job.max_norm);
  if (factor == 1.0) return;
  for_each_chunk(job.items, ScaleChunks{cpu_kernels(), factor});
}

}  // namespace fusereg::optim
