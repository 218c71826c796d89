// Penalties on weights and their proximal steps, over lists of tensors.
//
// For one tensor w with strengths l1, l2, group >= 0, whose groups are the slices along one
// dimension (n_g elements each), the penalty is
//
//   R(w) = l1 * sum |w_i|  +  l2/2 * sum w_i^2  +  group * sum_g sqrt(n_g) * ||w_g||_2
//   dR/dw_i = l1 * sign(w_i)  +  (l2 + group * sqrt(n_g) / ||w_g||_2) * w_i
//
// with sign(0) = 0 and w/||w|| = 0 for an all-zero group; a NaN weight gives NaN in both.
// A strength of exactly 0 leaves its term out altogether. The proximal step is
//
//   prox(w)_g = v_g * max(0, 1 - group * sqrt(n_g) / ||v_g||_2) / (1 + l2),   v = soft(w, l1),
//   soft(w, t) = sign(w) * max(|w| - t, 0)
//
// (group soft-thresholding after soft-thresholding is the proximal operator of the sum of both:
// Yu 2013, "On decomposing the proximal map", and Friedman, Hastie, Tibshirani 2010, "A note on the
// group lasso and a sparse group lasso"). Zeros come out as +0.0, also after rounding to 16 bits.
//
// Dtypes: float64, float32, float16, bfloat16, mixed freely within a list; w and its g share one.
// Arithmetic is in float32 (float64 for float64); sums run in float32 over at most 8 terms, then in
// float64. A sum that overflows float32 is done again in float64.
// Bytes moved per element of size e: kValue e, kAddGrad 3e, kWriteGrad 2e, kProx 2e; groups are
// read a second time from cache. Deterministic: chunk sizes, slots and the order of additions
// depend on shapes alone.
#pragma once

#include <cstdint>
#include <vector>

#include "core/dtype.h"
#include "core/isa.h"

namespace fusereg::penalty {

enum class Op : std::uint8_t {
  kValue,      // value = sum of R
  kAddGrad,    // value = sum of R, and g += scale * dR/dw
  kWriteGrad,  // g = scale * dR/dw
  kProx,       // w = prox(w)
};

// Memory order of a dense tensor seen from its groups: [outer, groups, inner], group index in the
// middle. Without a group term the shape of a tensor does not matter.
struct GroupShape {
  std::int64_t outer = 1;
  std::int64_t groups = 1;
  std::int64_t inner = 1;
  FUSEREG_HD std::int64_t group_size() const { return outer * inner; }
};

struct Strengths {
  double l1 = 0.0;
  double l2 = 0.0;
  double group = 0.0;
};

// One tensor of a list: dense, w and g in the same memory order.
struct Item {
  void* w = nullptr;
  void* g = nullptr;  // null for kValue and kProx, and for kAddGrad where no gradient is wanted
  std::int64_t numel = 0;
  DType dtype = DType::kFloat32;
  Strengths strengths;
  GroupShape shape;
};

struct Job {
  Op op = Op::kValue;
  std::vector<Item> items;
  // kValue, kAddGrad: where the 0-d value goes, float32 or float64.
  void* value = nullptr;
  DType value_dtype = DType::kFloat32;
  // kAddGrad, kWriteGrad: the gradient's factor, host_scale * *scale; scale may be null. It is read
  // by the kernel, so that a scale on the device costs no synchronization.
  const void* scale = nullptr;
  DType scale_dtype = DType::kFloat32;
  double host_scale = 1.0;
};

void run_cpu(const Job& job);

// CUDA only: `workspace` is kWorkspaceBytes of device memory whose first 8 bytes are zero; it is
// left so. One launch for the elementwise terms of up to some 670 tensors, one for the group terms
// of some 360.
inline constexpr std::int64_t kMaxBlocks = 4096;
inline constexpr std::int64_t kWorkspaceBytes = 16 + 8 * kMaxBlocks;
void run_cuda(const Job& job, void* workspace, int device, void* stream);

// --- what the CPU kernels of one instruction set provide (penalty_kernels.cpp) ---

struct Sums {
  double absolute = 0.0;  // sum |w|
  double square = 0.0;    // sum w^2
};

// The gradient of one run of elements is add/write scale * (l1 * sign(w) + l2 * w); the proximal
// step is soft(w, l1) * scale. The group term has become part of l2 (or of scale) by then.
struct Coefficients {
  double l1 = 0.0;
  double l2 = 0.0;
  double scale = 1.0;
};

struct CpuKernels {
  // One chunk of consecutive elements. Gives the sums that the value needs (for kValue and
  // kAddGrad).
  Sums (*elements)(Op op, DType dtype, void* w, void* g, std::int64_t n, const Coefficients& c);
  // Groups [begin, end) whole, each read once from memory; gives their part of the value.
  double (*groups)(Op op, const Item& item, double scale, std::int64_t begin, std::int64_t end);
  // The sums of |v| (where l1 is not 0) and v^2 of each of the slices [begin, end), to sums[0] and
  // on: v = w for kValue, soft(w, l1) for kProx.
  void (*slice_sums)(Op op, const Item& item, std::int64_t begin, std::int64_t end, Sums* sums);
  // kWriteGrad and kProx of the slices [begin, end) whose coefficients are known: slice i has
  // those of factors[slot_of[i]], and the same l1. One of no slot (not in [0, slots)) is left alone.
  void (*slices)(Op op, const Item& item, const std::int32_t* slot_of, const double* factors,
                 std::int64_t slots, std::int64_t begin, std::int64_t end);
};

FUSEREG_DECLARE_PER_ISA(CpuKernels, kernels)

// Elements a chunk: small enough that w and g stay in the L2 cache, large enough that its fixed
// costs vanish.
inline constexpr std::int64_t kChunk = 16384;
// A contiguous group of more elements than this is cut into chunks of its own.
inline constexpr std::int64_t kLargeGroup = 8 * kChunk;

}  // namespace fusereg::penalty
