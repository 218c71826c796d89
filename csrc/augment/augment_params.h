// What is done to each sample of a batch: drawn, and composed into the record that the kernels
// read.
//
// A list of steps is gone through in order, sample by sample. Coordinates are pixels, integers are
// pixel centers. Geometric steps are maps of the canvas, whose size they may change; their inverses
// multiply to the one matrix that takes an output pixel to its place in the input,
//
//   M = G_1 G_2 ... G_k,   G_j: canvas j to canvas j - 1.
//
//   affine   G^-1 p = c + t + R(angle) S(scale) H_y(shear_y) H_x(shear_x) (p - c), about the center
//            c = ((W - 1)/2, (H - 1)/2) unless one is given. R turns counter-clockwise as one sees
//            it (y points down), H_x = (1, -tan; 0, 1), H_y = (1, 0; -tan, 1).
//   flip     G: x -> W - 1 - x, and likewise y
//   window   G: p -> p + (x0, y0), whole pixels: of a random place
//   center   the same in the middle
//   resized  G: x -> x0 + (x + 1/2) w / W' - 1/2, a random window of w x h pixels made W' x H'
//   whole    the same of the whole canvas
//   side     as whole: of a random length of the shorter side, rounded as torchvision does
//   shortest, jitter  as whole: both sides times a random factor, cut off as torchvision does
//   perspective  G: the perspective that takes the corners of the canvas, moved inward, to these corners,
//            with torchvision's coordinates: a pixel's corner is where its index says
//   room     G: p -> p + (c - c'), a canvas about the same center that holds the turned one
//   color   brightness b, contrast c, saturation s: v' = c b (s I + (1 - s) gray) v + (1 - c)/2
//   erase    a random box of the output
//   mix      MixUp's weight or CutMix's box, and the partner
//
// Randomness: Philox with key = seed, counter = (low, high), high = the sample's id and
//   low = epoch | operation << 32 | occurrence << 40 | attempt << 48 | 1 << 63,
// so that what is drawn for a sample depends on nothing but (seed, epoch, id, operation,
// occurrence) (which of the steps of that kind it is). The top bit keeps these counters apart from
// dropout's. Scalar arithmetic in double precision, no library function that rounds (elementary.h):
// a sample's numbers are the same in any batch, at any place in it and on any processor.
//
// Partners depend on which samples are in the batch, but not on their order: samples are put in the
// order of a hash of (seed, epoch, id), and each takes the next one, the last the first. Or the first
// takes the last, the second the last but one, ..., and those that draw together draw by the hash of
// all their ids.
#pragma once

#include <cstdint>
#include <vector>

namespace fusereg::augment::params {

// One row a sample; see augment.h for what the kernels make of it.
inline constexpr int kRecordSize = 30;
// Angle, scale x y, shear x y, translation x y, flips x y, window x0 y0 x1 y1, brightness,
// contrast, saturation. Of two steps of a kind, the last. Scale: also that of shortest and jitter.
inline constexpr int kDrawsSize = 16;

enum class StepKind {
  kAffine,
  kFlip,
  kWindow,
  kCenter,
  kResized,
  kWhole,
  kColor,
  kErase,
  kMix,
  kRoom,
  kSide,
  kPerspective,
  kShortest,
  kJitter,
};
inline constexpr int kStepKinds = 14;

// How many values a step of each kind has, and which:
//   affine   probability; degrees from, to; +1 for counter-clockwise, -1 for clockwise;
//            scale x from, to; scale y from, to; 1: y as x; 1: a scale is of the pixels looked at
//            (above 1 makes things smaller); translation x from, to, y from, to, as fractions of
//            the canvas; 1: in whole pixels; shear x from, to, y from, to in degrees; 1: a center
//            is given; its x, y
//   flip     probability of x, of y
//   window   height, width (0: those of the canvas with its margins); margins left, top, right,
//            bottom that may be seen; what to do where the window is larger than that: 0 an error,
//            1 widen the margins on both sides by what is lacking, 2 put the canvas anywhere in it
//   center   height, width; where the window is larger: 0 an error, 2 surround the canvas
//   resized  height, width; share of the area from, to; width / height from, to
//   whole    height, width
//   color   brightness from, to; contrast from, to; saturation from, to
//   erase    probability; share of the area from, to; height / width from, to
//   mix      probability; MixUp's alpha; CutMix's alpha; share of CutMix; pairs: 0 by ids, or sample
//            i with n - 1 - i, where 1: each draws, 2: each pair draws once, 3: the batch does
//   room     degrees from, to: every one of them fits
//   perspective  probability; the share of half a side by which a corner moves inward at most
//   side     shorter side from, to (both possible; 0: as long as the longer one allows); the most
//            that the longer side may have, 0 for no limit
//   shortest  lengths of the shorter side: the first, the distance to the next, their number; the
//            most of the longer side, 0 for no limit
//   jitter   height, width that the image is fitted into; a factor from, to of what it has then
inline constexpr int kStepValues[kStepKinds] = {22, 2, 7, 3, 6, 2, 6, 5, 5, 2, 3, 2, 4, 4};

struct Step {
  StepKind kind = StepKind::kAffine;
  std::uint32_t occurrence = 0;
  std::vector<double> values;
};

struct Size {
  std::int64_t height = 0;
  std::int64_t width = 0;
};

struct Job {
  std::vector<Step> steps;
  std::uint64_t seed = 0;
  std::uint32_t epoch = 0;
  const std::int64_t* ids = nullptr;
  std::int64_t samples = 0;
  std::vector<Size> inputs;      // of each sample, or one for all
  double* records = nullptr;     // [samples, kRecordSize]
  double* draws = nullptr;       // [samples, kDrawsSize]
  std::int64_t* keys = nullptr;  // [samples, 2]: of the noise in erased boxes
};

// The size that the steps make of the inputs. Throws std::invalid_argument where a window does not
// fit, or where samples end in several sizes.
Size output_size(const Job& job);

void draw(const Job& job);

// Numbers for programs: out [samples, columns], the last `normals` of each row standard normal, the
// others uniform within [0, 1). Only ids, samples, seed and epoch of the job are read.
void draw_numbers(const Job& job, std::uint32_t occurrence, std::int64_t columns,
                  std::int64_t normals, double* out);

}  // namespace fusereg::augment::params
