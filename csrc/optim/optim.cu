// CUDA kernels of the optimizers. Contract: optim.h.
//
// One launch takes all parameters of a step (core/launch_table.cuh). Work is cut into tasks that
// never span tensors: chunks of elements, or rows where there is a group term. The last block to
// finish adds the blocks' shares of the value in their order and counts the launch's steps up: the
// other blocks have read them by then.
#include "optim/optim.h"
#include "optim/optim_device.cuh"

namespace fusereg::optim {
namespace {

constexpr int kMaxHypers = 8;
static_assert(kChunkElements == kChunk, "Job::norms is as long as kChunk says");

struct Scaling {
  Scalar grad_scale;
  Scalar found_inf;
  Scalar norm;
  double max_norm = 0.0;
};

// The numbers of a step: what changes from one to the next although the tensors stay.
struct StepHead {
  Output output;
  Scaling scaling;
  double* norms = nullptr;       // LAMB: of this table's entries
  double* norm_slots = nullptr;  // and of its tasks
  Hyper hypers[kMaxHypers];      // from the step's `first_hyper` on ...
  std::int32_t first_hyper = 0;
  const Hyper* many_hypers = nullptr;  // ... or, where these are too few, all of them
};

FUSEREG_DEVICE_INLINE const Hyper& hyper_of(const StepHead& head, int i) {
  return head.many_hypers == nullptr ? head.hypers[i - head.first_hyper] : head.many_hypers[i];
}

// What the last block to finish does: the value, and the step counts, which all blocks have read.
template <Algorithm algorithm, class Table>
__device__ void finish(const Table& t, double value) {
  const Output& out = t.head.output;
  const double share = cuda::block_sum(value);
  if (threadIdx.x == 0) out.slots[blockIdx.x] = share;
  if (!cuda::is_last_block(out.counter)) return;
  if constexpr (algorithm == Algorithm::kLambNorms) {
    // A warp adds a tensor's chunks.
    for (int i = cuda::warp_id(); i < t.count; i += kWarps) {
      double sums[2] = {0.0, 0.0};
      for (std::uint32_t task = t.first_task[i] + cuda::lane_id(); task < t.first_task[i + 1];
           task += cuda::kWarpSize) {
        for (int k = 0; k < 2; ++k) sums[k] += t.head.norm_slots[2 * task + k];
      }
      for (int k = 0; k < 2; ++k) {
        const double sum = cuda::warp_sum(sums[k]);
        if (cuda::lane_id() == 0) t.head.norms[2 * i + k] = sum;
      }
    }
  } else if (read_scalar(t.head.scaling.found_inf) == 0.0) {
    for (int i = static_cast<int>(threadIdx.x); i < t.count; i += kThreads) {
      const Target& item = t.entries[i];
      if (item.step == nullptr) continue;
      if constexpr (algorithm == Algorithm::kFtrl) {
        const HyperValues h = read_hyper(hyper_of(t.head, item.hyper));
        if (!rests(algorithm, h.lr)) write_last(item.step, item.p_dtype, h);
      } else {
        count_step(algorithm, item, read_hyper(hyper_of(t.head, item.hyper)));
      }
    }
  }
  if (out.value == nullptr) return;
  double sum = 0.0;
  for (unsigned i = threadIdx.x; i < gridDim.x; i += kThreads) sum += out.slots[i];
  sum = cuda::block_sum(sum);
  if (threadIdx.x != 0) return;
  if (!out.first) sum += *out.total;
  *out.total = sum;
  write_scalar(out.value, out.value_is_float64, sum);
}

// The coefficients take powers in float64: one thread works them out for its block, once for all of
// a tensor's tasks that follow each other.
template <Algorithm algorithm, class Table>
__device__ void prepare(const Table& t, int i, Work& shared) {
  __syncthreads();  // the previous task's readers are done
  if (threadIdx.x == 0) {
    const Target& item = t.entries[i];
    const StepHead& head = t.head;
    const Hyper& hyper = hyper_of(head, item.hyper);
    const Scaling& s = head.scaling;
    const double gradient =
        gradient_factor(read_scalar(s.grad_scale), read_scalar(s.norm), s.max_norm);
    double step = 1.0;
    LastStep last;
    if constexpr (algorithm == Algorithm::kFtrl) {
      last = read_last(item.step, item.p_dtype);
    } else if (item.step != nullptr) {
      step += read_count(item.step, item.step_dtype);
      if constexpr (algorithm == Algorithm::kLamb) {
        last.l1 = head.norms[2 * i];
        last.l2 = head.norms[2 * i + 1];
      }
      if constexpr (algorithm == Algorithm::kNadam) {
        last.l1 = nadam_product(item, read_hyper(hyper), step);
      }
    }
    shared.h = read_hyper(hyper);
    shared.flags = hyper.flags;
    shared.k = coefficients(algorithm, shared.h, hyper.flags, step, gradient, item.row, item.fresh,
                            item.p_dtype, last);
    shared.narrow = in_type<float>(shared.k);
    shared.average = read_scalar(s.found_inf) == 0.0;
    shared.update = shared.average && !rests(algorithm, shared.h.lr);
    shared.value = head.output.value != nullptr;
    if constexpr (!Table::kInParameters) shared.target = item;
  }
  __syncthreads();
}

// Two blocks to a multiprocessor: enough loads in flight to keep the memory busy. Without rows in a
// list their code, which wants registers of a whole multiprocessor, is left out.
template <Algorithm algorithm, bool kRows, class Table>
__global__ void __launch_bounds__(kThreads, kRows ? 1 : 2)
    optimizer_kernel(FUSEREG_GRID_CONSTANT(Table, t)) {
  FUSEREG_SHARED(memory, WorkMemory);
  Work& work = reinterpret_cast<Work&>(memory);
  double value = 0.0;
  const std::uint32_t tasks = t.first_task[t.count];
  int prepared = -1;
  for (std::uint32_t task = blockIdx.x; task < tasks; task += gridDim.x) {
    const int i = cuda::find_entry(t, task);
    if (i != prepared) prepare<algorithm>(t, i, work);
    prepared = i;
    const Target& item = Table::kInParameters ? t.entries[i] : work.target;
    const void* const gradient = cuda::moving_at(t, i);
    const auto own_task = static_cast<std::int64_t>(task - t.first_task[i]);
    if (kRows && item.row > 1) {
      const bool by_warp = item.row <= kWarpRow;
      const std::int64_t row = own_task * rows_per_task(item.row) + (by_warp ? cuda::warp_id() : 0);
      value += item.p_dtype == DType::kFloat64
                   ? row_value<algorithm, double>(item, gradient, work, row, by_warp)
                   : row_value<algorithm, float>(item, gradient, work, row, by_warp);
      continue;
    }
    const std::int64_t begin = own_task * kChunkElements;
    const std::int64_t rest = item.numel - begin;
    const std::int64_t n = rest < kChunkElements ? rest : kChunkElements;
    const double l1 = item.row == 1 ? work.h.l1 + work.h.group : work.h.l1;
    auto add = [&](auto shares) {
      if constexpr (algorithm == Algorithm::kLambNorms) {
        double sums[2] = {shares.square, shares.update};
        cuda::block_sum(sums);
        // Indexed by the thread, they would lie in local memory.
        if (threadIdx.x < 2) {
          t.head.norm_slots[2 * task + threadIdx.x] = threadIdx.x == 0 ? sums[0] : sums[1];
        }
        return;
      }
      if (l1 != 0.0) value += l1 * shares.absolute;
      if (work.h.l2 != 0.0) value += 0.5 * work.h.l2 * shares.square;
    };
    if (item.p_dtype == DType::kFloat64) {
      add(chunk<algorithm, double>(item, gradient, work, begin, n));
    } else {
      add(chunk<algorithm, float>(item, gradient, work, begin, n));
    }
  }
  finish<algorithm>(t, value);
}

// --- launcher ---

struct StepList {
  using Head = StepHead;
  using Entry = Target;
  static constexpr int kShared = kMaxHypers;

  const Job& job;
  bool rows;

  bool is_small() const { return !rows; }  // theirs are the largest kernels: one of each will do
  const Item& at(int i) const { return job.items[static_cast<std::size_t>(i)]; }
  int size() const { return static_cast<int>(job.items.size()); }
  Entry entry(int i) const { return at(i); }
  void* moving(int i) const { return const_cast<void*>(at(i).g); }
  std::int64_t tasks(int i) const {
    const Item& item = at(i);
    return item.row > 1 && is_whole(job.algorithm)
               ? ceil_div(item.numel / item.row, rows_per_task(item.row))
               : ceil_div(item.numel, kChunkElements);
  }
  int shared(int i) const { return at(i).hyper; }
  const void* shared_data() const { return job.hypers.data(); }
  std::size_t shared_bytes() const { return job.hypers.size() * sizeof(Hyper); }
};

template <Algorithm algorithm>
void launch_step(const Job& job, void* workspace, LaunchTables* tables, int device,
                 cuda::Stream stream) {
  const char* const op = "fusereg.optimizer";
  const bool rows = std::any_of(job.items.begin(), job.items.end(),
                                [](const Item& item) { return item.row > 1; });
  const StepList list{job, rows};
  Output output = output_in(workspace, job.value, job.value_dtype);
  double* slots = job.norms + 2 * job.items.size();
  const auto launch = [&](auto& table, const cuda::Part& part) {
    StepHead& head = table.head;
    head.output = output;
    if (job.norms != nullptr) {
      head.norms = job.norms + 2 * part.first;
      head.norm_slots = slots;
      slots += 2 * part.tasks;
    }
    head.scaling = {job.grad_scale, job.found_inf, job.norm, job.max_norm};
    head.many_hypers = static_cast<const Hyper*>(part.shared);
    if (part.shared == nullptr) {
      head.first_hyper = list.shared(part.first);
      const int rest = static_cast<int>(job.hypers.size()) - head.first_hyper;
      std::copy_n(job.hypers.begin() + head.first_hyper, std::min(rest, kMaxHypers), head.hypers);
    }
    using Table = std::remove_reference_t<decltype(table)>;
    constexpr bool kMayHaveRows = algorithm != Algorithm::kFtrl &&
                                  algorithm != Algorithm::kLambNorms &&
                                  Table::kMost > cuda::kSmallTable;
    const auto kernel = rows ? &optimizer_kernel<algorithm, kMayHaveRows, Table>
                             : &optimizer_kernel<algorithm, false, Table>;
    cuda::launch(op, kernel, config_for(part.tasks, stream), table);
    output.first = false;
  };
  cuda::launch_over(op, list, tables, device, stream, launch);
}

}  // namespace

void run_cuda(const Job& job, void* workspace, LaunchTables* tables, int device, void* stream) {
  const cuda::DeviceGuard guard(device);
  const auto on = static_cast<cuda::Stream>(stream);
  switch (job.algorithm) {
    case Algorithm::kSgd:
      return launch_step<Algorithm::kSgd>(job, workspace, tables, device, on);
    case Algorithm::kAdam:
      return launch_step<Algorithm::kAdam>(job, workspace, tables, device, on);
    case Algorithm::kAdagrad:
      return launch_step<Algorithm::kAdagrad>(job, workspace, tables, device, on);
    case Algorithm::kRmsprop:
      return launch_step<Algorithm::kRmsprop>(job, workspace, tables, device, on);
    case Algorithm::kNadam:
      return launch_step<Algorithm::kNadam>(job, workspace, tables, device, on);
    case Algorithm::kLion:
      return launch_step<Algorithm::kLion>(job, workspace, tables, device, on);
    case Algorithm::kLamb:
      return launch_step<Algorithm::kLamb>(job, workspace, tables, device, on);
    case Algorithm::kLambNorms:
      return launch_step<Algorithm::kLambNorms>(job, workspace, tables, device, on);
    default:
      return launch_step<Algorithm::kFtrl>(job, workspace, tables, device, on);
  }
}

}  // namespace fusereg::optim
