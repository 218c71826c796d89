// CUDA kernels of dropout fused with its neighbors. Contract: fused_dropout.h.
//
// Elements: a thread takes groups of 8 (one Philox call of 16-bit draws), kGroupsPerThread of them
// a block's width apart, all loads under way before the first draw is made; memory moves in 16-byte
// vectors where pointers and index_offset allow it. The gradient of the bias: a block has a tile of
// columns and one chunk of rows, a thread 8 columns of every kGroups-th row.
#include <algorithm>

#include "core/cuda.cuh"
#include "core/draw_rows.h"
#include "core/rounded.h"
#include "fused_dropout/fused_dropout.h"

namespace fusereg::fused_dropout {
namespace {

constexpr int kThreads = 256;
constexpr int kGroupsPerThread = 2;
constexpr int kWindow = cuda::kWarpSize * kGroup;
constexpr int kBlocksPerSm = 32;

struct Arguments {
  const void* x;
  const void* bias;
  const void* other;
  void* y;
  void* grad_bias;
  double* partials;
  unsigned* counters;
  std::int64_t numel;
  std::int64_t columns;
  RowSteps rows;  // of all threads' elements
  std::uint64_t index_offset;
  SeedPair random;
  Draw draw;
  double scale;
  bool vectors;       // x, other, y and index_offset allow them
  bool bias_vectors;  // and so does the bias
  Chunks chunks;
  int lanes;
};

using rounded::multiply;

// --- the forms: what becomes of an element ---

template <class T>
struct Add {
  static constexpr bool kBias = true;
  static constexpr bool kOther = true;
  static constexpr bool kDraws = true;
  using C = Compute<T>;
  static FUSEREG_DEVICE_INLINE C apply(C x, C other, C bias, bool keep, C scale) {
    return other + (keep ? multiply(x + bias, scale) : C(0));
  }
};

template <class T, Activation kActivation>
struct Activate {
  static constexpr bool kBias = false;
  static constexpr bool kOther = false;
  static constexpr bool kDraws = true;
  using C = Compute<T>;
  static FUSEREG_DEVICE_INLINE C apply(C x, C, C, bool keep, C scale) {
    return keep ? multiply(activate<kActivation>(x), scale) : C(0);
  }
};

template <class T, Activation kActivation>
struct ActivateBackward {
  static constexpr bool kBias = false;
  static constexpr bool kOther = true;
  // A result of relu that is positive was kept.
  static constexpr bool kDraws = kActivation != Activation::kRelu;
  using C = Compute<T>;
  static FUSEREG_DEVICE_INLINE C apply(C grad, C x, C, bool keep, C scale) {
    const C g = multiply(grad, scale);
    if constexpr (kDraws) return keep ? multiply(g, slope<kActivation>(x)) : C(0);
    return x <= C(0) ? C(0) : g;
  }
};

// The bias of 8 elements from position `at` on.
template <class T>
FUSEREG_DEVICE_INLINE void load_bias(const Arguments& g, std::int64_t at,
                                     Compute<T> (&bias)[kGroup]) {
  const T* const p = static_cast<const T*>(g.bias);
  constexpr int kN = cuda::kVecSize<T> < kGroup ? cuda::kVecSize<T> : kGroup;
  // The short division is a third of the long one.
  const bool small = g.numel < (std::int64_t{1} << 31);
  std::int64_t column = small
                            ? static_cast<std::uint32_t>(at) % static_cast<std::uint32_t>(g.columns)
                            : at % g.columns;
  if (g.bias_vectors) {
    FUSEREG_UNROLL
    for (int i = 0; i < kGroup / kN; ++i) {
      const auto v = cuda::load<kN>(p + column + i * kN);
      FUSEREG_UNROLL
      for (int e = 0; e < kN; ++e) bias[i * kN + e] = to_compute(v[e]);
    }
    return;
  }
  FUSEREG_UNROLL
  for (int e = 0; e < kGroup; ++e) {
    bias[e] = to_compute(p[column]);
    column = column + 1 == g.columns ? 0 : column + 1;
  }
}

template <class T, class Form>
__global__ void __launch_bounds__(kThreads)
    fused_dropout_elements_kernel(FUSEREG_GRID_CONSTANT(Arguments, g)) {
  using C = Compute<T>;
  constexpr int kN = cuda::kVecSize<T> < kGroup ? cuda::kVecSize<T> : kGroup;
  constexpr int kParts = kGroup / kN;
  const T* const x = static_cast<const T*>(g.x);
  const T* const other = static_cast<const T*>(g.other);
  T* const y = static_cast<T*>(g.y);
  const std::uint64_t seed = g.random.key();
  const std::uint64_t low = g.random.low();
  const C scale = static_cast<C>(g.scale);
  // Position of the first group's first element: 0, or negative where index_offset is within a
  // group.
  const std::uint64_t first_group = g.index_offset / kGroup;
  const std::int64_t origin = -static_cast<std::int64_t>(g.index_offset % kGroup);
  const std::int64_t groups = (g.numel - origin + kGroup - 1) / kGroup;
  const std::int64_t step = static_cast<std::int64_t>(gridDim.x) * kThreads * kGroupsPerThread;
  std::int64_t base =
      static_cast<std::int64_t>(blockIdx.x) * kThreads * kGroupsPerThread + threadIdx.x;
  for (; base < groups; base += step) {
    cuda::Vec<T, kN> from[kGroupsPerThread][kParts];
    cuda::Vec<T, kN> beside[kGroupsPerThread][kParts];
    if (g.vectors) {
      FUSEREG_UNROLL
      for (int u = 0; u < kGroupsPerThread; ++u) {
        const std::int64_t at = (base + u * kThreads) * kGroup;
        if (at + kGroup > g.numel) continue;
        FUSEREG_UNROLL
        for (int i = 0; i < kParts; ++i) {
          from[u][i] = cuda::load_streaming<kN>(x + at + i * kN);
          if constexpr (Form::kOther) beside[u][i] = cuda::load_streaming<kN>(other + at + i * kN);
        }
      }
    }
    FUSEREG_UNROLL
    for (int u = 0; u < kGroupsPerThread; ++u) {
      const std::int64_t group = base + u * kThreads;
      if (group >= groups) break;
      const std::int64_t at = origin + group * kGroup;
      std::uint32_t mask = 0;
      if constexpr (Form::kDraws)
        mask = keep_mask(seed, low, first_group + static_cast<std::uint64_t>(group), g.draw);
      C bias[kGroup] = {};
      if (g.vectors && at + kGroup <= g.numel) {
        if constexpr (Form::kBias) {
          if (g.bias != nullptr) load_bias<T>(g, at, bias);
        }
        FUSEREG_UNROLL
        for (int i = 0; i < kParts; ++i) {
          const auto result = cuda::rounded_to<T, kN>([&](int e) {
            C o = C(0);
            if constexpr (Form::kOther) o = to_compute(beside[u][i][e]);
            return Form::apply(to_compute(from[u][i][e]), o, bias[i * kN + e],
                               (mask >> (i * kN + e) & 1u) != 0, scale);
          });
          cuda::store(y + at + i * kN, result);
        }
      } else {
        for (int e = 0; e < kGroup; ++e) {
          const std::int64_t i = at + e;
          if (i < 0 || i >= g.numel) continue;
          C b = C(0);
          C o = C(0);
          if constexpr (Form::kBias) {
            if (g.bias != nullptr) b = to_compute(static_cast<const T*>(g.bias)[i % g.columns]);
          }
          if constexpr (Form::kOther) o = to_compute(other[i]);
          y[i] = from_compute<T>(Form::apply(to_compute(x[i]), o, b, (mask >> e & 1u) != 0, scale));
        }
      }
    }
  }
}

// Rows: kN elements that share a draw; kRagged: of any rows, of which one may end among them.
template <class T, int kN, class Index, bool kRagged>
__global__ void __launch_bounds__(kThreads)
    fused_dropout_rows_kernel(FUSEREG_GRID_CONSTANT(Arguments, g)) {
  using C = Compute<T>;
  const T* const x = static_cast<const T*>(g.x);
  const T* const residual = static_cast<const T*>(g.other);
  T* const y = static_cast<T*>(g.y);
  const std::uint64_t seed = g.random.key();
  const std::uint64_t low = g.random.low();
  const auto scale = static_cast<C>(g.scale);
  const auto length = static_cast<Index>(g.rows.repeat);
  const auto mask_of = [&](std::uint64_t group) { return keep_mask(seed, low, group, g.draw); };
  const auto sum = [&](T beside, T branch) {
    return to_compute(beside) + multiply(to_compute(branch), scale);
  };
  const std::int64_t vectors = (g.numel + kN - 1) / kN;
  const std::int64_t step = static_cast<std::int64_t>(gridDim.x) * kThreads;
  std::int64_t v = static_cast<std::int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  RowWalk<Index> rows(g.rows, static_cast<Index>(v) * kN, g.index_offset);
  for (; v < vectors; v += step) {
    const Index at = static_cast<Index>(v) * kN;
    constexpr std::uint32_t kAll = (1u << kN) - 1u;
    std::uint32_t mask;
    if constexpr (kRagged) {
      mask = rows.template mask<kN>(mask_of);
      rows.next();
      if (v * kN + kN > g.numel) {
        for (int e = 0; v * kN + e < g.numel; ++e) {
          const T beside = residual[at + e];
          y[at + e] = (mask >> e & 1u) != 0 ? from_compute<T>(sum(beside, x[at + e])) : beside;
        }
        continue;
      }
    } else {
      const std::uint64_t index = g.index_offset + at / length;
      mask = (mask_of(index / kGroup) >> (index % kGroup) & 1u) != 0 ? kAll : 0u;
    }
    auto data = cuda::load_streaming<kN>(residual + at);
    if (mask != 0) {
      const auto more = cuda::load_streaming<kN>(x + at);
      const auto sums = cuda::rounded_to<T, kN>([&](int e) { return sum(data[e], more[e]); });
      FUSEREG_UNROLL
      for (int e = 0; e < kN; ++e) {
        if (!kRagged || (mask >> e & 1u) != 0) data[e] = sums[e];
      }
    } else if (g.other == g.y) {
      continue;
    }
    cuda::store(y + at, data);
  }
}

// Element by element, where no vector fits: a lane draws for 8 that follow each other.
template <class T>
__global__ void __launch_bounds__(kThreads)
    fused_dropout_window_kernel(FUSEREG_GRID_CONSTANT(Arguments, g)) {
  const T* const x = static_cast<const T*>(g.x);
  const T* const residual = static_cast<const T*>(g.other);
  T* const y = static_cast<T*>(g.y);
  const std::uint64_t seed = g.random.key();
  const std::uint64_t low = g.random.low();
  const auto scale = static_cast<Compute<T>>(g.scale);
  const auto mask_of = [&](std::uint64_t group) {
    return keep_mask_at(seed, low, group * kGroup, g.draw);
  };
  const auto result = [&](T beside, T branch, bool keep) {
    const auto sum = to_compute(beside) + multiply(to_compute(branch), scale);
    return keep ? from_compute<T>(sum) : beside;
  };
  const bool in_place = g.other == g.y;
  const std::int64_t windows = g.numel / kWindow;
  const int step = static_cast<int>(gridDim.x) * (kThreads / cuda::kWarpSize);
  std::int64_t w = std::int64_t{blockIdx.x} * (kThreads / cuda::kWarpSize) + cuda::warp_id();
  const auto walk = [&](std::int64_t at) {
    return RowWalk<std::uint64_t>(g.rows, static_cast<std::uint64_t>(at), g.index_offset);
  };
  auto rows = walk(w * kWindow + cuda::lane_id() * kGroup);
  for (; w < windows; w += step) {
    const std::int64_t at = w * kWindow + cuda::lane_id();
    T beside[kGroup];
    T branch[kGroup];
    FUSEREG_UNROLL
    for (int j = 0; j < kGroup; ++j) {
      beside[j] = cuda::load_streaming(residual + at + j * cuda::kWarpSize);
    }
    const std::uint32_t mask = cuda::window_bits<kGroup>(rows.template mask<kGroup>(mask_of));
    rows.next();
    bool keep[kGroup];
    FUSEREG_UNROLL
    for (int j = 0; j < kGroup; ++j) {
      keep[j] = cuda::window_bit<kGroup>(mask, j);
      // What is dropped is not read.
      if (keep[j]) branch[j] = cuda::load_streaming(x + at + j * cuda::kWarpSize);
    }
    FUSEREG_UNROLL
    for (int j = 0; j < kGroup; ++j) {
      if (!keep[j] && in_place) continue;
      y[at + j * cuda::kWarpSize] = result(beside[j], branch[j], keep[j]);
    }
  }
  if (blockIdx.x != gridDim.x - 1) return;
  FUSEREG_NO_UNROLL
  for (std::int64_t i = windows * kWindow + threadIdx.x; i < g.numel; i += kThreads) {
    y[i] = result(residual[i], x[i], walk(i).template mask<1>(mask_of) != 0);
  }
}

// --- the gradient of the bias ---

// Adds up a tile's columns over one chunk of rows, writes grad_x on the way.
template <class T>
FUSEREG_DEVICE_INLINE void chunk_sums(const Arguments& g, std::int64_t first_column, int lane,
                                      int row_group, double (&totals)[kGroup]) {
  using C = Compute<T>;
  constexpr int kN = cuda::kVecSize<T> < kGroup ? cuda::kVecSize<T> : kGroup;
  constexpr int kParts = kGroup / kN;
  constexpr int kTermsPerFlush = 8;
  // Rows that are under way at once.
  constexpr int kAhead = sizeof(T) == 2 ? 2 : 1;
  const T* const x = static_cast<const T*>(g.x);
  T* const y = static_cast<T*>(g.y);
  const std::uint64_t seed = g.random.key();
  const std::uint64_t low = g.random.low();
  const C scale = static_cast<C>(g.scale);
  const Chunks& c = g.chunks;
  const std::int64_t column = first_column + lane * kGroup;
  const std::int64_t first = static_cast<std::int64_t>(blockIdx.y) * c.chunk_rows;
  const std::int64_t last = first + c.chunk_rows < c.rows ? first + c.chunk_rows : c.rows;
  const int step = kThreads / g.lanes;
  C sums[kGroup] = {};
  int terms = 0;
  if (column >= c.width) return;
  const auto at_row = [&](std::int64_t row) { return row * c.width + column; };
  const auto is_whole = [&](std::int64_t row) {
    return column + kGroup <= c.width && at_row(row) + kGroup <= g.numel;
  };
  for (std::int64_t row = first + row_group; row < last; row += kAhead * step) {
    cuda::Vec<T, kN> data[kAhead][kParts];
    FUSEREG_UNROLL
    for (int u = 0; u < kAhead; ++u) {
      const std::int64_t r = row + u * step;
      if (r >= last || !g.vectors || !is_whole(r)) continue;
      FUSEREG_UNROLL
      for (int i = 0; i < kParts; ++i) {
        data[u][i] = cuda::load_streaming<kN>(x + at_row(r) + i * kN);
      }
    }
    FUSEREG_UNROLL
    for (int u = 0; u < kAhead; ++u) {
      const std::int64_t r = row + u * step;
      if (r >= last) break;
      const std::int64_t at = at_row(r);
      const bool whole = is_whole(r);
      auto& from = data[u];
      const std::uint64_t index = g.index_offset + static_cast<std::uint64_t>(at);
      const std::uint32_t mask = keep_mask_at(seed, low, index, g.draw);
      FUSEREG_UNROLL
      for (int i = 0; i < kParts; ++i) {
        FUSEREG_UNROLL
        for (int e = 0; e < kN; ++e) {
          const int k = i * kN + e;
          const bool there = whole || (column + k < c.width && at + k < g.numel);
          const bool keep = there && (mask >> k & 1u) != 0;
          if (!(g.vectors && whole) && there) from[i][e] = x[at + k];
          const C product = keep ? multiply(to_compute(from[i][e]), scale) : C(0);
          sums[k] += product;
          from[i][e] = from_compute<T>(product);
          if (!(g.vectors && whole) && there) y[at + k] = from[i][e];
        }
        if (g.vectors && whole) cuda::store(y + at + i * kN, from[i]);
      }
      if (++terms == kTermsPerFlush) {
        FUSEREG_UNROLL
        for (int k = 0; k < kGroup; ++k) {
          totals[k] += static_cast<double>(sums[k]);
          sums[k] = C(0);
        }
        terms = 0;
      }
    }
  }
  FUSEREG_UNROLL
  for (int k = 0; k < kGroup; ++k) totals[k] += static_cast<double>(sums[k]);
}

// Blocks (x, 0), (x, 1), ... have the same tiles and a chunk of rows each; the last one to finish
// adds their slots.
template <class T>
__global__ void __launch_bounds__(kThreads, 2)
    fused_dropout_bias_backward_kernel(FUSEREG_GRID_CONSTANT(Arguments, g)) {
  FUSEREG_SHARED(partial, double[kThreads * kGroup]);
  const Chunks& c = g.chunks;
  const int tile = g.lanes * kGroup;
  const int lane = static_cast<int>(threadIdx.x) % g.lanes;
  const int row_group = static_cast<int>(threadIdx.x) / g.lanes;
  const std::int64_t step = static_cast<std::int64_t>(gridDim.x) * tile;
  const std::int64_t begin = static_cast<std::int64_t>(blockIdx.x) * tile;
  for (std::int64_t first = begin; first < c.width; first += step) {
    double totals[kGroup] = {};
    chunk_sums<T>(g, first, lane, row_group, totals);
    FUSEREG_UNROLL
    for (int k = 0; k < kGroup; ++k) partial[row_group * tile + lane * kGroup + k] = totals[k];
    __syncthreads();
    for (int i = static_cast<int>(threadIdx.x); i < tile && first + i < c.width; i += kThreads) {
      double sum = 0.0;
      for (int r = 0; r < kThreads / g.lanes; ++r) sum += partial[r * tile + i];
      g.partials[blockIdx.y * c.width + first + i] = sum;
    }
    __syncthreads();  // partial is free again
  }
  if (!cuda::is_last_block(g.counters + blockIdx.x, gridDim.y)) return;
  // Where a row holds the columns several times over, one tile holds the row.
  for (std::int64_t first = begin; first < c.width; first += step) {
    for (std::int64_t i = first + threadIdx.x; i < first + tile && i < g.columns; i += kThreads) {
      double sum = 0.0;
      for (std::int64_t k = 0; k < c.count; ++k) {
        for (std::int64_t at = i; at < c.width; at += g.columns) {
          sum += g.partials[k * c.width + at];
        }
      }
      static_cast<T*>(g.grad_bias)[i] = from_compute<T>(static_cast<Compute<T>>(sum));
    }
  }
}

// --- launcher ---

class CudaRun {
 public:
  CudaRun(const Job& job, int device, void* stream) : job_(job) {
    most_ = static_cast<std::int64_t>(cuda::device_properties(device).sm_count) * kBlocksPerSm;
    config_.block = dim3(kThreads);
    config_.stream = static_cast<cuda::Stream>(stream);
    g_.x = job.x;
    g_.bias = job.bias;
    g_.other = job.other;
    g_.y = job.y;
    g_.grad_bias = job.grad_bias;
    g_.partials = job.partials;
    g_.counters = job.counters;
    g_.numel = job.numel;
    g_.columns = job.columns;
    g_.index_offset = job.index_offset;
    g_.random = job.random;
    g_.draw = job.draw;
    g_.scale = job.scale;
    const bool aligned = cuda::is_aligned(job.x, 16) && cuda::is_aligned(job.y, 16) &&
                         cuda::is_aligned(job.other, 16);
    g_.vectors = aligned && job.index_offset % kGroup == 0;
    g_.bias_vectors = cuda::is_aligned(job.bias, 16) && job.columns % kGroup == 0;
  }

  void execute() {
    switch (job_.form) {
      case Form::kAdd:
        dispatch_dtype(job_.dtype, [&](auto tag) {
          elements<typename decltype(tag)::type, Add<typename decltype(tag)::type>>();
        });
        break;
      case Form::kActivate:
        activations<Activate>();
        break;
      case Form::kActivateBackward:
        activations<ActivateBackward>();
        break;
      case Form::kRows:
        dispatch_dtype(job_.dtype, [&](auto tag) { rows<typename decltype(tag)::type>(); });
        break;
      case Form::kBiasBackward:
        dispatch_dtype(job_.dtype,
                       [&](auto tag) { bias_backward<typename decltype(tag)::type>(); });
        break;
    }
  }

 private:
  static constexpr const char* kOp = "fusereg.fused_dropout";

  void set_grid(std::int64_t threads) {
    config_.grid = dim3(
        static_cast<unsigned>(std::clamp<std::int64_t>(ceil_div(threads, kThreads), 1, most_)));
  }

  template <class T, class Function>
  void elements() {
    if (job_.numel == 0) return;
    set_grid(ceil_div(job_.numel, kGroup * kGroupsPerThread) + 1);
    cuda::launch(kOp, fused_dropout_elements_kernel<T, Function>, config_, g_);
  }

  template <template <class, Activation> class Function>
  void activations() {
    dispatch_dtype(job_.dtype, [&](auto tag) {
      using T = typename decltype(tag)::type;
      switch (job_.activation) {
        case Activation::kRelu:
          return elements<T, Function<T, Activation::kRelu>>();
        case Activation::kGelu:
          return elements<T, Function<T, Activation::kGelu>>();
        case Activation::kGeluTanh:
          return elements<T, Function<T, Activation::kGeluTanh>>();
        default:
          return elements<T, Function<T, Activation::kSilu>>();
      }
    });
  }

  template <class T>
  void rows() {
    if (job_.numel == 0) return;
    constexpr int kN = cuda::kVecSize<T>;
    const bool aligned = cuda::is_aligned(job_.x, 16) && cuda::is_aligned(job_.y, 16) &&
                         cuda::is_aligned(job_.other, 16);
    const std::int64_t length = job_.numel / std::max<std::int64_t>(job_.rows, 1);
    const bool whole = length % kN == 0;
    const bool small = job_.numel < (std::int64_t{1} << 31);
    const auto launch = [&](auto kernel, std::int64_t elements) {
      set_grid(ceil_div(job_.numel, elements));
      g_.rows = row_steps(length, 1, std::int64_t{config_.grid.x} * kThreads * elements);
      cuda::launch(kOp, kernel, config_, g_);
    };
    if (aligned && whole && small) {
      launch(fused_dropout_rows_kernel<T, kN, std::uint32_t, false>, kN);
    } else if (aligned && whole) {
      launch(fused_dropout_rows_kernel<T, kN, std::uint64_t, false>, kN);
    } else if (aligned && small) {
      launch(fused_dropout_rows_kernel<T, kN, std::uint32_t, true>, kN);
    } else {
      launch(fused_dropout_window_kernel<T>, kGroup);
    }
  }

  template <class T>
  void bias_backward() {
    if (job_.columns == 0) return;
    g_.chunks = make_chunks(std::max<std::int64_t>(job_.numel, 1), job_.columns, kCudaRule);
    g_.vectors = g_.vectors && g_.chunks.width % kGroup == 0;
    // A row that repeats its columns is below twice the tile's width, and one tile must hold it.
    const bool repeats = g_.chunks.width > job_.columns;
    g_.lanes = static_cast<int>(kCudaRule.tile) / kGroup * (repeats ? 2 : 1);
    const std::int64_t tiles = ceil_div(g_.chunks.width, g_.lanes * kGroup);
    config_.grid = dim3(static_cast<unsigned>(std::min(tiles, kMaxTiles)),
                        static_cast<unsigned>(g_.chunks.count));
    cuda::launch(kOp, fused_dropout_bias_backward_kernel<T>, config_, g_);
  }

  const Job& job_;
  std::int64_t most_ = 1;
  cuda::LaunchConfig config_;
  Arguments g_{};
};

}  // namespace

void run_cuda(const Job& job, int device, void* stream) {
  const cuda::DeviceGuard guard(device);
  CudaRun(job, device, stream).execute();
}

}  // namespace fusereg::fused_dropout
