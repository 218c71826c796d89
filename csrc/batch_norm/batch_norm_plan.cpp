// The choice of kernels. Contract: batch_norm_plan.h.
#include "batch_norm/batch_norm_plan.h"

#include <algorithm>
#include <atomic>
#include <numeric>
#include <stdexcept>
#include <string>

#include "core/ceil_div.h"

namespace fusereg::batch_norm {
namespace {

// Octets that a thread of a streaming kernel works on: enough to pay for what a block does once.
constexpr std::int64_t kOctetsPerThread = 16;
// Blocks of a streaming kernel that keep a device busy, for each multiprocessor.
constexpr std::int64_t kBlocksPerSm = 8;
// Octets side by side with inner = 1: 64 channels, whole 64-byte sectors of any dtype.
constexpr int kColumnOctets = 8;
// The bytes that a block costs beside its shared memory.
constexpr int kReservedPerBlock = 1024;

// 0: free; 1: streaming; 2: resident.
std::atomic<int> forced_kind{0};
std::atomic<std::int64_t> forced_splits{0};
std::atomic<std::int64_t> forced_counters{0};

std::int64_t group_rows(const Tiling& t) { return std::min(t.outer, t.group_rows); }

// Octets of a slab of one group, as its threads count them.
std::int64_t slab_octets(const Tiling& t) { return group_rows(t) * t.width; }

void set_splits(Tiling& t, std::int64_t splits) {
  const std::int64_t forced = forced_counters;
  t.bundle = std::max<std::int64_t>(ceil_div(t.slabs, forced > 0 ? forced : kBundleCounters), 1);
  const std::int64_t units = t.columns ? group_rows(t) : slab_octets(t);
  // Shares of columns are whole rounds of the block's threads.
  const std::int64_t round = t.columns ? t.rows_at_once : 1;
  t.share = std::max<std::int64_t>(ceil_div(ceil_div(units, splits), round) * round, 1);
  t.splits = std::max<std::int64_t>(ceil_div(units, t.share), 1);
}

// Enough blocks for the device, if there is work for them.
void split_for_streaming(Tiling& t, std::int64_t octets_per_thread, const DeviceLimits& device) {
  const std::int64_t useful = ceil_div(slab_octets(t), kThreads * octets_per_thread);
  // A thread with less than 2 octets costs more than it gives.
  const std::int64_t most = std::max<std::int64_t>(slab_octets(t) / (kThreads * 2), 1);
  const std::int64_t wanted =
      ceil_div(kBlocksPerSm * device.sm_count, std::max<std::int64_t>(t.items(), 1));
  set_splits(t, std::clamp<std::int64_t>(std::max(useful, wanted), 1, most));
}

// A slab's row of octets with inner = 1.
void set_columns(Tiling& t, int octets) {
  // There may be no channels.
  t.width = std::clamp<std::int64_t>(ceil_div(t.channels, kOctet), 1, octets);
  t.pack = static_cast<int>(t.width) * kOctet;
  t.rows_at_once = kThreads / static_cast<int>(t.width);
  t.slabs = ceil_div(t.channels, t.pack);
}

Tiling make_tiling(const Layout& layout, DType dtype, bool aligned, bool masked, bool bits) {
  Tiling t;
  t.channels = layout.channels;
  t.inner = std::max<std::int64_t>(layout.inner, 1);
  t.outer = layout.inner == 0 ? 0 : layout.outer;
  t.group_rows = std::max<std::int64_t>(layout.group_rows, 1);
  t.groups = layout.groups();
  // float64 has no wide kernels: it is there for tests of gradients.
  aligned = aligned && dtype != DType::kFloat64;
  const std::int64_t inner = t.inner;
  const std::int64_t row = t.channels * inner;
  if (inner == 1) {
    t.columns = true;
    t.wide = aligned && row % kOctet == 0;
    set_columns(t, kColumnOctets);
    return t;
  }
  if (inner % kOctet != 0 && aligned && row % kOctet == 0 && !masked && !bits) {
    // The fewest channels that fill whole octets together; several times as many where that is
    // narrow.
    const std::int64_t pack = kOctet / std::gcd<std::int64_t>(inner, kOctet);
    const std::int64_t octets = pack * inner / kOctet;
    const std::int64_t times = std::clamp<std::int64_t>(ceil_div(32, octets), 1, kMaxPack / pack);
    if (octets <= kThreads) {
      t.columns = t.wide = true;
      t.pack = static_cast<int>(std::min(pack * times, t.channels));
      t.width = t.pack * inner / kOctet;
      t.rows_at_once = kThreads / static_cast<int>(t.width);
      t.slabs = ceil_div(t.channels, t.pack);
      return t;
    }
  }
  // Octets of memory need not begin with a line: those of its ends are shared with the neighbors.
  // Bits have their bytes counted from the line's start.
  t.wide = aligned && (inner % kOctet == 0 || !bits);
  t.width =
      t.wide && inner % kOctet != 0 ? (inner + 2 * (kOctet - 1)) / kOctet : ceil_div(inner, kOctet);
  if (t.width > 0x7fffffff) {
    throw std::invalid_argument("fusereg.batch_norm: " + std::to_string(inner) +
                                " elements of one sample and channel are too many");
  }
  t.slabs = t.channels;
  return t;
}

// The teams of a resident kernel; false: the slabs do not fit.
bool plan_resident(Plan& plan, DType dtype, Direction direction, const DeviceLimits& device) {
  Tiling& t = plan.reduce;
  if (!t.wide || t.outer == 0 || t.items() == 0 || t.items() > 0x7fffffff) return false;
  const std::int64_t blocks = std::int64_t{kResidentPerSm} * device.sm_count;
  const std::int64_t memory =
      std::min(device.shared_per_sm / kResidentPerSm - kReservedPerBlock, device.shared_per_block) -
      (t.columns ? kColumnsStaticBytes : kLinesStaticBytes);
  const std::int64_t step_bytes = std::int64_t{kThreads} * kOctet * dtype_size(dtype) *
                                  (direction == Direction::kForward ? 1 : 2);
  const std::int64_t most_steps = std::max<std::int64_t>(memory, 0) / step_bytes;
  if (most_steps == 0) return false;
  // The fewest blocks that hold a slab of a group.
  const auto least_splits = [&] {
    const std::int64_t units = t.columns ? group_rows(t) : slab_octets(t);
    return ceil_div(units, most_steps * (t.columns ? t.rows_at_once : kThreads));
  };
  if (t.columns && t.inner == 1) {
    // Fewer channels, but no less than whole 64-byte sectors of memory.
    for (int octets = kColumnOctets; least_splits() > blocks;) {
      octets /= 2;
      if (octets * kOctet * dtype_size(dtype) < 64) break;
      set_columns(t, octets);
    }
  }
  const std::int64_t least = least_splits();
  if (least > blocks) return false;
  std::int64_t teams = std::min(t.items(), blocks / least);
  teams = ceil_div(t.items(), ceil_div(t.items(), teams));  // as many as take equally many slabs
  const std::int64_t most = std::max<std::int64_t>(slab_octets(t) / (kThreads * 2), 1);
  std::int64_t splits = std::max(std::min(blocks / teams, most), least);
  if (const std::int64_t forced = forced_splits; forced > 0) splits = std::max(forced, least);
  set_splits(t, splits);
  // A team of one needs no barrier: as many as there are slabs, run in whatever order.
  plan.teams = t.splits == 1 ? t.items() : std::min(t.items(), blocks / t.splits);
  if (t.splits > 1) plan.teams = std::min<std::int64_t>(plan.teams, kMaxTeams);
  plan.steps =
      static_cast<int>(ceil_div(t.share, t.columns ? t.rows_at_once : std::int64_t{kThreads}));
  plan.shared_bytes = static_cast<int>(plan.steps * step_bytes);
  plan.kind = KernelKind::kResident;
  return plan.teams > 0;
}

}  // namespace

Plan make_plan(const Layout& layout, DType dtype, Direction direction, bool aligned, bool masked,
               bool bits, bool resident, const DeviceLimits& device) {
  Plan plan;
  plan.reduce = plan.apply = make_tiling(layout, dtype, aligned, masked, bits);
  const int forced = forced_kind;
  if (resident && forced != 1 && plan_resident(plan, dtype, direction, device)) return plan;
  plan.kind = KernelKind::kStreaming;
  plan.reduce = plan.apply;
  split_for_streaming(plan.reduce, kOctetsPerThread, device);
  split_for_streaming(plan.apply, kOctetsPerThread / 2, device);
  return plan;
}

void force_plan(const char* kind, std::int64_t splits, std::int64_t counters) {
  const std::string name = kind;
  if (name != "" && name != "streaming" && name != "resident") {
    throw std::invalid_argument(
        "fusereg.batch_norm: kernels are \"streaming\" or \"resident\", got \"" + name + "\"");
  }
  forced_kind = name == "" ? 0 : name == "streaming" ? 1 : 2;
  forced_splits = splits;
  forced_counters = counters;
}

bool resident_forced() { return forced_kind == 2; }

}  // namespace fusereg::batch_norm
