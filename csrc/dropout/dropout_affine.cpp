// The coefficients of both launchers of dropout. Contract: dropout.h.
#include <cmath>

#include "dropout/dropout.h"

namespace fusereg::dropout {
namespace {

// scale * alpha of SELU, with its sign: what alpha dropout puts in place of a dropped element.
constexpr double kAlphaPrime = -1.7580993408473766;

}  // namespace

Affine make_affine(Kind kind, const Draw& draw) {
  if (draw.keep == 0.0) return {0.0, 0.0, 0.0};
  if (kind == Kind::kDropout) return {1.0 / draw.keep, 0.0, 0.0};
  const double drop = 1.0 - draw.keep;
  const double a = 1.0 / std::sqrt(draw.keep * (1.0 + drop * kAlphaPrime * kAlphaPrime));
  if (kind == Kind::kAlphaBackward) return {a, 0.0, 0.0};
  const double b = -a * drop * kAlphaPrime;
  return {a, b, a * kAlphaPrime + b};
}

}  // namespace fusereg::dropout
