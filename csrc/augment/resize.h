// Antialiased resizing: two passes, along the rows and along the columns of an image.
//
//   y[n, c, i, j] = scale[c] sum_l Wx[j, l] (sum_k Wy[i, k] x[n, c, k, l]) + shift[c]
//
// x is [N, C, H, W] and y [N, C, Ho, Wo], each contiguous or channels last by itself, of the dtypes
// of augment.h; arithmetic is float32, or float64 if x is. Wy [Ho, H] and Wx [Wo, W] are banded: a
// row of one has `taps` neighboring weights from column first[i] on, in the type of the
// arithmetic. They are those of augment.h's `antialias` for the matrix that resizes (torch's
// align_corners=False), worked out in float64. The gradient of x is the same computation with the
// transposed matrices.
//
// Sums are in the order of the taps; a weight of zero is left out, so that a NaN reaches only those
// pixels that it has a weight in. Every instruction set, thread count and device gives the same
// bits.
//
// CPU: a strip of as many rows of y as a vector has lanes. First along the columns of x, where
// neighbors are neighbors in memory; the strip is turned in registers, so that a vector holds the
// strip's rows of one column; then along these, turned back and stored. Work for an element of x is
// about 2 (bicubic: 4) multiplications, for one of y as many times the ratio of the widths. What is
// between is a strip: W C vectors for each thread.
// CUDA: a launch for each pass, what is between in `scratch`, N C Ho W numbers. Deterministic; no
// atomics.
#pragma once

#include "augment/augment.h"
#include "core/dtype.h"

namespace fusereg::augment {

// A banded matrix: from `size` columns.
struct Band {
  const std::int32_t* first = nullptr;
  const void* weights = nullptr;  // [rows, taps]
  std::int64_t taps = 0;
};

struct ResizeJob {
  Images x, y;
  std::int64_t n = 0;
  int c = 0;
  Band rows, columns;
  void* scratch = nullptr;  // CUDA
  double scale[kMaxChannels] = {};
  double shift[kMaxChannels] = {};
};

// Where the taps of an output begin, within the image in any case.
FUSEREG_INLINE std::int64_t first_tap(const Band& band, std::int64_t i, std::int64_t size) {
  const std::int64_t most = size - band.taps;
  const std::int64_t first = band.first[i];
  return first > 0 ? (first < most ? first : most) : 0;
}

struct ResizeKernels {
  int lanes[2];  // rows of a strip, in float32 and in float64
  // The strip from `row` on, for `channels` of them from `channel` on; scratch holds a vector for
  // each element of x that they have in a row.
  void (*strip)(const ResizeJob& job, std::int64_t sample, int channel, int channels,
                std::int64_t row, void* scratch);
};
FUSEREG_DECLARE_PER_ISA(ResizeKernels, resize_kernels)

// The matrix of an axis, or its transpose. Taps that a row of it has, and its rows.
std::int64_t resize_taps(std::int64_t from, std::int64_t to, Interpolation how, bool transposed);
void resize_band(std::int64_t from, std::int64_t to, Interpolation how, bool transposed,
                 std::int64_t taps, std::int32_t* first, double* weights);

void run_cpu(const ResizeJob& job);
void run_cuda(const ResizeJob& job, int device, void* stream);

}  // namespace fusereg::augment
