// CUDA kernels of programs. Contract: program.h.
//
// A block for each sample, whose planes stay in the second-level cache between instructions, and
// which waits for all its threads after each. What knows no neighbors moves in 16-byte vectors, tables
// are looked up in shared memory; of what does, a warp takes a row.
#include <new>

#include "augment/launch.cuh"
#include "augment/program_math.h"
#include "core/cuda_device.cuh"

namespace fusereg::augment {
namespace {

constexpr const char* kOp = "fusereg.program";
// More than other kernels of this room: few samples are to keep the device busy.
constexpr int kBlockThreads = 512;
constexpr int kWarps = kBlockThreads / cuda::kWarpSize;

// What the threads of a block share.
struct Shared {
  std::uint32_t counts[256];
  std::uint8_t table[256];
  float weights[2][kMaxTaps];
  double record[kRecord];
  // A warp's Job and what it reads, made there by one thread: as variables they would lie in each
  // thread's local memory.
  alignas(Job) unsigned char job[sizeof(Job)];
  View view;
  float mean;
};

class Block {
 public:
  FUSEREG_DEVICE_INLINE Block(const ProgramJob& job, Shared& shared, std::int64_t sample)
      : job_(job), shared_(shared), plane_(job.x.h * job.x.w), count_(job.x.sample) {
    std::uint8_t* const scratch = job.scratch + sample * program_scratch(job);
    now_ = scratch;
    other_ = scratch + count_;
    floats_ = reinterpret_cast<float*>(scratch + program_planes(job));
  }

  FUSEREG_DEVICE_INLINE void run(std::int64_t sample) {
    const std::uint8_t* const x = static_cast<const std::uint8_t*>(job_.x.data) + sample * count_;
    if (job_.x.channels_last) {
      for_all(plane_, [&](std::int64_t i) {
        for (int c = 0; c < job_.c; ++c) now_[c * plane_ + i] = x[i * job_.c + c];
      });
    } else {
      map(x, now_, count_, [](std::uint8_t v) { return v; });
    }
    const double* row = job_.programs + sample * job_.length * kInstruction;
    for (int k = 0; k < job_.length; ++k, row += kInstruction)
      step(static_cast<Code>(static_cast<int>(row[0])), row + 1);
    std::uint8_t* const y = static_cast<std::uint8_t*>(job_.y.data) + sample * count_;
    if (job_.y.channels_last) {
      for_all(plane_, [&](std::int64_t i) {
        for (int c = 0; c < job_.c; ++c) y[i * job_.c + c] = now_[c * plane_ + i];
      });
    } else {
      map(now_, y, count_, [](std::uint8_t v) { return v; });
    }
  }

 private:
  template <class F>
  FUSEREG_DEVICE_INLINE void for_all(std::int64_t n, const F& f) {
    for (std::int64_t i = threadIdx.x; i < n; i += kBlockThreads) f(i);
    __syncthreads();
  }

  // f(row, column) for all pixels of a plane.
  template <class F>
  FUSEREG_DEVICE_INLINE void for_pixels(const F& f) {
    const auto lane = static_cast<std::int64_t>(cuda::lane_id());
    for (std::int64_t row = cuda::warp_id(); row < job_.x.h; row += kWarps) {
      for (std::int64_t column = lane; column < job_.x.w; column += cuda::kWarpSize) f(row, column);
    }
    __syncthreads();
  }

  // f(place, values from there on) for all of v[n], in vectors if they fit.
  template <class F>
  FUSEREG_DEVICE_INLINE void for_vectors(const std::uint8_t* v, std::int64_t n, bool fit,
                                         const F& f) {
    cuda::for_run<4>(
        v, n, threadIdx.x, kBlockThreads, fit,
        [](const std::uint8_t* from, auto count) {
          return cuda::load<decltype(count)::value>(from);
        },
        f);
    __syncthreads();
  }

  // to[i] = f(from[i]); they may be the same.
  template <class F>
  FUSEREG_DEVICE_INLINE void map(const std::uint8_t* from, std::uint8_t* to, std::int64_t n,
                                 const F& f) {
    const bool fit =
        (reinterpret_cast<std::uintptr_t>(from) - reinterpret_cast<std::uintptr_t>(to)) % 16 == 0;
    for_vectors(from, n, fit, [&](const std::uint8_t* at, auto v) {
      FUSEREG_UNROLL
      for (int e = 0; e < v.kSize; ++e) v[e] = f(v[e]);
      cuda::store(to + (at - from), v);
    });
  }

  FUSEREG_DEVICE_INLINE void look_up(std::uint8_t* v, std::int64_t n) {
    map(v, v, n, [&](std::uint8_t i) { return shared_.table[i]; });
  }

  FUSEREG_DEVICE_INLINE void swap() {
    std::uint8_t* const before = now_;
    now_ = other_;
    other_ = before;
  }

  FUSEREG_DEVICE_INLINE void step(Code code, const double* a) {
    if (code == Code::kIdentity) return;
    if (is_plain_table(code) || code == Code::kContrast) {
      const float mean = code == Code::kContrast ? mean_of_gray() : 0.0f;
      for_all(256, [&](std::int64_t i) {
        shared_.table[i] =
            static_cast<std::uint8_t>(table_entry(code, a, mean, static_cast<std::int32_t>(i)));
      });
      look_up(now_, count_);
    } else if (code == Code::kAutoContrast || code == Code::kEqualize) {
      for (int c = 0; c < job_.c; ++c) by_histogram(code, now_ + c * plane_);
    } else if (code == Code::kSaturation || code == Code::kHue || code == Code::kGray) {
      if (job_.c == 3) colors(code, a[0]);
    } else if (code == Code::kSharpness) {
      if (job_.x.h > 2 && job_.x.w > 2) sharpen(a[0]);
    } else if (code == Code::kBlur) {
      blur(a);
    } else {
      warp(a);
    }
  }

  FUSEREG_DEVICE_INLINE float mean_of_gray() {
    unsigned long long sum = 0;
    for (std::int64_t i = threadIdx.x; i < plane_; i += kBlockThreads) {
      sum += static_cast<unsigned long long>(job_.c == 3 ? gray(i) : std::int32_t{now_[i]});
    }
    sum = cuda::block_sum(sum);
    if (threadIdx.x == 0)
      shared_.mean = static_cast<float>(static_cast<double>(sum) / static_cast<double>(plane_));
    __syncthreads();
    const float mean = shared_.mean;
    __syncthreads();
    return mean;
  }

  FUSEREG_DEVICE_INLINE std::int32_t gray(std::int64_t i) const {
    return gray_of(static_cast<float>(now_[i]), static_cast<float>(now_[plane_ + i]),
                   static_cast<float>(now_[2 * plane_ + i]));
  }

  FUSEREG_DEVICE_INLINE void colors(Code code, double argument) {
    const auto f = static_cast<float>(argument);
    const auto g = static_cast<float>(1.0 - argument);
    for_all(plane_, [&](std::int64_t i) {
      float rgb[3];
      for (int c = 0; c < 3; ++c) rgb[c] = static_cast<float>(now_[c * plane_ + i]);
      std::int32_t out[3];
      if (code == Code::kHue) {
        turn_hue(f, rgb);
        for (int c = 0; c < 3; ++c) out[c] = static_cast<std::int32_t>(rgb[c]);
      } else {
        const std::int32_t own = gray_of(rgb[0], rgb[1], rgb[2]);
        for (int c = 0; c < 3; ++c) {
          out[c] = code == Code::kGray ? own : blended(rgb[c], static_cast<float>(own), f, g);
        }
      }
      for (int c = 0; c < 3; ++c) now_[c * plane_ + i] = static_cast<std::uint8_t>(out[c]);
    });
  }

  FUSEREG_DEVICE_INLINE void by_histogram(Code code, std::uint8_t* v) {
    for_all(256, [&](std::int64_t i) { shared_.counts[i] = 0; });
    for_vectors(v, plane_, true, [&](const std::uint8_t*, const auto& values) {
      FUSEREG_UNROLL
      for (int e = 0; e < values.kSize; ++e) atomicAdd(&shared_.counts[values[e]], 1u);
    });
    if (threadIdx.x == 0) table(code);
    __syncthreads();
    look_up(v, plane_);
  }

  FUSEREG_DEVICE_INLINE void table(Code code) {
    std::int32_t low = 0;
    std::int32_t high = 255;
    while (low < 255 && shared_.counts[low] == 0) ++low;
    while (high > 0 && shared_.counts[high] == 0) --high;
    const std::int64_t step = (plane_ - shared_.counts[high]) / 255;
    std::int64_t sum = step / 2;
    for (std::int32_t v = 0; v < 256; ++v) {
      std::int64_t to = stretched(v, low, high);
      if (code == Code::kEqualize) to = step == 0 ? v : sum / step < 255 ? sum / step : 255;
      shared_.table[v] = static_cast<std::uint8_t>(to);
      sum += shared_.counts[v];
    }
  }

  FUSEREG_DEVICE_INLINE void sharpen(double argument) {
    const auto g = static_cast<float>(1.0 - argument);
    const std::int64_t w = job_.x.w;
    for (int c = 0; c < job_.c; ++c) {
      for_pixels([&](std::int64_t row, std::int64_t column) {
        const std::int64_t i = c * plane_ + row * w + column;
        const std::uint8_t* const p = now_ + i;
        std::int32_t v = *p;
        if (row > 0 && column > 0 && row + 1 < job_.x.h && column + 1 < w) {
          const std::int32_t around =
              p[-w - 1] + p[-w] + p[-w + 1] + p[-1] + p[1] + p[w - 1] + p[w] + p[w + 1];
          v = sharpened(v, around, g);
        }
        other_[i] = static_cast<std::uint8_t>(v);
      });
    }
    swap();
  }

  FUSEREG_DEVICE_INLINE void blur(const double* a) {
    const auto taps_x = static_cast<int>(a[0]);
    const auto taps_y = static_cast<int>(a[1]);
    const std::int64_t h = job_.x.h;
    const std::int64_t w = job_.x.w;
    if (threadIdx.x < 2) {
      gaussian(threadIdx.x == 0 ? taps_x : taps_y, a[2 + threadIdx.x],
               shared_.weights[threadIdx.x]);
    }
    __syncthreads();
    for (int c = 0; c < job_.c; ++c) {
      const std::uint8_t* const v = now_ + c * plane_;
      for_pixels([&](std::int64_t row, std::int64_t column) {
        float sum = 0.0f;
        for (int k = 0; k < taps_x; ++k) {
          const auto value = static_cast<float>(v[row * w + reflected(column - taps_x / 2 + k, w)]);
          sum = add(sum, multiply(value, shared_.weights[0][k]));
        }
        floats_[row * w + column] = sum;
      });
      for_pixels([&](std::int64_t row, std::int64_t column) {
        float sum = 0.0f;
        for (int k = 0; k < taps_y; ++k) {
          const float value = floats_[reflected(row - taps_y / 2 + k, h) * w + column];
          sum = add(sum, multiply(value, shared_.weights[1][k]));
        }
        other_[c * plane_ + row * w + column] = to_uint8(sum);
      });
    }
    swap();
  }

  FUSEREG_DEVICE_INLINE void warp(const double* a) {
    if (threadIdx.x < kRecord) {
      const auto k = static_cast<int>(threadIdx.x);
      shared_.record[k] = k < 6 ? a[k] : k == 14 ? -1.0 : k == 15 ? 1.0 : 0.0;
    }
    __syncthreads();
    const Job& one = reinterpret_cast<const Job&>(shared_.job);
    if (threadIdx.x == 0) {
      set_job(*new (shared_.job) Job, a);
      view_of(one, one.x, 0, shared_.view);
    }
    __syncthreads();
    const bool nearest = one.interpolation == Interpolation::kNearest;
    Plane<std::uint8_t> plane;
    plane.row = one.x.row;
    plane.pixel = one.x.pixel;
    plane.h = static_cast<std::int32_t>(one.x.h);
    plane.w = static_cast<std::int32_t>(one.x.w);
    plane.mode = shared_.view.mode;
    const auto pixel = [&](std::int32_t x, std::int32_t y) { return pixel_at(plane, x, y); };
    for_pixels([&](std::int64_t row, std::int64_t column) {
      Place<float> p;
      place_in(shared_.view, column, row, nearest, p);
      const bool filled = job_.whole_pixels && !lies_within(a, column, row, one.x.h, one.x.w);
      for (int c = 0; c < job_.c; ++c) {
        plane.data = now_ + c * plane_;
        plane.fill = static_cast<float>(one.fill[c]);
        float v[1] = {interpolate(pixel, p, one.interpolation, static_cast<float>(one.cubic))};
        finished<std::uint8_t, 1>(one, 0, c, v);
        other_[c * plane_ + row * one.x.w + column] = filled ? job_.fill[c] : to_uint8(v[0]);
      }
    });
    swap();
  }

  FUSEREG_DEVICE_INLINE void set_job(Job& one, const double* a) const {
    one.x = job_.x;
    one.x.channels_last = false;
    one.x.channel = plane_;
    one.x.row = one.x.w;
    one.x.pixel = 1;
    one.y = one.x;
    one.x.data = now_;
    one.n = 1;
    one.c = job_.c;
    one.records = shared_.record;
    set_interpolation(one, static_cast<int>(a[6]));
    one.fill_mode = job_.whole_pixels ? FillMode::kBorder : FillMode::kConstant;
    one.limit = 255.0;
    for (int c = 0; c < job_.c; ++c) {
      one.fill[c] = static_cast<double>(job_.fill[c]);
      one.scale[c] = 1.0;
      one.shift[c] = job_.whole_pixels ? kTowardZero : 0.0;
    }
  }

  const ProgramJob& job_;
  Shared& shared_;
  std::int64_t plane_;
  std::int64_t count_;
  std::uint8_t* now_;
  std::uint8_t* other_;
  float* floats_;
};

__global__ void __launch_bounds__(kBlockThreads)
    program_kernel(FUSEREG_GRID_CONSTANT(ProgramJob, job)) {
  FUSEREG_SHARED(shared, Shared);
  for (std::int64_t i = blockIdx.x; i < job.n; i += gridDim.x) Block(job, shared, i).run(i);
}

}  // namespace

void run_cuda(const ProgramJob& job, int device, void* stream) {
  const cuda::DeviceGuard guard(device);
  cuda::LaunchConfig config = config_for(job.n * kThreads, device, stream);
  config.block = dim3(kBlockThreads);
  cuda::launch(kOp, program_kernel, config, job);
}

}  // namespace fusereg::augment
