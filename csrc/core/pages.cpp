#include "core/pages.h"

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace fusereg {

void ask_for_large_pages([[maybe_unused]] void* data, [[maybe_unused]] std::int64_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr std::int64_t kWorthAsking = std::int64_t{4} << 20;
  if (data == nullptr || bytes < kWorthAsking) return;
  // Whole pages; of any size that Linux has.
  constexpr std::uintptr_t kPage = 64 << 10;
  const auto begin = reinterpret_cast<std::uintptr_t>(data);
  const std::uintptr_t first = (begin + kPage - 1) / kPage * kPage;
  const std::uintptr_t last = (begin + static_cast<std::uintptr_t>(bytes)) / kPage * kPage;
  // A system without such pages says so by an error, which changes nothing.
  (void)madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#endif
}

}  // namespace fusereg
