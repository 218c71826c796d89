// Dropout, residual addition and layer or RMS normalization of rows in one pass over memory. The
// mask is dropout's: drawn in forward, drawn again in backward, never stored (core/draw.h).
//
//   s_i = residual_i + (keep_i ? x_i / keep : 0)            keep_i = draw(index_i) < threshold
//   y_i = (s_i - mean(s)) * rstd * weight_i + bias_i        rstd = (var(s) + eps)^(-1/2)
//   y_i = s_i * rstd * weight_i                             rstd = (mean(s^2) + eps)^(-1/2)    RMS
//
//   backward, with g = grad_y * weight and h = (s - mean) * rstd:
//   grad_s = rstd * (g - mean(g) - h * mean(g * h)) + grad_sum      (RMS: without mean(g))
//   grad_residual = grad_s,  grad_x_i = keep_i ? grad_s_i / keep : 0
//   grad_weight = sum over rows of grad_y * h,  grad_bias = sum over rows of grad_y
//
// Ba, Kiros, Hinton 2016; Zhang, Sennrich 2019; Srivastava et al. 2014. The variance is the biased
// one. Means are over a row, the last dimension. index_i = index_offset + the row-major position of
// element i. A dropped element is never multiplied: inf and NaN become 0. A NaN that is kept makes
// its own row NaN and no other.
//
// Dtypes: x, y, grad_y, grad_x are float64, float32, float16 or bfloat16, of one dtype. Where they
// have 16 bits, residual, sum (s) and their gradients may be float32 together, and so may weight,
// bias and theirs. All tensors are row-major without gaps.
// Arithmetic in float32 (float64 for float64). The sum is rounded once, to its dtype, and what is
// normalized is what comes of that: the sum that the caller gets, that is kept and that backward
// works on are one, so that rows which hardly vary have the gradients of what they are. y is
// rounded once from there.
//
// Statistics: a first sweep gives the mean as one float32, `hi`; a second one the sums of s - hi,
// which is exact for elements near the mean, and of its square, so that the mean is hi + lo to
// twice float32's digits: y is right to float32 at |mean| / std = 1e4 and more. Kept per row: hi,
// lo, rstd (RMS: rstd), in float32 (float64 for float64). Elements are summed in 32 (float64: 16)
// fixed lanes in turn, lanes of 2048 elements pairwise in float64, and those in order: the same
// bits on every instruction set and for any number of threads. CUDA adds in another fixed order.
//
// Bytes moved per element of size e, for 16-bit sums too: forward 3e, 4e where the sum is written;
// backward 4e (reads grad_y and sum, writes both gradients), 5e with grad_sum. Kept for backward: e
// (the sum), none where the sum is what the caller gets anyway, and 12 (RMS: 4) a row.
//
// grad_weight and grad_bias: rows are cut into chunks whose number depends on the number of rows
// alone; each adds its rows in order into a slot of its own, [chunk][weight, bias][length] in
// `partials`, and slots are added in order in float64.
#pragma once

#include <cstdint>

#include "core/ceil_div.h"
#include "core/draw.h"
#include "core/dtype.h"
#include "core/isa.h"

namespace fusereg::dropout_norm {

// What both directions share. bits == 0: nothing is dropped.
struct Problem {
  DType dtype = DType::kFloat32;
  bool wide_sum = false;     // sum, residual and their gradients are float32, the dtype is not
  bool wide_weight = false;  // weight, bias and their gradients likewise
  bool rms = false;
  std::int64_t rows = 0;
  std::int64_t length = 0;
  std::uint64_t index_offset = 0;
  SeedPair random;
  Draw draw;
};

// residual, weight, bias, sum, statistics may be null.
struct Forward : Problem {
  void* y = nullptr;
  void* sum = nullptr;
  void* statistics = nullptr;
  const void* x = nullptr;
  const void* residual = nullptr;
  const void* weight = nullptr;
  const void* bias = nullptr;
  double eps = 0.0;
};

// Results that are not wanted, grad_sum and weight may be null; partials too where neither
// grad_weight nor grad_bias is wanted.
struct Backward : Problem {
  void* grad_x = nullptr;
  void* grad_residual = nullptr;
  void* grad_weight = nullptr;
  void* grad_bias = nullptr;
  void* partials = nullptr;
  const void* grad_y = nullptr;
  const void* grad_sum = nullptr;
  const void* sum = nullptr;
  const void* statistics = nullptr;
  const void* weight = nullptr;
  // How many of grad_weight and grad_bias are wanted.
  FUSEREG_HD std::int64_t slots() const {
    return (grad_weight != nullptr) + (grad_bias != nullptr);
  }
};

FUSEREG_INLINE constexpr int statistics_per_row(bool rms) { return rms ? 1 : 3; }

// Rows of a chunk: as many chunks as may keep all threads busy, unless the slots would become much
// to move beside the rows.
struct Chunks {
  std::int64_t rows_each;
  std::int64_t count;
};
inline Chunks make_chunks(std::int64_t rows, std::int64_t wanted, std::int64_t fewest_rows) {
  const std::int64_t each = ceil_div(rows, wanted);
  const std::int64_t rows_each = each < fewest_rows ? fewest_rows : each > 256 ? 256 : each;
  return {rows_each, ceil_div(rows, rows_each)};
}
inline Chunks cpu_chunks(std::int64_t rows) { return make_chunks(rows, 64, 16); }
inline Chunks cuda_chunks(std::int64_t rows) { return make_chunks(rows, 512, 4); }

void run_cpu(const Forward& f);
void run_cpu(const Backward& b);

// One launch each. A backward that gives grad_weight or grad_bias is a cooperative one: `barrier`
// is the word of its grid-wide barrier (cuda::grid_sync).
void run_cuda(const Forward& f, int device, void* stream);
void run_cuda(const Backward& b, unsigned* barrier, int device, void* stream);

// --- what the CPU kernels of one instruction set provide (dropout_norm_kernels.cpp) ---

struct CpuKernels {
  // Rows [first, last).
  void (*forward)(const Forward& f, std::int64_t first, std::int64_t last);
  // The same; their share of grad_weight and grad_bias goes to the slots at `partial`.
  void (*backward)(const Backward& b, std::int64_t first, std::int64_t last, void* partial);
  // Adds the slots of all chunks, for columns [first, last) of [weight, bias][length].
  void (*combine)(const Backward& b, std::int64_t chunks, std::int64_t first, std::int64_t last);
};

FUSEREG_DECLARE_PER_ISA(CpuKernels, kernels)

}  // namespace fusereg::dropout_norm
