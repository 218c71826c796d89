// Dropout with no stored mask: every element's draw is a pure function of (seed, offset, index), so
// that backward draws it again (core/philox.h).
//
//   y_i = keep_i ? a * x_i + b : c        keep_i = draw(index_i) < threshold
//
//   dropout         a = 1 / keep, b = c = 0                        Srivastava et al. 2014, inverted
//   its backward    the same on the gradient
//   alpha dropout   a = (keep * (1 + (1 - keep) * s^2))^(-1/2),    Klambauer et al. 2017
//                   b = -a * (1 - keep) * s,  c = a * s + b,
//                   s = -(scale * alpha) of SELU = -1.7580993408473766
//   its backward    a as before, b = c = 0
//
// core/draw.h says how many bits a draw has. `keep` is what the threshold really gives, threshold /
// 2^bits, and a, b, c are made from it: the mean is unbiased for every p. p = 1 has threshold 0 and
// writes zeros. A dropped element is never multiplied: inf and NaN become c as well.
//
// index_i = index_offset + (position of element i in memory), for a tensor without gaps; with rows,
// the position of its row among the rows. It depends on nothing else: not on dtype, device,
// instruction set, threads, launch.
//
// Dtypes: float64, float32, float16, bfloat16, x and y alike. Arithmetic in float32 (float64 for
// float64): one multiplication and, for alpha dropout, one addition, each rounded; then rounded to
// the dtype. Bytes moved per element of size e: 2e; rows that are dropped are not read. y may be x.
#pragma once

#include <cstdint>

#include "core/draw.h"
#include "core/dtype.h"
#include "core/isa.h"

namespace fusereg::dropout {

enum class Kind : std::uint8_t { kDropout, kAlpha, kAlphaBackward };

struct Affine {
  double a = 1.0;
  double b = 0.0;
  double c = 0.0;
  FUSEREG_HD bool linear() const { return b == 0.0 && c == 0.0; }
};

Affine make_affine(Kind kind, const Draw& draw);

// Memory as [outer, repeat, inner]: the elements along `repeat` share a draw, whose index is
// outer_index * inner + inner_index. repeat = 1 is one draw an element.
struct Rows {
  std::int64_t outer = 1;
  std::int64_t repeat = 1;
  std::int64_t inner = 1;
};

struct Job {
  const void* x = nullptr;
  void* y = nullptr;
  DType dtype = DType::kFloat32;
  std::int64_t numel = 0;
  Rows rows;
  std::uint64_t index_offset = 0;
  SeedPair random;
  Draw draw;
  Affine affine;
};

void run_cpu(const Job& job);

// One launch; no workspace.
void run_cuda(const Job& job, int device, void* stream);

// --- what the CPU kernels of one instruction set provide (dropout_kernels.cpp) ---

// One call's constants, `low` being offset / 4.
struct Stream {
  std::uint64_t seed;
  std::uint64_t low;
  Draw draw;
  Affine affine;
};

struct CpuKernels {
  // n consecutive elements, the first of which has this index.
  void (*elements)(DType dtype, const void* x, void* y, std::int64_t n, std::uint64_t index,
                   const Stream& s);
  // n consecutive elements that share a draw.
  void (*row)(DType dtype, const void* x, void* y, std::int64_t n, bool keep, const Affine& affine);
  // `repeat` lines of n elements, `stride` apart; element i of each line has the draw of index + i.
  // n <= kMaxColumns.
  void (*columns)(DType dtype, const void* x, void* y, std::int64_t n, std::int64_t repeat,
                  std::int64_t stride, std::uint64_t index, const Stream& s);
  // The 4 words of counters (low, high), (low, high + 1), ... as many as a vector call gives, by
  // kMaskRounds or kNumberRounds; returns how many.
  int (*words)(int rounds, std::uint64_t seed, std::uint64_t low, std::uint64_t high,
               std::uint32_t* words);
};

FUSEREG_DECLARE_PER_ISA(CpuKernels, kernels)

inline constexpr std::int64_t kMaxColumns = 512;
inline constexpr int kMaxWords = 32;

}  // namespace fusereg::dropout
