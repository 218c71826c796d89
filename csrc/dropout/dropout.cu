// CUDA kernels of dropout. Contract: dropout.h.
//
// A thread takes groups of 8 elements (one Philox call of 16-bit draws), kGroupsPerThread of them a
// block's width apart: all loads are under way before the first draw is made. Memory moves in
// 16-byte vectors where pointers and index_offset allow it, element by element otherwise: a warp then
// takes the 256 elements of its groups as a window (core/cuda_device.cuh). The draws are the same.
#include <algorithm>

#include "core/cuda.cuh"
#include "core/draw_rows.h"
#include "core/rounded.h"
#include "dropout/dropout.h"

namespace fusereg::dropout {
namespace {

constexpr int kThreads = 256;
constexpr int kGroupsPerThread = 2;
constexpr int kWindow = cuda::kWarpSize * kGroup;
constexpr int kBlocksPerSm = 32;

struct Arguments {
  const void* x;
  void* y;
  std::int64_t numel;
  RowSteps rows;  // of all threads' elements
  std::uint64_t index_offset;
  SeedPair random;
  Draw draw;
  double a, b, c;
};

using rounded::multiply;

template <class C>
struct Constants {
  C a, b, c;
};

template <class C>
FUSEREG_DEVICE_INLINE Constants<C> constants(const Arguments& g) {
  return {static_cast<C>(g.a), static_cast<C>(g.b), static_cast<C>(g.c)};
}

template <class T, bool kLinear>
FUSEREG_DEVICE_INLINE Compute<T> apply(T x, bool keep, const Constants<Compute<T>>& k) {
  Compute<T> y = multiply(to_compute(x), k.a);
  if constexpr (!kLinear) y = y + k.b;
  return keep ? y : k.c;
}

// The blocks that a multiprocessor is to hold at least: fewer registers would be spilled.
template <class T>
constexpr int kResident = sizeof(T) == 8 ? 3 : 4;

template <class T, int kBits, bool kLinear>
__global__ void __launch_bounds__(kThreads, kResident<T>)
    dropout_elements_kernel(FUSEREG_GRID_CONSTANT(Arguments, g)) {
  constexpr int kN = cuda::kVecSize<T> < kGroup ? cuda::kVecSize<T> : kGroup;
  constexpr int kParts = kGroup / kN;
  const T* const x = static_cast<const T*>(g.x);
  T* const y = static_cast<T*>(g.y);
  const std::uint64_t seed = g.random.key();
  const std::uint64_t low = g.random.low();
  const auto k = constants<Compute<T>>(g);
  const std::uint64_t first_group = g.index_offset / kGroup;
  const std::int64_t groups = (g.numel + kGroup - 1) / kGroup;
  const std::int64_t step = static_cast<std::int64_t>(gridDim.x) * kThreads * kGroupsPerThread;
  std::int64_t base =
      static_cast<std::int64_t>(blockIdx.x) * kThreads * kGroupsPerThread + threadIdx.x;
  for (; base < groups; base += step) {
    cuda::Vec<T, kN> data[kGroupsPerThread][kParts];
    FUSEREG_UNROLL
    for (int u = 0; u < kGroupsPerThread; ++u) {
      const std::int64_t at = (base + u * kThreads) * kGroup;
      if (at + kGroup > g.numel) continue;
      FUSEREG_UNROLL
      for (int i = 0; i < kParts; ++i) data[u][i] = cuda::load_streaming<kN>(x + at + i * kN);
    }
    FUSEREG_UNROLL
    for (int u = 0; u < kGroupsPerThread; ++u) {
      const std::int64_t group = base + u * kThreads;
      if (group >= groups) break;
      const std::int64_t at = group * kGroup;
      const std::uint32_t mask =
          keep_mask<kBits>(seed, low, first_group + static_cast<std::uint64_t>(group), g.draw);
      if (at + kGroup <= g.numel) {
        FUSEREG_UNROLL
        for (int i = 0; i < kParts; ++i) {
          const auto result = cuda::rounded_to<T, kN>([&](int e) {
            return apply<T, kLinear>(data[u][i][e], (mask >> (i * kN + e) & 1u) != 0, k);
          });
          cuda::store(y + at + i * kN, result);
        }
      } else {
        FUSEREG_NO_UNROLL
        for (int e = 0; at + e < g.numel; ++e) {
          y[at + e] = from_compute<T>(apply<T, kLinear>(x[at + e], (mask >> e & 1u) != 0, k));
        }
      }
    }
  }
}

// Element by element, where each has a draw of its own and where rows share them: a lane draws for 8
// that follow each other.
template <class T, int kBits, bool kLinear, bool kRows>
__global__ void __launch_bounds__(kThreads)
    dropout_window_kernel(FUSEREG_GRID_CONSTANT(Arguments, g)) {
  const T* const x = static_cast<const T*>(g.x);
  T* const y = static_cast<T*>(g.y);
  const std::uint64_t seed = g.random.key();
  const std::uint64_t low = g.random.low();
  const auto k = constants<Compute<T>>(g);
  const auto mask_of = [&](std::uint64_t group) {
    return keep_mask<kBits>(seed, low, group, g.draw);
  };
  // Windows of whole groups of draws. Those before and behind them are the last block's.
  const std::int64_t head = kRows ? 0 : -g.index_offset % kGroup;
  const std::int64_t windows = g.numel > head ? (g.numel - head) / kWindow : 0;
  const int step = static_cast<int>(gridDim.x) * (kThreads / cuda::kWarpSize);
  std::int64_t w = std::int64_t{blockIdx.x} * (kThreads / cuda::kWarpSize) + cuda::warp_id();
  const auto walk = [&](std::int64_t at) {
    return RowWalk<std::uint64_t>(g.rows, static_cast<std::uint64_t>(at), g.index_offset);
  };
  auto rows = walk(w * kWindow + cuda::lane_id() * kGroup);
  for (; w < windows; w += step) {
    const std::int64_t begin = head + w * kWindow;
    const std::int64_t at = begin + cuda::lane_id();
    T data[kGroup];
    const auto load = [&](int j) { data[j] = cuda::load_streaming(x + at + j * cuda::kWarpSize); };
    std::uint32_t mask;
    if constexpr (kRows) {
      mask = rows.template mask<kGroup>(mask_of);
      rows.next();
    } else {
      FUSEREG_UNROLL
      for (int j = 0; j < kGroup; ++j) load(j);
      mask = mask_of((g.index_offset + begin) / kGroup + cuda::lane_id());
    }
    mask = cuda::window_bits<kGroup>(mask);
    bool keep[kGroup];
    FUSEREG_UNROLL
    for (int j = 0; j < kGroup; ++j) {
      keep[j] = cuda::window_bit<kGroup>(mask, j);
      // Of rows, what is dropped is not read.
      if (kRows && keep[j]) load(j);
    }
    FUSEREG_UNROLL
    for (int j = 0; j < kGroup; ++j) {
      y[at + j * cuda::kWarpSize] = from_compute<T>(apply<T, kLinear>(data[j], keep[j], k));
    }
  }
  if (blockIdx.x != gridDim.x - 1) return;
  FUSEREG_NO_UNROLL
  for (std::int64_t t = threadIdx.x; t < g.numel - windows * kWindow; t += kThreads) {
    const std::int64_t i = t < head ? t : t + windows * kWindow;
    const std::uint64_t index = g.index_offset + i;
    const bool keep = kRows ? walk(i).template mask<1>(mask_of) != 0
                            : (mask_of(index / kGroup) >> index % kGroup & 1u) != 0;
    y[i] = from_compute<T>(apply<T, kLinear>(x[i], keep, k));
  }
}

// Rows: kN elements that share a draw (inner = 1) or have consecutive ones of one group; kRagged:
// kN elements of any rows, whose draws are looked up one after the other.
template <class T, int kBits, bool kLinear, int kN, class Index, bool kRagged>
__global__ void __launch_bounds__(kThreads)
    dropout_rows_kernel(FUSEREG_GRID_CONSTANT(Arguments, g)) {
  const T* const x = static_cast<const T*>(g.x);
  T* const y = static_cast<T*>(g.y);
  const std::uint64_t seed = g.random.key();
  const std::uint64_t low = g.random.low();
  const auto k = constants<Compute<T>>(g);
  const auto repeat = static_cast<Index>(g.rows.repeat);
  const auto inner = static_cast<Index>(g.rows.inner);
  const auto mask_of = [&](std::uint64_t group) {
    return keep_mask<kBits>(seed, low, group, g.draw);
  };
  const std::int64_t vectors = (g.numel + kN - 1) / kN;
  const std::int64_t step = static_cast<std::int64_t>(gridDim.x) * kThreads;
  std::int64_t v = static_cast<std::int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  RowWalk<Index> rows(g.rows, static_cast<Index>(v) * kN, g.index_offset);
  for (; v < vectors; v += step) {
    const Index at = static_cast<Index>(v) * kN;
    std::uint32_t mask;
    if constexpr (kRagged) {
      mask = rows.template mask<kN>(mask_of);
      rows.next();
      if (v * kN + kN > g.numel) {
        for (int e = 0; v * kN + e < g.numel; ++e)
          y[at + e] = from_compute<T>(apply<T, kLinear>(x[at + e], (mask >> e & 1u) != 0, k));
        continue;
      }
    } else {
      const std::uint64_t index = g.index_offset + at / (repeat * inner) * inner + at % inner;
      mask = mask_of(index / kGroup) >> (index % kGroup);
      if (inner == 1) mask = (mask & 1u) != 0 ? 0xffu : 0u;
    }
    cuda::Vec<T, kN> data;
    if ((mask & ((1u << kN) - 1u)) == 0) {
      // A row that is dropped is not read.
      FUSEREG_UNROLL
      for (int e = 0; e < kN; ++e) data[e] = from_compute<T>(k.c);
    } else {
      data = cuda::load_streaming<kN>(x + at);
      data = cuda::rounded_to<T, kN>(
          [&](int e) { return apply<T, kLinear>(data[e], (mask >> e & 1u) != 0, k); });
    }
    cuda::store(y + at, data);
  }
}

// Calls f with compile-time values of a job's dtype, bits and form.
template <class F>
void dispatch(const Job& job, F&& f) {
  dispatch_dtype(job.dtype, [&](auto tag) {
    using Wide = std::integral_constant<int, 32>;
    using Narrow = std::integral_constant<int, 16>;
    const bool linear = job.affine.linear();
    if (job.draw.bits != 32) {
      if (linear) {
        f(tag, Narrow{}, std::true_type{});
      } else {
        f(tag, Narrow{}, std::false_type{});
      }
    } else if (linear) {
      f(tag, Wide{}, std::true_type{});
    } else {
      f(tag, Wide{}, std::false_type{});
    }
  });
}

}  // namespace

void run_cuda(const Job& job, int device, void* stream) {
  if (job.numel == 0) return;
  const cuda::DeviceGuard guard(device);
  Arguments g = {job.x,      job.y,    job.numel,    {},           job.index_offset,
                 job.random, job.draw, job.affine.a, job.affine.b, job.affine.c};
  const std::int64_t most =
      static_cast<std::int64_t>(cuda::device_properties(device).sm_count) * kBlocksPerSm;
  cuda::LaunchConfig config;
  config.block = dim3(kThreads);
  config.stream = static_cast<cuda::Stream>(stream);
  // For all threads at so many elements each.
  auto set_grid = [&](std::int64_t elements) {
    const std::int64_t blocks =
        std::clamp<std::int64_t>(ceil_div(job.numel, kThreads * elements), 1, most);
    config.grid = dim3(static_cast<unsigned>(blocks));
    g.rows = row_steps(job.rows.repeat, job.rows.inner, blocks * kThreads * elements);
  };
  const bool aligned = cuda::is_aligned(job.x, 16) && cuda::is_aligned(job.y, 16);
  constexpr const char* kOp = "fusereg.dropout";

  dispatch(job, [&](auto tag, auto bits, auto linear) {
    using T = typename decltype(tag)::type;
    constexpr int kBits = decltype(bits)::value;
    constexpr bool kLinear = decltype(linear)::value;
    if (job.rows.repeat == 1) {
      if (aligned && job.index_offset % kGroup == 0) {
        set_grid(kGroup * kGroupsPerThread);
        cuda::launch(kOp, dropout_elements_kernel<T, kBits, kLinear>, config, g);
      } else {
        set_grid(kGroup);
        cuda::launch(kOp, dropout_window_kernel<T, kBits, kLinear, false>, config, g);
      }
      return;
    }
    constexpr int kN = cuda::kVecSize<T> < kGroup ? cuda::kVecSize<T> : kGroup;
    const bool whole = job.rows.inner == 1 ? job.rows.repeat % kN == 0
                                           : job.rows.inner % kN == 0 && job.index_offset % kN == 0;
    const bool small = job.numel < (std::int64_t{1} << 31);
    const auto launch = [&](auto width, auto index, auto ragged) {
      constexpr int kWidth = decltype(width)::value;
      using Index = typename decltype(index)::type;
      set_grid(kWidth);
      cuda::launch(kOp,
                   dropout_rows_kernel<T, kBits, kLinear, kWidth, Index, decltype(ragged)::value>,
                   config, g);
    };
    constexpr std::integral_constant<int, kN> wide{};
    if (aligned && whole && small) {
      launch(wide, TypeTag<std::uint32_t>{}, std::false_type{});
    } else if (aligned && whole) {
      launch(wide, TypeTag<std::uint64_t>{}, std::false_type{});
    } else if (aligned && small) {
      launch(wide, TypeTag<std::uint32_t>{}, std::true_type{});
    } else {
      set_grid(kGroup);
      cuda::launch(kOp, dropout_window_kernel<T, kBits, kLinear, true>, config, g);
    }
  });
}

}  // namespace fusereg::dropout
