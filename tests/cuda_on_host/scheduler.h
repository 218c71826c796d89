// The machine's state while a kernel runs: threads, warps, blocks and clusters, and the engine that
// schedules them. For the sources in this folder only.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "cuda_on_host.h"
#include "fiber.h"

namespace fusereg::cuda_on_host {

constexpr int kWarp = 32;

// splitmix64: the scheduler's own small source of numbers.
class Random {
 public:
  explicit Random(std::uint64_t seed) : state_(seed) {}
  std::uint64_t next() {
    std::uint64_t z = (state_ += 0x9e3779b97f4a7c15u);
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    return z ^ (z >> 31);
  }
  std::size_t below(std::size_t n) { return static_cast<std::size_t>(next() % n); }

 private:
  std::uint64_t state_;
};

enum class State { kReady, kAtBarrier, kInWarpOp, kExited };

struct Block;

struct Thread {
  Block* block = nullptr;
  Fiber* fiber = nullptr;
  uint3 index{};
  int rank = 0;
  State state = State::kReady;
  Site site{"", 0};
  Barrier barrier = Barrier::kSync;
  int predicate = 0;
  WarpRequest request{};
  std::uint64_t result = 0;
};

struct Warp {
  unsigned valid = 0;  // the lanes that it has; a block's last warp may be short
  unsigned in_op = 0;  // those that wait in a warp operation
  unsigned exited = 0;
};

struct Cluster {
  std::vector<Block*> blocks;
};

struct Memory {
  void operator()(void* p) const { std::free(p); }
};
using Bytes = std::unique_ptr<unsigned char, Memory>;

struct SharedVariable {
  Bytes bytes;
  std::size_t size = 0;
};

struct Block {
  uint3 index{};
  Cluster* cluster = nullptr;
  unsigned rank_in_cluster = 0;
  std::vector<Thread> threads;
  std::vector<Warp> warps;
  std::vector<Thread*> ready;  // from ready_head on
  std::size_t ready_head = 0;
  int exited = 0;
  int at_barrier = 0;
  const Thread* first_at_barrier = nullptr;  // all that wait agree with it
  Bytes dynamic;
  std::vector<SharedVariable> variables;

  int alive() const { return static_cast<int>(threads.size()) - exited; }
  std::size_t ready_count() const { return ready.size() - ready_head; }
};

// Ends a kernel from inside; the message is with the engine.
struct Abandon {};

[[noreturn]] void fiber_main();

class Engine {
 public:
  cudaError_t refusal(const Launch& l) const;
  cudaError_t run(const Launch& launch);

  // Called by running threads.
  int barrier(Barrier kind, int predicate, Site site);
  std::uint64_t warp_exchange(const WarpRequest& request, Site site);
  void after_atomic(bool changed, Site site);
  void poll(Site site);
  void progressed() { idle_polls_ = 0; }
  [[noreturn]] void fault(const std::string& what);
  Thread* self() const { return current_; }
  void* dynamic_shared();
  void* shared_variable(Block* block, int id, std::size_t bytes, std::size_t alignment);
  void* map(void* p, unsigned rank);
  [[noreturn]] void fiber_loop();

  Schedule schedule;
  Device device;
  std::uint64_t launches = 0;
  std::uint64_t parameter_bytes = 0;
  std::uint64_t questions = 0;
  std::map<const void*, std::size_t> dynamic_bytes;  // that kernels have been allowed

 private:
  void run_together(const std::vector<std::uint64_t>& blocks);
  void prepare(Block& b, std::uint64_t index);
  Bytes allocate(std::size_t bytes, std::size_t alignment);

  void make_ready(Thread* t);
  void make_all_ready(Block& b);
  Thread* pick();
  void become(Thread* t);
  void yield();
  void release_barrier(Block& b);
  void thread_exited(Thread* t);
  void finish_warp_op(const Thread& any);
  void refuse_if_awaited(const Thread& t, const std::string& doing);
  Warp& warp_of(const Thread& t) const {
    return t.block->warps[static_cast<std::size_t>(t.rank / kWarp)];
  }
  Thread& lane_of(const Thread& t, int i) const {
    return t.block->threads[static_cast<std::size_t>(t.rank / kWarp * kWarp + i)];
  }
  std::string deadlock_report() const;

  const char* op_ = "";
  dim3 grid_, block_dim_, cluster_dim_;
  std::size_t shared_bytes_ = 0;
  const std::function<void()>* body_ = nullptr;

  std::vector<std::unique_ptr<Block>> block_pool_;
  std::vector<Block*> group_;  // the blocks that are alive together
  std::vector<Cluster> clusters_;
  std::size_t group_at_ = 0;  // whose threads are being run
  std::size_t group_ready_ = 0;
  std::size_t group_alive_ = 0;
  Thread* current_ = nullptr;
  std::uint64_t idle_polls_ = 0;
  std::string error_;
  Random random_{0};
  Fibers fibers_{&fiber_main};
};

Engine& engine();

}  // namespace fusereg::cuda_on_host
