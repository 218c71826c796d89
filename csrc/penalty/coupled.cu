// CUDA kernels of coupled channels. Contract: coupled.h.
//
// As in penalty.cu a launch takes a table of tensors in its parameters, of some 400 tensors; the
// work on groups is that of penalty_groups.cuh. kSums leaves each slice's sums in a place of its
// own, and a second launch adds those of each slot in the order of the list. kGrad and kProx look a
// slice's slot up and compute its factor where they need it.
#include <algorithm>

#include "penalty/coupled.h"
#include "penalty/penalty_groups.cuh"

namespace fusereg::penalty {
namespace {

constexpr int kEntryBytes = 80;
constexpr int kMaxEntries = static_cast<int>((cuda::kMaxKernelParamBytes - 256) / kEntryBytes);

template <int kEntries>
struct CoupledTable {
  double l1;
  const double* first_factor;
  const std::int32_t* slot_of;
  const double* factors;
  const double* squares;
  std::int64_t slots;
  double* partial;
  int count;
  std::uint32_t first_task[kEntries + 1];
  void* w[kEntries];
  void* g[kEntries];
  GroupShape shape[kEntries];
  GroupLayout layout[kEntries];
  std::int64_t first[kEntries];
  DType dtype[kEntries];

  void copy(int to, const CoupledTable<kMaxEntries>& t, int from) {
    w[to] = t.w[from];
    g[to] = t.g[from];
    shape[to] = t.shape[from];
    layout[to] = t.layout[from];
    first[to] = t.first[from];
    dtype[to] = t.dtype[from];
  }
};
static_assert(sizeof(CoupledTable<kMaxEntries>) <= cuda::kMaxKernelParamBytes,
              "the table does not fit a launch");

// kSums: a slice's sums go to their place.
struct StoreSums {
  static constexpr bool kSums = true;
  static constexpr bool kWrites = false;
  static constexpr bool kMayLeave = false;
  double* partial;
  __device__ GroupTerms operator()(std::int64_t slice, const double (&sums)[2], bool leader) const {
    if (leader) cuda::store_pair(partial + 2 * slice, sums[0], sums[1]);
    return {};
  }
};

// kGrad, kProx: a slice's factor is that of its slot.
template <Op op>
struct SlotTerms {
  static constexpr bool kSums = false;
  static constexpr bool kWrites = true;
  static constexpr bool kMayLeave = true;
  const std::int32_t* slot_of;
  const double* factors;
  const double* squares;
  std::int64_t slots;
  __device__ GroupTerms operator()(std::int64_t slice, const double (&)[2], bool) const {
    const std::int64_t slot = slot_of[slice];
    GroupTerms t{};
    t.left = slot < 0 || slot >= slots;
    if (t.left) return t;
    t.l2 = op == Op::kProx ? group_prox_factor(factors[slot], sqrt(squares[slot])) : factors[slot];
    return t;
  }
};

// Slices of one element, one for each thread.
template <class T, Op op, class Terms>
__device__ void single_elements(T* w, T* g, std::int64_t count, double l1, std::int64_t first,
                                const Terms& terms) {
  using C = Compute<T>;
  const std::int64_t i = first + threadIdx.x;
  if (i >= count) return;
  double sums[2] = {0.0, 0.0};
  if constexpr (Terms::kSums) {
    double x = to_compute(w[i]);
    if (op == Op::kProx) x = soft_threshold<double>(x, l1, 1.0);
    sums[0] = x < 0.0 ? -x : x;
    sums[1] = x * x;
  }
  const GroupTerms t = terms(i, sums, true);
  if constexpr (Terms::kWrites) {
    if (t.left) return;
    T* const out = op == Op::kProx ? w : g;
    out[i] = from_compute<T>(new_element<T, op>(to_compute(w[i]), C(0), static_cast<C>(l1),
                                                static_cast<C>(t.l2), l1 != 0.0, true));
  }
}

template <Op op, class Terms, class Table>
__global__ void __launch_bounds__(kThreads) coupled_kernel(FUSEREG_GRID_CONSTANT(Table, t)) {
  FUSEREG_SHARED(shared, ColumnSums);
  const double l1 = t.first_factor == nullptr ? t.l1 : *t.first_factor;
  const std::uint32_t tasks = t.first_task[t.count];
  for (std::uint32_t task = blockIdx.x; task < tasks; task += gridDim.x) {
    const int i = cuda::find_in_parameters(t.first_task, t.count, task);
    const GroupShape shape = t.shape[i];
    const GroupLayout layout = t.layout[i];
    const std::int64_t first =
        static_cast<std::int64_t>(task - t.first_task[i]) * layout.groups_per_task;
    Terms terms{};
    if constexpr (Terms::kSums) {
      terms.partial = t.partial + 2 * t.first[i];
    } else {
      terms = Terms{t.slot_of + t.first[i], t.factors, t.squares, t.slots};
    }
    dispatch_dtype(t.dtype[i], [&](auto tag) {
      using T = typename decltype(tag)::type;
      T* const w = static_cast<T*>(t.w[i]);
      T* const g = static_cast<T*>(t.g[i]);
      if (shape.group_size() == 1) {
        single_elements<T, op>(w, g, shape.groups, l1, first, terms);
      } else {
        groups_of_task<T, op>(w, g, shape, layout, l1, 1.0, first, shared, terms);
      }
    });
  }
}

// A slot for each thread.
__global__ void __launch_bounds__(kThreads)
    slot_sums_kernel(const double* partial, const std::int32_t* starts, const std::int32_t* order,
                     std::int64_t entries, std::int64_t slots, double* sums) {
  const std::int64_t slot = static_cast<std::int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (slot >= slots) return;
  double absolute = 0.0;
  double square = 0.0;
  const std::int64_t begin = starts[slot] < 0 ? 0 : starts[slot];
  const std::int64_t end = starts[slot + 1] > entries ? entries : starts[slot + 1];
  for (std::int64_t i = begin; i < end; ++i) {
    const std::int64_t entry = order[i];
    if (entry < 0 || entry >= entries) continue;
    absolute += partial[2 * entry];
    square += partial[2 * entry + 1];
  }
  sums[slot] = absolute;
  sums[slots + slot] = square;
}

class CoupledCudaRun {
 public:
  CoupledCudaRun(const CoupledJob& job, cuda::Stream stream) : job_(job), stream_(stream) {}

  void execute() const {
    CoupledTable<kMaxEntries> t;
    clear_table(t);
    for (std::size_t i = 0; i < job_.items.size(); ++i) {
      if (job_.items[i].numel != 0) add(t, job_.items[i], job_.first[i]);
    }
    flush(t);
    if (job_.pass == CoupledJob::Pass::kSums) {
      cuda::launch("fusereg.coupled_sums", &slot_sums_kernel,
                   config(ceil_div(job_.slots, kThreads)), job_.partial, job_.starts, job_.order,
                   job_.entries, job_.slots, job_.sums);
    }
  }

 private:
  cuda::LaunchConfig config(std::int64_t blocks) const {
    cuda::LaunchConfig c;
    c.grid = dim3(static_cast<unsigned>(blocks));
    c.block = dim3(kThreads);
    c.stream = stream_;
    return c;
  }

  void add(CoupledTable<kMaxEntries>& t, const Item& item, std::int64_t first) const {
    GroupLayout layout = group_layout(item);
    if (item.shape.group_size() == 1) layout.groups_per_task = kThreads;
    const std::int64_t tasks = ceil_div(item.shape.groups, layout.groups_per_task);
    if (t.count == kMaxEntries || t.first_task[t.count] + tasks > cuda::kMaxTasks) flush(t);
    const int i = t.count++;
    t.first_task[i + 1] = t.first_task[i] + static_cast<std::uint32_t>(tasks);
    t.w[i] = item.w;
    t.g[i] = item.g;
    t.shape[i] = item.shape;
    t.layout[i] = layout;
    t.first[i] = first;
    t.dtype[i] = item.dtype;
  }

  void flush(CoupledTable<kMaxEntries>& t) const {
    if (t.count == 0) return;
    with_fitting_table(t, [this](auto& table) { launch(table); });
    clear_table(t);
  }

  template <class Table>
  void launch(Table& t) const {
    t.l1 = job_.l1;
    t.first_factor = job_.first_factor;
    t.slot_of = job_.slot_of;
    t.factors = job_.factors;
    t.squares = job_.squares;
    t.slots = job_.slots;
    t.partial = job_.partial;
    const std::int64_t blocks =
        std::min<std::int64_t>(t.first_task[t.count], std::int64_t{8} * kMaxBlocks);
    const auto start = [&](auto* kernel) {
      cuda::launch("fusereg.coupled", kernel, config(blocks), t);
    };
    switch (job_.pass) {
      case CoupledJob::Pass::kSums:
        if (job_.thresholded) {
          start(&coupled_kernel<Op::kProx, StoreSums, Table>);
        } else {
          start(&coupled_kernel<Op::kValue, StoreSums, Table>);
        }
        break;
      case CoupledJob::Pass::kGrad:
        start(&coupled_kernel<Op::kWriteGrad, SlotTerms<Op::kWriteGrad>, Table>);
        break;
      default:
        start(&coupled_kernel<Op::kProx, SlotTerms<Op::kProx>, Table>);
        break;
    }
  }

  const CoupledJob& job_;
  const cuda::Stream stream_;
};

}  // namespace

void run_cuda(const CoupledJob& job, int device, void* stream) {
  const cuda::DeviceGuard guard(device);
  const auto run = [&](const CoupledJob& one) {
    CoupledCudaRun(one, static_cast<cuda::Stream>(stream)).execute();
  };
  if (job.pass != CoupledJob::Pass::kStep) return run(job);
  CoupledJob part = job;
  part.pass = CoupledJob::Pass::kSums;
  run(part);
  part.pass = CoupledJob::Pass::kProx;
  run(part);
}

}  // namespace fusereg::penalty
