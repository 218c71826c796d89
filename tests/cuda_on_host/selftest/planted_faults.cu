// The faults that the shim must catch, one sub-command of the self-test each. Each line that does
// it says so; the tests look for that line in the report.
#include <cstring>
#include <memory>
#include <vector>

#include "selftest.h"

namespace selftest {
namespace {

__global__ void over_read_kernel(float* out, const float* in, int n) {
  const int i = static_cast<int>(threadIdx.x);
  float v = i <= n ? in[i] : 0.0f;  // PLANTED global_over_read
  v = fc::warp_sum(v);
  if (i == 0) *out = v;
}

void global_over_read() {
  const auto in = std::make_unique<float[]>(20);
  float out = 0;
  fc::launch("over_read", over_read_kernel, config(1, 32), &out, in.get(), 20);
}

template <class T>
__global__ void shared_over_read_kernel(T* out, int shift) {
  FUSEREG_SHARED(tile, T[64]);
  tile[threadIdx.x] = T(1);
  __syncthreads();
  const T* p = tile;
  out[threadIdx.x] = p[static_cast<int>(threadIdx.x) + shift];  // PLANTED shared_over_read
}

void shared_over_read() {
  std::vector<float> out(64);
  fc::launch("shared_over_read", shared_over_read_kernel<float>, config(2, 64), out.data(), 1);
}

__global__ void dynamic_over_write_kernel(float* out) {
  float* memory = fc::dynamic_shared<float>();
  memory[threadIdx.x + 1] = 1.0f;  // PLANTED dynamic_over_write
  __syncthreads();
  out[threadIdx.x] = memory[threadIdx.x];
}

void dynamic_over_write() {
  std::vector<float> out(32);
  fc::launch("dynamic_over_write", dynamic_over_write_kernel, config(1, 32, 32 * sizeof(float)),
             out.data());
}

// Whole vectors up to n rounded up, where n is no multiple of 4.
__global__ void tail_kernel(float* out, const float* in, int n, bool write) {
  const int i = static_cast<int>(threadIdx.x) * 4;
  if (i >= n) return;
  if (write) {
    for (int k = 0; k < 4; ++k) out[i + k] = 0.0f;  // PLANTED tail_write
  } else {
    const fc::Vec<float, 4> v = fc::load<4>(in + i);  // PLANTED tail_read
    out[threadIdx.x] = v[0] + v[1] + v[2] + v[3];
  }
}

void tail(bool write) {
  constexpr int kN = 61;
  void* memory = nullptr;
  cudaMalloc(&memory, kN * sizeof(float));
  auto* p = static_cast<float*>(memory);
  std::memset(p, 0, kN * sizeof(float));
  fc::launch("tail", tail_kernel, config(1, 32), p, p, kN, write);
  cudaFree(memory);
}

__global__ void divergent_kernel(int* out) {
  if (threadIdx.x < 40) {
    __syncthreads();  // PLANTED divergent_barrier
    out[threadIdx.x] = 1;
  } else {
    __syncthreads();
  }
}

void divergent_barrier() {
  std::vector<int> out(64);
  fc::launch("divergent", divergent_kernel, config(2, 64), out.data());
}

// Lane 0 waits for 1, 1 for 2, 2 for 0, and the rest of the block for all of them.
__global__ void deadlock_kernel(int* out) {
  const unsigned t = threadIdx.x;
  if (t < 3) {
    const unsigned next = (t + 1) % 3;
    out[t] = __shfl_sync(1u << t | 1u << next, 1, static_cast<int>(next));  // PLANTED deadlock
  }
  if (t >= 48) return;
  __syncthreads();
}

void deadlock() {
  std::vector<int> out(64);
  fc::launch("deadlock", deadlock_kernel, config(1, 64), out.data());
}

__global__ void dead_lane_kernel(int* out, int n) {
  if (static_cast<int>(threadIdx.x) >= n) return;
  out[threadIdx.x] = __shfl_down_sync(fc::kFullMask, 1, 1);  // PLANTED dead_lane
}

void dead_lane() {
  std::vector<int> out(32);
  fc::launch("dead_lane", dead_lane_kernel, config(1, 32), out.data(), 20);
}

__global__ void sum_kernel(float* out) {
  const float v = fc::warp_sum(1.0f);
  if (threadIdx.x == 0) *out = v;
}

void short_warp() {
  float out = 0;
  fc::launch("short_warp", sum_kernel, config(1, 48), &out);
}

__global__ void unnamed_kernel(int* out, unsigned mask, int source) {
  if (threadIdx.x < 2) out[threadIdx.x] = __shfl_sync(mask, 1, source);  // PLANTED unnamed_lane
}

void unnamed_lane() {
  std::vector<int> out(2);
  fc::launch("unnamed_lane", unnamed_kernel, config(1, 32), out.data(), 0x2u, 1);
}

void unnamed_source() {
  std::vector<int> out(2);
  fc::launch("unnamed_source", unnamed_kernel, config(1, 32), out.data(), 0x3u, 7);
}

// Lane 31 goes round the shuffle and to the barrier.
__global__ void divergent_warp_kernel(int* out) {
  if (threadIdx.x != 31)
    out[threadIdx.x] = __shfl_sync(fc::kFullMask, 1, 0);  // PLANTED divergent_warp
  __syncthreads();
}

void divergent_warp() {
  std::vector<int> out(32);
  fc::launch("divergent_warp", divergent_warp_kernel, config(1, 32), out.data());
}

void cooperative_too_large() {
  std::vector<int> data(100);
  unsigned state = 0;
  LaunchConfig c = config(100, 1024);
  c.cooperative = true;
  fc::launch("too_large", ring_kernel, c, data.data(), &state, 1);
}

// Blocks that wait for each other without a cooperative launch: on a device it hangs if they are
// many.
void not_cooperative() {
  std::vector<int> data(2);
  unsigned state = 0;
  fc::launch("not_cooperative", ring_kernel, config(2, 32), data.data(), &state, 1);
}

__global__ void cluster_exit_kernel(int* out) {
  FUSEREG_SHARED(value, int);
  value = static_cast<int>(fc::cluster_rank());
  fc::cluster_sync();
  // No cluster_sync() after it: the other block may have left.
  out[blockIdx.x] = *fc::cluster_map(&value, fc::cluster_rank() ^ 1u);  // PLANTED cluster_exit
}

void cluster_exit() {
  std::vector<int> out(2);
  LaunchConfig c = config(2, 1);
  c.cluster = dim3(2);
  fc::launch("cluster_exit", cluster_exit_kernel, c, out.data());
}

// Shared memory starts as garbage in each block, also where an earlier block has written it.
__global__ void uninitialized_kernel(int* out) {
  FUSEREG_SHARED(count, int);
  if (blockIdx.x == 0 && threadIdx.x == 0) count = 0;
  __syncthreads();
  if (threadIdx.x == 0) out[blockIdx.x] = count;
}

void uninitialized_shared() {
  std::vector<int> out(2, 7);
  fc::launch("uninitialized", uninitialized_kernel, config(2, 32), out.data());
  expect_equal(out, {0, 0}, "zero");
}

__global__ void stale_kernel(int** kept, int* out) {
  FUSEREG_SHARED(value, int);
  value = 1;
  if (blockIdx.x == 0) *kept = &value;
  out[blockIdx.x] = blockIdx.x == 1 ? **kept : 0;  // PLANTED stale_shared
}

void stale_shared() {
  int* kept = nullptr;
  std::vector<int> out(2);
  fc::launch("stale", stale_kernel, config(2, 1), &kept, out.data());
}

__global__ void index_kernel(int* out, int rows, int columns) {
  const int at = rows * columns;  // PLANTED index_overflow
  if (at > 0) out[0] = at;
}

void index_overflow() {
  int out = 0;
  fc::launch("index", index_kernel, config(1, 1), &out, 1 << 16, 1 << 15);
}

__global__ void parameter_kernel(float* out, FUSEREG_GRID_CONSTANT(Large, large), int at) {
  *out = large.values[at];  // PLANTED parameter_over_read
}

void parameter_over_read() {
  const auto large = std::make_unique<Large>();
  float out = 0;
  fc::launch("parameter", parameter_kernel, config(1, 1), &out, *large,
             static_cast<int>(sizeof(Large) / sizeof(float)));
}

__global__ void misaligned_kernel(float* out, const float* in) { *out = fc::load<4>(in + 1)[0]; }

void misaligned() {
  const auto in = std::make_unique<float[]>(8);
  float out = 0;
  fc::launch("misaligned", misaligned_kernel, config(1, 1), &out, in.get());
}

__global__ void deep_kernel(int* out, int depth) {  // PLANTED stack_overflow
  volatile char frame[256 * 1024];
  frame[depth] = 1;
  *out = frame[depth];
}

void stack_overflow() {
  int out = 0;
  fc::launch("stack", deep_kernel, config(1, 1), &out, 0);
}

void block_too_large() {
  float* const none = nullptr;
  fc::launch("block_too_large", sum_kernel, config(1, 1025), none);
}

void shared_too_large() {
  float* const none = nullptr;
  fc::launch("shared_too_large", sum_kernel, config(1, 32, 1 << 20), none);
}

void cluster_does_not_divide() {
  std::vector<int> out(1);
  LaunchConfig c = config(5, 32);
  c.cluster = dim3(2);
  fc::launch("cluster_does_not_divide", cluster_kernel, c, out.data(), 2);
}

}  // namespace

const Commands& planted_faults() {
  static const Commands table = {
      {"uninitialized_shared", uninitialized_shared},
      {"global_over_read", global_over_read},
      {"shared_over_read", shared_over_read},
      {"dynamic_over_write", dynamic_over_write},
      {"tail_read", [] { tail(false); }},
      {"tail_write", [] { tail(true); }},
      {"stale_shared", stale_shared},
      {"index_overflow", index_overflow},
      {"parameter_over_read", parameter_over_read},
      {"stack_overflow", stack_overflow},
      {"divergent_barrier", divergent_barrier},
      {"deadlock", deadlock},
      {"dead_lane", dead_lane},
      {"short_warp", short_warp},
      {"unnamed_lane", unnamed_lane},
      {"unnamed_source", unnamed_source},
      {"divergent_warp", divergent_warp},
      {"cooperative_too_large", cooperative_too_large},
      {"not_cooperative", not_cooperative},
      {"cluster_exit", cluster_exit},
      {"misaligned", misaligned},
      {"block_too_large", block_too_large},
      {"shared_too_large", shared_too_large},
      {"cluster_does_not_divide", cluster_does_not_divide},
  };
  return table;
}

}  // namespace selftest
