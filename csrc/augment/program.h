// Programs of images: a short list of instructions for each sample of uint8, one after the other.
//
// x and y are [N, C, H, W] of uint8, each contiguous or channels last by itself. A program is
// [length, 8] float64 in memory of x's device, each row an instruction: a code and up to 7
// arguments. After every instruction values are whole numbers again, rounded toward zero, as those of
// torchvision's functions of tensors of uint8 are; f is float32(argument), g float32(1 - argument),
// fma(a, b, c) is a b + c rounded once, clamp is to [0, 255].
//
//   identity
//   brightness f      clamp(f v)
//   contrast f        clamp(fma(m, g, f v)), m the mean of gray over the image (of v if C = 1)
//   saturation f      clamp(fma(gray, g, f v))                           C = 1: nothing
//   hue h             the hue moved by h of a turn, in float32           C = 1: nothing
//   gray              gray in each channel                               C = 1: nothing
//   invert            255 - v
//   posterize b       the b highest bits
//   solarize t        255 - v where v >= t
//   solarize_add a t  min(255, v + a) where v < t
//   autocontrast      clamp((v - lo) / ((hi - lo) / 255)), each channel; hi = lo: nothing
//   equalize          the histogram of each channel made level, as PIL's ImageOps.equalize
//   sharpness f       clamp(fma(d - v, g, v)), d = round((8 neighbors + 5 v) / 13); the outermost
//                     pixels stay
//   blur kx ky sx sy  Gaussian of kx x ky taps, reflected at the edges, rounded to nearest; the one
//                     operation of which torchvision's result may differ, by one level
//   warp m0..m5 i     augment.h's warp by this matrix with interpolation i (3: bicubic with a = -1),
//                     constant `fill`; rounded to nearest. With `whole_pixels`, as in PIL: a pixel
//                     whose place is within the image is that of the image alone, its edge repeated,
//                     rounded toward zero (what is within a thousandth below a whole number is that
//                     number), and others are the fill; without it the image fades into the fill.
//
// gray = floor(fma(B, .114, fma(G, .587, .2989 R))). C is 1 or 3 where gray or hue is asked for.
//
// CPU: a thread takes a sample at a time, in its cache: tables of 256 entries are composed and
// applied at once. A pass before and one after (augment.h) may be done with it, on the sample while it
// is there. CUDA: a block for each sample. Either way one read of x and one write of y, and every
// instruction set, thread count and device gives the same bits.
#pragma once

#include "augment/augment.h"
#include "core/dtype.h"

namespace fusereg::augment {

enum class Code : std::uint8_t {
  kIdentity,
  kBrightness,
  kContrast,
  kSaturation,
  kHue,
  kGray,
  kInvert,
  kPosterize,
  kSolarize,
  kSolarizeAdd,
  kAutoContrast,
  kEqualize,
  kSharpness,
  kBlur,
  kWarp,
};
inline constexpr int kCodes = 15;
inline constexpr int kInstruction = 8;
inline constexpr int kMaxTaps = 255;  // of a blur

struct ProgramJob {
  Images x, y;
  std::int64_t n = 0;
  int c = 0;
  const double* programs = nullptr;  // [n, length, 8]
  int length = 0;
  bool whole_pixels = false;
  std::uint8_t fill[kMaxChannels] = {};
  std::uint8_t* scratch = nullptr;  // CUDA: program_scratch() bytes
  // CPU: passes before and after the programs that mix no samples, the one after without
  // antialiasing; x is what the one before gives, y what the one after reads, without data then.
  const Forward* before = nullptr;
  const Forward* after = nullptr;
};

// Sizes of a sample: planes of h w bytes.
struct Planes {
  std::int64_t h = 0, w = 0;
  int c = 0;
  std::int64_t plane() const { return h * w; }
};

// Added before rounding to nearest, for rounding toward zero.
inline constexpr double kTowardZero = -0.499;

struct ProgramKernels {
  // Adds to counts[256] those of v[n].
  void (*histogram)(const std::uint8_t* v, std::int64_t n, std::uint32_t* counts);
  void (*look_up)(std::uint8_t* v, std::int64_t n, const std::uint8_t* table);
  // The sum of gray of three planes.
  std::uint64_t (*gray_sum)(const std::uint8_t* v, std::int64_t plane);
  // In place, on three planes: saturation, hue, gray.
  void (*colors)(std::uint8_t* v, std::int64_t plane, Code code, double argument);
  void (*sharpen)(const std::uint8_t* v, std::uint8_t* y, const Planes& size, double argument);
  // One plane; scratch holds (h + 1) (w + kMaxTaps) floats.
  void (*blur)(const std::uint8_t* v, std::uint8_t* y, const Planes& size, const float* weights_x,
               int taps_x, const float* weights_y, int taps_y, float* scratch);
  // Planes from or to a sample of another layout.
  void (*to_planes)(const std::uint8_t* x, std::uint8_t* v, const Planes& size);
  void (*from_planes)(const std::uint8_t* v, std::uint8_t* y, const Planes& size);
};
FUSEREG_DECLARE_PER_ISA(ProgramKernels, program_kernels)

// Bytes that the CUDA kernel needs for each sample.
FUSEREG_INLINE std::int64_t program_planes(const ProgramJob& job) {
  return (job.x.sample * 2 + 15) / 16 * 16;
}
FUSEREG_INLINE std::int64_t program_scratch(const ProgramJob& job) {
  return program_planes(job) + (job.x.h * job.x.w + 3) / 4 * 16;
}

void run_cpu(const ProgramJob& job);
void run_cuda(const ProgramJob& job, int device, void* stream);

}  // namespace fusereg::augment
