// How launches run, and what a kernel's code calls.
#include "cuda_on_host.h"

#include <algorithm>
#include <map>
#include <memory>
#include <mutex>
#include <numeric>
#include <utility>
#include <vector>

#include "scheduler.h"

namespace fusereg::cuda_on_host {

Coordinates coordinates;

// --- launches ---

void Engine::prepare(Block& b, std::uint64_t index) {
  b.index = {static_cast<unsigned>(index % grid_.x),
             static_cast<unsigned>(index / grid_.x % grid_.y),
             static_cast<unsigned>(index / grid_.x / grid_.y)};
  b.ready.clear();
  b.ready_head = 0;
  b.exited = 0;
  b.at_barrier = 0;
  b.first_at_barrier = nullptr;
  b.dynamic.reset();
  b.variables.clear();
  b.threads.assign(static_cast<std::size_t>(block_dim_.x) * block_dim_.y * block_dim_.z, Thread{});
  int rank = 0;
  for (unsigned z = 0; z < block_dim_.z; ++z) {
    for (unsigned y = 0; y < block_dim_.y; ++y) {
      for (unsigned x = 0; x < block_dim_.x; ++x) {
        Thread& t = b.threads[static_cast<std::size_t>(rank)];
        t.block = &b;
        t.index = {x, y, z};
        t.rank = rank++;
      }
    }
  }
  const auto count = static_cast<int>(b.threads.size());
  b.warps.assign(static_cast<std::size_t>((count + kWarp - 1) / kWarp), Warp{});
  for (Thread& t : b.threads) {
    warp_of(t).valid |= 1u << (t.rank % kWarp);
    make_ready(&t);
  }
  group_alive_ += b.threads.size();
}

// Runs these blocks, all alive at the same time, to their end.
void Engine::run_together(const std::vector<std::uint64_t>& blocks) {
  while (block_pool_.size() < blocks.size()) block_pool_.push_back(std::make_unique<Block>());
  group_.clear();
  group_at_ = 0;
  group_ready_ = 0;
  group_alive_ = 0;
  idle_polls_ = 0;
  for (std::size_t i = 0; i < blocks.size(); ++i) {
    group_.push_back(block_pool_[i].get());
    prepare(*group_.back(), blocks[i]);
  }
  // Blocks of one cluster find each other by where the cluster starts in the grid.
  const dim3 c = cluster_dim_;
  std::map<std::uint64_t, std::vector<Block*>> members;
  for (Block* b : group_) {
    const std::uint64_t x = b->index.x / c.x, y = b->index.y / c.y, z = b->index.z / c.z;
    members[(z * grid_.y + y) * grid_.x + x].push_back(b);
  }
  clusters_.assign(members.size(), Cluster{});
  std::size_t at = 0;
  for (auto& [key, list] : members) {
    Cluster& cluster = clusters_[at++];
    cluster.blocks.resize(list.size());
    for (Block* b : list) {
      b->cluster = &cluster;
      b->rank_in_cluster = b->index.x % c.x + c.x * (b->index.y % c.y + c.y * (b->index.z % c.z));
      cluster.blocks[b->rank_in_cluster] = b;
    }
  }

  Thread* const first = pick();
  first->fiber = fibers_.acquire();
  become(first);
  fibers_.switch_to(nullptr, first->fiber);
  current_ = nullptr;
  if (error_.empty() && group_alive_ > 0) error_ = deadlock_report();
  for (Block* b : group_) {  // freed now, so that a stale pointer into it is caught
    b->dynamic.reset();
    b->variables.clear();
  }
}

cudaError_t Engine::refusal(const Launch& l) const {
  // A kernel has 48 KB unasked.
  const auto allowed = dynamic_bytes.find(l.function);
  if (l.shared_bytes >
      std::max<std::size_t>(48 * 1024, allowed == dynamic_bytes.end() ? 0 : allowed->second)) {
    return cudaErrorInvalidValue;
  }
  const std::uint64_t cluster_blocks = std::uint64_t{l.cluster.x} * l.cluster.y * l.cluster.z;
  if (cluster_blocks > static_cast<std::uint64_t>(device.cluster_blocks)) {
    return cudaErrorInvalidClusterSize;
  }
  if (l.cooperative) {
    const std::uint64_t blocks = std::uint64_t{l.grid.x} * l.grid.y * l.grid.z;
    int most = max_resident_blocks(l.block.x * l.block.y * l.block.z, l.shared_bytes);
    if (device.granted_sms > 0) most = most / device.sm_count * device.granted_sms;
    if (blocks > static_cast<std::uint64_t>(most)) return cudaErrorCooperativeLaunchTooLarge;
  }
  return cudaSuccess;
}

cudaError_t Engine::run(const Launch& launch) {
  if (const cudaError_t error = refusal(launch)) return error;
  const auto& [op, function, grid, block, shared_bytes, cooperative, cluster, stream, parameters,
               body] = launch;
  (void)function, (void)stream;
  for (const Parameter& p : parameters) parameter_bytes += p.size;
  const std::uint64_t cluster_blocks = std::uint64_t{cluster.x} * cluster.y * cluster.z;
  const std::uint64_t blocks = std::uint64_t{grid.x} * grid.y * grid.z;
  ++launches;
  op_ = op.c_str();
  grid_ = grid;
  block_dim_ = block;
  cluster_dim_ = cluster;
  shared_bytes_ = shared_bytes;
  body_ = &body;
  error_.clear();
  coordinates.block_dim = block;
  coordinates.grid_dim = grid;
  // Each launch draws on from the last, so that a test that launches twice sees two interleavings.
  random_ = Random(schedule.seed + launches * 0x632be59bd9b4e019u);

  // One entry per group of blocks that run together: the whole grid, a cluster, or one block.
  const std::uint64_t groups = cooperative ? 1 : blocks / cluster_blocks;
  std::vector<std::uint32_t> order;
  if (schedule.order == Order::kRandom) {
    order.resize(groups);
    std::iota(order.begin(), order.end(), 0u);
    for (std::size_t i = order.size(); i > 1; --i) std::swap(order[i - 1], order[random_.below(i)]);
  }
  std::vector<std::uint64_t> together;
  for (std::uint64_t i = 0; i < groups && error_.empty(); ++i) {
    const std::uint64_t group = schedule.order == Order::kForward   ? i
                                : schedule.order == Order::kReverse ? groups - 1 - i
                                                                    : order[i];
    together.clear();
    if (cooperative) {
      for (std::uint64_t b = 0; b < blocks; ++b) together.push_back(b);
    } else {
      const std::uint64_t across = grid.x / cluster.x, down = grid.y / cluster.y;
      const std::uint64_t x0 = group % across * cluster.x, y0 = group / across % down * cluster.y,
                          z0 = group / across / down * cluster.z;
      for (unsigned z = 0; z < cluster.z; ++z) {
        for (unsigned y = 0; y < cluster.y; ++y) {
          for (unsigned x = 0; x < cluster.x; ++x) {
            together.push_back(((z0 + z) * grid.y + y0 + y) * grid.x + x0 + x);
          }
        }
      }
    }
    if (schedule.order == Order::kReverse) std::reverse(together.begin(), together.end());
    run_together(together);
  }
  // The next launch may come from another thread: no fiber keeps a place from this one.
  fibers_.reset_all();
  if (!error_.empty()) throw Fault(error_);
  return cudaSuccess;
}

// --- the interface ---

namespace {
// Launches from several threads of the process run one after the other.
std::mutex launch_mutex;
}  // namespace

cudaError_t refusal(const Launch& launch) { return engine().refusal(launch); }

cudaError_t run(const Launch& launch) {
  const std::lock_guard<std::mutex> lock(launch_mutex);
  return engine().run(launch);
}

int barrier(Barrier kind, int predicate, Site site) {
  return engine().barrier(kind, predicate, site);
}
std::uint64_t warp_exchange(const WarpRequest& request, Site site) {
  return engine().warp_exchange(request, site);
}
int lane() { return engine().self()->rank % kWarp; }
void after_atomic(bool changed, Site site) { engine().after_atomic(changed, site); }
unsigned load_acquire(const unsigned* p, const char* file, int line) {
  const unsigned before = *p;
  engine().poll({file, line});
  if (*p != before) engine().progressed();
  return *p;
}
void store_release(unsigned* p, unsigned value) {
  *p = value;
  engine().progressed();
}
void fault(const std::string& what) { engine().fault(what); }
void* dynamic_shared_memory() { return engine().dynamic_shared(); }
void cluster_barrier(const char* file, int line) {
  engine().barrier(Barrier::kCluster, 0, {file, line});
}
unsigned cluster_rank() { return engine().self()->block->rank_in_cluster; }
void* cluster_map(void* p, unsigned rank) { return engine().map(p, rank); }
int new_shared_variable() {
  static int next = 0;
  return next++;
}
void* shared_variable_of_block(int id, std::size_t bytes, std::size_t alignment) {
  return engine().shared_variable(engine().self()->block, id, bytes, alignment);
}
void check_width(int width) {
  if (width < 1 || width > kWarp || (width & (width - 1)) != 0) {
    fault("warp shuffle: the width must be 1, 2, 4, 8, 16 or 32, got " + std::to_string(width));
  }
}

Schedule schedule() { return engine().schedule; }
void set_schedule(Schedule schedule) { engine().schedule = schedule; }
Schedule parse_schedule(const std::string& text) {
  if (text == "forward") return {Order::kForward, 0};
  if (text == "reverse") return {Order::kReverse, 0};
  const std::string random = "random";
  if (text == random) return {Order::kRandom, 0};
  if (text.rfind(random + ":", 0) == 0) {
    const std::string digits = text.substr(random.size() + 1);
    char* end = nullptr;
    const std::uint64_t seed = std::strtoull(digits.c_str(), &end, 10);
    if (!digits.empty() && *end == '\0') return {Order::kRandom, seed};
  }
  throw std::invalid_argument(
      "FUSEREG_HOST_SCHEDULE must be forward, reverse, random or random:<seed>, got '" + text +
      "'");
}
Device& device() { return engine().device; }
std::uint64_t launch_count() { return engine().launches; }
std::uint64_t parameter_bytes() { return engine().parameter_bytes; }
std::uint64_t question_count() { return engine().questions; }
int max_resident_blocks(unsigned threads_per_block, std::size_t shared_bytes) {
  const Device& d = engine().device;
  int per_sm = std::min(d.blocks_per_sm, d.threads_per_sm / static_cast<int>(threads_per_block));
  if (shared_bytes > 0) per_sm = std::min(per_sm, d.shared_per_sm / static_cast<int>(shared_bytes));
  return per_sm * d.sm_count;
}

}  // namespace fusereg::cuda_on_host

cudaError_t cudaFuncSetAttribute(const void* function, cudaFuncAttribute, int value) {
  auto& engine = fusereg::cuda_on_host::engine();
  ++engine.questions;
  if (value > engine.device.shared_per_block) return cudaErrorInvalidValue;
  engine.dynamic_bytes[function] = static_cast<std::size_t>(value);
  return cudaSuccess;
}
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, const void*, int threads,
                                                          std::size_t shared_bytes) {
  auto& engine = fusereg::cuda_on_host::engine();
  ++engine.questions;
  *blocks =
      fusereg::cuda_on_host::max_resident_blocks(static_cast<unsigned>(threads), shared_bytes) /
      engine.device.sm_count;
  return cudaSuccess;
}
