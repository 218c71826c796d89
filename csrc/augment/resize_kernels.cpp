// CPU kernels of antialiased resizing; compiled once per instruction set. Contract: resize.h.
#include "augment/resize_strip.h"

namespace fusereg::augment::FUSEREG_ISA {
namespace {

template <class C, class U>
FUSEREG_INLINE void store_some(U* to, Vector<C> v, std::int64_t left) {
  constexpr int kN = kWidth<C>;
  if constexpr (sizeof(C) == 8 || sizeof(U) == 8) {
    for (std::int64_t i = 0; i < kN && i < left; ++i) {
      if constexpr (sizeof(U) == 8) {
        to[i] = static_cast<double>(v[i]);
      } else if constexpr (sizeof(U) == 1) {
        to[i] = to_uint8(v[i]);
      } else {
        to[i] = from_compute<U>(static_cast<float>(v[i]));
      }
    }
  } else if (left >= kN) {
    store_as(to, v);
  } else {
    U part[kN];
    store_as(part, v);
    memcpy(to, part, static_cast<std::size_t>(left) * sizeof(U));
  }
}

// What of an image a call concerns: channels of their own, or all of them last.
struct Part {
  std::int64_t sample, row;
  int channel, channels;
};

template <class T>
void to_strip(const ResizeJob& job, const Part& part, Number<T>* strip) {
  constexpr int kN = kWidth<Number<T>>;
  const Images& x = job.x;
  const std::int64_t run = x.channels_last ? x.w * job.c : x.w;
  const T* const image = static_cast<const T*>(x.data) + part.sample * x.sample;
  const auto rows = static_cast<int>(job.y.h - part.row < kN ? job.y.h - part.row : kN);
  for (int r = 0; r < (x.channels_last ? 1 : part.channels); ++r, strip += run * kN) {
    const T* const plane = image + (x.channels_last ? 0 : (part.channel + r) * x.channel);
    along_columns<T>(plane, x, job.rows, part.row, rows, 0, run, strip);
  }
}

// Along the strip, to y.
template <class C, class U>
void from_strip(const ResizeJob& job, const Part& part, const C* strip) {
  constexpr int kN = kWidth<C>;
  const Images& y = job.y;
  const bool last = y.channels_last;
  const std::int64_t run = last ? y.w * job.c : y.w;
  // From a column of the strip to the next, and from a channel to the next.
  const std::int64_t step = (job.x.channels_last ? job.c : 1) * kN;
  const std::int64_t plane = job.x.channels_last ? kN : job.x.w * kN;
  U* const image = static_cast<U*>(y.data) + part.sample * y.sample;
  for (int r = 0; r < (last ? 1 : part.channels); ++r) {
    std::int64_t column = 0;
    int channel = last ? 0 : r;
    for (std::int64_t e = 0; e < run; e += kN) {
      Vector<C> v[kN];
      for (int q = 0; q < kN; ++q) {
        Vector<C> sum = {};
        if (e + q < run) {
          sum = along_row(strip + channel * plane, job.columns, column, job.x.w, 0, step);
          sum = sum * static_cast<C>(job.scale[part.channel + channel]) +
                static_cast<C>(job.shift[part.channel + channel]);
          if (!last || ++channel == job.c) {
            ++column;
            if (last) channel = 0;
          }
        }
        v[q] = sum;
      }
      turn<kN / 2, C>(v);
      U* to = image + part.row * y.row + (last ? 0 : (part.channel + r) * y.channel) + e;
      for (int q = 0; q < kN && part.row + q < y.h; ++q, to += y.row)
        store_some<C, U>(to, v[q], run - e);
    }
  }
}

void strip(const ResizeJob& job, std::int64_t sample, int channel, int channels, std::int64_t row,
           void* scratch) {
  const Part part = {sample, row, channel, channels};
  dispatch_element(job.x.type, [&](auto tag) {
    using T = typename decltype(tag)::type;
    to_strip<T>(job, part, static_cast<Number<T>*>(scratch));
  });
  dispatch_element(job.y.type, [&](auto tag) {
    using U = typename decltype(tag)::type;
    if (job.x.type == Element::kFloat64) {
      from_strip<double, U>(job, part, static_cast<const double*>(scratch));
    } else {
      from_strip<float, U>(job, part, static_cast<const float*>(scratch));
    }
  });
}

}  // namespace

const ResizeKernels resize_kernels = {{kWidth<float>, kWidth<double>}, &strip};

}  // namespace fusereg::augment::FUSEREG_ISA
