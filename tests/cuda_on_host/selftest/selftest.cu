// What the shim must get right, one sub-command each, as for the faults in planted_faults.cu:
//   selftest COMMAND [forward|reverse|random[:seed]]
// Exit status 0: right. 1 and "MISMATCH": a wrong result. 2 and "FAULT": an error was thrown. A
// sanitizer's report ends the process by itself. Both files compile with nvcc too, so that the
// shim's dialect stays CUDA's; what they then run is host memory, so it is not run on a device.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <exception>
#include <memory>
#include <string>
#include <vector>

#include "core/cuda_info.h"
#include "selftest.h"

namespace selftest {
namespace {

template <class T>
__global__ void block_sum_kernel(T* out, const T* in, int n) {
  T v[2] = {T(0), T(1)};
  for (int i = static_cast<int>(threadIdx.x); i < n; i += static_cast<int>(blockDim.x))
    v[0] += in[i];
  for (int round = 0; round < 3; ++round) {  // again at once: the scratch must be free again
    T w[2] = {v[0], v[1]};
    fc::block_sum(w);
    out[(round * blockDim.x + threadIdx.x) * 2] = w[0];
    out[(round * blockDim.x + threadIdx.x) * 2 + 1] = w[1];
  }
}

template <class T>
void block_sum_of() {
  constexpr int kN = 1000;
  std::vector<T> in(kN);
  for (int i = 0; i < kN; ++i) in[static_cast<std::size_t>(i)] = static_cast<T>(i % 17 - 3);
  T want = 0;
  for (const T v : in) want += v;
  for (const unsigned threads : {32u, 96u, 256u, 1024u}) {
    std::vector<T> out(3 * 2 * threads);
    fc::launch("block_sum", block_sum_kernel<T>, config(1, threads), out.data(), in.data(), kN);
    for (std::size_t i = 0; i < out.size(); i += 2) {
      expect(out[i] == want && out[i + 1] == static_cast<T>(threads), "block_sum");
    }
  }
}

void block_reduction() {
  block_sum_of<float>();
  block_sum_of<double>();
  block_sum_of<int>();
}

__global__ void extremes_kernel(float* out, const float* in) {
  const float v = in[threadIdx.x];
  const float largest = fc::block_reduce(v, fc::Max{}, -INFINITY);
  const float smallest = fc::block_reduce(v, fc::Min{}, INFINITY);
  if (threadIdx.x == 0) {
    out[0] = largest;
    out[1] = smallest;
  }
}

void extremes() {
  std::vector<float> in(64), out(2);
  for (int i = 0; i < 64; ++i)
    in[static_cast<std::size_t>(i)] = static_cast<float>((i * 37) % 64 - 20);
  fc::launch("extremes", extremes_kernel, config(1, 64), out.data(), in.data());
  expect(out[0] == 43.0f && out[1] == -20.0f, "max and min");
  for (const std::size_t at : {0u, 31u, 32u, 63u}) {
    std::vector<float> with_nan = in;
    with_nan[at] = NAN;
    fc::launch("extremes", extremes_kernel, config(1, 64), out.data(), with_nan.data());
    expect(std::isnan(out[0]) && std::isnan(out[1]), "NaN is kept");
  }
}

__global__ void shuffle_kernel(int* out) {
  const int lane = static_cast<int>(threadIdx.x % 32);
  int* mine = out + threadIdx.x * 8;
  mine[0] = __shfl_sync(fc::kFullMask, lane, 5);
  mine[1] = __shfl_sync(fc::kFullMask, lane, 3, 8);
  mine[2] = __shfl_up_sync(fc::kFullMask, lane, 2);
  mine[3] = __shfl_up_sync(fc::kFullMask, lane, 1, 4);
  mine[4] = __shfl_down_sync(fc::kFullMask, lane, 3);
  mine[5] = __shfl_down_sync(fc::kFullMask, lane, 3, 16);
  mine[6] = __shfl_xor_sync(fc::kFullMask, lane, 9);
  mine[7] = static_cast<int>(__shfl_xor_sync(fc::kFullMask, lane + 0.5, 1) * 2);
}

void shuffles() {
  std::vector<int> out(64 * 8), want;
  fc::launch("shuffles", shuffle_kernel, config(1, 64), out.data());
  for (int t = 0; t < 64; ++t) {
    const int l = t % 32;
    for (const int v :
         {5, l / 8 * 8 + 3, l < 2 ? l : l - 2, l % 4 == 0 ? l : l - 1, l + 3 > 31 ? l : l + 3,
          l % 16 + 3 > 15 ? l : l + 3, l ^ 9, (l ^ 1) * 2 + 1}) {
      want.push_back(v);
    }
  }
  expect_equal(out, want, "shuffles");
}

__global__ void ballot_kernel(unsigned* out, int limit) {
  const int t = static_cast<int>(threadIdx.x);
  const unsigned votes = __ballot_sync(fc::kFullMask, t < limit);
  const int any = __any_sync(fc::kFullMask, t == limit);
  const int all = __all_sync(fc::kFullMask, t < limit);
  out[t * 4] = votes;
  out[t * 4 + 1] = static_cast<unsigned>(any);
  out[t * 4 + 2] = static_cast<unsigned>(all);
  out[t * 4 + 3] = static_cast<unsigned>(__syncthreads_count(t < limit)) * 4u +
                   (__syncthreads_and(t < limit) ? 2u : 0u) +
                   (__syncthreads_or(t < limit) ? 1u : 0u);
}

void ballots() {
  std::vector<unsigned> out(96 * 4), want;
  fc::launch("ballots", ballot_kernel, config(1, 96), out.data(), 40);
  for (unsigned t = 0; t < 96; ++t) {
    const unsigned warp = t / 32;
    want.push_back(warp == 0 ? 0xffffffffu : warp == 1 ? 0xffu : 0u);
    want.push_back(warp == 1);
    want.push_back(warp == 0);
    want.push_back(40 * 4 + 1);
  }
  expect_equal(out, want, "ballots");
}

// A part of a warp may work by itself, with a mask of its own, while the rest waits further on.
__global__ void half_warp_kernel(int* out) {
  int v = static_cast<int>(threadIdx.x);
  if (threadIdx.x % 32 < 16) {
    for (int offset = 8; offset > 0; offset /= 2) v += __shfl_xor_sync(0x0000ffffu, v, offset);
  }
  __syncwarp();
  out[threadIdx.x] = __shfl_sync(fc::kFullMask, v, 0);
}

void half_warp() {
  std::vector<int> out(64), want;
  fc::launch("half_warp", half_warp_kernel, config(1, 64), out.data());
  for (int t = 0; t < 64; ++t) want.push_back(t < 32 ? 120 : 120 + 16 * 32);
  expect_equal(out, want, "half warp");
}

__global__ void atomics_kernel(int* histogram, unsigned* words, float* sum, const int* in, int n) {
  FUSEREG_SHARED(bins, int[8]);
  if (threadIdx.x < 8) bins[threadIdx.x] = 0;
  __syncthreads();
  const int i = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x);
  if (i < n) atomicAdd(&bins[in[i] % 8], 1);
  __syncthreads();
  if (threadIdx.x < 8) atomicAdd(&histogram[threadIdx.x], bins[threadIdx.x]);
  if (i < n) {
    atomicInc(&words[0], 6);  // 0..6 and around
    atomicMax(&words[1], static_cast<unsigned>(in[i]));
    atomicOr(&words[2], 1u << (in[i] % 32));
    unsigned seen = words[3], expected;
    do {  // a product by compare-and-swap
      expected = seen;
      seen = atomicCAS(&words[3], expected, expected * 3u);
    } while (seen != expected);
    atomicAdd(sum, 0.5f);
  }
}

void atomics() {
  constexpr int kN = 500;
  const std::vector<int> in = counting(kN);
  std::vector<int> histogram(8), want(8);
  std::vector<unsigned> words = {0, 0, 0, 1};
  float sum = 0;
  fc::launch("atomics", atomics_kernel, config(4, 128), histogram.data(), words.data(), &sum,
             in.data(), kN);
  unsigned product = 1;
  for (const int v : in) {
    ++want[static_cast<std::size_t>(v % 8)];
    product *= 3u;
  }
  expect_equal(histogram, want, "histogram");
  expect_equal(words, {kN % 7u, kN - 1u, 0xffffffffu, product}, "atomics");
  expect(sum == kN / 2.0f, "atomicAdd of float");
}

// Right when `kBarrier`, and otherwise the most plain of missing barriers.
template <bool kBarrier>
__global__ void reverse_kernel(int* data) {
  int* shared = fc::dynamic_shared<int>();
  const unsigned t = threadIdx.x;
  int* mine = data + blockIdx.x * blockDim.x;
  shared[t] = mine[t];
  if (kBarrier) __syncthreads();
  mine[t] = shared[blockDim.x - 1 - t];
}

template <bool kBarrier>
void reverse_blocks() {
  std::vector<int> data = counting(4 * 64), want;
  for (int b = 0; b < 4; ++b) {
    for (int t = 63; t >= 0; --t) want.push_back(b * 64 + t);
  }
  fc::launch("reverse", reverse_kernel<kBarrier>, config(4, 64, 64 * sizeof(int)), data.data());
  expect_equal(data, want, "reverse");
}

// The second barrier keeps a fast warp from writing the next round's value over one that a slow
// warp has yet to read. A missing one gives right results whenever the warps happen to go in step.
template <bool kBarrier>
__global__ void rounds_kernel(int* out, int rounds) {
  FUSEREG_SHARED(value, int);
  int sum = 0;
  for (int round = 0; round < rounds; ++round) {
    if (threadIdx.x == 0) value = round;
    __syncthreads();
    sum += value;
    if (kBarrier) __syncthreads();
  }
  out[threadIdx.x] = sum;
}

template <bool kBarrier>
void rounds() {
  std::vector<int> out(96);
  fc::launch("rounds", rounds_kernel<kBarrier>, config(1, 96), out.data(), 10);
  expect_equal(out, std::vector<int>(96, 45), "rounds");
}

// Lanes exchange through shared memory with no __syncwarp: right only on hardware in lockstep.
template <bool kBarrier>
__global__ void lockstep_kernel(int* out) {
  FUSEREG_SHARED(tile, int[32]);
  tile[threadIdx.x] = static_cast<int>(threadIdx.x);
  if (kBarrier) __syncwarp();
  out[threadIdx.x] = tile[threadIdx.x ^ 1u];
}

template <bool kBarrier>
void lockstep() {
  std::vector<int> out(32), want;
  for (int t = 0; t < 32; ++t) want.push_back(t ^ 1);
  fc::launch("lockstep", lockstep_kernel<kBarrier>, config(1, 32), out.data());
  expect_equal(out, want, "lockstep");
}

// Blocks finish in any order: with kRight false, the block of the highest index takes itself for
// the last.
template <bool kRight>
__global__ void two_stage_kernel(double* out, double* partial, unsigned* counter, const float* in,
                                 int n) {
  double v = 0;
  for (int i = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x); i < n;
       i += static_cast<int>(gridDim.x * blockDim.x)) {
    v += in[i];
  }
  v = fc::block_sum(v);
  if (threadIdx.x == 0) partial[blockIdx.x] = v;
  const bool last = kRight ? fc::is_last_block(counter) : blockIdx.x == gridDim.x - 1;
  if (!last) return;
  double total = 0;
  for (unsigned i = threadIdx.x; i < gridDim.x; i += blockDim.x) total += partial[i];
  total = fc::block_sum(total);
  if (threadIdx.x == 0) *out = total;
}

template <bool kRight>
void two_stages() {
  constexpr int kN = 3001;
  std::vector<float> in(kN);
  double want = 0;
  for (int i = 0; i < kN; ++i) want += in[static_cast<std::size_t>(i)] = static_cast<float>(i % 7);
  unsigned counter = 0;
  for (const unsigned blocks : {1u, 7u, 12u}) {
    double out = -1;
    std::vector<double> partial(blocks, NAN);
    fc::launch("two_stages", two_stage_kernel<kRight>, config(blocks, 64), &out, partial.data(),
               &counter, in.data(), kN);
    expect(out == want && counter == 0, "sum over blocks");
  }
}

}  // namespace

__global__ void ring_kernel(int* data, unsigned* state, int rounds) {
  for (int round = 0; round < rounds; ++round) {
    const int neighbor = data[(blockIdx.x + 1) % gridDim.x];
    fc::grid_sync(state);
    if (threadIdx.x == 0) data[blockIdx.x] = neighbor;
    fc::grid_sync(state);
  }
}

namespace {

void cooperative_ring() {
  unsigned state = 0;
  for (const unsigned blocks : {1u, 2u, 5u, 9u}) {  // one state for grids of several sizes
    std::vector<int> data = counting(blocks), want;
    LaunchConfig c = config(blocks, 64);
    c.cooperative = true;
    fc::launch("ring", ring_kernel, c, data.data(), &state, 3);
    for (unsigned b = 0; b < blocks; ++b) want.push_back(static_cast<int>((b + 3) % blocks));
    expect_equal(data, want, "ring of " + std::to_string(blocks));
    expect((state & 0x7fffffffu) == 0, "the barrier's state");
  }
}

}  // namespace

__global__ void cluster_kernel(int* out, int width) {
  FUSEREG_SHARED(scratch, int[64]);
  int* memory = fc::dynamic_shared<int>();
  const unsigned rank = fc::cluster_rank();
  memory[threadIdx.x] = static_cast<int>(blockIdx.x * 100 + threadIdx.x);
  scratch[threadIdx.x] = -1;
  fc::cluster_sync();
  const unsigned peer = (rank + 1) % static_cast<unsigned>(width);
  const int theirs = fc::cluster_map(memory, peer)[threadIdx.x];
  fc::cluster_map(scratch, peer)[threadIdx.x] = theirs;
  fc::cluster_sync();
  out[(blockIdx.x * blockDim.x + threadIdx.x) * 2] = theirs;
  out[(blockIdx.x * blockDim.x + threadIdx.x) * 2 + 1] = scratch[threadIdx.x];
}

namespace {

void clusters() {
  std::vector<int> out(12 * 64 * 2), want;
  LaunchConfig c = config(12, 64, 64 * sizeof(int));
  c.cluster = dim3(4);
  fc::launch("clusters", cluster_kernel, c, out.data(), 4);
  for (int b = 0; b < 12; ++b) {
    for (int t = 0; t < 64; ++t) {
      want.push_back((b / 4 * 4 + (b + 1) % 4) * 100 + t);
      want.push_back(b * 100 + t);  // what the left neighbor read here, it wrote here
    }
  }
  expect_equal(out, want, "clusters");
}

__global__ void early_exit_kernel(int* out, int n) {
  FUSEREG_SHARED(tile, int[64]);
  if (static_cast<int>(threadIdx.x) >= n) return;  // those that left are not waited for
  tile[threadIdx.x] = static_cast<int>(threadIdx.x);
  __syncthreads();
  out[threadIdx.x] = tile[static_cast<unsigned>(n) - 1 - threadIdx.x];
}

void early_exit() {
  std::vector<int> out(40), want = counting(40);
  std::reverse(want.begin(), want.end());
  fc::launch("early_exit", early_exit_kernel, config(1, 64), out.data(), 40);
  expect_equal(out, want, "early exit");
}

__global__ void coordinates_kernel(unsigned* out) {
  const unsigned at = fc::block_rank() * fc::block_threads() + fc::thread_rank();
  __syncthreads();
  out[at] = ((blockIdx.z * 10 + blockIdx.y) * 10 + blockIdx.x) * 1000 +
            (threadIdx.z * 10 + threadIdx.y) * 10 + threadIdx.x;
}

void coordinates() {
  LaunchConfig c;
  c.grid = dim3(3, 2, 2);
  c.block = dim3(4, 2, 5);
  std::vector<unsigned> out(12 * 40), want;
  fc::launch("coordinates", coordinates_kernel, c, out.data());
  for (unsigned b = 0; b < 12; ++b) {
    for (unsigned t = 0; t < 40; ++t) {
      want.push_back((b / 6 * 100 + b / 3 % 2 * 10 + b % 3) * 1000 + t / 8 * 100 + t / 4 % 2 * 10 +
                     t % 4);
    }
  }
  expect_equal(out, want, "coordinates");
}

__global__ void large_kernel(float* out, FUSEREG_GRID_CONSTANT(Large, large), int stride,
                             float scale) {
  out[threadIdx.x] = large.values[static_cast<int>(threadIdx.x) * stride] * scale;
}

void large_arguments() {
  auto large = std::make_unique<Large>();
  for (std::size_t i = 0; i < sizeof(Large) / sizeof(float); ++i) {
    large->values[i] = static_cast<float>(i);
  }
  std::vector<float> out(32), want;
  fc::launch("large", large_kernel, config(1, 32), out.data(), *large, 100, 2);  // 2 becomes 2.0f
  for (int i = 0; i < 32; ++i) want.push_back(static_cast<float>(i * 200));
  expect_equal(out, want, "large arguments");
}

template <int N>
__global__ void vector_kernel(float* out, const float* in, int n) {
  const int i = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x) * N;
  if (i + N > n) return;
  fc::Vec<float, N> v = fc::load_streaming<N>(in + i);
  const fc::Vec<float, N> w = fc::load<N>(in + i);
  for (int k = 0; k < N; ++k) v[k] = v[k] + w[k];
  fc::store(out + i, v);
  fc::store_streaming(out + i, v);
}

template <int N>
void vectors_of(std::size_t offset) {
  std::vector<float> in(64 + 4), out(64 + 4);
  for (std::size_t i = 0; i < in.size(); ++i) in[i] = static_cast<float>(i);
  const float* from = in.data() + offset;
  expect(fc::is_aligned(from, N * sizeof(float)) == (offset % N == 0), "is_aligned");
  fc::launch("vectors", vector_kernel<N>, config(2, 32 / N), out.data() + offset, from, 64);
  for (std::size_t i = 0; i < 64; ++i) {
    expect(out[offset + i] == 2.0f * in[offset + i], "vectors");
  }
}

void vectors() {
  vectors_of<1>(1);
  vectors_of<2>(0);
  vectors_of<4>(0);
  static_assert(fc::kVecSize<float> == 4 && fc::kVecSize<double> == 2, "16 bytes");
  static_assert(sizeof(fc::Vec<unsigned short, 8>) == 16 && alignof(fc::Vec<char, 8>) == 8, "Vec");
}

void nothing() {
  int* const none = nullptr;
  fc::launch("nothing", reverse_kernel<true>, config(0, 64), none);
}

#if defined(FUSEREG_CUDA_ON_HOST)
namespace host = fusereg::cuda_on_host;

__global__ void ticket_kernel(unsigned* tickets, unsigned* next) {
  tickets[blockIdx.x * blockDim.x + threadIdx.x] = atomicAdd(next, 1u);
}

std::vector<unsigned> tickets(const std::string& schedule) {
  host::set_schedule(host::parse_schedule(schedule));
  std::vector<unsigned> out(8 * 4);
  unsigned next = 0;
  fc::launch("tickets", ticket_kernel, config(8, 4), out.data(), &next);
  return out;
}

void orders() {
  std::vector<unsigned> upwards(32), downwards(32);
  for (unsigned i = 0; i < 32; ++i) {
    upwards[i] = i;
    downwards[i] = 31 - i;
  }
  expect_equal(tickets("forward"), upwards, "forward");
  expect_equal(tickets("reverse"), downwards, "reverse");
  std::vector<unsigned> random = tickets("random:1");
  expect(random != upwards && random != downwards && random != tickets("random:2"), "random");
  std::sort(random.begin(), random.end());
  expect_equal(random, upwards, "every thread once");
}

void devices() {
  const fc::DeviceReport report = fc::device_info();
  expect(report.devices.size() == 2 && report.error.empty() && report.driver_version == 13000 &&
             report.runtime_version == 13000 && report.devices[1].index == 1 &&
             report.devices[0].sm_count == 4 && report.devices[0].total_memory > 0,
         "device_info");
  expect(fc::current_device() == 0, "device 0 first");
  {
    const fc::DeviceGuard guard(1);
    expect(fc::current_device() == 1, "guard");
    const fc::DeviceGuard again(1);
  }
  expect(fc::current_device() == 0, "guard restores");
  expect(fc::device_properties(1).major == 9 && fc::device_properties(1).sm_count == 4,
         "properties");
  expect(fc::max_resident_blocks("resident", ring_kernel, 1024) == 8, "resident by threads");
  expect(fc::max_resident_blocks("resident", ring_kernel, 64, 100 * 1024) == 8, "by shared memory");
  host::device().count = 0;
  const fc::DeviceReport none = fc::device_info();
  expect(none.devices.empty() && none.error.find("cudaErrorNoDevice") == 0,
         "no device is an answer");
}

void counts_launches() {
  const std::uint64_t before = host::launch_count();
  nothing();
  expect(host::launch_count() == before, "an empty grid is no launch");
  early_exit();
  early_exit();
  expect(host::launch_count() == before + 2, "two launches");
}

__global__ void idle_kernel(int* out) {
  if (threadIdx.x == 0) ++*out;
}

// What does not change is asked once of a kernel; a launch that needs less shared memory takes none away.
void asks_once() {
  int runs = 0;
  const std::uint64_t before = host::question_count();
  for (const int kilobytes : {100, 60, 100, 20}) {
    auto c = config(1, 32);
    c.shared_bytes = static_cast<std::size_t>(kilobytes) * 1024;
    fc::launch("asks", idle_kernel, c, &runs);
  }
  expect(runs == 4 && host::question_count() == before + 1, "one attribute, for the most");
  for (int i = 0; i < 3; ++i) {
    expect(fc::max_resident_blocks("asks", idle_kernel, 64, 100 * 1024) == 8, "two an SM");
  }
  expect(host::question_count() == before + 2, "one answer for a size");
  expect(fc::max_resident_blocks("asks", idle_kernel, 1024) == 8, "another size");
  expect(host::question_count() == before + 3, "another answer");
  {
    const fc::DeviceGuard guard(1);
    (void)fc::max_resident_blocks("asks", idle_kernel, 64, 100 * 1024);
    expect(host::question_count() == before + 5, "another device is asked itself");
  }
  std::string refused;
  try {
    auto c = config(1, 32);
    c.shared_bytes = 300 * 1024;
    fc::launch("asks", idle_kernel, c, &runs);
  } catch (const std::runtime_error& error) {
    refused = error.what();
  }
  expect(refused.find("cudaErrorInvalidValue") != std::string::npos, "no device has as much");
}

// After a fault, the next launch works as if nothing had been.
__global__ void stuck_kernel(int* out) {
  if (threadIdx.x < 2) out[threadIdx.x] = __shfl_sync(0x3u, 1, 0);
  if (threadIdx.x >= 2 && threadIdx.x < 40) __syncthreads();
  if (threadIdx.x == 40) __trap();
  __syncthreads();
}

void recovers() {
  std::vector<int> out(64);
  for (int i = 0; i < 3; ++i) {
    bool faulted = false;
    try {
      fc::launch("stuck", stuck_kernel, config(1, 64), out.data());
    } catch (const host::Fault&) {
      faulted = true;
    }
    expect(faulted, "the fault is thrown");
    block_reduction();
    cooperative_ring();
  }
}
#endif

// Right kernels, and those whose result depends on the order since something is missing.
const Commands& commands() {
  static const Commands table = {
      {"block_reduction", block_reduction},
      {"extremes", extremes},
      {"shuffles", shuffles},
      {"ballots", ballots},
      {"half_warp", half_warp},
      {"atomics", atomics},
      {"reverse", reverse_blocks<true>},
      {"rounds", rounds<true>},
      {"lockstep", lockstep<true>},
      {"two_stages", two_stages<true>},
      {"cooperative_ring", cooperative_ring},
      {"clusters", clusters},
      {"early_exit", early_exit},
      {"coordinates", coordinates},
      {"large_arguments", large_arguments},
      {"vectors", vectors},
      {"nothing", nothing},
#if defined(FUSEREG_CUDA_ON_HOST)
      {"orders", orders},
      {"devices", devices},
      {"counts_launches", counts_launches},
      {"asks_once", asks_once},
      {"recovers", recovers},
#endif
      {"missing_barrier", reverse_blocks<false>},
      {"missing_second_barrier", rounds<false>},
      {"missing_syncwarp", lockstep<false>},
      {"highest_block_is_last", two_stages<false>},
  };
  return table;
}

}  // namespace
}  // namespace selftest

int main(int argc, char** argv) {
  const std::string command = argc > 1 ? argv[1] : "";
  const selftest::Commands& faults = selftest::planted_faults();
  auto found = selftest::commands().find(command);
  if (found == selftest::commands().end()) found = faults.find(command);
  if (found == faults.end()) {
    std::fprintf(stderr, "usage: selftest COMMAND [SCHEDULE]\n");
    return 64;
  }
  try {
#if defined(FUSEREG_CUDA_ON_HOST)
    if (argc > 2) selftest::host::set_schedule(selftest::host::parse_schedule(argv[2]));
#endif
    found->second();
  } catch (const selftest::Mismatch& m) {
    std::printf("MISMATCH: %s\n", m.what.c_str());
    return 1;
  } catch (const std::exception& e) {
    std::printf("FAULT: %s\n", e.what());
    return 2;
  }
  std::printf("RIGHT\n");
  return 0;
}
