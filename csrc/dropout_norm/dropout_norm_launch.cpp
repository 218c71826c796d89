// The CPU launchers of dropout + normalization. Contract: dropout_norm.h.
#include <algorithm>

#include "core/pages.h"
#include "core/parallel.h"
#include "dropout_norm/dropout_norm.h"

namespace fusereg::dropout_norm {
namespace {

// Elements a thread should get at least.
constexpr std::int64_t kGrain = 1 << 14;

std::int64_t grain(std::int64_t elements_each) {
  return std::max<std::int64_t>(1, kGrain / std::max<std::int64_t>(1, elements_each));
}

}  // namespace

void run_cpu(const Forward& f) {
  const std::int64_t size = dtype_size(f.dtype);
  prepare_pages(f.y, f.rows * f.length * size);
  prepare_pages(f.sum, f.rows * f.length * (f.wide_sum ? 4 : size));
  if (f.rows == 0 || f.length == 0) return;
  const CpuKernels& kernels = cpu_kernels();
  parallel_for(f.rows, grain(f.length),
               [&](std::int64_t first, std::int64_t last) { kernels.forward(f, first, last); });
}

void run_cpu(const Backward& b) {
  const std::int64_t size = dtype_size(b.dtype);
  prepare_pages(b.grad_x, b.rows * b.length * size);
  prepare_pages(b.grad_residual, b.rows * b.length * (b.wide_sum ? 4 : size));
  if (b.length == 0) return;
  const CpuKernels& kernels = cpu_kernels();
  const Chunks chunks = cpu_chunks(b.rows);
  const std::int64_t slot = b.slots() * b.length;
  const std::int64_t slot_bytes = slot * (b.dtype == DType::kFloat64 ? 8 : 4);
  parallel_for(
      chunks.count, grain(chunks.rows_each * b.length), [&](std::int64_t first, std::int64_t last) {
        for (std::int64_t c = first; c < last; ++c) {
          char* const partial = static_cast<char*>(b.partials);
          kernels.backward(b, c * chunks.rows_each, std::min(b.rows, (c + 1) * chunks.rows_each),
                           partial == nullptr ? nullptr : partial + c * slot_bytes);
        }
      });
  if (slot == 0) return;
  parallel_for(slot, grain(chunks.count), [&](std::int64_t first, std::int64_t last) {
    kernels.combine(b, chunks.count, first, last);
  });
}

}  // namespace fusereg::dropout_norm
