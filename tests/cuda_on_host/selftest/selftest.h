// What the self-test's sources share: how they say that a result is wrong, and the kernels that
// more than one of them launches.
#pragma once

#include <cstddef>
#include <functional>
#include <map>
#include <string>
#include <vector>

#include "core/cuda.cuh"

namespace selftest {

namespace fc = fusereg::cuda;
using fc::LaunchConfig;

struct Mismatch {
  std::string what;
};

inline void expect(bool right, const std::string& what) {
  if (!right) throw Mismatch{what};
}

template <class T>
void expect_equal(const std::vector<T>& got, const std::vector<T>& want, const std::string& what) {
  expect(got.size() == want.size(), what + ": size");
  for (std::size_t i = 0; i < got.size(); ++i) {
    expect(got[i] == want[i], what + ": element " + std::to_string(i) + " is " +
                                  std::to_string(got[i]) + ", not " + std::to_string(want[i]));
  }
}

inline LaunchConfig config(unsigned grid, unsigned block, std::size_t shared_bytes = 0) {
  LaunchConfig c;
  c.grid = dim3(grid);
  c.block = dim3(block);
  c.shared_bytes = shared_bytes;
  return c;
}

inline std::vector<int> counting(std::size_t n, int first = 0) {
  std::vector<int> v(n);
  for (std::size_t i = 0; i < n; ++i) v[i] = first + static_cast<int>(i);
  return v;
}

struct Large {
  float values[fc::kMaxKernelParamBytes / sizeof(float)];
};

// Both are in selftest.cu, where they are launched as they should be.
__global__ void ring_kernel(int* data, unsigned* state, int rounds);
__global__ void cluster_kernel(int* out, int width);

using Commands = std::map<std::string, std::function<void()>>;
const Commands& planted_faults();

}  // namespace selftest
