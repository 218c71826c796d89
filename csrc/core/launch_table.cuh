// Launches over lists of tensors: a table says what is to be done with each, and which of the
// launch's tasks are its own.
//
// A table that fits is a kernel's parameter as a whole (constant memory). Of a longer one the
// parameters hold the head and the addresses that move (gradients are allocated anew for each
// step), of some 3800 tensors; the rest lies in memory of the device and is written anew only where
// it has changed. So what is repeated step by step is one launch, for any number of tensors.
//
// Kernels write that memory, out of their parameters: those are copied when a launch is made,
// whereas CUDA does not say when cudaMemcpyAsync is done with pageable memory. A stream that is
// being captured records launches for later, when the memory may hold something else: there a long
// list takes several launches with whole tables.
#pragma once

#include <algorithm>
#include <type_traits>

#include "core/cuda.cuh"
#include "core/cuda_info.h"
#include "core/launch_tables.h"

namespace fusereg::cuda {

// Task indices are 32 bits wide; a launch never gets more than half of that range.
inline constexpr std::int64_t kMaxTasks = std::int64_t{1} << 31;

template <class Head, class Entry>
inline constexpr int kMostInParameters = static_cast<int>(
    (kMaxKernelParamBytes - sizeof(Head) - 64) / (sizeof(Entry) + sizeof(void*) + 4));

#if defined(FUSEREG_CUDA_ON_HOST)
// The stand-in device looks for addresses in all of a kernel's parameters.
#define FUSEREG_EMPTY_ON_HOST = {}
#else
#define FUSEREG_EMPTY_ON_HOST
#endif

// For up to kSize tensors: all of it is copied for a launch, however many there are.
template <class Head, class Entry, int kSize = kMostInParameters<Head, Entry>>
struct ParamTable {
  static constexpr bool kInParameters = true;
  static constexpr int kMost = kSize;
  Head head;
  int count = 0;
  std::uint32_t first_task[kMost + 1] FUSEREG_EMPTY_ON_HOST;  // of each tensor, and behind the last
  void* moving[kMost] FUSEREG_EMPTY_ON_HOST;
  Entry entries[kMost] FUSEREG_EMPTY_ON_HOST;
};

template <class Head, class Entry>
struct MemoryTable {
  static constexpr bool kInParameters = false;
  static constexpr int kMost =
      static_cast<int>((kMaxKernelParamBytes - sizeof(Head) - 64) / sizeof(void*));
  Head head;
  int count = 0;
  const std::uint32_t* first_task = nullptr;
  const Entry* entries = nullptr;
  void* const* many_moving = nullptr;  // where `moving` does not hold them all
  void* moving[kMost] FUSEREG_EMPTY_ON_HOST;
};
#undef FUSEREG_EMPTY_ON_HOST

// --- device code ---

// The last entry whose first task is not above `task`; in constant memory, which reads one address
// at a time, but quickly.
FUSEREG_DEVICE_INLINE int find_in_parameters(const std::uint32_t* first_task, int count,
                                             std::uint32_t task) {
  int low = 0;
  int high = count;
  while (high - low > 1) {
    const int middle = (low + high) / 2;
    if (first_task[middle] <= task) {
      low = middle;
    } else {
      high = middle;
    }
  }
  return low;
}

template <class Head, class Entry, int kSize>
FUSEREG_DEVICE_INLINE int find_entry(const ParamTable<Head, Entry, kSize>& t, std::uint32_t task) {
  return find_in_parameters(t.first_task, t.count, task);
}
// For all threads of a warp: every lane looks at a place of its own, and a list of a thousand takes
// two rounds.
template <class Head, class Entry>
FUSEREG_DEVICE_INLINE int find_entry(const MemoryTable<Head, Entry>& t, std::uint32_t task) {
  int low = 0;
  int size = t.count;
  while (size > 1) {
    const int step = (size + kWarpSize - 1) / kWarpSize;
    const int at = static_cast<int>(lane_id()) * step;
    const bool begun = at < size && t.first_task[low + at] <= task;
    const int skipped = (__popc(__ballot_sync(kFullMask, begun)) - 1) * step;
    low += skipped;
    size = size - skipped < step ? size - skipped : step;
  }
  return low;
}

template <class Head, class Entry, int kSize>
FUSEREG_DEVICE_INLINE void* moving_at(const ParamTable<Head, Entry, kSize>& t, int i) {
  return t.moving[i];
}
template <class Head, class Entry>
FUSEREG_DEVICE_INLINE void* moving_at(const MemoryTable<Head, Entry>& t, int i) {
  return t.many_moving == nullptr ? t.moving[i] : t.many_moving[i];
}

// --- host code ---

// Brings what memory.data holds up to memory.next. Both have whole numbers of 16 bytes.
void write_table(const char* op, TableMemory& memory, Stream stream);

// The part of a list that one launch does.
struct Part {
  int first = 0;
  std::int64_t tasks = 0;
  bool last = true;
  const void* shared = nullptr;  // where List::shared_data() lies for the kernel, if it was written
};

// Calls launch(table, part) for as many tables as there must be, at least one; it fills in the head
// and launches. A list is
//   using Head, Entry               Entry without padding: tables are compared as bytes
//   int size() const
//   Entry entry(int i) const        what stays from call to call
//   void* moving(int i) const
//   std::int64_t tasks(int i) const
//   int shared(int i) const         which record entry i shares with others, ascending with i
//   static constexpr int kShared    how many records the head has room for
//   const void* shared_data() const, std::size_t shared_bytes() const   all the records
//   bool is_small() const           whether a table for kSmallTable of them may do: another kernel
inline constexpr int kSmallTable = 16;

template <class List, class Launch>
class TableLauncher {
  using Params = ParamTable<typename List::Head, typename List::Entry>;
  using Small = ParamTable<typename List::Head, typename List::Entry, kSmallTable>;
  using Memory = MemoryTable<typename List::Head, typename List::Entry>;
  using Entry = typename List::Entry;
  static_assert(std::has_unique_object_representations_v<Entry>, "an entry has padding");
  static_assert(sizeof(Params) <= kMaxKernelParamBytes && sizeof(Memory) <= kMaxKernelParamBytes,
                "the table does not fit a launch");

 public:
  TableLauncher(const char* op, const List& list, const Launch& launch)
      : op_(op), list_(list), launch_(launch) {}

  void execute(LaunchTables* tables, int device, Stream stream) const {
    if (list_.size() <= kSmallTable && list_.is_small()) {
      Small small;
      if (fill(small, 0) == list_.size()) {
        launch_(small, Part{0, small.first_task[small.count], true, nullptr});
        return;
      }
    }
    Params t;
    int end = fill(t, 0);
    if (end < list_.size() && tables != nullptr && from_memory(*tables, device, stream)) return;
    launch_(t, Part{0, t.first_task[t.count], end == list_.size(), nullptr});
    while (end < list_.size()) {
      const int first = end;
      end = fill(t, first);
      launch_(t, Part{first, t.first_task[t.count], end == list_.size(), nullptr});
    }
  }

 private:
  // Gives the first entry that is left out.
  template <class Table>
  int fill(Table& t, int first) const {
    int i = first;
    std::int64_t tasks = 0;
    t.first_task[0] = 0;
    for (; i < list_.size() && i - first < Table::kMost; ++i) {
      const std::int64_t own = list_.tasks(i);
      if (i > first &&
          (list_.shared(i) - list_.shared(first) >= List::kShared || tasks + own > kMaxTasks))
        break;
      tasks += own;
      t.moving[i - first] = list_.moving(i);
      t.entries[i - first] = list_.entry(i);
      t.first_task[i - first + 1] = static_cast<std::uint32_t>(tasks);
    }
    t.count = i - first;
    return i;
  }

  // False where it cannot be done so.
  bool from_memory(LaunchTables& tables, int device, Stream stream) const {
    const int count = list_.size();
    std::int64_t tasks = 0;
    for (int i = 0; i < count; ++i) tasks += list_.tasks(i);
    if (tasks > kMaxTasks || is_capturing(op_, stream)) return false;

    std::size_t bytes = 0;
    const auto section = [&bytes](std::size_t size) {
      const std::size_t begin = bytes;
      bytes += (size + 15) / 16 * 16;
      return begin;
    };
    const auto n = static_cast<std::size_t>(count);
    const bool many = count > Memory::kMost;
    const bool shares = list_.shared(count - 1) - list_.shared(0) >= List::kShared;
    // What changes more often lies before what does not.
    const std::size_t shared = section(shares ? list_.shared_bytes() : 0);
    const std::size_t moving = section(many ? n * sizeof(void*) : 0);
    const std::size_t first_task = section((n + 1) * sizeof(std::uint32_t));
    const std::size_t entries = section(n * sizeof(Entry));

    TableMemory& memory = tables.reserve(device, stream, bytes);
    memory.next.resize(bytes);
    unsigned char* const next = memory.next.data();
    const auto put = [next](std::size_t section_begin, std::size_t i, const auto& value) {
      std::memcpy(next + section_begin + i * sizeof(value), &value, sizeof(value));
    };
    Memory t;
    if (shares) std::memcpy(next + shared, list_.shared_data(), list_.shared_bytes());
    std::uint32_t begin = 0;
    for (std::size_t i = 0; i < n; ++i) {
      const int at = static_cast<int>(i);
      void* const address = list_.moving(at);
      if (many) {
        put(moving, i, address);
      } else {
        t.moving[i] = address;
      }
      put(first_task, i, begin);
      put(entries, i, list_.entry(at));
      begin += static_cast<std::uint32_t>(list_.tasks(at));
    }
    put(first_task, n, begin);
    write_table(op_, memory, stream);

    const auto* const data = static_cast<const unsigned char*>(memory.data);
    t.count = count;
    t.first_task = reinterpret_cast<const std::uint32_t*>(data + first_task);
    t.entries = reinterpret_cast<const Entry*>(data + entries);
    t.many_moving = many ? reinterpret_cast<void* const*>(data + moving) : nullptr;
    launch_(t, Part{0, tasks, true, shares ? data + shared : nullptr});
    return true;
  }

  const char* op_;
  const List& list_;
  const Launch& launch_;
};

template <class List, class Launch>
void launch_over(const char* op, const List& list, LaunchTables* tables, int device, Stream stream,
                 const Launch& launch) {
  TableLauncher<List, Launch>(op, list, launch).execute(tables, device, stream);
}

}  // namespace fusereg::cuda
