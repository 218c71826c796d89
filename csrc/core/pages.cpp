#include "core/pages.h"

#include <atomic>
#include <cerrno>

#include "core/parallel.h"

#if defined(__linux__)
#include <sys/mman.h>
#include <unistd.h>
#endif

namespace fusereg {

#if defined(__linux__)
namespace {

constexpr int kPopulateWrite = 23;  // MADV_POPULATE_WRITE, which older headers do not have

// Whether this Linux has it (5.14).
std::atomic<bool> g_populates{true};

// Lets pages of [begin, begin + count * size) that are not there be made, a run of them at a time.
void populate(char* begin, std::int64_t count, std::int64_t size) {
  constexpr std::int64_t kPiece = 1024;  // pages
  constexpr std::int64_t kFew = 8;       // which come by faults as soon
  unsigned char there[kPiece];
  for (; count > 0; begin += kPiece * size, count -= kPiece) {
    const std::int64_t n = count < kPiece ? count : kPiece;
    if (mincore(begin, static_cast<std::size_t>(n * size), there) != 0) return;
    for (std::int64_t i = 0; i < n;) {
      std::int64_t end = i;
      while (end < n && (there[end] & 1) == 0) ++end;
      if (end - i > kFew && madvise(begin + i * size, static_cast<std::size_t>((end - i) * size),
                                    kPopulateWrite) != 0) {
        if (errno == EINVAL) g_populates.store(false, std::memory_order_relaxed);
        return;
      }
      i = end + 1;
    }
  }
}

}  // namespace
#endif

void prepare_pages([[maybe_unused]] void* data, [[maybe_unused]] std::int64_t bytes) {
#if defined(__linux__)
  constexpr std::int64_t kWorthPopulating = std::int64_t{512} << 10;
  if (data == nullptr || bytes < kWorthPopulating) return;
  const auto begin = reinterpret_cast<std::uintptr_t>(data);
  const std::uintptr_t end = begin + static_cast<std::uintptr_t>(bytes);
#if defined(MADV_HUGEPAGE)
  constexpr std::int64_t kWorthAsking = std::int64_t{4} << 20;
  if (bytes >= kWorthAsking) {
    // Whole pages; of any size that Linux has.
    constexpr std::uintptr_t kLargest = 64 << 10;
    const std::uintptr_t first = (begin + kLargest - 1) / kLargest * kLargest;
    // A system without such pages says so by an error, which changes nothing.
    (void)madvise(reinterpret_cast<void*>(first), end / kLargest * kLargest - first, MADV_HUGEPAGE);
  }
#endif
  if (!g_populates.load(std::memory_order_relaxed)) return;
  static const auto kPage = static_cast<std::uintptr_t>(sysconf(_SC_PAGESIZE));
  auto* const first = reinterpret_cast<char*>((begin + kPage - 1) / kPage * kPage);
  const auto size = static_cast<std::int64_t>(kPage);
  const auto count =
      static_cast<std::int64_t>(end / kPage - reinterpret_cast<std::uintptr_t>(first) / kPage);
  // By as many threads as will write there, so that each one's memory is near to it.
  constexpr std::int64_t kGrain = std::int64_t{2} << 20;  // bytes
  parallel_for(count, kGrain / size, [&](std::int64_t from, std::int64_t to) {
    populate(first + from * size, to - from, size);
  });
#endif
}

}  // namespace fusereg
