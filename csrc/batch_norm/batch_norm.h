// Batch normalization (Ioffe and Szegedy 2015) with its epilogue, over every layout as one view.
//
// x is seen as [outer, channels, inner], element (o, c, i) at (o * channels + c) * inner + i:
// contiguous (N, C, ...) has inner = the product of the rest, channels_last and (N, C) have
// inner = 1. Statistics are taken over (o, i), for each channel c, and for each group of
// `group_rows` consecutive o (ghost batch norm; outer for the plain kind; the last group may be
// smaller). Statistic s = (o / group_rows) * channels + c.
//
//   mean_s = E[x]        variance_s = E[(x - mean_s)^2]  (biased)       over the count_s elements
//   z = (x - mean_s) * weight_c / sqrt(variance_s + eps) + bias_c + residual
//   y = dropout(activation(z))
//
// The mean is used as a sum of two numbers, m_hi + m_lo, and z computed as (x - m_hi) * a + b with
// a = weight * invstd, b = bias - m_lo * a, all three made in float64: in float32 the error of y
// stays below 1e-6 of its scale for mean / std up to 1e5.
//
// Running statistics: r <- (1 - momentum) * r + momentum * value, with the unbiased variance
// (count / (count - 1)); over several groups the groups' moments are combined first (sums of
// counts, means and squared deviations). `batches`, if given, is counted up by one before that; the
// momentum kCumulative means a cumulative average, 1 / *batches, and without `batches` it leaves
// the running statistics, as torch's layers do. A statistic of no elements changes nothing (a batch
// is counted nevertheless, as torch counts it); one of a single element leaves the variance.
//
// Backward, with dz = gradient of z (dropout drawn again, activation'(z) from x, or from `bits`),
// over the count_s elements:
//   sum_s = sum dz      dot_s = sum dz * (x - mean_s)
//   grad_bias_c = sum over groups of sum_s        grad_weight_c = sum of invstd_s * dot_s
//   grad_x = a * (dz - sum_s / count_s - (x - mean_s) * invstd_s^2 * dot_s / count_s)
//   grad_residual = dz
// with fixed statistics (evaluation, frozen): grad_x = a * dz.
//
// from_y: backward has y where it would have x, for forward wrote y over x (in-place activated
// batch norm, Rota Bulo, Porzi and Kontschieder 2018). The epilogue must be one that can be
// inverted: no residual, no dropout, and no activation or a leaky ReLU of positive slope. Then
//   z = y > 0 ? y : y / slope      x - mean_s = (z - bias_c) * sqrt(variance_s + eps) / weight_c
// for weights of either sign. Of a channel with weight 0 nothing is left of x: its grad_x, which is
// 0, is right, its grad_weight and dot_s come out 0 and are not. The smaller weight is against
// bias, the more digits of x - mean are lost, so a caller that wants these channels exact keeps
// their x.
//
// mask: one byte for each (o, i), o * inner + i; where it is 0 an element belongs to no statistic,
// y and grad_x are 0. Applies to padded sequences.
//
// bits: whether the activation passes the gradient on whole: a leaky ReLU where z > 0, a ReLU where
// not z <= 0, so that a NaN does, as in torch. Kept for these after a residual was added (without
// one, backward computes z again from x). One line of bytes for each line of memory: the
// inner elements of (o, c), or with inner = 1 the channels of o; each line starts at a new byte,
// bit e % 8 of byte e / 8 is element e; bits past a line's end are zero.
//
// Dtypes: x, y, residual and their gradients alike: float64, float32, float16, bfloat16; weight,
// bias and running statistics of x's dtype or float32 (float64 for float64), each its own.
// Arithmetic on elements in float32 (float64 for float64); sums in float32 over short fixed runs,
// then in float64; moments and sums are float64. Nothing is rounded to 16 bits but y and grad_x.
// Deterministic: the same bits for any number of threads and any CPU instruction set.
//
// Bytes per element of size e that must move: forward 2e where the group of elements behind one
// statistic stays in cache (CPU) or on chip (CUDA resident kernels) between the two passes, else
// 3e; residual e more; backward 3e or 5e, residual's gradient e more. y may be residual or x
// (then backward has no x), grad_x may be grad.
#pragma once

#include <cstdint>
#include <limits>

#include "core/draw.h"
#include "core/dtype.h"
#include "core/isa.h"

namespace fusereg::batch_norm {

enum class Activation : std::uint8_t { kNone, kRelu, kLeakyRelu, kSilu, kGelu };

struct Layout {
  std::int64_t outer = 0;
  std::int64_t channels = 0;
  std::int64_t inner = 1;
  std::int64_t group_rows = 0;
  FUSEREG_HD std::int64_t numel() const { return outer * channels * inner; }
  FUSEREG_HD std::int64_t groups() const {
    return outer == 0 ? 1 : (outer + group_rows - 1) / group_rows;
  }
  // How many statistics of each kind there are.
  FUSEREG_HD std::int64_t statistics() const { return groups() * channels; }
  // Bytes of `bits`.
  FUSEREG_HD std::int64_t bit_bytes() const {
    return inner > 1 ? outer * channels * ((inner + 7) / 8) : outer * ((channels + 7) / 8);
  }
};

// A vector with one number for each channel; may be absent.
struct PerChannel {
  void* data = nullptr;
  DType dtype = DType::kFloat32;
};

struct Epilogue {
  Activation activation = Activation::kNone;
  double slope = 0.01;  // of leaky ReLU
  // Dropout of the result: element e of memory has the draw of index_offset + e.
  bool dropout = false;
  Draw draw;
  SeedPair random;
  std::uint64_t index_offset = 0;
};

// What a call is to do with the statistics.
enum class Statistics : std::uint8_t {
  kCompute,  // batch statistics of x, into `moments`
  kGiven,    // batch statistics that `moments` holds (synchronized ones); backward as for kCompute
  kFixed,    // constants, of which backward knows: in `moments` or, if that is null, the running
             // statistics, which are then read and never written
};

// Every finite number is a momentum, as in torch.
inline constexpr double kCumulative = -std::numeric_limits<double>::infinity();

// moments: float64 [3, statistics]: mean, biased variance, count.
struct Forward {
  Layout layout;
  DType dtype = DType::kFloat32;
  Statistics statistics = Statistics::kCompute;
  const void* x = nullptr;
  const void* residual = nullptr;
  const std::uint8_t* mask = nullptr;
  void* y = nullptr;  // null: statistics only
  std::uint8_t* bits = nullptr;
  double* moments = nullptr;
  PerChannel weight, bias;
  // Updated from the moments, whoever computed them (not with kFixed); absent: not.
  PerChannel running_mean, running_var;
  std::int64_t* batches = nullptr;
  double momentum = 0.1;
  double eps = 1e-5;
  Epilogue epilogue;
};

// sums: float64 [2, statistics]: sum_s, dot_s; on the CPU null where nobody asks for them.
struct Backward {
  Layout layout;
  DType dtype = DType::kFloat32;
  Statistics statistics = Statistics::kCompute;
  const void* grad = nullptr;
  const void* x = nullptr;
  const std::uint8_t* mask = nullptr;
  const std::uint8_t* bits = nullptr;
  // Where neither x nor bits tell z: a residual before SiLU or GELU.
  const void* residual = nullptr;
  const double* moments = nullptr;
  PerChannel running_mean, running_var;  // with kFixed and no moments
  PerChannel weight, bias;
  double eps = 1e-5;
  Epilogue epilogue;
  bool from_y = false;  // x is y
  // Two steps, each of which may be left out: the sums (of this process), and with the sums (by
  // then of all processes) the gradients of the elements. grad_weight and grad_bias are of the
  // first step, so of this process.
  bool reduce = true;
  double* sums = nullptr;
  PerChannel grad_weight, grad_bias;
  void* grad_x = nullptr;         // null: not wanted
  void* grad_residual = nullptr;  // null: not wanted, or equal to grad
};

void run_cpu(const Forward& job);
void run_cpu(const Backward& job);

// `scratch`: uninitialized device memory, 16-byte aligned, of at least these bytes. `semaphores`:
// kSemaphoreBytes of zeros, which are left zeros.
inline constexpr std::int64_t kSemaphoreBytes = 64 * 1024;
std::int64_t scratch_bytes(const Forward& job, int device);
std::int64_t scratch_bytes(const Backward& job, int device);
void run_cuda(const Forward& job, void* scratch, void* semaphores, int device, void* stream);
void run_cuda(const Backward& job, void* scratch, void* semaphores, int device, void* stream);

// --- what the CPU kernels of one instruction set provide (batch_norm_kernels.cpp) ---

inline constexpr std::int64_t kMaxColumns = 512;
inline constexpr std::int64_t kMaxLines = 16;
// Up to this inner, lines of several channels are taken as one line of at most kMaxColumns.
inline constexpr std::int64_t kMaxFolded = 256;

// The plain kernels, which are loops of their own, take the lines of several channels as one, of at
// most kMaxPlainColumns, if they are short (`folds`). Every column has coefficients and sums of its
// own then, which few rows are not worth, but for lines that are very short. Longer ones of 16 bits
// gain as well (measured on Sapphire Rapids), unless they have bits.
inline constexpr std::int64_t kMaxPlainColumns = 2048;
inline constexpr std::int64_t kMaxPlainLines = 64;

FUSEREG_INLINE bool folds(const Layout& l, DType dtype, bool bits, std::int64_t rows) {
  constexpr std::int64_t kWorthFolding = 32;
  const std::int64_t longest = bits || dtype == DType::kFloat32 ? 256 : 1024;
  return l.inner > 1 && l.inner <= longest && (rows >= kWorthFolding || l.inner < 32);
}

FUSEREG_INLINE bool is_plain(DType dtype, const std::uint8_t* mask) {
  return dtype != DType::kFloat64 && mask == nullptr;
}
// Whether plain kernels do the whole job: no mask, no dropout, ReLU or no activation.
FUSEREG_INLINE bool is_plain(const Forward& job) {
  const Epilogue& e = job.epilogue;
  if (!is_plain(job.dtype, job.mask) || e.dropout) return false;
  if (job.bits != nullptr) return e.activation == Activation::kRelu && job.residual != nullptr;
  return e.activation == Activation::kNone || e.activation == Activation::kRelu;
}
FUSEREG_INLINE bool is_plain(const Backward& job) {
  const Epilogue& e = job.epilogue;
  if (!is_plain(job.dtype, job.mask) || e.dropout || job.from_y) return false;
  if (job.grad_x == nullptr && job.grad_residual != nullptr) return false;
  if (e.activation == Activation::kNone) return true;
  return e.activation == Activation::kRelu && (job.bits != nullptr || job.residual == nullptr);
}

// `rows` values of o from `row` on, of one group, and some channels: of lines at most
// kMaxPlainLines if the job is plain (and kMaxPlainColumns / inner where it folds them), otherwise
// at most kMaxColumns / inner up to kMaxFolded and kMaxLines from there on; of columns at most
// kMaxColumns.
struct Tile {
  std::int64_t row = 0;
  std::int64_t rows = 0;
  std::int64_t channel = 0;
  std::int64_t channels = 0;
};

// For each channel of a tile: z = (x - m) * a + b; grad_x = a * dz + q * (x - m) + r. `m`, `a`, `b`
// are numbers of the type that computes.
struct Coefficients {
  double m[kMaxColumns], a[kMaxColumns], b[kMaxColumns], q[kMaxColumns], r[kMaxColumns];
};

// Two sums for each channel of a tile, to which a kernel adds the tile's: so partial results of
// fixed tiles, added in their order, are the same whoever adds them.
struct Sums {
  double* first;
  double* second;
};

struct CpuKernels {
  // sum (x - m), sum (x - m)^2
  void (*moments)(const Forward& job, const Tile& tile, const Coefficients& k, Sums sums);
  void (*forward)(const Forward& job, const Tile& tile, const Coefficients& k);
  // sum dz, sum dz * (x - m)
  void (*reduce)(const Backward& job, const Tile& tile, const Coefficients& k, Sums sums);
  void (*backward)(const Backward& job, const Tile& tile, const Coefficients& k);
};

FUSEREG_DECLARE_PER_ISA(CpuKernels, kernels)
FUSEREG_DECLARE_PER_ISA(CpuKernels, plain_kernels)  // of plain jobs alone; `kernels` uses them

}  // namespace fusereg::batch_norm
