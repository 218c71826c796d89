// CUDA kernels of antialiased resizing. Contract: resize.h.
//
// A launch for each pass, a thread for each element. Neighboring threads take neighbors in
// memory: along the columns each tap is whole lines; along the rows the taps overlap in the cache.
#include "augment/augment_math.h"
#include "augment/launch.cuh"
#include "augment/resize.h"

namespace fusereg::augment {
namespace {

constexpr const char* kOp = "fusereg.resize";

// scratch: as x, with y's height. Index has 32 bits where the elements can be counted with them:
// divisions of 64-bit numbers cost more than the taps.
template <class T, class Index>
__global__ void __launch_bounds__(kThreads)
    resize_columns_kernel(FUSEREG_GRID_CONSTANT(ResizeJob, job)) {
  using C = Number<T>;
  const Images& x = job.x;
  const std::int64_t run = x.channels_last ? x.w * job.c : x.w;
  const std::int64_t planes = x.channels_last ? job.n : job.n * job.c;
  const std::int64_t count = planes * job.y.h * run;
  const std::int64_t stride = static_cast<std::int64_t>(gridDim.x) * kThreads;
  for (std::int64_t i = static_cast<std::int64_t>(blockIdx.x) * kThreads + threadIdx.x; i < count;
       i += stride) {
    const Index line = static_cast<Index>(i) / static_cast<Index>(run);
    const Index plane = line / static_cast<Index>(job.y.h);
    const std::int64_t row = line - plane * static_cast<Index>(job.y.h);
    const std::int64_t in_line = static_cast<Index>(i) - line * static_cast<Index>(run);
    const C* const weights = static_cast<const C*>(job.rows.weights) + row * job.rows.taps;
    const T* p = static_cast<const T*>(x.data) +
                 (static_cast<std::int64_t>(plane) * x.h + first_tap(job.rows, row, x.h)) * run +
                 in_line;
    C sum{0};
    for (std::int64_t k = 0; k < job.rows.taps; ++k, p += run) {
      if (weights[k] != C{0}) sum = add(sum, multiply(read(p), weights[k]));
    }
    static_cast<C*>(job.scratch)[i] = sum;
  }
}

template <class C, class Index>
__global__ void __launch_bounds__(kThreads)
    resize_rows_kernel(FUSEREG_GRID_CONSTANT(ResizeJob, job)) {
  const Images& x = job.x;
  const Images& y = job.y;
  const auto c = static_cast<Index>(job.c);
  const Index run = static_cast<Index>(y.channels_last ? y.w * job.c : y.w);
  const std::int64_t count = job.n * y.sample;
  const std::int64_t step = x.channels_last ? job.c : 1;
  const std::int64_t stride = static_cast<std::int64_t>(gridDim.x) * kThreads;
  for (std::int64_t i = static_cast<std::int64_t>(blockIdx.x) * kThreads + threadIdx.x; i < count;
       i += stride) {
    const Index line = static_cast<Index>(i) / run;
    const Index in_line = static_cast<Index>(i) - line * run;
    const Index plane = line / static_cast<Index>(y.h);
    const std::int64_t row = line - plane * static_cast<Index>(y.h);
    const Index outer = y.channels_last ? in_line : plane;
    const Index others = outer / c;
    const std::int64_t channel = outer - others * c;
    const std::int64_t sample = y.channels_last ? plane : others;
    const std::int64_t column = y.channels_last ? others : in_line;
    const C* const weights = static_cast<const C*>(job.columns.weights) + column * job.columns.taps;
    const std::int64_t from = first_tap(job.columns, column, x.w);
    const C* p = static_cast<const C*>(job.scratch) +
                 (x.channels_last ? ((sample * y.h + row) * x.w + from) * job.c + channel
                                  : ((sample * job.c + channel) * y.h + row) * x.w + from);
    C sum{0};
    for (std::int64_t k = 0; k < job.columns.taps; ++k, p += step) {
      if (weights[k] != C{0}) sum = add(sum, multiply(*p, weights[k]));
    }
    write(
        y.data, y.type, i,
        add(multiply(sum, static_cast<C>(job.scale[channel])), static_cast<C>(job.shift[channel])));
  }
}

}  // namespace

void run_cuda(const ResizeJob& job, int device, void* stream) {
  const cuda::DeviceGuard guard(device);
  dispatch_element(job.x.type, [&](auto tag) {
    using T = typename decltype(tag)::type;
    const std::int64_t between = job.n * job.c * job.y.h * job.x.w;
    const std::int64_t results = job.n * job.y.sample;
    auto pass = [&](std::int64_t count, auto small, auto large) {
      const bool is_small = count <= UINT32_MAX;
      cuda::launch(kOp, is_small ? small : large, config_for(count, device, stream), job);
    };
    pass(between, &resize_columns_kernel<T, std::uint32_t>,
         &resize_columns_kernel<T, std::int64_t>);
    pass(results, &resize_rows_kernel<Number<T>, std::uint32_t>,
         &resize_rows_kernel<Number<T>, std::int64_t>);
  });
}

}  // namespace fusereg::augment
