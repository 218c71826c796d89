// The scheduler behind cuda_on_host.h: fibers, barriers, warps, shared memory, and the reports.
#include "cuda_on_host.h"

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <map>
#include <memory>
#include <mutex>
#include <new>
#include <numeric>
#include <utility>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#define FUSEREG_HOST_ASAN 1
#elif defined(__has_feature)
#if __has_feature(address_sanitizer)
#define FUSEREG_HOST_ASAN 1
#endif
#endif
#if defined(FUSEREG_HOST_ASAN)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

// A switch written by hand is a dozen instructions; swapcontext makes a system call each time.
#if defined(__x86_64__) && !defined(__CET__) && !defined(FUSEREG_HOST_UCONTEXT)
#define FUSEREG_HOST_ASM_SWITCH 1
#else
#include <ucontext.h>
#endif

#if defined(FUSEREG_HOST_ASM_SWITCH)
// Saves what the calling convention asks a function to keep, leaves the stack pointer in *save, and
// continues where `load` was saved.
extern "C" void fusereg_host_switch(void** save, void* load);
asm(R"(
.text
.hidden fusereg_host_switch
.globl fusereg_host_switch
.type fusereg_host_switch, @function
fusereg_host_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size fusereg_host_switch, .-fusereg_host_switch
)");
#endif

namespace fusereg::cuda_on_host {

Coordinates coordinates;

namespace {

constexpr int kWarp = 32;
// Enough for a kernel's frames with the sanitizers' red zones between its variables.
constexpr std::size_t kStackBytes = 128 * 1024;
// A kernel that overruns its stack hits this, unreadable, instead of its neighbour's stack. It is
// wide, since a large frame steps over a narrow one.
constexpr std::size_t kGuardBytes = 256 * 1024;
// So many polls in a row that find nothing changed: nobody is going to change it.
constexpr std::uint64_t kLivelockPolls = 2'000'000;

std::string text(const uint3& v) {
  return "(" + std::to_string(v.x) + ", " + std::to_string(v.y) + ", " + std::to_string(v.z) + ")";
}

std::string text(Site site) {
  const std::string file = site.file;
  const std::size_t slash = file.find_last_of('/');
  return (slash == std::string::npos ? file : file.substr(slash + 1)) + ":" +
         std::to_string(site.line);
}

std::string hex(unsigned v) {
  char buffer[16];
  std::snprintf(buffer, sizeof(buffer), "0x%08x", v);
  return buffer;
}

bool same(Site a, Site b) {
  return a.line == b.line && (a.file == b.file || std::strcmp(a.file, b.file) == 0);
}

const char* name(Barrier kind) {
  switch (kind) {
    case Barrier::kSync:
      return "__syncthreads";
    case Barrier::kCount:
      return "__syncthreads_count";
    case Barrier::kAnd:
      return "__syncthreads_and";
    case Barrier::kOr:
      return "__syncthreads_or";
    case Barrier::kCluster:
      return "cluster_sync";
  }
  return "barrier";
}

const char* name(WarpOp op) {
  switch (op) {
    case WarpOp::kSync:
      return "__syncwarp";
    case WarpOp::kShuffle:
      return "warp shuffle";
    case WarpOp::kBallot:
      return "warp vote";
  }
  return "warp operation";
}

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

struct Thread;

// A stack and where to continue on it.
struct Fiber {
  unsigned char* stack = nullptr;  // above its guard
  Thread* thread = nullptr;        // what it runs, or is to run when it is continued
  void* fake_stack = nullptr;
#if defined(FUSEREG_HOST_ASM_SWITCH)
  void* stack_pointer = nullptr;
#else
  ucontext_t context{};
#endif
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

std::string text(const Thread& t) {
  return "block " + text(t.block->index) + " thread " + text(t.index);
}

// Ends a kernel from inside; the message is with the engine.
struct Abandon {};

[[noreturn]] void fiber_main();

class Engine {
 public:
  cudaError_t run(const char* op, dim3 grid, dim3 block, std::size_t shared_bytes, bool cooperative,
                  dim3 cluster, const Body& body);

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

  Fiber* acquire_fiber();
  void reset_fiber(Fiber* f);
  // A null pointer stands for the launching thread's own stack.
  void switch_fiber(Fiber* from, Fiber* to);
  void arrived(void* fake_stack);

  const char* op_ = "";
  dim3 grid_, block_dim_, cluster_dim_;
  std::size_t shared_bytes_ = 0;
  const Body* body_ = nullptr;

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

  std::vector<std::unique_ptr<Fiber>> fibers_;
  std::vector<Fiber*> free_fibers_;
  Fiber main_;
  const void* main_stack_ = nullptr;
  std::size_t main_stack_size_ = 0;
  bool left_main_ = false;
};

Engine& engine() {
  static Engine* const instance = [] {
    auto e = std::make_unique<Engine>();
    if (const char* wanted = std::getenv("FUSEREG_HOST_SCHEDULE"); wanted && *wanted) {
      e->schedule = parse_schedule(wanted);
    }
    return e.release();  // never destroyed: a launch may come from another static's destructor
  }();
  return *instance;
}

// Launches from several threads of the process run one after the other.
std::mutex launch_mutex;

// ---- Fibers ----

[[noreturn]] void fiber_main() { engine().fiber_loop(); }

void Engine::reset_fiber(Fiber* f) {
#if defined(FUSEREG_HOST_ASAN)
  // What was abandoned on this stack left red zones behind.
  __asan_unpoison_memory_region(f->stack, kStackBytes);
#endif
  f->fake_stack = nullptr;
#if defined(FUSEREG_HOST_ASM_SWITCH)
  // As if fiber_main had been called: below a return address of 0, which ends every backtrace.
  auto* top = reinterpret_cast<void**>(f->stack + kStackBytes);
  *--top = nullptr;
  *--top = reinterpret_cast<void*>(&fiber_main);
  for (int i = 0; i < 6; ++i) *--top = nullptr;
  f->stack_pointer = top;
#else
  getcontext(&f->context);
  f->context.uc_stack.ss_sp = f->stack;
  f->context.uc_stack.ss_size = kStackBytes;
  f->context.uc_link = nullptr;
  makecontext(&f->context, reinterpret_cast<void (*)()>(&fiber_main), 0);
#endif
}

Fiber* Engine::acquire_fiber() {
  if (free_fibers_.empty()) {
    void* memory = mmap(nullptr, kStackBytes + kGuardBytes, PROT_READ | PROT_WRITE,
                        MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED) throw std::bad_alloc();
    if (mprotect(memory, kGuardBytes, PROT_NONE) != 0) throw std::bad_alloc();
    auto fiber = std::make_unique<Fiber>();
    fiber->stack = static_cast<unsigned char*>(memory) + kGuardBytes;
    reset_fiber(fiber.get());
    free_fibers_.push_back(fiber.get());
    fibers_.push_back(std::move(fiber));
  }
  Fiber* f = free_fibers_.back();
  free_fibers_.pop_back();
  return f;
}

// The first thing on the stack that has been switched to.
void Engine::arrived(void* fake_stack) {
#if defined(FUSEREG_HOST_ASAN)
  const void* bottom = nullptr;
  std::size_t size = 0;
  __sanitizer_finish_switch_fiber(fake_stack, &bottom, &size);
  if (left_main_) {
    main_stack_ = bottom;
    main_stack_size_ = size;
  }
#endif
  (void)fake_stack;
}

void Engine::switch_fiber(Fiber* from, Fiber* to) {
  Fiber* const source = from ? from : &main_;
  Fiber* const target = to ? to : &main_;
  left_main_ = from == nullptr;
#if defined(FUSEREG_HOST_ASAN)
  __sanitizer_start_switch_fiber(&source->fake_stack, to ? to->stack : main_stack_,
                                 to ? kStackBytes : main_stack_size_);
#endif

#if defined(FUSEREG_HOST_ASM_SWITCH)
  fusereg_host_switch(&source->stack_pointer, target->stack_pointer);
#else
  swapcontext(&source->context, &target->context);
#endif
  arrived(source->fake_stack);
}

// What every fiber runs: one thread after another, for as long as they never yield without a
// switch.
void Engine::fiber_loop() {
  arrived(nullptr);
  for (;;) {
    Thread* const mine = current_;
    Fiber* const fiber = mine->fiber;
    try {
      (*body_)();
      thread_exited(mine);
    } catch (const Abandon&) {
    } catch (const std::exception& e) {
      error_ = std::string(op_) + ": an exception left the kernel: " + e.what();
    }
    mine->fiber = nullptr;
    // After a fault the other threads are left where they are.
    Thread* const next = error_.empty() ? pick() : nullptr;
    if (next == nullptr) {  // all done, or nobody can go on: the launching thread finds out which
      free_fibers_.push_back(fiber);
      switch_fiber(fiber, nullptr);
    } else if (next->fiber == nullptr) {
      next->fiber = fiber;
      become(next);
    } else {
      free_fibers_.push_back(fiber);
      become(next);
      switch_fiber(fiber, next->fiber);
    }
  }
}

// ---- Scheduling ----

void Engine::make_ready(Thread* t) {
  t->state = State::kReady;
  t->block->ready.push_back(t);
  ++group_ready_;
}

// The next thread to run, taken from its queue; null where there is none.
Thread* Engine::pick() {
  if (group_ready_ == 0) return nullptr;
  if (group_.size() > 1 && schedule.order == Order::kRandom && random_.below(16) == 0) {
    group_at_ = random_.below(group_.size());
  }
  while (group_[group_at_]->ready_count() == 0) group_at_ = (group_at_ + 1) % group_.size();
  Block& b = *group_[group_at_];
  Thread* t = nullptr;
  switch (schedule.order) {
    case Order::kForward:
      t = b.ready[b.ready_head++];
      break;
    case Order::kReverse:
      t = b.ready.back();
      b.ready.pop_back();
      break;
    case Order::kRandom:
      std::swap(b.ready[b.ready_head + random_.below(b.ready_count())], b.ready.back());
      t = b.ready.back();
      b.ready.pop_back();
      break;
  }
  if (b.ready_head == b.ready.size()) {
    b.ready.clear();
    b.ready_head = 0;
  }
  --group_ready_;
  return t;
}

void Engine::become(Thread* t) {
  current_ = t;
  coordinates.thread = t->index;
  coordinates.block = t->block->index;
}

// Gives way; returns when this thread is picked again.
void Engine::yield() {
  Thread* const mine = current_;
  Thread* const next = pick();
  if (next == mine) return;
  if (next == nullptr) {
    switch_fiber(mine->fiber, nullptr);
  } else {
    if (next->fiber == nullptr) next->fiber = acquire_fiber();
    become(next);
    switch_fiber(mine->fiber, next->fiber);
  }
}

void Engine::fault(const std::string& what) {
  error_ = std::string(op_) + ": " + text(*current_) + ": " + what;
  throw Abandon{};  // unwinds this thread alone, to fiber_loop()
}

// ---- Barriers ----

// Nothing that needs a destructor may be alive where a thread yields: after a fault in another
// thread it is never continued.
int Engine::barrier(Barrier kind, int predicate, Site site) {
  Thread& t = *current_;
  Block& b = *t.block;
  if (b.at_barrier > 0) {
    const Thread& other = *b.first_at_barrier;
    if (other.barrier != kind || (kind != Barrier::kCluster && !same(other.site, site))) {
      fault(std::string("divergent barrier: reached ") + name(kind) + " at " + text(site) +
            " while " + text(other) + " waits in " + name(other.barrier) + " at " +
            text(other.site));
    }
  } else {
    b.first_at_barrier = &t;
  }
  if (warp_of(t).in_op != 0) {
    refuse_if_awaited(t, std::string("reached ") + name(kind) + " at " + text(site));
  }
  t.state = State::kAtBarrier;
  t.barrier = kind;
  t.predicate = predicate;
  t.site = site;
  ++b.at_barrier;
  release_barrier(b);
  yield();
  return static_cast<int>(t.result);
}

// Lets the waiting threads of the block (or cluster) go if all that are alive wait. Threads that
// have exited do not count, as on the device.
void Engine::release_barrier(Block& b) {
  if (b.at_barrier == 0) return;
  if (b.first_at_barrier->barrier == Barrier::kCluster) {
    for (const Block* peer : b.cluster->blocks) {
      if (peer->at_barrier != peer->alive()) return;
      if (peer->at_barrier > 0 && peer->first_at_barrier->barrier != Barrier::kCluster) return;
    }
    for (Block* peer : b.cluster->blocks) make_all_ready(*peer);
  } else if (b.at_barrier == b.alive()) {
    make_all_ready(b);
  }
}

void Engine::make_all_ready(Block& b) {
  int count = 0;
  for (const Thread& t : b.threads) count += t.state == State::kAtBarrier && t.predicate != 0;
  for (Thread& t : b.threads) {
    if (t.state != State::kAtBarrier) continue;
    const int result = t.barrier == Barrier::kAnd  ? count == b.at_barrier
                       : t.barrier == Barrier::kOr ? count > 0
                                                   : count;
    t.result = static_cast<std::uint64_t>(result);
    make_ready(&t);
  }
  b.at_barrier = 0;
  progressed();
}

// ---- Warps ----

// A lane that goes elsewhere while another waits for it in a warp operation will never get there:
// the barrier that it goes to waits for that other lane in turn.
void Engine::refuse_if_awaited(const Thread& t, const std::string& doing) {
  const Warp& warp = warp_of(t);
  for (int i = 0; i < kWarp; ++i) {
    if (!(warp.in_op >> i & 1u)) continue;
    const Thread& other = lane_of(t, i);
    if (other.request.mask >> (t.rank % kWarp) & 1u) {
      fault("divergent warp: " + doing + " while " + text(other) + " waits for this lane in a " +
            name(other.request.op) + " at " + text(other.site) + " with mask " +
            hex(other.request.mask));
    }
  }
}

std::uint64_t Engine::warp_exchange(const WarpRequest& request, Site site) {
  Thread& t = *current_;
  Warp& warp = warp_of(t);
  const int own = t.rank % kWarp;
  const unsigned mask = request.mask;
  const auto refuse = [&](const std::string& what) {
    fault(std::string(name(request.op)) + " at " + text(site) + ": the mask " + hex(mask) + " " +
          what);
  };
  if (!(mask >> own & 1u)) refuse("does not name the calling lane " + std::to_string(own));
  if (mask & ~warp.valid) {
    refuse("names lanes that the block does not have (it has " + hex(warp.valid) + ")");
  }
  if (mask & warp.exited) refuse("names lanes that have exited: " + hex(mask & warp.exited));
  if (request.op == WarpOp::kShuffle && !(mask >> request.source & 1u)) {
    refuse("does not name lane " + std::to_string(request.source) + ", from which lane " +
           std::to_string(own) + " reads");
  }
  bool complete = true;
  for (int i = 0; i < kWarp; ++i) {
    if (i == own || !(mask >> i & 1u)) continue;
    const Thread& other = lane_of(t, i);
    if (other.state == State::kInWarpOp) {
      const WarpRequest& theirs = other.request;
      const bool agrees = theirs.mask == mask && theirs.op == request.op &&
                          theirs.bytes == request.bytes &&
                          (request.op == WarpOp::kSync || same(other.site, site));
      if (agrees) continue;
      // Where it does not wait for this lane, it may finish there and still come here.
      if (theirs.mask >> own & 1u) {
        refuse("names " + text(other) + ", which waits for this lane elsewhere: in a " +
               name(theirs.op) + " at " + text(other.site) + " with mask " + hex(theirs.mask) +
               " (divergent warp)");
      }
    } else if (other.state == State::kAtBarrier) {
      refuse("names " + text(other) + ", which waits in " + name(other.barrier) + " at " +
             text(other.site) + " (divergent warp)");
    }
    complete = false;
  }
  t.state = State::kInWarpOp;
  t.request = request;
  t.site = site;
  warp.in_op |= 1u << own;
  if (complete) finish_warp_op(t);
  yield();
  return t.result;
}

void Engine::finish_warp_op(const Thread& any) {
  const unsigned mask = any.request.mask;
  std::uint64_t ballot = 0;
  for (int i = 0; i < kWarp; ++i) {
    if (mask >> i & 1u && lane_of(any, i).request.value) ballot |= std::uint64_t{1} << i;
  }
  const bool shuffle = any.request.op == WarpOp::kShuffle;
  for (int i = 0; i < kWarp; ++i) {
    if (!(mask >> i & 1u)) continue;
    Thread& t = lane_of(any, i);
    t.result = shuffle ? lane_of(any, t.request.source).request.value : ballot;
    make_ready(&t);
  }
  warp_of(any).in_op &= ~mask;
  progressed();
}

void Engine::thread_exited(Thread* t) {
  Warp& warp = warp_of(*t);
  if (warp.in_op != 0) refuse_if_awaited(*t, "exited");
  warp.exited |= 1u << (t->rank % kWarp);
  t->state = State::kExited;
  ++t->block->exited;
  --group_alive_;
  progressed();
  // Any block's barrier can have waited for this thread, if it is the cluster's.
  if (t->block->cluster->blocks.size() == 1) {
    release_barrier(*t->block);
  } else {
    for (Block* b : t->block->cluster->blocks) release_barrier(*b);
  }
}

// ---- Waiting in a loop ----

void Engine::after_atomic(bool changed, Site site) {
  if (!changed) {
    poll(site);
    return;
  }
  progressed();
  const bool may_yield =
      schedule.order == Order::kRandom ? random_.below(4) == 0 : group_.size() > 1;
  if (!may_yield) return;
  make_ready(current_);
  yield();
}

void Engine::poll(Site site) {
  if (++idle_polls_ > kLivelockPolls) {
    fault("livelock: polls at " + text(site) +
          ", and no thread that could end the wait is running" +
          (group_.size() == 1 ? " (blocks run one after the other unless the launch is cooperative)"
                              : ""));
  }
  if (schedule.order == Order::kReverse) {
    // To the far end of its stack, or it would be picked again at once and for ever.
    Block& b = *current_->block;
    if (b.ready_head > 0) {
      b.ready[--b.ready_head] = current_;
    } else {
      b.ready.insert(b.ready.begin(), current_);
    }
    ++group_ready_;
  } else {
    make_ready(current_);
  }
  if (group_.size() > 1) group_at_ = (group_at_ + 1) % group_.size();
  yield();
}

// ---- Shared memory ----

// Between red zones, and full of garbage: what a kernel reads before it writes shows.
Bytes Engine::allocate(std::size_t bytes, std::size_t alignment) {
  alignment = std::max<std::size_t>(alignment, 16);
  void* p = nullptr;
  if (posix_memalign(&p, alignment, bytes) != 0) throw std::bad_alloc();
  auto* const memory = static_cast<unsigned char*>(p);
  switch (schedule.order) {
    case Order::kForward:
      std::memset(memory, 0xff, bytes);  // NaN, or -1
      break;
    case Order::kReverse:
      std::memset(memory, 0x5a, bytes);  // 1.5e16 as float: large, and no NaN that a max could hide
      break;
    case Order::kRandom:
      for (std::size_t i = 0; i < bytes; ++i)
        memory[i] = static_cast<unsigned char>(random_.next());
      break;
  }
  return Bytes(memory);
}

void* Engine::dynamic_shared() {
  Block& b = *current_->block;
  if (!b.dynamic) b.dynamic = allocate(shared_bytes_, 16);
  return b.dynamic.get();
}

void* Engine::shared_variable(Block* b, int id, std::size_t bytes, std::size_t alignment) {
  const auto at = static_cast<std::size_t>(id);
  if (b->variables.size() <= at) b->variables.resize(at + 1);
  SharedVariable& v = b->variables[at];
  if (!v.bytes) v = {allocate(bytes, alignment), bytes};
  return v.bytes.get();
}

void* Engine::map(void* p, unsigned rank) {
  Block& b = *current_->block;
  if (rank >= b.cluster->blocks.size()) {
    fault("cluster_map: rank " + std::to_string(rank) + " in a cluster of " +
          std::to_string(b.cluster->blocks.size()));
  }
  Block& peer = *b.cluster->blocks[rank];
  if (peer.alive() == 0) {
    fault("cluster_map: block " + text(peer.index) +
          " has exited; cluster_sync() must keep it until the last access");
  }
  auto* const address = static_cast<unsigned char*>(p);
  const auto offset_in = [address](const Bytes& bytes, std::size_t size) {
    const auto at = reinterpret_cast<std::uintptr_t>(address);
    const auto start = reinterpret_cast<std::uintptr_t>(bytes.get());
    return bytes && at >= start && at < start + size ? static_cast<std::ptrdiff_t>(at - start) : -1;
  };
  if (const auto offset = offset_in(b.dynamic, shared_bytes_); offset >= 0) {
    if (!peer.dynamic) peer.dynamic = allocate(shared_bytes_, 16);
    return peer.dynamic.get() + offset;
  }
  for (std::size_t id = 0; id < b.variables.size(); ++id) {
    const SharedVariable& v = b.variables[id];
    if (const auto offset = offset_in(v.bytes, v.size); offset >= 0) {
      return static_cast<unsigned char*>(shared_variable(&peer, static_cast<int>(id), v.size, 16)) +
             offset;
    }
  }
  fault("cluster_map: the address is not in this block's shared memory");
}

// ---- Launches ----

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
  first->fiber = acquire_fiber();
  become(first);
  switch_fiber(nullptr, first->fiber);
  current_ = nullptr;
  if (error_.empty() && group_alive_ > 0) error_ = deadlock_report();
  for (Block* b : group_) {  // freed now, so that a stale pointer into it is caught
    b->dynamic.reset();
    b->variables.clear();
  }
}

std::string Engine::deadlock_report() const {
  std::string report =
      std::string(op_) + ": deadlock: " + std::to_string(group_alive_) + " threads wait forever";
  for (const Block* b : group_) {
    if (b->alive() == 0) continue;
    struct Waiting {
      int count = 0;
      const Thread* first = nullptr;
    };
    std::map<std::string, Waiting> places;
    for (const Thread& t : b->threads) {
      if (t.state == State::kExited) continue;
      std::string place = t.state == State::kAtBarrier
                              ? std::string(name(t.barrier)) + " at " + text(t.site)
                              : std::string(name(t.request.op)) + " at " + text(t.site) +
                                    " with mask " + hex(t.request.mask);
      Waiting& w = places[place];
      if (w.count++ == 0) w.first = &t;
    }
    report += "\n  block " + text(b->index) + ": " + std::to_string(b->exited) + " of " +
              std::to_string(b->threads.size()) + " threads exited";
    for (const auto& [place, w] : places) {
      report += "; " + std::to_string(w.count) + " in " + place + " (first: thread " +
                text(w.first->index) + ")";
    }
  }
  return report;
}

cudaError_t Engine::run(const char* op, dim3 grid, dim3 block, std::size_t shared_bytes,
                        bool cooperative, dim3 cluster, const Body& body) {
  if (shared_bytes > static_cast<std::size_t>(device.shared_per_block))
    return cudaErrorInvalidValue;
  const std::uint64_t cluster_blocks = std::uint64_t{cluster.x} * cluster.y * cluster.z;
  const std::uint64_t blocks = std::uint64_t{grid.x} * grid.y * grid.z;
  if (cluster_blocks > static_cast<std::uint64_t>(device.cluster_blocks)) {
    return cudaErrorInvalidClusterSize;
  }
  if (cooperative) {
    const int most = max_resident_blocks(block.x * block.y * block.z, shared_bytes);
    if (blocks > static_cast<std::uint64_t>(most)) return cudaErrorCooperativeLaunchTooLarge;
  }
  ++launches;
  op_ = op;
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
  free_fibers_.clear();
  for (const auto& f : fibers_) {
    reset_fiber(f.get());
    free_fibers_.push_back(f.get());
  }
  if (!error_.empty()) throw Fault(error_);
  return cudaSuccess;
}

}  // namespace

// ---- The interface ----

cudaError_t run(const char* op, dim3 grid, dim3 block, std::size_t shared_bytes, bool cooperative,
                dim3 cluster, Body body) {
  const std::lock_guard<std::mutex> lock(launch_mutex);
  return engine().run(op, grid, block, shared_bytes, cooperative, cluster, body);
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
int max_resident_blocks(unsigned threads_per_block, std::size_t shared_bytes) {
  const Device& d = engine().device;
  int per_sm = std::min(d.blocks_per_sm, d.threads_per_sm / static_cast<int>(threads_per_block));
  if (shared_bytes > 0) per_sm = std::min(per_sm, d.shared_per_sm / static_cast<int>(shared_bytes));
  return per_sm * d.sm_count;
}

}  // namespace fusereg::cuda_on_host

// ---- The runtime ----

namespace {
thread_local int current_device = 0;
thread_local cudaError_t last_error = cudaSuccess;

cudaError_t record(cudaError_t error) {
  if (error != cudaSuccess) last_error = error;
  return error;
}
bool exists(int device) { return device >= 0 && device < fusereg::cuda_on_host::device().count; }
}  // namespace

const char* cudaGetErrorName(cudaError_t error) {
  switch (error) {
    case cudaSuccess:
      return "cudaSuccess";
    case cudaErrorInvalidValue:
      return "cudaErrorInvalidValue";
    case cudaErrorMemoryAllocation:
      return "cudaErrorMemoryAllocation";
    case cudaErrorNoDevice:
      return "cudaErrorNoDevice";
    case cudaErrorInvalidDevice:
      return "cudaErrorInvalidDevice";
    case cudaErrorCooperativeLaunchTooLarge:
      return "cudaErrorCooperativeLaunchTooLarge";
    case cudaErrorInvalidClusterSize:
      return "cudaErrorInvalidClusterSize";
    default:
      return "cudaErrorUnknown";
  }
}

const char* cudaGetErrorString(cudaError_t error) {
  switch (error) {
    case cudaSuccess:
      return "no error";
    case cudaErrorInvalidValue:
      return "invalid argument";
    case cudaErrorMemoryAllocation:
      return "out of memory";
    case cudaErrorNoDevice:
      return "no CUDA-capable device is detected";
    case cudaErrorInvalidDevice:
      return "invalid device ordinal";
    case cudaErrorCooperativeLaunchTooLarge:
      return "too many blocks in cooperative launch";
    case cudaErrorInvalidClusterSize:
      return "invalid cluster size";
    default:
      return "an error that the host model does not name";
  }
}

cudaError_t cudaGetLastError() { return std::exchange(last_error, cudaSuccess); }
cudaError_t cudaPeekAtLastError() { return last_error; }
cudaError_t cudaDriverGetVersion(int* version) {
  *version = 13000;
  return cudaSuccess;
}
cudaError_t cudaRuntimeGetVersion(int* version) {
  *version = 13000;
  return cudaSuccess;
}
cudaError_t cudaGetDeviceCount(int* count) {
  *count = fusereg::cuda_on_host::device().count;
  return *count > 0 ? cudaSuccess : record(cudaErrorNoDevice);
}
cudaError_t cudaGetDevice(int* device) {
  *device = current_device;
  return exists(current_device) ? cudaSuccess : record(cudaErrorNoDevice);
}
cudaError_t cudaSetDevice(int device) {
  if (!exists(device)) return record(cudaErrorInvalidDevice);
  current_device = device;
  return cudaSuccess;
}
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device) {
  if (!exists(device)) return record(cudaErrorInvalidDevice);
  const fusereg::cuda_on_host::Device& d = fusereg::cuda_on_host::device();
  switch (attribute) {
    case cudaDevAttrMultiProcessorCount:
      *value = d.sm_count;
      return cudaSuccess;
    case cudaDevAttrL2CacheSize:
      *value = 1 << 20;
      return cudaSuccess;
    case cudaDevAttrMaxThreadsPerMultiProcessor:
      *value = d.threads_per_sm;
      return cudaSuccess;
    case cudaDevAttrComputeCapabilityMajor:
      *value = 9;
      return cudaSuccess;
    case cudaDevAttrComputeCapabilityMinor:
      *value = 0;
      return cudaSuccess;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin:
      *value = d.shared_per_block;
      return cudaSuccess;
  }
  return record(cudaErrorInvalidValue);
}
cudaError_t cudaGetDeviceProperties(cudaDeviceProp* properties, int device) {
  if (!exists(device)) return record(cudaErrorInvalidDevice);
  *properties = {};
  std::snprintf(properties->name, sizeof(properties->name), "CUDA on host");
  properties->totalGlobalMem = static_cast<std::size_t>(sysconf(_SC_PHYS_PAGES)) *
                               static_cast<std::size_t>(sysconf(_SC_PAGESIZE));
  properties->major = 9;
  properties->multiProcessorCount = fusereg::cuda_on_host::device().sm_count;
  return cudaSuccess;
}
cudaError_t cudaMalloc(void** p, std::size_t bytes) {
  *p = std::malloc(bytes);
  return *p || bytes == 0 ? cudaSuccess : record(cudaErrorMemoryAllocation);
}
cudaError_t cudaFree(void* p) {
  std::free(p);
  return cudaSuccess;
}
cudaError_t cudaMemcpyAsync(void* to, const void* from, std::size_t bytes, cudaMemcpyKind,
                            cudaStream_t) {
  if (bytes > 0) std::memmove(to, from, bytes);
  return cudaSuccess;
}
cudaError_t cudaMemsetAsync(void* p, int value, std::size_t bytes, cudaStream_t) {
  if (bytes > 0) std::memset(p, value, bytes);
  return cudaSuccess;
}
