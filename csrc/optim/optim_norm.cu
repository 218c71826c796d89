// CUDA kernels of norms over lists of gradients, and of clipping by them. Contract: optim.h.
//
// Work is cut into chunks that never span tensors. The last block to finish adds the blocks' shares
// in their order.
#include "optim/coefficients.h"
#include "optim/launch.cuh"
#include "optim/optim_math.h"

namespace fusereg::optim {
namespace {

struct NormHead {
  Norm norm = Norm::kTwo;
  Output output;  // value: the norm, from `total` in the last launch
  bool last = true;
  Scalar clip_norm;
  double max_norm = 0.0;
};

// Where the elements lie is the table's moving address.
struct NormEntry {
  std::int64_t numel = 0;
  DType dtype = DType::kFloat32;
  std::uint8_t unused[7] = {};
};

// Vectors that a thread has under way at once.
constexpr int kAhead = 4;

// Calls f(x, v), v being the elements from x on, for those of a chunk: one by one up to a 16-byte
// boundary, then vectors.
template <class T, class F>
FUSEREG_DEVICE_INLINE void for_each_vector(T* x, std::int64_t n, const F& f) {
  constexpr int kN = cuda::kVecSize<T>;
  const auto misalignment = reinterpret_cast<std::uintptr_t>(x) % 16;
  std::int64_t head =
      misalignment == 0 ? 0 : static_cast<std::int64_t>((16 - misalignment) / sizeof(T));
  if (head > n) head = n;
  const std::int64_t vectors = (n - head) / kN;
  const auto one = [&](T* p) { f(p, cuda::load<1>(p)); };
  FUSEREG_NO_UNROLL
  for (std::int64_t i = threadIdx.x; i < head; i += kThreads) one(x + i);
  T* const from = x + head;
  std::int64_t v = threadIdx.x;
  for (; v + (kAhead - 1) * kThreads < vectors; v += kAhead * kThreads) {
    cuda::Vec<T, kN> data[kAhead];
    FUSEREG_UNROLL
    for (int u = 0; u < kAhead; ++u) data[u] = cuda::load<kN>(from + (v + u * kThreads) * kN);
    FUSEREG_UNROLL
    for (int u = 0; u < kAhead; ++u) f(from + (v + u * kThreads) * kN, data[u]);
  }
  FUSEREG_NO_UNROLL
  for (; v < vectors; v += kThreads) f(from + v * kN, cuda::load<kN>(from + v * kN));
  FUSEREG_NO_UNROLL
  for (std::int64_t i = vectors * kN + threadIdx.x; i < n - head; i += kThreads) one(from + i);
}

template <class Table, class F>
__device__ void for_each_chunk(const Table& t, const F& f) {
  const std::uint32_t tasks = t.first_task[t.count];
  for (std::uint32_t task = blockIdx.x; task < tasks; task += gridDim.x) {
    const int i = cuda::find_entry(t, task);
    const NormEntry item = t.entries[i];
    void* const data = cuda::moving_at(t, i);
    const std::int64_t begin = static_cast<std::int64_t>(task - t.first_task[i]) * kChunkElements;
    const std::int64_t rest = item.numel - begin;
    dispatch_dtype(item.dtype, [&](auto tag) {
      using T = typename decltype(tag)::type;
      for_each_vector(static_cast<T*>(data) + begin, rest < kChunkElements ? rest : kChunkElements,
                      f);
    });
  }
}

template <class Table>
__global__ void __launch_bounds__(kThreads) norm_kernel(FUSEREG_GRID_CONSTANT(Table, t)) {
  const Norm norm = t.head.norm;
  double share = 0.0;
  for_each_chunk(t, [&](auto*, const auto& v) {
    FUSEREG_UNROLL
    for (int k = 0; k < v.kSize; ++k) {
      const double y = static_cast<double>(to_compute(v[k]));
      const double magnitude = y < 0.0 ? -y : y;
      if (norm == Norm::kInfinity) {
        share = greater(magnitude, share);
      } else {
        share += norm == Norm::kOne ? magnitude : y * y;
      }
    }
  });
  const bool most = norm == Norm::kInfinity;
  const double block_share =
      most ? cuda::block_reduce(share, cuda::Max{}, 0.0) : cuda::block_sum(share);
  const Output& out = t.head.output;
  if (threadIdx.x == 0) out.slots[blockIdx.x] = block_share;
  if (!cuda::is_last_block(out.counter)) return;
  double total = 0.0;
  for (unsigned i = threadIdx.x; i < gridDim.x; i += kThreads) {
    total = most ? greater(out.slots[i], total) : total + out.slots[i];
  }
  total = most ? cuda::block_reduce(total, cuda::Max{}, 0.0) : cuda::block_sum(total);
  if (threadIdx.x != 0) return;
  if (!out.first) total = most ? greater(*out.total, total) : total + *out.total;
  *out.total = total;
  if (t.head.last) {
    write_scalar(out.value, out.value_is_float64, norm == Norm::kTwo ? sqrt(total) : total);
  }
}

template <class Table>
__global__ void __launch_bounds__(kThreads) clip_kernel(FUSEREG_GRID_CONSTANT(Table, t)) {
  const double factor = clip_factor(read_scalar(t.head.clip_norm), t.head.max_norm);
  if (factor == 1.0) return;
  for_each_chunk(t, [&](auto* x, const auto& v) {
    using T = std::remove_pointer_t<decltype(x)>;
    const auto by = static_cast<Compute<T>>(factor);
    constexpr int kN = std::decay_t<decltype(v)>::kSize;
    cuda::store(x, cuda::rounded_to<T, kN>([&](int k) { return to_compute(v[k]) * by; }));
  });
}

// --- launchers ---

// The same bytes for the norm and for clipping: a long table is written once for both.
struct NormList {
  using Head = NormHead;
  using Entry = NormEntry;
  static constexpr int kShared = 1;

  const std::vector<NormItem>& items;

  const NormItem& at(int i) const { return items[static_cast<std::size_t>(i)]; }
  int size() const { return static_cast<int>(items.size()); }
  Entry entry(int i) const {
    Entry e;
    e.numel = at(i).numel;
    e.dtype = at(i).dtype;
    return e;
  }
  void* moving(int i) const { return at(i).data; }
  std::int64_t tasks(int i) const { return ceil_div(at(i).numel, kChunkElements); }
  int shared(int) const { return 0; }
  const void* shared_data() const { return nullptr; }
  std::size_t shared_bytes() const { return 0; }
};

}  // namespace

void run_cuda(const NormJob& job, void* workspace, LaunchTables* tables, int device, void* stream) {
  const cuda::DeviceGuard guard(device);
  const auto on = static_cast<cuda::Stream>(stream);
  const char* const op = "fusereg.get_total_norm";
  Output output = output_in(workspace, job.out, job.out_dtype);
  const auto launch = [&](auto& table, const cuda::Part& part) {
    table.head.norm = job.norm;
    table.head.output = output;
    table.head.last = part.last;
    using Table = std::remove_reference_t<decltype(table)>;
    cuda::launch(op, &norm_kernel<Table>, config_for(part.tasks, on), table);
    output.first = false;
  };
  cuda::launch_over(op, NormList{job.items}, tables, device, on, launch);
}

void run_cuda(const ClipJob& job, LaunchTables* tables, int device, void* stream) {
  const cuda::DeviceGuard guard(device);
  const auto on = static_cast<cuda::Stream>(stream);
  const char* const op = "fusereg.clip_grad_norm_";
  const auto launch = [&](auto& table, const cuda::Part& part) {
    table.head.clip_norm = job.norm;
    table.head.max_norm = job.max_norm;
    using Table = std::remove_reference_t<decltype(table)>;
    cuda::launch(op, &clip_kernel<Table>, config_for(part.tasks, on), table);
  };
  cuda::launch_over(op, NormList{job.items}, tables, device, on, launch);
}

}  // namespace fusereg::optim
