// Data augmentation in one pass: warp, color, normalization, erasing and mixing of a batch.
//
//   y[i] = lam_i A(i) + (1 - lam_i) A(partner_i)  inside sample i's mix box,  A(i)  outside;
//   A(i) = erased(normalized(colored(warped(x[i])))) with sample i's record.
//
// x is [N, C, H, W] and y [N, C, Ho, Wo], each contiguous or channels last by itself. x is uint8,
// float16, bfloat16, float32 or float64; y any of them. Arithmetic is float32, or float64 if x is.
// uint8 elements are the numbers 0 to 255.
//
// A record is a row of 30 float64 for each sample, in memory of x's device:
//   0..5    M = [m00 m01 m02; m10 m11 m12]: output pixel (x, y) comes from M (x, y, 1) in the
//           input; integers are the centers of pixels in both
//   6..9    erase box x0 y0 x1 y1 in output pixels, half open; empty if x1 <= x0 or y1 <= y0
//   10..13  mix box, likewise
//   14      partner: an index into the batch; negative or beyond it: none
//   15      lam
//   16..27  color, 3 x 4 row by row, read if `color`: C = 3: v' = K v + t with K the first three
//           columns; other C: v' = k v + t for each channel with k = [16], t = [19]
//   28, 29  perspective: the place in the input is M (x, y, 1) / ([28] x + [29] y + 1); zeros: none
//
// Per output pixel, in this order:
//   warped      interpolation of the taps around M (x, y, 1). Constant fill: taps outside the image
//               have the value fill[c] (in x's units). border: the nearest pixel inside; reflect:
//               -1 is 1; symmetric: -1 is 0; wrap: -1 is W - 1. window: of an axis-aligned sample
//               only those pixels are read that its output covers, its border repeated (antialias:
//               the weights of those taps made to sum to one), as if it were cropped first and then
//               resized; of others as border. nearest: floor(v + 1/2). bilinear.
//               bicubic: Keys' cubic convolution with a = `cubic`: -3/4, PIL's is -1. A tap of weight zero is not read:
//               a NaN reaches only those pixels that it has a weight in.
//   colored    if `color`; then clamped to [0, 255] (uint8) or [0, 1]
//   normalized  v * scale[c] + shift[c]
//   erased      inside the erase box erase[c] (in y's units), or a standard normal (`erase_noise`):
//               Philox under keys[i] = (seed, low half of the counter), element (c Ho + y) Wo + x
//               as in Gaussian dropout (core/normal.h)
//   mixed       see above. lam 0 reads the partner alone, lam 1 the sample alone.
//   stored      rounded to y's dtype; uint8: to nearest, halves to even, 0 to 255, NaN 0
//
// antialias (bilinear, bicubic with a = -1/2): the filter is as wide along an axis of the input as
// the output pixel is: by max(1, e) with e = hypot(m00, m01) for x, hypot(m10, m11) for y.
//   axis-aligned  Under constant fill the weights are those of the taps inside the image, made to sum
//                 to one, and the result is coverage * v + (1 - coverage) * fill with the share of the
//                 pixel's extent, e wide, that lies inside. This is
//                 torch.nn.functional.interpolate(antialias=True).
//   turned,       in two steps. The image is resized by this filter to z of W' = W / e, rounded to
//   sheared       nearest and within 1 and W, by H' likewise; weights are those of the taps inside the
//                 image, made to sum to one; z is rounded to x's dtype. Then z is interpolated at points
//                 by M' = D (M + 1/2) - 1/2 with D = diag(W' / W, H' / H), whose rows are about as long
//                 as one; fill and fill mode are those of z. The same bits as one call after the other.
//   perspective   interpolated at points.
//
// Coordinates. float64 x, and any perspective: in float64. Others: fixed point, F bits after the point (22 for
// |m| < 16, fewer beyond): pixels are taken in blocks of 16 along a row, the block's first
// coordinate is float64 rounded to 2^-F, and the steps within the block are multiples of 2^-F too
// (error below 3e-7 pixels). All else is integer arithmetic, so every instruction set, thread count
// and device has the same coordinates, and as nothing is contracted the same bits of y.
// Whole-pixel shifts, flips and quarter turns are exact. Coordinates beyond +-2^29 count as those.
//
// On the CPU, axis-aligned samples are antialiased along one axis and then the other, in strips of rows
// (augment_filter.h). Of turned ones a thread makes what its rows read of z, and keeps it in its cache
// (antialias_launch.cpp). On CUDA a kernel makes z of all of them first, in memory of x's size. Otherwise
// the pixels of z are worked out where they are read: on the CPU float64 x and a turned sample mixed
// with an axis-aligned one; gradients. All have the same bits.
//
// Images of several sizes: `each` has the image of every sample, all of x's type and layout; x has
// their largest sides. On the CPU, forward.
//
// Bytes: every byte of x that is needed once, every element of y once. No workspace but the strips' and
// z's: on the CPU of a sample and its partner for each thread.
//
// Backward: grad_x [N, C, H, W] = the transpose of the map that forward is in x: the sum over
// output pixels, in row-major order, own output first and then those of the samples that have it as
// their partner in their order, of weight * gradient; erased pixels give none. With `color` x must
// be there: where the clamp acts there is no gradient. On the CPU one thread owns a band of a
// sample's rows and adds in that order; on CUDA a thread owns an input pixel and walks the output
// pixels that can reach it in the same order. Deterministic; no atomics.
#pragma once

#include <cstdint>

#include "core/dtype.h"
#include "core/isa.h"

namespace fusereg::augment {

inline constexpr int kMaxChannels = 64;
inline constexpr std::int64_t kMaxSide = std::int64_t{1} << 24;
inline constexpr int kRecord = 30;
// Pixels of a row whose coordinates have one float64 base.
inline constexpr int kBlock = 16;

enum class Element : std::uint8_t { kFloat64, kFloat32, kFloat16, kBFloat16, kUInt8 };
constexpr std::int64_t element_size(Element type) {
  return type == Element::kFloat64   ? 8
         : type == Element::kFloat32 ? 4
         : type == Element::kUInt8   ? 1
                                     : 2;
}
enum class Interpolation : std::uint8_t { kNearest, kBilinear, kBicubic };
enum class FillMode : std::uint8_t { kConstant, kBorder, kReflect, kSymmetric, kWrap, kWindow };

// A batch of images: strides in elements.
struct Images {
  void* data = nullptr;
  Element type = Element::kFloat32;
  bool channels_last = false;
  std::int64_t h = 0, w = 0;
  std::int64_t sample = 0, channel = 0, row = 0, pixel = 0;
};

struct Job {
  Images x;       // backward: without data, if there is no `color`
  Images y;       // forward: the result; backward: its gradient, in the type of the arithmetic
  Images grad_x;  // likewise
  std::int64_t n = 0;
  int c = 0;
  const Images* each = nullptr;  // of several sizes: the samples' images
  const double* records = nullptr;
  const std::int64_t* keys = nullptr;  // [N, 2], with erase_noise
  Interpolation interpolation = Interpolation::kBilinear;
  FillMode fill_mode = FillMode::kConstant;
  bool antialias = false;
  void* reduced = nullptr;  // CUDA, antialias: room for z of turned samples, laid out as x
  bool color = false;
  bool erase_noise = false;
  bool outside_unread = false;  // CPU: where no tap is in the image, the result may be anything
  double limit = 1.0;
  double cubic = -0.75;
  double fill[kMaxChannels] = {};
  double scale[kMaxChannels] = {};
  double shift[kMaxChannels] = {};
  double erase[kMaxChannels] = {};
};

// The numbers of interpolations in calls: those of Interpolation, and PIL's bicubic.
inline constexpr int kPilBicubic = 3;
FUSEREG_INLINE void set_interpolation(Job& job, int number) {
  job.interpolation = static_cast<Interpolation>(number == kPilBicubic ? 2 : number);
  job.cubic = number == kPilBicubic ? -1.0 : -0.75;
}

struct Forward : Job {};
struct Backward : Job {};

// Rows [begin, end) of all output rows of the batch (forward, filtered), or of a sample's rows of
// grad_x. `filtered` is forward of axis-aligned samples that antialias; scratch has filter_bytes().
struct CpuKernels {
  int lanes;
  void (*forward)(const Job& job, std::int64_t begin, std::int64_t end);
  void (*filtered)(const Job& job, std::int64_t begin, std::int64_t end, void* scratch);
  void (*backward)(const Job& job, std::int64_t sample, std::int64_t row_begin,
                   std::int64_t row_end);
};
FUSEREG_DECLARE_PER_ISA(CpuKernels, kernels)

void run_cpu(const Forward& job);
void run_cpu(const Backward& job);
void run_cuda(const Forward& job, int device, void* stream);
void run_cuda(const Backward& job, int device, void* stream);

}  // namespace fusereg::augment
