// The CPU launcher of cross-entropy. Contract: cross_entropy.h.
#include <algorithm>
#include <cstddef>
#include <vector>

#include "core/ceil_div.h"
#include "core/pages.h"
#include "core/parallel.h"
#include "cross_entropy/cross_entropy.h"

namespace fusereg::cross_entropy {
namespace {

// Logits that a chunk has at least, and that a thread should get.
constexpr std::int64_t kChunk = 1 << 13;
constexpr std::int64_t kGrain = 1 << 15;

std::int64_t units_of(const Problem& p, std::int64_t logits) {
  const std::int64_t unit = p.classes * (p.inner == 1 ? 1 : std::min<std::int64_t>(kTile, p.inner));
  return std::max<std::int64_t>(1, logits / std::max<std::int64_t>(1, unit));
}

double sum_of_weights(const Problem& p) {
  if (p.weight == nullptr) return static_cast<double>(p.classes);
  double sum = 0.0;
  for (std::int64_t c = 0; c < p.classes; ++c) {
    sum += p.dtype == DType::kFloat64 ? static_cast<const double*>(p.weight)[c]
                                      : static_cast<double>(static_cast<const float*>(p.weight)[c]);
  }
  return sum;
}

}  // namespace

void run_cpu(const Forward& forward) {
  const CpuKernels& kernels = cpu_kernels();
  const std::int64_t count = units(forward);
  const std::int64_t chunk = units_of(forward, kChunk);
  std::vector<Parts> parts(static_cast<std::size_t>(ceil_div(count, chunk)));
  parallel_for(static_cast<std::int64_t>(parts.size()), units_of(forward, kGrain) / chunk,
               [&](std::int64_t begin, std::int64_t end) {
                 for (std::int64_t i = begin; i < end; ++i) {
                   parts[static_cast<std::size_t>(i)] =
                       kernels.forward(forward, i * chunk, std::min(count, (i + 1) * chunk));
                 }
               });
  Parts total;
  for (const Parts& part : parts) add(total, part);
  finish(forward, total, sum_of_weights(forward));
}

void run_cpu(const Backward& backward) {
  const std::int64_t numel = backward.rows() * backward.classes;
  if (backward.grad_x != backward.x) {
    prepare_pages(backward.grad_x, numel * dtype_size(backward.dtype));
  }
  const CpuKernels& kernels = cpu_kernels();
  parallel_for(
      units(backward), units_of(backward, kGrain),
      [&](std::int64_t begin, std::int64_t end) { kernels.backward(backward, begin, end); });
}

}  // namespace fusereg::cross_entropy
