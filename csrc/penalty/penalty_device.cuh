// Tables of tensors, and what a thread does with elements. For the room's .cu files alone.
#pragma once

#include <cstring>

#include "core/launch_table.cuh"
#include "core/soft_threshold.h"
#include "penalty/penalty.h"

namespace fusereg::penalty {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / cuda::kWarpSize;
constexpr std::int64_t kChunkElements = 8192;
// Vectors that a thread has under way at once.
constexpr int kAhead = 4;

// Where a launch leaves its value. `total` collects it over the launches of one call.
struct Output {
  unsigned* counter;
  double* total;
  double* slots;
  void* value;
  bool value_is_float64;
  bool first;
};

struct Scale {
  const void* device;
  DType dtype;
  double host;
};

// --- tables ---
// A launch copies its whole table to the device: a short list has a small one.

constexpr int kElementEntryBytes = 48;
constexpr int kMaxElementEntries =
    static_cast<int>((cuda::kMaxKernelParamBytes - 256) / kElementEntryBytes);

// Elementwise: L1, L2.
template <int kEntries>
struct ElementTable {
  Output output;
  Scale scale;
  int count;
  std::uint32_t first_task[kEntries + 1];
  void* w[kEntries];
  void* g[kEntries];
  std::int64_t numel[kEntries];
  double l1[kEntries];  // kProx: the threshold
  double l2[kEntries];  // kProx: the factor
  DType dtype[kEntries];

  void copy(int to, const ElementTable<kMaxElementEntries>& t, int from) {
    w[to] = t.w[from];
    g[to] = t.g[from];
    numel[to] = t.numel[from];
    l1[to] = t.l1[from];
    l2[to] = t.l2[from];
    dtype[to] = t.dtype[from];
  }
};
static_assert(sizeof(ElementTable<kMaxElementEntries>) <= cuda::kMaxKernelParamBytes,
              "the table does not fit a launch");

// How a tensor's groups are laid over threads.
enum class GroupMode : std::uint8_t {
  kWarp,     // runs of at least a warp's width, small groups: a warp each
  kBlock,    // the same, large groups: a block each
  kColumns,  // short runs: neighboring columns side by side in a warp, rows over the warps
};
constexpr std::int64_t kWarpGroupElements = 2048;

struct GroupLayout {
  GroupMode mode = GroupMode::kWarp;
  // kColumns: threads side by side, and columns of each; at most kMaxColumns in all.
  std::uint8_t lanes = 0;
  std::uint8_t columns = 0;
  std::int64_t groups_per_task = 1;
};
constexpr int kMaxColumns = 64;
// As many blocks as a large device has at once. Columns are read by whole cache lines where that
// leaves so many, else by sectors of 32 bytes.
constexpr std::int64_t kManyTasks = 264;

GroupLayout group_layout(const Item& item) {
  const GroupShape& shape = item.shape;
  GroupLayout layout;
  if (shape.outer == 1 || shape.inner >= cuda::kWarpSize) {
    const bool small = shape.group_size() <= kWarpGroupElements;
    layout.mode = small ? GroupMode::kWarp : GroupMode::kBlock;
    layout.groups_per_task = small ? kWarps : 1;
    return layout;
  }
  layout.mode = GroupMode::kColumns;
  const std::int64_t vector = dispatch_dtype(
      item.dtype, [](auto tag) { return cuda::kVecSize<typename decltype(tag)::type>; });
  if (shape.inner == 1 && shape.groups % vector == 0 && cuda::is_aligned(item.w, 16) &&
      cuda::is_aligned(item.g, 16)) {
    std::int64_t lanes = 2;
    while (lanes < 8 && shape.groups / (2 * lanes * vector) >= kManyTasks) lanes *= 2;
    layout.lanes = static_cast<std::uint8_t>(lanes);
    layout.columns = static_cast<std::uint8_t>(vector);
    layout.groups_per_task = lanes * vector;
  } else {
    layout.lanes = cuda::kWarpSize;
    layout.columns = 1;
    layout.groups_per_task = cuda::kWarpSize / shape.inner;
  }
  return layout;
}

constexpr int kGroupEntryBytes = 88;
constexpr int kMaxGroupEntries =
    static_cast<int>((cuda::kMaxKernelParamBytes - 256) / kGroupEntryBytes);

template <int kEntries>
struct GroupTable {
  Output output;
  Scale scale;
  int count;
  std::uint32_t first_task[kEntries + 1];
  void* w[kEntries];
  void* g[kEntries];
  GroupShape shape[kEntries];
  Strengths strengths[kEntries];
  GroupLayout layout[kEntries];
  DType dtype[kEntries];

  void copy(int to, const GroupTable<kMaxGroupEntries>& t, int from) {
    w[to] = t.w[from];
    g[to] = t.g[from];
    shape[to] = t.shape[from];
    strengths[to] = t.strengths[from];
    layout[to] = t.layout[from];
    dtype[to] = t.dtype[from];
  }
};
static_assert(sizeof(GroupTable<kMaxGroupEntries>) <= cuda::kMaxKernelParamBytes,
              "the table does not fit a launch");

// Makes a table an empty one. What lies beyond its entries is never read and not cleared, but on the
// host, where a stand-in device looks at every address that a launch has.
template <class Table>
void clear_table(Table& t) {
#if defined(FUSEREG_CUDA_ON_HOST)
  std::memset(static_cast<void*>(&t), 0, sizeof(t));
#endif
  t.count = 0;
  t.first_task[0] = 0;
}

// Calls launch(table) with t's entries in the smallest table that has room for them.
template <template <int> class Table, int kMost, class Launch>
void with_fitting_table(Table<kMost>& t, const Launch& launch) {
  if (t.count > cuda::kSmallTable) return launch(t);
  Table<cuda::kSmallTable> small;
  clear_table(small);
  small.count = t.count;
  for (int i = 0; i < t.count; ++i) small.copy(i, t, i);
  std::copy(t.first_task, t.first_task + t.count + 1, small.first_task);
  launch(small);
}

// --- device code ---

__device__ double read_scale(const Scale& s) {
  if (s.device == nullptr) return s.host;
  switch (s.dtype) {
    case DType::kFloat64:
      return s.host * *static_cast<const double*>(s.device);
    case DType::kFloat32:
      return s.host * *static_cast<const float*>(s.device);
    case DType::kFloat16:
      return s.host * to_float(*static_cast<const Half*>(s.device));
    default:
      return s.host * to_float(*static_cast<const BFloat16*>(s.device));
  }
}

__device__ void finish_value(const Output& out, double value) {
  const double block_value = cuda::block_sum(value);
  if (threadIdx.x == 0) out.slots[blockIdx.x] = block_value;
  if (!cuda::is_last_block(out.counter)) return;
  double sum = 0.0;
  for (unsigned i = threadIdx.x; i < gridDim.x; i += kThreads) sum += out.slots[i];
  sum = cuda::block_sum(sum);
  if (threadIdx.x != 0) return;
  if (!out.first) sum += *out.total;
  *out.total = sum;
  if (out.value_is_float64) {
    *static_cast<double*>(out.value) = sum;
  } else {
    *static_cast<float*>(out.value) = static_cast<float>(sum);
  }
}

FUSEREG_DEVICE_INLINE bool is_finite(double x) { return x - x == 0.0; }

template <Op op>
inline constexpr bool kGivesValue = op == Op::kValue || op == Op::kAddGrad;

// What becomes of one element: its new gradient or, for kProx, its new value.
template <class T, Op op, class C = Compute<T>>
FUSEREG_DEVICE_INLINE C new_element(C w, C before, C l1, C l2, bool has_l1, bool has_l2) {
  if constexpr (op == Op::kProx) {
    return soft_threshold<T>(w, l1, l2);
  } else {
    C d = op == Op::kAddGrad ? before : C(0);
    if (has_l1) d += l1 * sign(w);
    if (has_l2) d += l2 * w;
    return d;
  }
}

// Elements of a tensor and of its gradient (kAddGrad), and what becomes of them.
template <class T, int kN>
struct Elements {
  cuda::Vec<T, kN> x;
  cuda::Vec<T, kN> before;
};

// One chunk of one tensor by the whole block; gives the thread's share of the value.
template <class T, Op op>
__device__ double chunk_value(T* w, T* g, std::int64_t n, double l1, double l2, double scale) {
  using C = Compute<T>;
  constexpr bool kWrites = op != Op::kValue;
  const bool has_l1 = l1 != 0.0 || op == Op::kProx;
  const bool has_l2 = l2 != 0.0;
  const bool writes = op == Op::kProx || (kWrites && g != nullptr);
  const C c1 = static_cast<C>(op == Op::kProx ? l1 : l1 * scale);
  const C c2 = static_cast<C>(op == Op::kProx ? l2 : l2 * scale);
  T* const out = op == Op::kProx ? w : g;
  double absolute_sum = 0.0;
  double square_sum = 0.0;
  C absolute = 0;  // of the elements at hand, a vector's at most
  C square = 0;
  auto flush = [&] {
    if constexpr (kGivesValue<op>) {
      absolute_sum += static_cast<double>(absolute);
      square_sum += static_cast<double>(square);
      absolute = square = 0;
    }
  };

  auto add = [&](C x) {
    if constexpr (kGivesValue<op>) {
      absolute += x < C(0) ? -x : x;
      square += x * x;
    }
  };
  // Where w and g lie differently against 16-byte boundaries, no vector fits both.
  const auto misalignment = [](const T* p) { return reinterpret_cast<std::uintptr_t>(p) % 16; };
  const bool together = !writes || misalignment(out) == misalignment(w);
  constexpr int kDeep = op != Op::kAddGrad ? kAhead : kAhead / 2;
  // Without a gradient w again: a load behind a branch would be waited for there.
  const T* const before = writes ? g : w;
  cuda::for_run<kDeep>(
      w, n, threadIdx.x, kThreads, together,
      [&](T* p, auto count) {
        constexpr int kN = decltype(count)::value;
        Elements<T, kN> e{};
        e.x = cuda::load<kN>(p);
        if constexpr (op == Op::kAddGrad) {
          e.before = cuda::load<kN>(before + (p - w));
        }
        return e;
      },
      [&](T* p, auto e) {
        FUSEREG_UNROLL
        for (int k = 0; k < decltype(e.x)::kSize; ++k) {
          const C x = to_compute(e.x[k]);
          add(x);
          if constexpr (kWrites) {
            e.before[k] = from_compute<T>(
                new_element<T, op>(x, to_compute(e.before[k]), c1, c2, has_l1, has_l2));
          }
        }
        flush();
        if constexpr (kWrites) {
          if (writes) cuda::store(out + (p - w), e.before);
        }
      });

  if constexpr (!kGivesValue<op>) return 0.0;
  if (sizeof(C) == 4 && !(is_finite(absolute_sum) && is_finite(square_sum))) {
    // float32 squares overflow from 1.8e19 on although the value may not: this thread's elements
    // again.
    absolute_sum = square_sum = 0.0;
    cuda::for_run<1>(
        w, n, threadIdx.x, kThreads, together,
        [](T* p, auto count) { return cuda::load<decltype(count)::value>(p); },
        [&](T*, const auto& v) {
          for (int k = 0; k < std::decay_t<decltype(v)>::kSize; ++k) {
            const double x = to_compute(v[k]);
            absolute_sum += x < 0.0 ? -x : x;
            square_sum += x * x;
          }
        });
  }
  double value = 0.0;
  if (has_l1) value += l1 * absolute_sum;
  if (has_l2) value += 0.5 * l2 * square_sum;
  return value;
}

}  // namespace
}  // namespace fusereg::penalty
