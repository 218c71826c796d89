// CUDA kernels of the penalties. Contract: penalty.h.
//
// A launch takes a table of tensors in its parameters (constant memory), as many as fit. Work is
// cut into chunks that never span tensors; a block finds its chunk's tensor by binary search over
// the chunk counts, so the number of tensors and of blocks do not limit each other. Each block adds
// its share of the value in float64 and leaves it in its own slot; the last block to finish adds
// the slots in their order.
#include <algorithm>
#include <cmath>

#include "penalty/penalty_groups.cuh"

namespace fusereg::penalty {
namespace {

template <Op op, class Table>
__global__ void __launch_bounds__(kThreads)
    penalty_elements_kernel(FUSEREG_GRID_CONSTANT(Table, t)) {
  const double scale = read_scale(t.scale);
  double value = 0.0;
  const std::uint32_t chunks = t.first_task[t.count];
  for (std::uint32_t chunk = blockIdx.x; chunk < chunks; chunk += gridDim.x) {
    const int i = cuda::find_in_parameters(t.first_task, t.count, chunk);
    const std::int64_t offset = static_cast<std::int64_t>(chunk - t.first_task[i]) * kChunkElements;
    const std::int64_t rest = t.numel[i] - offset;
    const std::int64_t n = rest < kChunkElements ? rest : kChunkElements;
    auto run = [&](auto tag) {
      using T = typename decltype(tag)::type;
      T* const w = static_cast<T*>(t.w[i]) + offset;
      T* const g = t.g[i] == nullptr ? nullptr : static_cast<T*>(t.g[i]) + offset;
      return chunk_value<T, op>(w, g, n, t.l1[i], t.l2[i], scale);
    };
    value += dispatch_dtype(t.dtype[i], run);
  }
  if constexpr (kGivesValue<op>) finish_value(t.output, value);
}

template <Op op, class Table>
__global__ void __launch_bounds__(kThreads) penalty_groups_kernel(FUSEREG_GRID_CONSTANT(Table, t)) {
  FUSEREG_SHARED(shared, ColumnSums);
  const double scale = read_scale(t.scale);
  double value = 0.0;
  const std::uint32_t tasks = t.first_task[t.count];
  for (std::uint32_t task = blockIdx.x; task < tasks; task += gridDim.x) {
    const int i = cuda::find_in_parameters(t.first_task, t.count, task);
    const GroupShape shape = t.shape[i];
    const Strengths s = t.strengths[i];
    const GroupLayout layout = t.layout[i];
    const std::int64_t first =
        static_cast<std::int64_t>(task - t.first_task[i]) * layout.groups_per_task;
    auto run = [&](auto tag) {
      using T = typename decltype(tag)::type;
      T* const w = static_cast<T*>(t.w[i]);
      T* const g = static_cast<T*>(t.g[i]);
      const OwnTerms<op> terms{s, shape.group_size()};
      return groups_of_task<T, op>(w, g, shape, layout, s.l1, scale, first, shared, terms);
    };
    value += dispatch_dtype(t.dtype[i], run);
  }
  if constexpr (kGivesValue<op>) finish_value(t.output, value);
}

// --- launcher ---

class CudaRun {
 public:
  CudaRun(const Job& job, void* workspace, cuda::Stream stream) : job_(job), stream_(stream) {
    auto* const bytes = static_cast<char*>(workspace);
    output_ = {reinterpret_cast<unsigned*>(bytes),    reinterpret_cast<double*>(bytes + 8),
               reinterpret_cast<double*>(bytes + 16), job.value,
               job.value_dtype == DType::kFloat64,    true};
    scale_ = {job.scale, job.scale_dtype, job.host_scale};
  }

  void execute() {
    ElementTable<kMaxElementEntries> elements;
    GroupTable<kMaxGroupEntries> groups;
    clear_table(elements);
    clear_table(groups);
    for (const Item& item : job_.items) {
      if (item.numel == 0) continue;
      const Strengths& s = item.strengths;
      if (s.group != 0.0) {
        add_groups(groups, item);
      } else if (s.l1 != 0.0 || s.l2 != 0.0 || job_.op == Op::kWriteGrad) {
        add_elements(elements, item);
      }
    }
    if (elements.count > 0) flush(elements);
    if (groups.count > 0) flush(groups);
    // No work at all still owes a value of 0: an empty table gives it.
    if (output_.value != nullptr && output_.first) flush(elements);
  }

 private:
  // Gives the entry's place, behind what was there before.
  template <template <int> class Table, int kMost>
  int reserve(Table<kMost>& t, std::int64_t tasks) {
    if (t.count == kMost || (t.count > 0 && t.first_task[t.count] + tasks > cuda::kMaxTasks))
      flush(t);
    const int i = t.count++;
    t.first_task[i + 1] = t.first_task[i] + static_cast<std::uint32_t>(tasks);
    return i;
  }

  void add_elements(ElementTable<kMaxElementEntries>& t, const Item& item) {
    const int i = reserve(t, ceil_div(item.numel, kChunkElements));
    const bool prox = job_.op == Op::kProx;
    t.w[i] = item.w;
    t.g[i] = item.g;
    t.numel[i] = item.numel;
    t.l1[i] = item.strengths.l1;
    t.l2[i] = prox ? 1.0 / (1.0 + item.strengths.l2) : item.strengths.l2;
    t.dtype[i] = item.dtype;
  }

  void add_groups(GroupTable<kMaxGroupEntries>& t, const Item& item) {
    const GroupLayout layout = group_layout(item);
    const int i = reserve(t, ceil_div(item.shape.groups, layout.groups_per_task));
    t.w[i] = item.w;
    t.g[i] = item.g;
    t.shape[i] = item.shape;
    t.strengths[i] = item.strengths;
    t.layout[i] = layout;
    t.dtype[i] = item.dtype;
  }

  template <template <int> class Table, int kMost>
  void flush(Table<kMost>& t) {
    with_fitting_table(t, [this](auto& table) { launch(table); });
    clear_table(t);
  }

  template <int kMost>
  void launch(ElementTable<kMost>& t) {
    using Table = ElementTable<kMost>;
    launch(t, &penalty_elements_kernel<Op::kValue, Table>,
           &penalty_elements_kernel<Op::kAddGrad, Table>,
           &penalty_elements_kernel<Op::kWriteGrad, Table>,
           &penalty_elements_kernel<Op::kProx, Table>);
  }

  template <int kMost>
  void launch(GroupTable<kMost>& t) {
    using Table = GroupTable<kMost>;
    launch(t, &penalty_groups_kernel<Op::kValue, Table>,
           &penalty_groups_kernel<Op::kAddGrad, Table>,
           &penalty_groups_kernel<Op::kWriteGrad, Table>, &penalty_groups_kernel<Op::kProx, Table>);
  }

  template <class Table, class Kernel>
  void launch(Table& t, Kernel value, Kernel add_grad, Kernel write_grad, Kernel prox) {
    t.output = output_;
    t.scale = scale_;
    const Kernel kernel = job_.op == Op::kValue       ? value
                          : job_.op == Op::kAddGrad   ? add_grad
                          : job_.op == Op::kWriteGrad ? write_grad
                                                      : prox;
    cuda::LaunchConfig config;
    config.grid =
        dim3(static_cast<unsigned>(std::clamp<std::int64_t>(t.first_task[t.count], 1, kMaxBlocks)));
    config.block = dim3(kThreads);
    config.stream = stream_;
    cuda::launch(job_.op == Op::kProx ? "fusereg.prox" : "fusereg.penalty", kernel, config, t);
    output_.first = false;
  }

  const Job& job_;
  const cuda::Stream stream_;
  Output output_;
  Scale scale_;
};

}  // namespace

void run_cuda(const Job& job, void* workspace, int device, void* stream) {
  const cuda::DeviceGuard guard(device);
  CudaRun(job, workspace, static_cast<cuda::Stream>(stream)).execute();
}

}  // namespace fusereg::penalty
