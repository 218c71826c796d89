#include "core/parallel.h"

#include <algorithm>
#include <atomic>

#include "core/ceil_div.h"

#if defined(_OPENMP)
#include <omp.h>
#if !defined(_WIN32)
#include <pthread.h>
#endif
#endif

namespace fusereg {

#if defined(_OPENMP)
namespace {

std::atomic<bool> g_forked{false};
std::atomic<void (*)()> g_ask{nullptr};

#if !defined(_WIN32)
[[maybe_unused]] const int kForkIsSeen =
    pthread_atfork(nullptr, nullptr, [] { g_forked.store(true, std::memory_order_relaxed); });
#endif

}  // namespace
#endif

void ask_for_threads([[maybe_unused]] void (*ask)()) {
#if defined(_OPENMP)
  g_ask.store(ask, std::memory_order_relaxed);
#endif
}

int max_threads() {
#if defined(_OPENMP)
  if (g_forked.load(std::memory_order_relaxed)) return 1;
  thread_local bool asked = false;
  if (!asked) {
    asked = true;
    if (void (*const ask)() = g_ask.load(std::memory_order_relaxed)) ask();
  }
  return omp_get_max_threads();
#else
  return 1;
#endif
}

void parallel_for(std::int64_t n, std::int64_t grain, RangeFunction f) {
  if (n <= 0) return;
#if defined(_OPENMP)
  const std::int64_t wanted = ceil_div(n, std::max<std::int64_t>(grain, 1));
  const auto threads =
      wanted > 1 ? static_cast<int>(std::min<std::int64_t>(wanted, max_threads())) : 1;
  if (threads > 1 && !omp_in_parallel()) {
#pragma omp parallel num_threads(threads)
    {
      // The runtime may give fewer threads than asked for.
      const std::int64_t count = omp_get_num_threads();
      const std::int64_t id = omp_get_thread_num();
      const std::int64_t begin = n * id / count;
      const std::int64_t end = n * (id + 1) / count;
      if (begin < end) f(begin, end);
    }
    return;
  }
#else
  (void)grain;
#endif
  f(0, n);
}

double ordered_sum(const double* values, std::int64_t n) {
  double sum = 0.0;
  for (std::int64_t i = 0; i < n; ++i) sum += values[i];
  return sum;
}

}  // namespace fusereg
