// Cross-entropy with label smoothing, class weights, and targets that are class indices, two of them
// mixed, or probabilities. For logits x of one row with C classes and target weights q:
//
//   lse     = log sum_c exp(x_c)
//   loss    = s lse - q.x              s = sum_c q_c
//   dx_c    = s exp(x_c - lse) - q_c
//
//   index y        q_c = w_c ((1 - e) [c = y] + e / C)   with e = smoothing and class weights w, or 1;
//                  q = 0 where y is ignore_index
//   probabilities  q_c = w_c ((1 - e) t_c + e / C)
//   mixed          share * (q of the first index) + (1 - share) * (q of the second)
//
// Reductions: none, a loss for each row; sum; mean, which divides by the sum of w_y of the rows that
// are not ignored (for each of two mixed indices by its own), for probabilities by the number of
// rows. No rows, or only ignored ones, give NaN.
//
// Dtypes: float64, float32, float16, bfloat16. Arithmetic is float32 (float64 for float64), sums
// run in float32 over at most 32 terms and then in float64; a row ends in float64. The loss has x's
// dtype, or float32 beside 16 bits. Class weights are float32 (float64 for float64); probabilities
// have x's dtype, or float32 beside 16 bits. A logit of -infinity has the probability 0; NaN,
// +infinity and a row of -infinity alone give NaN. Ignored rows are not read.
//
// Nothing as large as x is kept: a row leaves its lse (8 bytes) and, for probabilities, s. Backward
// computes the exponentials a second time. Bytes moved per element of size e: forward e, backward
// 2e, and as much as probabilities have in both. grad_x may be x.
//
// Deterministic: chunks depend on shapes alone, and their sums are added in order.
#pragma once

#include <cstdint>

#include "core/activation.h"
#include "core/dtype.h"
#include "core/isa.h"

namespace fusereg::cross_entropy {

enum class Reduction : std::uint8_t { kNone, kMean, kSum };

// Memory order of x: [outer, classes, inner]; row r is (r / inner, :, r % inner).
struct Problem {
  const void* x = nullptr;
  DType dtype = DType::kFloat32;
  std::int64_t outer = 0;
  std::int64_t classes = 0;
  std::int64_t inner = 1;
  // Class indices of the rows; the second is null unless two are mixed.
  const std::int64_t* index[2] = {nullptr, nullptr};
  const float* share = nullptr;  // of the first index, one for `rows_per_share` rows
  std::int64_t rows_per_share = 1;
  std::int64_t ignore_index = -100;
  // In place of indices; in memory as x.
  const void* probabilities = nullptr;
  bool wide_probabilities = false;
  const void* weight = nullptr;  // [classes], or null
  double smoothing = 0.0;
  Reduction reduction = Reduction::kMean;
  // What backward keeps: [rows] lse; [rows] s, for probabilities only; then kTail numbers: the
  // factors of the losses of both indices (1 / divisor), and the sum of the class weights.
  double* statistics = nullptr;

  FUSEREG_HD std::int64_t rows() const { return outer * inner; }
  FUSEREG_HD bool soft() const { return probabilities != nullptr; }
  FUSEREG_HD double* tail() const { return statistics + rows() * (soft() ? 2 : 1); }
  FUSEREG_HD std::int64_t row_start(std::int64_t row) const {
    return row / inner * classes * inner + row % inner;
  }
};
inline constexpr int kTail = 3;

struct Forward : Problem {
  void* loss = nullptr;  // [rows], or one number
  bool wide_loss = false;
};

struct Backward : Problem {
  const void* grad = nullptr;  // as the loss
  DType grad_dtype = DType::kFloat32;
  void* grad_x = nullptr;
};

void run_cpu(const Forward& forward);
void run_cpu(const Backward& backward);

// CUDA: an index that is out of range gives NaN, in the loss and in the row's gradient. `workspace`
// is kWorkspace float64 numbers from a multiple of 16 bytes on; one launch for the rows, one to add up
// what they have left there.
inline constexpr int kMaxBlocks = 4096;
inline constexpr std::int64_t kWorkspace = 4 * kMaxBlocks;
void run_cuda(const Forward& forward, double* workspace, int device, void* stream);
void run_cuda(const Backward& backward, int device, void* stream);

// --- what the kernels of all devices share: the numbers of one row ---

FUSEREG_INLINE double natural_log(double x) {
#if defined(__CUDACC__)
  return log(x);
#else
  return __builtin_log(x);
#endif
}
FUSEREG_INLINE double not_a_number() { return __builtin_nan(""); }

// What a row's logits give: dot is the sum of their products with the class weights (where labels
// are smoothed), or with q for probabilities, and mass the sum of those factors.
struct RowSums {
  double lse = 0.0;
  double dot = 0.0;
  double mass = 0.0;
};

// sum: of exp(x - largest).
FUSEREG_INLINE double log_sum(double largest, double sum) {
  // Neither +infinity nor -infinity alone has a softmax.
  if (!(sum > 0.0) || largest - largest != 0.0) return not_a_number();
  return largest + natural_log(sum);
}

// The parts of a reduction: of the losses and divisors of both indices.
struct Parts {
  double loss[2] = {0.0, 0.0};
  double divisor[2] = {0.0, 0.0};
};
FUSEREG_INLINE void add(Parts& sum, const Parts& parts) {
  for (int i = 0; i < 2; ++i) {
    sum.loss[i] += parts.loss[i];
    sum.divisor[i] += parts.divisor[i];
  }
}

template <class T>
FUSEREG_INLINE double weight_of(const Problem& p, std::int64_t index) {
  if (p.weight == nullptr) return 1.0;
  return static_cast<double>(static_cast<const Compute<T>*>(p.weight)[index]);
}

FUSEREG_INLINE double share_of(const Problem& p, std::int64_t row, int which) {
  if (p.share == nullptr) return 1.0;
  const auto share = static_cast<double>(p.share[row / p.rows_per_share]);
  return which == 0 ? share : 1.0 - share;
}

FUSEREG_INLINE bool in_range(const Problem& p, std::int64_t index) {
  return index >= 0 && index < p.classes;
}

// Whether all indices of the row are ignored.
FUSEREG_INLINE bool is_ignored(const Problem& p, std::int64_t row) {
  return !p.soft() && p.index[0][row] == p.ignore_index &&
         (p.index[1] == nullptr || p.index[1][row] == p.ignore_index);
}

// The losses of a row, each times its share, and its divisors.
template <class T>
FUSEREG_INLINE Parts row_parts(const Problem& p, std::int64_t row, const RowSums& sums) {
  Parts parts;
  if (p.soft()) {
    parts.loss[0] = sums.mass * sums.lse - sums.dot;
    parts.divisor[0] = 1.0;
    return parts;
  }
  const auto* const x = static_cast<const T*>(p.x) + p.row_start(row);
  for (int i = 0; i < 2 && p.index[i] != nullptr; ++i) {
    const std::int64_t index = p.index[i][row];
    if (index == p.ignore_index) continue;
    if (!in_range(p, index)) {
      parts.loss[i] = not_a_number();
      continue;
    }
    const double w = weight_of<T>(p, index);
    double loss = w * (sums.lse - static_cast<double>(to_compute(x[index * p.inner])));
    if (p.smoothing != 0.0) {
      loss = (1.0 - p.smoothing) * loss +
             p.smoothing / static_cast<double>(p.classes) * (sums.mass * sums.lse - sums.dot);
    }
    parts.loss[i] = share_of(p, row, i) * loss;
    parts.divisor[i] = w;
  }
  return parts;
}

// The gradient of a row: dx_c = probability * softmax_c - spread * w_c - at[i] where c = index[i];
// for probabilities, probability * softmax_c - spread * q_c.
struct RowGradient {
  double probability = 0.0;
  double spread = 0.0;
  double at[2] = {0.0, 0.0};
  std::int64_t index[2] = {-1, -1};
};

template <class T>
FUSEREG_INLINE RowGradient row_gradient(const Problem& p, std::int64_t row, double grad) {
  RowGradient g;
  const double* const tail = p.tail();
  if (p.soft()) {
    g.spread = grad * tail[0];
    g.probability = g.spread * p.statistics[p.rows() + row];
    return g;
  }
  for (int i = 0; i < 2 && p.index[i] != nullptr; ++i) {
    const std::int64_t index = p.index[i][row];
    if (index == p.ignore_index) continue;
    if (!in_range(p, index)) {
      g.probability = not_a_number();
      continue;
    }
    const double scale = grad * share_of(p, row, i) * tail[i];
    const double at = scale * (1.0 - p.smoothing) * weight_of<T>(p, index);
    g.probability += at;
    if (p.smoothing != 0.0) {
      const double spread = scale * p.smoothing / static_cast<double>(p.classes);
      g.spread += spread;
      g.probability += spread * tail[2];
    }
    if (g.index[0] == index) {
      g.at[0] += at;
    } else {
      g.index[i] = index;
      g.at[i] = at;
    }
  }
  return g;
}

// What follows the last row: the loss, unless each row has its own, and the numbers for backward.
FUSEREG_INLINE void finish(const Forward& f, const Parts& total, double sum_of_weights) {
  double* const tail = f.tail();
  const bool mean = f.reduction == Reduction::kMean;
  for (int i = 0; i < 2; ++i) tail[i] = mean ? 1.0 / total.divisor[i] : 1.0;
  tail[2] = sum_of_weights;
  if (f.reduction == Reduction::kNone) return;
  double loss = mean ? total.loss[0] / total.divisor[0] : total.loss[0];
  if (f.index[1] != nullptr) loss += mean ? total.loss[1] / total.divisor[1] : total.loss[1];
  const bool wide = f.wide_loss;
  dispatch_dtype(f.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    if (wide) {
      *static_cast<Compute<T>*>(f.loss) = static_cast<Compute<T>>(loss);
    } else {
      *static_cast<T*>(f.loss) = from_compute<T>(static_cast<Compute<T>>(loss));
    }
  });
}

// exp(x - lse) as exp(x - reference) * factor. The reference is what x would be if all classes were
// alike: there most differences are small, and keep more digits than those from lse or the largest.
template <class C>
struct Softmax {
  C reference;
  C factor;
};
template <class C>
FUSEREG_INLINE Softmax<C> softmax_of(const Problem& p, double lse, double probability) {
  const double classes = static_cast<double>(p.classes);
  const double log_classes = natural_log(classes);
  const auto reference = static_cast<C>(lse - log_classes);
  const double off = (static_cast<double>(reference) - lse) + log_classes;
  return {reference, static_cast<C>(probability / classes * exp_negative(off, 0.0))};
}

// --- what the CPU kernels of one instruction set provide (cross_entropy_kernels.cpp) ---

// Columns that are walked together where classes are not neighbors.
inline constexpr int kTile = 32;

struct CpuKernels {
  // Units [begin, end): rows, or tiles of kTile rows where inner > 1.
  Parts (*forward)(const Forward& forward, std::int64_t begin, std::int64_t end);
  void (*backward)(const Backward& backward, std::int64_t begin, std::int64_t end);
};

FUSEREG_DECLARE_PER_ISA(CpuKernels, kernels)

inline std::int64_t tiles(const Problem& p) { return (p.inner + kTile - 1) / kTile; }
inline std::int64_t units(const Problem& p) { return p.inner == 1 ? p.outer : p.outer * tiles(p); }

}  // namespace fusereg::cross_entropy
