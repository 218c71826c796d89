// A CUDA runtime whose device memory is host memory: what a CUDA build of torch calls to have devices, memory,
// streams, events and graphs where there is no GPU. Work that is put on a stream runs at once, or, while the
// stream is captured, goes into the graph, which runs it at each replay. Built as libcudart.so.13 (stubs.py).
//
// Kept of the real one, since tests are about it: errors of calls that a capture forbids; when the host waits;
// which device memory and streams belong to; what the events between streams say of their order.
#include <cuda_runtime_api.h>

#include <atomic>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <unordered_map>
#include <utility>
#include <vector>

#include "standin.h"

#undef cudaGetDeviceProperties
#undef cudaSignalExternalSemaphoresAsync

namespace {

// --- what there is ---

constexpr unsigned char kPoison = 0xA5;

int device_count() {
  static const int count = [] {
    const char* const text = std::getenv("STANDIN_DEVICES");
    return text != nullptr ? std::atoi(text) : 2;
  }();
  return count;
}

// How much of the work of each stream is known to be done, by whoever holds this. Streams are numbered.
using Clock = std::map<int, std::uint64_t>;

void join(Clock& into, const Clock& other) {
  for (const auto& [stream, tick] : other) {
    std::uint64_t& mine = into[stream];
    if (mine < tick) mine = tick;
  }
}

struct Node {
  StandinWork work;
  StandinDrop drop;
  void* context;
  Node(StandinWork w, StandinDrop d, void* c) : work(w), drop(d), context(c) {}
  Node(const Node&) = delete;
  ~Node() {
    if (drop != nullptr) drop(context);
  }
};

struct Graph {
  std::vector<std::unique_ptr<Node>> nodes;
};

struct Stream;
struct Capture {
  unsigned long long id = 0;
  bool global = true;   // forbids unsafe calls in every thread
  bool broken = false;  // by a call that it forbids
  bool ended = false;
  std::vector<Stream*> joined;
  std::shared_ptr<Graph> graph = std::make_shared<Graph>();
};

struct Stream {
  int number;
  int device;
  int priority = 0;
  std::shared_ptr<Capture> capture;
  Clock clock;
};

struct Event {
  std::shared_ptr<Capture> capture;
  Clock clock;
  std::chrono::steady_clock::time_point when;
};

struct Block {
  std::size_t bytes;
  int device;  // -1: pinned memory of the host
};

std::recursive_mutex mutex;
#define LOCKED const std::lock_guard<std::recursive_mutex> lock(mutex)

std::map<std::uintptr_t, Block>& memory() {
  static auto* const blocks = new std::map<std::uintptr_t, Block>;
  return *blocks;
}
std::vector<std::weak_ptr<Capture>> captures;
std::vector<bool> contexts(static_cast<std::size_t>(device_count()));
Clock host_clock;
int streams_made = 0;

thread_local int current = 0;

// Something is done on the current device, which gives it a context.
void use_device() {
  LOCKED;
  contexts[static_cast<std::size_t>(current)] = true;
}
thread_local cudaError_t last_error = cudaSuccess;
thread_local cudaStreamCaptureMode capture_mode = cudaStreamCaptureModeGlobal;
thread_local std::string explanation;

cudaError_t answer(cudaError_t error) {
  if (error != cudaSuccess) last_error = error;
  return error;
}
cudaError_t refuse(cudaError_t error, const std::string& words) {
  explanation = words;
  return answer(error);
}

Stream* stream_of(cudaStream_t handle) {
  const auto value = reinterpret_cast<std::uintptr_t>(handle);
  if (value >= 16) return reinterpret_cast<Stream*>(handle);
  LOCKED;
  static std::map<int, Stream>* const defaults = new std::map<int, Stream>;
  const auto [found, made] = defaults->try_emplace(current);
  if (made) {
    found->second.number = streams_made++;
    found->second.device = current;
  }
  return &found->second;
}

// The block that an address lies in.
const Block* block_of(std::uintptr_t address) {
  auto& blocks = memory();
  auto found = blocks.upper_bound(address);
  if (found == blocks.begin()) return nullptr;
  --found;
  return address < found->first + found->second.bytes ? &found->second : nullptr;
}

// --- when the host waits ---

void (*on_wait)(const char*) = nullptr;

// The host waits for what `clock` knows. Forbidden while `capture` is recorded.
cudaError_t wait(const char* what, const Clock& clock, const std::shared_ptr<Capture>& capture) {
  if (on_wait != nullptr) on_wait(what);
  LOCKED;
  if (capture) {
    capture->broken = true;
    return refuse(cudaErrorStreamCaptureUnsupported,
                  std::string("operation not permitted when stream is capturing: ") + what);
  }
  join(host_clock, clock);
  return cudaSuccess;
}

// Calls that a capture forbids to every thread that has not said that it knows better.
cudaError_t unsafe(const char* what) {
  LOCKED;
  if (capture_mode == cudaStreamCaptureModeRelaxed) return cudaSuccess;
  for (const auto& weak : captures) {
    const auto capture = weak.lock();
    if (!capture || !capture->global) continue;
    capture->broken = true;
    return refuse(cudaErrorStreamCaptureUnsupported,
                  std::string(what) + " is not permitted while a stream is captured");
  }
  return cudaSuccess;
}

// --- the order of streams ---

constexpr std::uintptr_t kGranule = 512;  // what torch's allocator deals out
struct Accesses {
  int writer = -1;
  std::uint64_t written = 0;
  Clock reads;
};
bool order_is_checked = false;
std::unordered_map<std::uintptr_t, Accesses> accesses;

Clock everything() {
  Clock clock;
  LOCKED;
  for (int stream = 0; stream < streams_made; ++stream) clock[stream] = ~std::uint64_t{0} >> 1;
  return clock;
}

// --- work ---

// Work of one stream begins: it comes after what the stream has waited for and what the host knows is done.
void advance(Stream* s) {
  join(s->clock, host_clock);
  ++s->clock[s->number];
}

int enqueue(cudaStream_t handle, StandinWork work, StandinDrop drop, void* context) {
  LOCKED;
  Stream* const s = stream_of(handle);
  if (s->capture) {
    s->capture->graph->nodes.push_back(std::make_unique<Node>(work, drop, context));
    return kStandinRecorded;
  }
  advance(s);
  return kStandinRunNow;
}

template <class F>
cudaError_t put(cudaStream_t handle, F f) {
  auto* const context = new F(std::move(f));
  const auto work = [](void* c) -> int {
    (*static_cast<F*>(c))();
    return 0;
  };
  const auto drop = [](void* c) { delete static_cast<F*>(c); };
  if (enqueue(handle, work, drop, context) == kStandinRunNow) {
    work(context);
    drop(context);
  }
  return cudaSuccess;
}

bool pinned_or_device(const void* p) {
  LOCKED;
  return block_of(reinterpret_cast<std::uintptr_t>(p)) != nullptr;
}

// A copy with memory of the host that is not pinned: the host waits until it is done, or staged.
void note_pageable(const void* to, const void* from) {
  if (on_wait != nullptr && !(pinned_or_device(to) && pinned_or_device(from))) {
    on_wait("a copy with pageable memory");
  }
}

}  // namespace

extern "C" {

// --- beside CUDA's own ---

int standin_enqueue(void* stream, StandinWork work, StandinDrop drop, void* context) {
  return enqueue(static_cast<cudaStream_t>(stream), work, drop, context);
}

int standin_check_launch(void* handle, const char* name, const void* const* parameters,
                         const std::size_t* sizes, int count) {
  LOCKED;
  const Stream* const s = stream_of(static_cast<cudaStream_t>(handle));
  if (s->device != current) {
    return refuse(cudaErrorInvalidResourceHandle, std::string(name) + ": a stream of device " +
                                                      std::to_string(s->device) + ", but device " +
                                                      std::to_string(current) + " is current");
  }
  auto& blocks = memory();
  if (blocks.empty()) return cudaSuccess;
  const std::uintptr_t low = blocks.begin()->first;
  const std::uintptr_t high = blocks.rbegin()->first + blocks.rbegin()->second.bytes;
  for (int i = 0; i < count; ++i) {
    const auto* const words = static_cast<const unsigned char*>(parameters[i]);
    for (std::size_t at = 0; at + sizeof(low) <= sizes[i]; at += sizeof(low)) {
      std::uintptr_t word;
      std::memcpy(&word, words + at, sizeof(word));
      if (word < low || word >= high) continue;
      const Block* const block = block_of(word);
      if (block != nullptr && block->device >= 0 && block->device != current) {
        return refuse(cudaErrorIllegalAddress,
                      std::string(name) + ": memory of device " + std::to_string(block->device) +
                          " in a kernel on device " + std::to_string(current));
      }
    }
  }
  return cudaSuccess;
}

void standin_explain(const char* words) { explanation = words; }

int standin_refuse(int error, const char* words) {
  return refuse(static_cast<cudaError_t>(error), words);
}

int standin_has_context(int device) {
  LOCKED;
  return contexts[static_cast<std::size_t>(device)] ? 1 : 0;
}

// How many captures there are.
int standin_captures = 0;

int standin_is_capturing(void* stream) {
  LOCKED;
  return stream_of(static_cast<cudaStream_t>(stream))->capture ? 1 : 0;
}

// Calls back at each wait of the host, with what it was; nullptr ends it.
void standin_on_wait(void (*callback)(const char*)) { on_wait = callback; }

// Work begins on a stream, of which standin_access() is to be told.
void standin_advance(void* stream) {
  LOCKED;
  advance(stream_of(static_cast<cudaStream_t>(stream)));
}

// That the host waits, for whatever runs on torch's operators.
int standin_wait(void* stream, const char* what) {
  Stream* const s = stream_of(static_cast<cudaStream_t>(stream));
  return wait(what, s->clock, s->capture);
}

// Whether memory at this address may be read: of the device, or pinned.
int standin_is_memory(std::uintptr_t address) { return pinned_or_device((void*)address) ? 1 : 0; }

void standin_check_order(int on) {
  LOCKED;
  order_is_checked = on != 0;
  accesses.clear();
}

// The work that a stream is doing reads or writes these bytes. Answers the number of the stream whose work
// with them may not be done yet, and 1 in front (1000 + number), or 0.
int standin_access(void* handle, std::uintptr_t begin, std::size_t bytes, int writes) {
  LOCKED;
  if (!order_is_checked || bytes == 0) return 0;
  Stream* const s = stream_of(static_cast<cudaStream_t>(handle));
  int offender = 0;
  const auto done = [s](int stream, std::uint64_t tick) {
    const auto known = s->clock.find(stream);
    return stream == s->number || (known != s->clock.end() && known->second >= tick);
  };
  for (std::uintptr_t g = begin / kGranule; g <= (begin + bytes - 1) / kGranule; ++g) {
    Accesses& a = accesses[g];
    if (a.writer >= 0 && !done(a.writer, a.written)) offender = 1000 + a.writer;
    if (writes != 0) {
      for (const auto& [stream, tick] : a.reads) {
        if (!done(stream, tick)) offender = 1000 + stream;
      }
      a.reads.clear();
      a.writer = s->number;
      a.written = s->clock[s->number];
    } else {
      a.reads[s->number] = s->clock[s->number];
    }
  }
  return offender;
}

// --- devices ---

cudaError_t cudaGetDeviceCount(int* n) {
  *n = device_count();
  return cudaSuccess;
}
cudaError_t cudaGetDevice(int* d) {
  *d = current;
  return cudaSuccess;
}
cudaError_t cudaSetDevice(int d) {
  if (d < 0 || d >= device_count()) return answer(cudaErrorInvalidDevice);
  current = d;
  use_device();  // since CUDA 12
  return cudaSuccess;
}
cudaError_t cudaDeviceSynchronize() { return wait("cudaDeviceSynchronize", everything(), nullptr); }
// --- memory ---

cudaError_t cudaMalloc(void** p, std::size_t n) {
  *p = nullptr;
  if (n == 0) return cudaSuccess;
  if (const cudaError_t error = unsafe("cudaMalloc")) return error;
  use_device();
  if (posix_memalign(p, 512, n) != 0) return answer(cudaErrorMemoryAllocation);
  std::memset(*p, kPoison, n);
  LOCKED;
  memory()[reinterpret_cast<std::uintptr_t>(*p)] = {n, current};
  return cudaSuccess;
}
cudaError_t cudaFree(void* p) {
  if (p == nullptr) return cudaSuccess;
  if (const cudaError_t error = unsafe("cudaFree")) return error;
  LOCKED;
  memory().erase(reinterpret_cast<std::uintptr_t>(p));
  std::free(p);
  return cudaSuccess;
}
cudaError_t cudaMallocAsync(void** p, std::size_t n, cudaStream_t) { return cudaMalloc(p, n); }
cudaError_t cudaFreeAsync(void* p, cudaStream_t) { return cudaFree(p); }
cudaError_t cudaHostAlloc(void** p, std::size_t n, unsigned) {
  if (const cudaError_t error = unsafe("cudaHostAlloc")) return error;
  n = n == 0 ? 1 : n;
  if (posix_memalign(p, 4096, n) != 0) return answer(cudaErrorMemoryAllocation);
  std::memset(*p, kPoison, n);
  LOCKED;
  memory()[reinterpret_cast<std::uintptr_t>(*p)] = {n, -1};
  return cudaSuccess;
}
cudaError_t cudaFreeHost(void* p) {
  LOCKED;
  memory().erase(reinterpret_cast<std::uintptr_t>(p));
  std::free(p);
  return cudaSuccess;
}
cudaError_t cudaHostRegister(void* p, std::size_t n, unsigned) {
  LOCKED;
  memory()[reinterpret_cast<std::uintptr_t>(p)] = {n, -1};
  return cudaSuccess;
}
cudaError_t cudaHostUnregister(void* p) {
  LOCKED;
  memory().erase(reinterpret_cast<std::uintptr_t>(p));
  return cudaSuccess;
}
cudaError_t cudaMemGetInfo(std::size_t* f, std::size_t* t) {
  *t = std::size_t{8} << 30;
  *f = std::size_t{6} << 30;
  return cudaSuccess;
}
cudaError_t cudaPointerGetAttributes(cudaPointerAttributes* a, const void* p) {
  std::memset(a, 0, sizeof *a);
  LOCKED;
  const Block* const block = block_of(reinterpret_cast<std::uintptr_t>(p));
  a->type = block == nullptr     ? cudaMemoryTypeUnregistered
            : block->device >= 0 ? cudaMemoryTypeDevice
                                 : cudaMemoryTypeHost;
  a->device = block != nullptr && block->device >= 0 ? block->device : 0;
  a->devicePointer = block != nullptr ? const_cast<void*>(p) : nullptr;
  a->hostPointer = block == nullptr || block->device < 0 ? const_cast<void*>(p) : nullptr;
  return cudaSuccess;
}
cudaError_t cudaMemcpyAsync(void* d, const void* s, std::size_t n, cudaMemcpyKind,
                            cudaStream_t stream) {
  note_pageable(d, s);
  return put(stream, [=] { std::memmove(d, s, n); });
}
cudaError_t cudaMemcpy(void* d, const void* s, std::size_t n, cudaMemcpyKind kind) {
  if (const cudaError_t error = unsafe("cudaMemcpy")) return error;
  if (const cudaError_t error = cudaMemcpyAsync(d, s, n, kind, nullptr)) return error;
  return wait("cudaMemcpy", stream_of(nullptr)->clock, nullptr);
}
cudaError_t cudaMemcpyPeerAsync(void* d, int, const void* s, int, std::size_t n,
                                cudaStream_t stream) {
  return put(stream, [=] { std::memmove(d, s, n); });
}
cudaError_t cudaMemcpy2DAsync(void* d, std::size_t dp, const void* s, std::size_t sp, std::size_t w,
                              std::size_t h, cudaMemcpyKind, cudaStream_t stream) {
  note_pageable(d, s);
  return put(stream, [=] {
    for (std::size_t i = 0; i < h; ++i) {
      std::memmove(static_cast<char*>(d) + i * dp, static_cast<const char*>(s) + i * sp, w);
    }
  });
}
cudaError_t cudaMemsetAsync(void* p, int v, std::size_t n, cudaStream_t stream) {
  return put(stream, [=] { std::memset(p, v, n); });
}
cudaError_t cudaMemset(void* p, int v, std::size_t n) { return cudaMemsetAsync(p, v, n, nullptr); }
// --- streams and events ---

cudaError_t cudaStreamCreateWithPriority(cudaStream_t* s, unsigned, int priority) {
  LOCKED;
  use_device();
  auto* const made = new Stream;
  made->number = streams_made++;
  made->device = current;
  made->priority = priority;
  *s = reinterpret_cast<cudaStream_t>(made);
  return cudaSuccess;
}
cudaError_t cudaStreamCreate(cudaStream_t* s) { return cudaStreamCreateWithPriority(s, 0, 0); }
cudaError_t cudaStreamDestroy(cudaStream_t) { return cudaSuccess; }
cudaError_t cudaStreamSynchronize(cudaStream_t handle) {
  Stream* const s = stream_of(handle);
  return wait("cudaStreamSynchronize", s->clock, s->capture);
}
cudaError_t cudaStreamQuery(cudaStream_t handle) {
  LOCKED;
  join(host_clock, stream_of(handle)->clock);
  return cudaSuccess;
}
cudaError_t cudaStreamWaitEvent(cudaStream_t handle, cudaEvent_t event, unsigned) {
  LOCKED;
  Stream* const s = stream_of(handle);
  const auto* const e = reinterpret_cast<const Event*>(event);
  if (e->capture && !s->capture && !e->capture->ended) {  // it joins the graph
    s->capture = e->capture;
    s->capture->joined.push_back(s);
  }
  join(s->clock, e->clock);
  return cudaSuccess;
}
cudaError_t cudaStreamGetPriority(cudaStream_t s, int* p) {
  *p = stream_of(s)->priority;
  return cudaSuccess;
}
cudaError_t cudaEventCreateWithFlags(cudaEvent_t* e, unsigned) {
  *e = reinterpret_cast<cudaEvent_t>(new Event);
  return cudaSuccess;
}
cudaError_t cudaEventCreate(cudaEvent_t* e) { return cudaEventCreateWithFlags(e, 0); }
cudaError_t cudaEventDestroy(cudaEvent_t e) {
  delete reinterpret_cast<Event*>(e);
  return cudaSuccess;
}
cudaError_t cudaEventRecordWithFlags(cudaEvent_t event, cudaStream_t handle, unsigned) {
  LOCKED;
  Stream* const s = stream_of(handle);
  auto* const e = reinterpret_cast<Event*>(event);
  e->capture = s->capture;
  e->clock = s->clock;
  e->when = std::chrono::steady_clock::now();
  return cudaSuccess;
}
cudaError_t cudaEventRecord(cudaEvent_t e, cudaStream_t s) {
  return cudaEventRecordWithFlags(e, s, 0);
}
cudaError_t cudaEventQuery(cudaEvent_t event) {
  LOCKED;
  const auto* const e = reinterpret_cast<const Event*>(event);
  if (e->capture) return refuse(cudaErrorCapturedEvent, "an event of a capture is asked for");
  join(host_clock, e->clock);
  return cudaSuccess;
}
cudaError_t cudaEventSynchronize(cudaEvent_t event) {
  const auto* const e = reinterpret_cast<const Event*>(event);
  return wait("cudaEventSynchronize", e->clock, e->capture);
}
cudaError_t cudaEventElapsedTime(float* t, cudaEvent_t begin, cudaEvent_t end) {
  const auto between =
      reinterpret_cast<const Event*>(end)->when - reinterpret_cast<const Event*>(begin)->when;
  *t = std::chrono::duration<float, std::milli>(between).count();
  return cudaSuccess;
}
cudaError_t cudaLaunchHostFunc(cudaStream_t s, cudaHostFn_t f, void* u) {
  return put(s, [=] { f(u); });
}
cudaError_t cudaStreamAddCallback(cudaStream_t s, cudaStreamCallback_t f, void* u, unsigned) {
  f(s, cudaSuccess, u);
  return cudaSuccess;
}

// --- graphs ---

cudaError_t cudaStreamBeginCapture(cudaStream_t handle, cudaStreamCaptureMode mode) {
  LOCKED;
  static unsigned long long count = 0;
  if (reinterpret_cast<std::uintptr_t>(handle) < 16) {
    return refuse(cudaErrorStreamCaptureUnsupported, "the default stream cannot be captured");
  }
  Stream* const s = stream_of(handle);
  if (s->capture) return refuse(cudaErrorIllegalState, "the stream is captured already");
  s->capture = std::make_shared<Capture>();
  s->capture->id = ++count;
  s->capture->global = mode == cudaStreamCaptureModeGlobal;
  captures.push_back(s->capture);
  standin_captures = static_cast<int>(captures.size());
  return cudaSuccess;
}
cudaError_t cudaStreamEndCapture(cudaStream_t handle, cudaGraph_t* g) {
  LOCKED;
  *g = nullptr;
  Stream* const s = stream_of(handle);
  const std::shared_ptr<Capture> capture = s->capture;
  if (!capture) return refuse(cudaErrorIllegalState, "the stream is not captured");
  s->capture = nullptr;
  capture->ended = true;
  for (std::size_t i = captures.size(); i-- > 0;) {
    if (captures[i].expired() || captures[i].lock() == capture) {
      captures.erase(captures.begin() + static_cast<std::ptrdiff_t>(i));
    }
  }
  standin_captures = static_cast<int>(captures.size());
  for (Stream* const other : capture->joined) other->capture = nullptr;
  if (capture->broken) {
    return refuse(cudaErrorStreamCaptureInvalidated,
                  "operation failed due to a previous error during capture");
  }
  *g = reinterpret_cast<cudaGraph_t>(new std::shared_ptr<Graph>(capture->graph));
  return cudaSuccess;
}
cudaError_t cudaStreamIsCapturing(cudaStream_t s, cudaStreamCaptureStatus* c) {
  LOCKED;
  const auto& capture = stream_of(s)->capture;
  *c = !capture          ? cudaStreamCaptureStatusNone
       : capture->broken ? cudaStreamCaptureStatusInvalidated
                         : cudaStreamCaptureStatusActive;
  return cudaSuccess;
}
cudaError_t cudaStreamGetCaptureInfo(cudaStream_t s, cudaStreamCaptureStatus* c,
                                     unsigned long long* id, cudaGraph_t*, const cudaGraphNode_t**,
                                     const cudaGraphEdgeData**, std::size_t*) {
  LOCKED;
  const auto& capture = stream_of(s)->capture;
  if (id != nullptr) *id = capture ? capture->id : 0;
  return cudaStreamIsCapturing(s, c);
}
cudaError_t cudaThreadExchangeStreamCaptureMode(cudaStreamCaptureMode* mode) {
  std::swap(capture_mode, *mode);
  return cudaSuccess;
}
cudaError_t cudaGraphInstantiateWithFlags(cudaGraphExec_t* e, cudaGraph_t g, unsigned long long) {
  *e = reinterpret_cast<cudaGraphExec_t>(
      new std::shared_ptr<Graph>(*reinterpret_cast<std::shared_ptr<Graph>*>(g)));
  return cudaSuccess;
}
cudaError_t cudaGraphLaunch(cudaGraphExec_t e, cudaStream_t handle) {
  const std::shared_ptr<Graph> graph = *reinterpret_cast<std::shared_ptr<Graph>*>(e);
  {
    LOCKED;
    advance(stream_of(handle));
  }
  for (const auto& node : graph->nodes) {
    if (const int error = node->work(node->context)) return answer(static_cast<cudaError_t>(error));
  }
  return cudaSuccess;
}
cudaError_t cudaGraphDestroy(cudaGraph_t g) {
  delete reinterpret_cast<std::shared_ptr<Graph>*>(g);
  return cudaSuccess;
}
cudaError_t cudaGraphExecDestroy(cudaGraphExec_t e) {
  delete reinterpret_cast<std::shared_ptr<Graph>*>(e);
  return cudaSuccess;
}
cudaError_t cudaGraphGetNodes(cudaGraph_t g, cudaGraphNode_t*, std::size_t* n) {
  *n = (*reinterpret_cast<std::shared_ptr<Graph>*>(g))->nodes.size();
  return cudaSuccess;
}
cudaError_t cudaGraphDebugDotPrint(cudaGraph_t, const char*, unsigned) { return cudaSuccess; }
cudaError_t cudaGraphNodeGetDependencies(cudaGraphNode_t, cudaGraphNode_t*, cudaGraphEdgeData*,
                                         std::size_t* n) {
  *n = 0;
  return cudaSuccess;
}

// --- errors ---

const char* cudaGetErrorName(cudaError_t error) {
  switch (error) {
    case cudaSuccess:
      return "cudaSuccess";
    case cudaErrorCooperativeLaunchTooLarge:
      return "cudaErrorCooperativeLaunchTooLarge";
    case cudaErrorStreamCaptureUnsupported:
      return "cudaErrorStreamCaptureUnsupported";
    default:
      return "cudaError";
  }
}
const char* cudaGetErrorString(cudaError_t error) {
  static thread_local std::string words;
  words = "error " + std::to_string(static_cast<int>(error)) + " of the stand-in device";
  if (!explanation.empty()) words += ": " + explanation;
  return words.c_str();
}
cudaError_t cudaGetLastError() { return std::exchange(last_error, cudaSuccess); }
cudaError_t cudaPeekAtLastError() { return last_error; }
}
