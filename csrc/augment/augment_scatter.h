// The gradient of a block of output pixels: places and weights as vectors, then tap by tap, in the
// order of augment.h. For the CPU kernels, once per instruction set; float32 arithmetic, no
// antialiasing, no color.
#pragma once

#include "augment/augment_vector.h"

namespace fusereg::augment::FUSEREG_ISA {
namespace {

// Of the taps along an axis, from the first one on: the weights of for_taps, lane by lane, each a
// block after the one before.
template <Interpolation kHow>
FUSEREG_INLINE void tap_weights(Floats t, [[maybe_unused]] float cubic, float* weights) {
  if constexpr (kHow == Interpolation::kNearest) {
    store(weights, Floats{} + 1.0f);
  } else if constexpr (kHow == Interpolation::kBilinear) {
    store(weights, 1.0f - t);
    store(weights + kBlock, t);
  } else {
    const Cubic<Floats> k = cubic_weights(t, cubic);
    store(weights, k.before);
    store(weights + kBlock, ((1.0f - k.before) - k.next) - k.last);
    store(weights + 2 * kBlock, k.next);
    store(weights + 3 * kBlock, k.last);
  }
}

// Adds what `count` pixels, all of whose taps are inside the image, give to rows of grad_x.
template <Interpolation kHow, bool kThree>
void scatter_block(const Job& job, const Frame& f, const Place16& place, std::int64_t row,
                   std::int64_t first, int count, std::int64_t row_begin, std::int64_t row_end) {
  constexpr int kTaps = kHow == Interpolation::kNearest    ? 1
                        : kHow == Interpolation::kBilinear ? 2
                                                           : 4;
  constexpr int kBefore = kTaps == 4 ? 1 : 0;
  alignas(kVectorBytes) std::int32_t xs[kBlock], ys[kBlock];
  alignas(kVectorBytes) float wx[kTaps][kBlock], wy[kTaps][kBlock];
  const std::int32_t half = (kHalfBit<kHow> << f.bits) >> 1;
  const auto cubic = static_cast<float>(job.cubic);
  for (int p = 0; p < kParts; ++p) {
    const Spot s = spot_of(f, place.start, p, half);
    store_ints(xs + p * kLanes, s.x - kBefore);
    store_ints(ys + p * kLanes, s.y - kBefore);
    tap_weights<kHow>(s.tx, cubic, wx[0] + p * kLanes);
    tap_weights<kHow>(s.ty, cubic, wy[0] + p * kLanes);
  }
  const int channels = kThree ? 3 : job.c;
  const Images& grad_x = job.grad_x;
  const float* from = static_cast<const float*>(job.y.data) + f.sample * job.y.sample +
                      row * job.y.row + first * job.y.pixel;
  // From the view to the image.
  const std::int64_t top = f.view.top;
  float* const to =
      static_cast<float*>(grad_x.data) + f.sample * grad_x.sample + f.view.left * grad_x.pixel;
  for (int i = 0; i < count; ++i, from += job.y.pixel) {
    float g[kThree ? 3 : kMaxChannels];
    for (int c = 0; c < channels; ++c)
      g[c] = from[c * job.y.channel] * static_cast<float>(job.scale[c]);
    for (int j = 0; j < kTaps; ++j) {
      const std::int64_t y = top + ys[i] + j;
      if (wy[j][i] == 0.0f || y < row_begin || y >= row_end) continue;
      float* at = to + y * grad_x.row + xs[i] * grad_x.pixel;
      for (int k = 0; k < kTaps; ++k, at += grad_x.pixel) {
        const float weight = wy[j][i] * wx[k][i];
        if (weight == 0.0f) continue;
        for (int c = 0; c < channels; ++c) at[c * grad_x.channel] += weight * g[c];
      }
    }
  }
}

}  // namespace
}  // namespace fusereg::augment::FUSEREG_ISA
