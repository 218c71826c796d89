// CPU kernels of batch normalization for the plain cases; compiled once per instruction set.
// Contract: batch_norm.h.
#include "batch_norm/batch_norm.h"
#include "batch_norm/batch_norm_plain.h"

namespace fusereg::batch_norm::FUSEREG_ISA {
namespace {

// Plain are float32, float16 and bfloat16.
template <class F>
FUSEREG_INLINE void dispatch_plain(DType dtype, F f) {
  dispatch_dtype(dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    if constexpr (sizeof(Compute<T>) == sizeof(float)) f(tag);
  });
}

void moments(const Forward& job, const Tile& tile, const Coefficients& k, Sums sums) {
  dispatch_plain(job.dtype, [&](auto tag) {
    plain_moments<typename decltype(tag)::type>(job, tile, k, sums);
  });
}
void forward(const Forward& job, const Tile& tile, const Coefficients& k) {
  dispatch_plain(job.dtype,
                 [&](auto tag) { plain_forward<typename decltype(tag)::type>(job, tile, k); });
}
void reduce(const Backward& job, const Tile& tile, const Coefficients& k, Sums sums) {
  dispatch_plain(job.dtype,
                 [&](auto tag) { plain_reduce<typename decltype(tag)::type>(job, tile, k, sums); });
}
void backward(const Backward& job, const Tile& tile, const Coefficients& k) {
  dispatch_plain(job.dtype,
                 [&](auto tag) { plain_backward<typename decltype(tag)::type>(job, tile, k); });
}

}  // namespace

const CpuKernels plain_kernels = {&moments, &forward, &reduce, &backward};

}  // namespace fusereg::batch_norm::FUSEREG_ISA
