// The scheduler behind cuda_on_host.h: which thread runs next, barriers, warps, shared memory, and
// the reports.
#include "scheduler.h"

#include <algorithm>
#include <cstdio>
#include <cstring>
#include <map>
#include <memory>
#include <new>
#include <utility>

namespace fusereg::cuda_on_host {

namespace {

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

std::string text(const Thread& t) {
  return "block " + text(t.block->index) + " thread " + text(t.index);
}

}  // namespace

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

[[noreturn]] void fiber_main() { engine().fiber_loop(); }

// --- scheduling ---

// What every fiber runs: one thread after another, for as long as they never yield without a
// switch.
void Engine::fiber_loop() {
  fibers_.started();
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
      fibers_.release(fiber);
      fibers_.switch_to(fiber, nullptr);
    } else if (next->fiber == nullptr) {
      next->fiber = fiber;
      become(next);
    } else {
      fibers_.release(fiber);
      become(next);
      fibers_.switch_to(fiber, next->fiber);
    }
  }
}

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
    fibers_.switch_to(mine->fiber, nullptr);
  } else {
    if (next->fiber == nullptr) next->fiber = fibers_.acquire();
    become(next);
    fibers_.switch_to(mine->fiber, next->fiber);
  }
}

void Engine::fault(const std::string& what) {
  error_ = std::string(op_) + ": " + text(*current_) + ": " + what;
  throw Abandon{};  // unwinds this thread alone, to fiber_loop()
}

// --- barriers ---

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

// --- warps ---

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

// --- waiting in a loop ---

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

// --- shared memory ---

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

// --- deadlock ---

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

}  // namespace fusereg::cuda_on_host
