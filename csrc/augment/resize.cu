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

// scratch: as x, with y's height.
template <class T>
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
    const std::int64_t row = i / run % job.y.h;
    const C* const weights = static_cast<const C*>(job.rows.weights) + row * job.rows.taps;
    const T* p = static_cast<const T*>(x.data) +
                 (i / run / job.y.h * x.h + first_tap(job.rows, row, x.h)) * run + i % run;
    C sum{0};
    for (std::int64_t k = 0; k < job.rows.taps; ++k, p += run) {
      if (weights[k] != C{0}) sum = add(sum, multiply(read(p), weights[k]));
    }
    static_cast<C*>(job.scratch)[i] = sum;
  }
}

template <class C>
__global__ void __launch_bounds__(kThreads)
    resize_rows_kernel(FUSEREG_GRID_CONSTANT(ResizeJob, job)) {
  const Images& x = job.x;
  const Images& y = job.y;
  const std::int64_t run = y.channels_last ? y.w * job.c : y.w;
  const std::int64_t count = job.n * y.sample;
  const std::int64_t step = x.channels_last ? job.c : 1;
  const std::int64_t stride = static_cast<std::int64_t>(gridDim.x) * kThreads;
  for (std::int64_t i = static_cast<std::int64_t>(blockIdx.x) * kThreads + threadIdx.x; i < count;
       i += stride) {
    const std::int64_t row = i / run % y.h;
    const std::int64_t plane = i / run / y.h;
    const std::int64_t sample = y.channels_last ? plane : plane / job.c;
    const std::int64_t channel = y.channels_last ? i % run % job.c : plane % job.c;
    const std::int64_t column = y.channels_last ? i % run / job.c : i % run;
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
    cuda::launch(kOp, resize_columns_kernel<T>,
                 config_for(job.n * job.c * job.y.h * job.x.w, device, stream), job);
    cuda::launch(kOp, resize_rows_kernel<Number<T>>,
                 config_for(job.n * job.y.sample, device, stream), job);
  });
}

}  // namespace fusereg::augment
