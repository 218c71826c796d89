// Which CUDA kernels a batch normalization runs, and how the work is laid over blocks: a pure
// function of shapes and of the device's limits, so that it can be tested without a device.
//
// A thread moves octets: 8 consecutive elements of memory. Blocks are laid over x in one of two
// ways:
//   lines    (inner > 1)  a slab is one channel; its octets, line after line, are cut into shares;
//   columns  (inner = 1, or lines too short for that)  a row is the channels * inner elements of
//            one o; a slab is a run of `width` octets of it that holds whole channels, and a share
//            is some rows of a slab: each thread stays in one octet of the row. Lines whose length
//            is no multiple of 8 are so read in whole vectors (8 channels of 7 x 7 are 49 octets).
// A share is what one block works on; `splits` shares make up a slab of one group.
//
// Streaming kernels read x once for its statistics and once more to normalize it: 3 transfers per
// element forward, 5 backward. Resident kernels keep a slab's shares in the shared memory of a team
// of `splits` blocks that wait for each other, and need 2 and 3. Two blocks share a multiprocessor,
// so that one loads while the other one stores.
#pragma once

#include <cstdint>

#include "batch_norm/batch_norm.h"

namespace fusereg::batch_norm {

// What the choice needs to know of a device.
struct DeviceLimits {
  int sm_count = 0;
  int shared_per_sm = 0;
  int shared_per_block = 0;
};

enum class Direction : std::uint8_t { kForward, kBackward };
enum class KernelKind : std::uint8_t { kStreaming, kResident };

// What one launch is laid over. Copied to the device.
struct Tiling {
  std::int64_t outer = 0;
  std::int64_t channels = 0;
  std::int64_t inner = 1;
  std::int64_t group_rows = 1;
  std::int64_t groups = 1;
  bool columns = false;
  // 16-byte access; otherwise element by element.
  bool wide = false;
  int pack = 1;            // channels of a slab
  int rows_at_once = 1;    // columns: rows that a block's threads cover together
  std::int64_t width = 1;  // octets of a line, or of a slab's row
  std::int64_t slabs = 1;
  std::int64_t splits = 1;
  std::int64_t share = 1;   // lines: octets of a share; columns: rows
  std::int64_t bundle = 1;  // slabs that share a counter
  FUSEREG_HD std::int64_t items() const { return slabs * groups; }
};

struct Plan {
  KernelKind kind = KernelKind::kStreaming;
  Tiling reduce;  // of the kernel that reads for the statistics; resident: of the one kernel
  Tiling apply;   // of the kernel that writes
  // Resident only:
  std::int64_t teams = 0;  // each of reduce.splits blocks
  int steps = 0;           // octets that a thread keeps
  int shared_bytes = 0;    // dynamic shared memory
};

inline constexpr int kThreads = 256;
inline constexpr int kOctet = 8;
// Channels of a slab, at most.
inline constexpr int kMaxPack = 128;
// Numbers that a block's threads leave for each other's sums, 8 for each, and padding: of any
// width, and of the 8 octets at most that float64 has.
inline constexpr int kColumnNumbers = 2560;
inline constexpr int kNarrowColumnNumbers = 2112;
// What the resident kernels declare as static shared memory stays below this.
inline constexpr int kColumnsStaticBytes = 28 * 1024;
inline constexpr int kLinesStaticBytes = 4 * 1024;
// Blocks of a resident kernel on one multiprocessor.
inline constexpr int kResidentPerSm = 2;

// Counters among the semaphores: one for the whole call, then one for each bundle of slabs, then
// two for each team.
inline constexpr int kBundleCounters = 8000;
inline constexpr int kFirstTeamCounter = 8192;
inline constexpr int kMaxTeams = 4096;
static_assert((kFirstTeamCounter + 2 * kMaxTeams) * 4 <= kSemaphoreBytes, "semaphores do not fit");

// aligned: all tensors of the call begin at multiples of 16 bytes. resident: such a kernel can do
// what this call asks for.
Plan make_plan(const Layout& layout, DType dtype, Direction direction, bool aligned, bool masked,
               bool bits, bool resident, const DeviceLimits& device);

// For tests: all later plans are of one kind ("": of any), resident teams are of so many blocks and
// slabs have so many counters (0: as it comes). Throws std::invalid_argument.
void force_plan(const char* kind, std::int64_t splits, std::int64_t counters);
// Whether resident kernels are forced: one that does not fit is then an error.
bool resident_forced();

}  // namespace fusereg::batch_norm
