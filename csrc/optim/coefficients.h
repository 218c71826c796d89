// The numbers that an update computes with, from its hyperparameters and step; on the host and on
// the device.
#pragma once

#include <math.h>

#include "optim/optim.h"

namespace fusereg::optim {

FUSEREG_INLINE double read_scalar(const Scalar& s) {
  if (s.device == nullptr) return s.host;
  switch (s.dtype) {
    case DType::kFloat64:
      return *static_cast<const double*>(s.device);
    case DType::kFloat32:
      return *static_cast<const float*>(s.device);
    case DType::kFloat16:
      return to_float(*static_cast<const Half*>(s.device));
    default:
      return to_float(*static_cast<const BFloat16*>(s.device));
  }
}

// What the gradients of a call are multiplied by, but for the sign.
FUSEREG_INLINE double clip_factor(double norm, double max_norm) {
  const double factor = max_norm / (norm + 1e-6);
  return factor > 1.0 ? 1.0 : factor;  // NaN stays
}
FUSEREG_INLINE double gradient_factor(double grad_scale, double norm, double max_norm) {
  const double unscale = 1.0 / grad_scale;
  return max_norm > 0.0 ? unscale * clip_factor(norm * unscale, max_norm) : unscale;
}

// What a row of a gradient is multiplied by, from the norms of the row and of its weights.
FUSEREG_INLINE double adaptive_factor(double grad_norm, double weight_norm, double factor,
                                      double eps) {
  const double limit = factor * (weight_norm < eps ? eps : weight_norm);
  return grad_norm < limit ? 1.0 : limit / (grad_norm < 1e-6 ? 1e-6 : grad_norm);
}

struct HyperValues {
  double lr, first, second, eps, weight_decay, l1, l2, group, ema_decay, third;
};

FUSEREG_INLINE HyperValues read_hyper(const Hyper& h) {
  return {read_scalar(h.lr),   read_scalar(h.first),        read_scalar(h.second),
          read_scalar(h.eps),  read_scalar(h.weight_decay), read_scalar(h.l1),
          read_scalar(h.l2),   read_scalar(h.group),        read_scalar(h.ema_decay),
          read_scalar(h.third)};
}

// FTRL's LastStep in memory, of a parameter of that dtype.
FUSEREG_INLINE LastStep read_last(const void* at, DType p_dtype) {
  if (p_dtype == DType::kFloat64) {
    const double* const x = static_cast<const double*>(at);
    return {x[0], x[1], x[2], x[3]};
  }
  const float* const x = static_cast<const float*>(at);
  return {x[0], x[1], x[2], x[3]};
}
FUSEREG_INLINE void write_last(void* at, DType p_dtype, const HyperValues& h) {
  const double last[4] = {h.l1, h.l2, h.lr, h.first};
  for (int i = 0; i < 4; ++i) {
    if (p_dtype == DType::kFloat64) {
      static_cast<double*>(at)[i] = last[i];
    } else {
      static_cast<float*>(at)[i] = static_cast<float>(last[i]);
    }
  }
}

// A number of a parameter that the kernels count on: its steps, NAdam's product.
FUSEREG_INLINE double read_count(const void* at, DType dtype) {
  return dtype == DType::kFloat64 ? *static_cast<const double*>(at)
                                  : static_cast<double>(*static_cast<const float*>(at));
}
FUSEREG_INLINE void write_count(void* at, DType dtype, double x) {
  if (dtype == DType::kFloat64) {
    *static_cast<double*>(at) = x;
  } else {
    *static_cast<float*>(at) = static_cast<float>(x);
  }
}

// NAdam's momentum at a step.
FUSEREG_INLINE double nadam_mu(const HyperValues& h, double step) {
  return h.first * (1.0 - 0.5 * pow(0.96, step * h.third));
}

// NAdam's product at a step, from that before; rounded as torch rounds it.
FUSEREG_INLINE double nadam_product(const Target& item, const HyperValues& h, double step) {
  const double before = read_count(item.state[2], item.step_dtype);
  const double mu = nadam_mu(h, step);
  if (item.step_dtype == DType::kFloat64) return before * mu;
  return static_cast<double>(static_cast<float>(before) * static_cast<float>(mu));
}

// Counts a step that was taken.
FUSEREG_INLINE void count_step(Algorithm algorithm, const Target& item, const HyperValues& h) {
  const double step = read_count(item.step, item.step_dtype) + 1.0;
  write_count(item.step, item.step_dtype, step);
  if (algorithm != Algorithm::kNadam) return;
  write_count(item.state[2], item.step_dtype, nadam_product(item, h, step));
}

// Whether a step writes the weights and counts.
FUSEREG_INLINE bool is_whole(Algorithm algorithm) { return algorithm != Algorithm::kLambNorms; }

// LAMB's r, from the squares of both norms.
FUSEREG_INLINE double lamb_ratio(const HyperValues& h, const Flags& f, const LastStep& norms) {
  if (h.weight_decay == 0.0 && !f.nesterov) return 1.0;
  if (!(norms.l1 > 0.0 && norms.l2 > 0.0)) return 1.0;
  const double ratio = sqrt(norms.l1) / sqrt(norms.l2);
  return h.third > 0.0 && ratio > h.third ? h.third : ratio;
}

// FTRL divides by the rate: at 0 weights and states stay.
FUSEREG_INLINE bool rests(Algorithm algorithm, double lr) {
  return algorithm == Algorithm::kFtrl && lr == 0.0;
}

// Magnitudes up to this become zero in storage.
FUSEREG_INLINE double rounds_to_zero(DType dtype) {
  return dtype == DType::kFloat16    ? Traits<Half>::kRoundsToZero
         : dtype == DType::kBFloat16 ? Traits<BFloat16>::kRoundsToZero
                                     : 0.0;
}

// `row` as in Item; `step` counts from 1; `last` for FTRL, NAdam and LAMB.
FUSEREG_INLINE Coefficients<double> coefficients(Algorithm algorithm, const HyperValues& h,
                                                 const Flags& f, double step, double gradient,
                                                 std::int64_t row, bool fresh, DType p_dtype,
                                                 const LastStep& last) {
  Coefficients<double> k;
  double lr = h.lr;
  const double l1 = row == 1 ? h.l1 + h.group : h.l1;
  const double group = row > 1 ? h.group * sqrt(static_cast<double>(row)) : 0.0;
  k.grad = f.maximize ? -gradient : gradient;
  k.eps = h.eps;
  k.largest_zero = rounds_to_zero(p_dtype);
  k.average = 1.0 - h.ema_decay;
  switch (algorithm) {
    case Algorithm::kSgd:
      k.first = h.first;
      k.second = fresh ? 1.0 : 1.0 - h.second;
      k.rate = lr;
      // A gradient that stays moves p by this much more, so its counterpart in the penalty must.
      if (f.momentum && f.prox >= Prox::kPreconditioned) lr *= (1.0 - h.second) / (1.0 - h.first);
      break;
    case Algorithm::kAdam:
      k.first = 1.0 - h.first;
      k.second = h.second;
      k.third = 1.0 - h.second;
      k.rate = lr / (1.0 - pow(h.first, step));
      k.root = 1.0 / sqrt(1.0 - pow(h.second, step));
      break;
    case Algorithm::kAdagrad:
      lr = lr / (1.0 + (step - 1.0) * h.first);
      k.rate = lr;
      break;
    case Algorithm::kNadam: {
      const double mu = nadam_mu(h, step);
      const double next = nadam_mu(h, step + 1.0);
      const double product = last.l1;
      k.first = 1.0 - h.first;
      k.second = h.second;
      k.third = 1.0 - h.second;
      k.rate = lr * (1.0 - mu) / (1.0 - product);
      k.other = lr * next / (1.0 - product * next);
      k.root = 1.0 / sqrt(1.0 - pow(h.second, step));
      break;
    }
    case Algorithm::kLamb:
    case Algorithm::kLambNorms:
      k.first = 1.0 - h.first;
      k.second = h.second;
      k.third = 1.0 - h.second;
      k.rate = 1.0 / (1.0 - pow(h.first, step));
      k.root = 1.0 / sqrt(1.0 - pow(h.second, step));
      k.decay = h.weight_decay;
      lr *= lamb_ratio(h, f, last);
      k.other = lr;
      break;
    case Algorithm::kRmsprop:
      k.first = h.first;
      k.second = h.second;
      k.third = 1.0 - h.second;
      k.rate = lr;
      if (f.momentum && f.prox >= Prox::kPreconditioned) lr /= 1.0 - h.first;
      break;
    case Algorithm::kLion:
      k.first = h.first;
      k.third = 1.0 - h.first;
      k.root = 1.0 - h.second;
      k.rate = lr;
      break;
    default:
      k.first = 1.0 / lr;
      k.second = h.first / lr;
      k.third = last.l1;
      k.root = last.l2;
      k.eps = 1.0 / last.lr;
      k.factor = last.beta / last.lr;
      break;
  }
  if (algorithm == Algorithm::kLamb || algorithm == Algorithm::kLambNorms) {
    // Part of the update.
  } else if (f.decoupled_decay) {
    k.decay = 1.0 - lr * h.weight_decay;
  } else {
    k.l2 = h.weight_decay;
  }
  if (algorithm == Algorithm::kFtrl) {
    k.threshold = l1;
    k.shrink = h.l2;
  } else if (f.prox == Prox::kNone) {
    k.l1 = l1;
    k.l2 += h.l2;
    k.group = group;
  } else {
    k.threshold = lr * l1;
    k.shrink = lr * h.l2;
    k.factor = 1.0 / (1.0 + k.shrink);
    if (f.prox == Prox::kCapped) {
      // The steps that the metric remembers: before them a missing gradient proves nothing.
      const double memory = algorithm == Algorithm::kAdagrad ? 1e-3 : 1.0 - h.second;
      // The centered metric may fall below the gradient.
      const double half = f.centered ? 0.0 : 0.5;
      k.floor_l1 = half * l1;
      k.floor_l2 = half * h.l2;
      k.floor_group = half * group;
      k.spared = step * memory < 1.0 ? 0.0 : -1.0;
    }
    if (algorithm == Algorithm::kLion) {
      k.floor_l1 = l1;
      k.floor_l2 = h.l2;
    }
    k.group = lr * group;
  }
  return k;
}

}  // namespace fusereg::optim
