// CUDA kernels of norms over lists of gradients, and of clipping by them. Contract: optim.h.
//
// Work is cut into chunks that never span tensors. The last block to finish adds the blocks' shares
// in their order.
#include "optim/coefficients.h"
#include "optim/launch.cuh"
#include "optim/optim_device.cuh"
#include "optim/optim_math.h"

namespace fusereg::optim {
namespace {

struct NormHead {
  Norm norm = Norm::kTwo;
  Output output;  // value: the norm, from `total` in the last launch
  bool last = true;
  Scalar clip_norm;
  double max_norm = 0.0;
  double limit = -1.0;
};

// Where the elements lie is the table's moving address.
struct NormEntry {
  std::int64_t numel = 0;
  DType dtype = DType::kFloat32;
  std::uint8_t unused[7] = {};
};

// Vectors that a thread has under way at once: of a chunk, and of a row, which may be short.
constexpr int kAhead = 4;
constexpr int kRowAhead = 2;

// Calls f(x, v) for the vectors and elements from x on, v what lies there.
template <int kDeep, class T, class F>
FUSEREG_DEVICE_INLINE void for_vectors(T* x, std::int64_t n, unsigned thread, unsigned threads,
                                       const F& f) {
  const auto load = [](T* from, auto count) {
    return cuda::load<decltype(count)::value>(in_global(from));
  };
  cuda::for_run<kDeep>(x, n, thread, threads, true, load, f);
}

// The same for the launch's tensors.
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
      for_vectors<kAhead>(static_cast<T*>(data) + begin,
                          rest < kChunkElements ? rest : kChunkElements, threadIdx.x, kThreads, f);
    });
  }
}

template <class C>
FUSEREG_DEVICE_INLINE C magnitude(C x) {
  return x < C(0) ? -x : x;
}

// The sum that a vector gives: in float32, as on the CPU, a vector's elements are few enough.
template <class C, class T, int kN>
FUSEREG_DEVICE_INLINE C terms(const cuda::Vec<T, kN>& v, Norm norm) {
  C sum = 0;
  if (norm == Norm::kOne) {
    FUSEREG_UNROLL
    for (int k = 0; k < kN; ++k) sum += magnitude(static_cast<C>(to_compute(v[k])));
  } else {
    FUSEREG_UNROLL
    for (int k = 0; k < kN; ++k) {
      const C y = static_cast<C>(to_compute(v[k]));
      sum += y * y;
    }
  }
  return sum;
}

template <class C, class T, int kN>
FUSEREG_DEVICE_INLINE double share_of(const cuda::Vec<T, kN>& v, Norm norm) {
  const auto found = static_cast<double>(terms<C>(v, norm));
  return sizeof(C) == 8 || (found >= 1e-30 && found <= 1e38)
             ? found
             : terms<double>(v, norm);  // squares beyond float32's range, or zeros
}

template <class Table>
__global__ void __launch_bounds__(kThreads) norm_kernel(FUSEREG_GRID_CONSTANT(Table, t)) {
  const Norm norm = t.head.norm;
  double share = 0.0;
  for_each_chunk(t, [&](auto* x, const auto& v) {
    constexpr int kN = std::decay_t<decltype(v)>::kSize;
    using C = Compute<std::remove_pointer_t<decltype(x)>>;
    if (norm == Norm::kInfinity) {
      C most = 0;
      FUSEREG_UNROLL
      for (int k = 0; k < kN; ++k) most = greater(magnitude(to_compute(v[k])), most);
      share = greater(static_cast<double>(most), share);
      return;
    }
    share += share_of<C>(v, norm);
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
  const double limit = t.head.limit;
  const bool by_value = limit >= 0.0;
  const double factor =
      by_value ? limit : clip_factor(read_scalar(t.head.clip_norm), t.head.max_norm);
  if (!by_value && factor == 1.0) return;
  for_each_chunk(t, [&](auto* x, auto v) {
    using T = std::remove_pointer_t<decltype(x)>;
    FUSEREG_UNROLL
    for (int k = 0; k < decltype(v)::kSize; ++k) {
      const Compute<T> y = to_compute(v[k]);
      const auto by = static_cast<Compute<T>>(factor);
      v[k] = from_compute<T>(by_value ? clamped(y, by) : y * by);
    }
    cuda::store(x, v);
  });
}

// --- adaptive clipping: a row by a warp, a long one by a block ---

struct AdaptiveHead {
  double factor = 0.0;
  double eps = 0.0;
};

template <class Table>
__global__ void __launch_bounds__(kThreads) adaptive_kernel(FUSEREG_GRID_CONSTANT(Table, t)) {
  const std::uint32_t tasks = t.first_task[t.count];
  for (std::uint32_t task = blockIdx.x; task < tasks; task += gridDim.x) {
    const int i = cuda::find_entry(t, task);
    const AdaptiveItem item = t.entries[i];
    void* const grad = cuda::moving_at(t, i);
    const bool by_warp = item.row <= kWarpRow;
    const std::int64_t row =
        static_cast<std::int64_t>(task - t.first_task[i]) * rows_per_task(item.row) +
        (by_warp ? cuda::warp_id() : 0);
    const std::int64_t begin = row * item.row;
    const std::int64_t length = begin < item.numel ? item.row : 0;
    const unsigned thread = by_warp ? cuda::lane_id() : threadIdx.x;
    const unsigned threads = by_warp ? cuda::kWarpSize : kThreads;
    const auto square_sum = [&](DType dtype, const void* data) {
      double sum = 0.0;
      dispatch_dtype(dtype, [&](auto tag) {
        using T = typename decltype(tag)::type;
        for_vectors<kRowAhead>(
            static_cast<const T*>(data) + begin, length, thread, threads,
            [&](const T*, const auto& v) { sum += share_of<Compute<T>>(v, Norm::kTwo); });
      });
      return sum;
    };
    double squares[2] = {square_sum(item.g_dtype, grad), square_sum(item.p_dtype, item.p)};
    if (by_warp) {
      squares[0] = cuda::warp_sum(squares[0]);
      squares[1] = cuda::warp_sum(squares[1]);
    } else {
      cuda::block_sum(squares);
    }
    const double factor =
        adaptive_factor(sqrt(squares[0]), sqrt(squares[1]), t.head.factor, t.head.eps);
    if (factor == 1.0) continue;
    dispatch_dtype(item.g_dtype, [&](auto tag) {
      using T = typename decltype(tag)::type;
      const auto by = static_cast<Compute<T>>(factor);
      for_vectors<kRowAhead>(static_cast<T*>(grad) + begin, length, thread, threads,
                             [&](T* x, auto v) {
                               FUSEREG_UNROLL
                               for (int k = 0; k < v.kSize; ++k)
                                 v[k] = from_compute<T>(to_compute(v[k]) * by);
                               cuda::store(x, v);
                             });
    });
  }
}

// --- launchers ---

struct AdaptiveList {
  using Head = AdaptiveHead;
  using Entry = AdaptiveItem;
  static constexpr int kShared = 1;

  const AdaptiveJob& job;

  bool is_small() const { return true; }
  const AdaptiveItem& at(int i) const { return job.items[static_cast<std::size_t>(i)]; }
  int size() const { return static_cast<int>(job.items.size()); }
  Entry entry(int i) const { return at(i); }
  void* moving(int i) const { return job.grads[static_cast<std::size_t>(i)]; }
  std::int64_t tasks(int i) const {
    return ceil_div(at(i).numel / at(i).row, rows_per_task(at(i).row));
  }
  int shared(int) const { return 0; }
  const void* shared_data() const { return nullptr; }
  std::size_t shared_bytes() const { return 0; }
};

// The same bytes for the norm and for clipping: a long table is written once for both.
struct NormList {
  using Head = NormHead;
  using Entry = NormEntry;
  static constexpr int kShared = 1;

  const std::vector<NormItem>& items;

  bool is_small() const { return true; }
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
    table.head.limit = job.limit;
    using Table = std::remove_reference_t<decltype(table)>;
    cuda::launch(op, &clip_kernel<Table>, config_for(part.tasks, on), table);
  };
  cuda::launch_over(op, NormList{job.items}, tables, device, on, launch);
}

void run_cuda(const AdaptiveJob& job, LaunchTables* tables, int device, void* stream) {
  const cuda::DeviceGuard guard(device);
  const auto on = static_cast<cuda::Stream>(stream);
  const char* const op = "fusereg.adaptive_clip_grad_";
  const auto launch = [&](auto& table, const cuda::Part& part) {
    table.head.factor = job.factor;
    table.head.eps = job.eps;
    using Table = std::remove_reference_t<decltype(table)>;
    cuda::launch(op, &adaptive_kernel<Table>, config_for(part.tasks, on), table);
  };
  cuda::launch_over(op, AdaptiveList{job}, tables, device, on, launch);
}

}  // namespace fusereg::optim
