// The group lasso of channels whose slices lie in several tensors, along a dimension of each: its
// sums, its gradient, and its proximal step.
//
// A list of tensors w, each cut into slices along one dimension, has `entries` slices in all, one
// tensor after the other. slot_of[entry] is the channel (slot) that a slice belongs to, -1 for none;
// no slice belongs to two. With strengths l1 >= 0 and group_s >= 0 for each slot s
//
//   R(w) = l1 * sum |w_i|  +  sum_s group_s * ||w_s||_2        w_s: all elements of slot s
//   dR/dw_i = l1 * sign(w_i)  +  group_s / ||w_s||_2 * w_i     0 for an all-zero slot's second term
//   prox(w)_s = v_s * max(0, 1 - group_s / ||v_s||_2),   v = soft(w, l1)
//
// in two passes, for all channels of a model at once: the sums of each slot (kSums), then what they
// scale (kGrad, kProx). Between the two, ranks that hold shards of the tensors add their sums. Where
// one device holds all, kStep is both: on the CPU slot by slot, so that the second pass comes from
// cache.
// Slices of no slot are not written: the caller clears their gradients.
//
// Dtypes and arithmetic as in penalty.h: float64, float32, float16, bfloat16, mixed within a list;
// sums run in float32 over at most 8 terms, then in float64, and again in float64 where float32
// squares overflow or lose their bits. Zeros come out as +0.0.
// Bytes moved per element of size e: kSums e, kGrad 2e, kProx 2e, kStep 2e (CUDA: 3e); the bits of
// kStep are those of kSums and kProx. Deterministic: each slice's sums
// go to a place of their own, and a slot adds its slices in the order of the list.
#pragma once

#include "penalty/penalty.h"

namespace fusereg::penalty {

struct CoupledJob {
  enum class Pass : std::uint8_t { kSums, kGrad, kProx, kStep };
  Pass pass = Pass::kSums;
  std::vector<Item> items;          // shape.groups slices each; strengths are not read
  std::vector<std::int64_t> first;  // of each item: its first entry
  std::int64_t entries = 0;
  std::int64_t slots = 0;
  const std::int32_t* slot_of = nullptr;  // [entries]
  // kSums, kStep: sums of |v| and of v^2, v = w, or soft(w, l1) with `thresholded`.
  // kProx, kStep: the thresholds of the elements.
  double l1 = 0.0;
  bool thresholded = false;
  const std::int32_t* starts =
      nullptr;                          // [slots + 1]: the places of each slot's entries in `order`
  const std::int32_t* order = nullptr;  // entries by slot
  double* partial = nullptr;            // [entries, 2]: scratch, 16-byte aligned
  double* sums = nullptr;               // [2, slots]: of |v|, then of v^2
  // kGrad: g = *first_factor * sign(w) + factors[slot] * w.
  // kProx, kStep: factors are the slots' thresholds, squares their sums of v^2, which kStep makes.
  const double* first_factor = nullptr;
  const double* factors = nullptr;
  const double* squares = nullptr;
};

void run_cpu(const CoupledJob& job);
void run_cuda(const CoupledJob& job, int device, void* stream);

}  // namespace fusereg::penalty
