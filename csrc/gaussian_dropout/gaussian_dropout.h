// Gaussian dropout: multiplicative noise of mean 1, with none of it stored.
//
//   y_i = x_i * (1 + s n_i),   s = sqrt(p / (1 - p)),   n_i of a standard normal distribution
//
// Srivastava et al. 2014, section 10; s^2 is the variance of dropout's mask over its mean. Backward
// is the same map on the gradient, and draws n again.
//
// index_i = index_offset + (position of element i in memory), for a tensor without gaps. Philox's
// chunk index_i / 4 has 4 words: words 0 and 1 make normals 0 and 1, words 2 and 3 make 2 and 3, by
// the method of Box and Muller 1958 (core/normal.h). The arithmetic is float32, each
// operation rounded by itself and no library function among them: the same bits on every
// instruction set and device. |n| is at most 6.67, which is exceeded with probability 3e-11.
//
// Dtypes: float64, float32, float16, bfloat16, x and y alike. 1 + s n and the product are float32
// (float64 for float64, of the same n), then rounded to the dtype. Bytes moved per element of size
// e: 2e. y may be x.
#pragma once

#include <cstdint>

#include "core/draw.h"
#include "core/dtype.h"
#include "core/isa.h"

namespace fusereg::gaussian_dropout {

// Normals that are drawn together: two Philox calls.
inline constexpr int kNormals = 8;

struct Job {
  const void* x = nullptr;
  void* y = nullptr;
  DType dtype = DType::kFloat32;
  std::int64_t numel = 0;
  std::uint64_t index_offset = 0;
  SeedPair random;
  double strength = 0.0;  // s
};

void run_cpu(const Job& job);

// One launch; no workspace.
void run_cuda(const Job& job, int device, void* stream);

// --- what the CPU kernels of one instruction set provide (gaussian_dropout_kernels.cpp) ---

struct CpuKernels {
  // The elements [begin, end) of a job.
  void (*elements)(const Job& job, std::int64_t begin, std::int64_t end);
};

FUSEREG_DECLARE_PER_ISA(CpuKernels, kernels)

}  // namespace fusereg::gaussian_dropout
