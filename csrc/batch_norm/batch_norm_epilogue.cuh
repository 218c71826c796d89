// What becomes of an octet, forward and backward.
#pragma once

#include "batch_norm/batch_norm_device.cuh"
#include "core/activation.h"

namespace fusereg::batch_norm {

// Octets that a thread has under way at once.
template <class T>
inline constexpr int kAhead = sizeof(T) == 2 ? 4 : 2;
// Backward an octet is two or three: columns that are loaded element by element have no registers for
// more than one.
template <class T, class Walk>
inline constexpr int kAheadBackward = Walk::kColumns && !Walk::kWide ? 1 : kAhead<T> / 2;

// --- epilogues ---
// What a call does is decided by branches that go the same way for the whole grid, once an octet.
// kHeavy: with the code for SiLU, GELU and dropout, which would cost the others registers. What is not
// wide has no other kind.

inline bool is_heavy(const Epilogue& e) {
  return e.dropout || e.activation == Activation::kSilu || e.activation == Activation::kGelu;
}

template <class C>
struct Plain {
  C slope, inverse_slope, scale;  // inverse: from y to z
  std::uint64_t seed, low;
};
template <class C>
FUSEREG_DEVICE_INLINE Plain<C> plain_of(const Epilogue& e) {
  const C slope = static_cast<C>(e.slope);
  const double keep = e.dropout ? e.draw.keep : 1.0;
  return {slope, e.activation == Activation::kLeakyRelu ? C(1) / slope : C(1),
          static_cast<C>(keep > 0.0 ? 1.0 / keep : 0.0), e.dropout ? e.random.key() : 0,
          e.dropout ? e.random.low() : 0};
}

// Which elements of the octet dropout keeps.
template <class C>
FUSEREG_DEVICE_INLINE unsigned kept_bits(const Epilogue& e, const Plain<C>& plain,
                                         std::int64_t at) {
  return keep_mask_at(plain.seed, plain.low, e.index_offset + static_cast<std::uint64_t>(at),
                      e.draw);
}

template <bool kHeavy, class C>
FUSEREG_DEVICE_INLINE void activate(C (&z)[kOctet], Activation activation, C slope) {
  switch (activation) {
    case Activation::kRelu:
      FUSEREG_UNROLL
      for (int e = 0; e < kOctet; ++e) z[e] = z[e] < C(0) ? C(0) : z[e];
      break;
    case Activation::kLeakyRelu:
      FUSEREG_UNROLL
      for (int e = 0; e < kOctet; ++e) z[e] = z[e] < C(0) ? z[e] * slope : z[e];
      break;
    case Activation::kSilu:
      if constexpr (kHeavy) {
        FUSEREG_UNROLL
        for (int e = 0; e < kOctet; ++e) z[e] = silu(z[e]);
      }
      break;
    case Activation::kGelu:
      if constexpr (kHeavy) {
        FUSEREG_UNROLL
        for (int e = 0; e < kOctet; ++e) z[e] = gelu(z[e]);
      }
      break;
    default:
      break;
  }
}

// Whether a ReLU or leaky ReLU passes the gradient on whole: a NaN's only a ReLU (batch_norm.h).
template <class C>
FUSEREG_DEVICE_INLINE bool passes(C z, bool relu) {
  return z > C(0) || (relu && z != z);
}

// dz *= activation'(z); of ReLU and leaky ReLU, `positive` tells.
template <bool kHeavy, class C>
FUSEREG_DEVICE_INLINE void activate_backward(C (&dz)[kOctet], const C (&z)[kOctet],
                                             unsigned positive, Activation activation, C slope) {
  switch (activation) {
    case Activation::kRelu:
      FUSEREG_UNROLL
      for (int e = 0; e < kOctet; ++e) dz[e] = (positive >> e & 1u) != 0 ? dz[e] : C(0);
      break;
    case Activation::kLeakyRelu:
      FUSEREG_UNROLL
      for (int e = 0; e < kOctet; ++e) dz[e] = (positive >> e & 1u) != 0 ? dz[e] : dz[e] * slope;
      break;
    case Activation::kSilu:
      if constexpr (kHeavy) {
        FUSEREG_UNROLL
        for (int e = 0; e < kOctet; ++e) dz[e] *= silu_derivative(z[e]);
      }
      break;
    case Activation::kGelu:
      if constexpr (kHeavy) {
        FUSEREG_UNROLL
        for (int e = 0; e < kOctet; ++e) dz[e] *= gelu_derivative(z[e]);
      }
      break;
    default:
      break;
  }
}

// --- forward ---

template <class T, bool kWide>
struct ForwardData {
  Octet<T, kWide> x, residual;
};

template <class Walk, class T>
FUSEREG_DEVICE_INLINE void finish_octet_inputs(const Forward& job, const Place& place,
                                               ForwardData<T, Walk::kWide>& data) {
  if (job.residual != nullptr) {
    data.residual = load_octet<Walk>(static_cast<const T*>(job.residual), place);
  }
  data.residual.raw.join();
}

template <bool kHeavy, class Walk, class T, class C>
FUSEREG_DEVICE_INLINE void write_forward(const Forward& job, const Plain<C>& plain,
                                         const Kept<C, Walk::kSets>& k, const Place& place,
                                         const ForwardData<T, Walk::kWide>& data) {
  C z[kOctet];
  FUSEREG_UNROLL
  for (int e = 0; e < kOctet; ++e) {
    const int i = Walk::kSets == 1 ? 0 : e;
    z[e] = multiply_add(to_compute(data.x[e]) - k.m[i], k.a[i], k.b[i]);
  }
  if (job.residual != nullptr) {
    FUSEREG_UNROLL
    for (int e = 0; e < kOctet; ++e) z[e] += to_compute(data.residual[e]);
  }
  if (job.bits != nullptr) {
    unsigned positive = 0;
    const bool relu = job.epilogue.activation == Activation::kRelu;
    FUSEREG_UNROLL
    for (int e = 0; e < kOctet; ++e) positive |= static_cast<unsigned>(passes(z[e], relu)) << e;
    job.bits[place.bits_at] = static_cast<std::uint8_t>(positive & place.live);
  }
  activate<kHeavy>(z, job.epilogue.activation, plain.slope);
  unsigned live = place.live;
  if constexpr (kHeavy) {
    if (job.epilogue.dropout) {
      live &= kept_bits(job.epilogue, plain, place.at);
      FUSEREG_UNROLL
      for (int e = 0; e < kOctet; ++e) z[e] *= plain.scale;
    }
  }
  const auto y = Octet<T>::rounded([&](int e) { return (live >> e & 1u) != 0 ? z[e] : C(0); });
  store_octet<Walk>(static_cast<T*>(job.y), place, y);
}

// --- backward ---

template <class T, bool kWide>
struct BackwardData {
  Octet<T, kWide> grad, x, residual;
  unsigned positive;
  unsigned kept;  // by dropout; kHeavy only
};

// Draws come first: they want registers that the octet's data take afterwards.
template <bool kHeavy, class Walk, class T, class C>
FUSEREG_DEVICE_INLINE BackwardData<T, Walk::kWide> drawn(const Backward& job, const Plain<C>& plain,
                                                         const Place& place) {
  BackwardData<T, Walk::kWide> data{};
  if constexpr (kHeavy) {
    data.kept = kAllInside;
    if (job.epilogue.dropout) data.kept = kept_bits(job.epilogue, plain, place.at);
  }
  return data;
}

// What is not kept on the chip: the residual, where one is needed, and the bits.
template <class Walk, class T>
FUSEREG_DEVICE_INLINE void finish_octet_inputs(const Backward& job, const Place& place,
                                               BackwardData<T, Walk::kWide>& data) {
  data.positive = 0;
  if (job.bits != nullptr) {
    data.positive = place.inside != 0 ? job.bits[place.bits_at] : 0u;
  } else if (job.residual != nullptr) {
    data.residual = load_octet<Walk>(static_cast<const T*>(job.residual), place);
  }
  data.residual.raw.join();
}

template <bool kHeavy, class Walk, class T, class C>
FUSEREG_DEVICE_INLINE BackwardData<T, Walk::kWide> load_backward(const Backward& job,
                                                                 const Plain<C>& plain,
                                                                 const Place& place) {
  auto data = drawn<kHeavy, Walk, T>(job, plain, place);
  data.grad = load_octet<Walk>(static_cast<const T*>(job.grad), place);
  if (job.x != nullptr) data.x = load_octet<Walk>(static_cast<const T*>(job.x), place);
  data.x.raw.join();
  finish_octet_inputs<Walk>(job, place, data);
  return data;
}

// dz, and d = x - m (with from_y: z - m); both zero for elements that do not count.
template <bool kHeavy, class Walk, class T, class C>
FUSEREG_DEVICE_INLINE void gradient_of_z(const Backward& job, const Plain<C>& plain,
                                         const Kept<C, Walk::kSets>& k, const Place& place,
                                         const BackwardData<T, Walk::kWide>& data, C (&dz)[kOctet],
                                         C (&d)[kOctet]) {
  constexpr bool kFromY = !(kHeavy && Walk::kWide);  // it goes with none of the three
  const bool from_y = kFromY && job.from_y;
  unsigned positive = data.positive;
  const unsigned kept = kHeavy ? data.kept & place.live : place.live;
  FUSEREG_UNROLL
  for (int e = 0; e < kOctet; ++e) {
    const int i = Walk::kSets == 1 ? 0 : e;
    dz[e] = to_compute(data.grad[e]);
    if constexpr (kHeavy) dz[e] *= plain.scale;
    C x = to_compute(data.x[e]);
    if (from_y) {
      positive |= static_cast<unsigned>(x > C(0)) << e;
      if (!(x > C(0))) x *= plain.inverse_slope;
    }
    d[e] = job.x != nullptr ? x - k.m[i] : C(0);
  }
  if (job.epilogue.activation != Activation::kNone) {
    C z[kOctet];
    if (job.bits == nullptr && !from_y) {
      const bool relu = job.epilogue.activation == Activation::kRelu;
      FUSEREG_UNROLL
      for (int e = 0; e < kOctet; ++e) {
        const int i = Walk::kSets == 1 ? 0 : e;
        z[e] = multiply_add(d[e], k.a[i], k.b[i]);
        if (job.residual != nullptr) z[e] += to_compute(data.residual[e]);
        positive |= static_cast<unsigned>(passes(z[e], relu)) << e;
      }
    } else {
      FUSEREG_UNROLL
      for (int e = 0; e < kOctet; ++e) z[e] = C(0);
    }
    activate_backward<kHeavy>(dz, z, positive, job.epilogue.activation, plain.slope);
  }
  if (kept != kAllInside) {
    FUSEREG_UNROLL
    for (int e = 0; e < kOctet; ++e) {
      if ((kept >> e & 1u) == 0) dz[e] = C(0);
      if ((place.live >> e & 1u) == 0) d[e] = C(0);
    }
  }
}

template <bool kHeavy, class Walk, class T, class C>
FUSEREG_DEVICE_INLINE void write_backward(const Backward& job, const Plain<C>& plain,
                                          const Kept<C, Walk::kSets>& k, const C (&q)[Walk::kSets],
                                          const C (&r)[Walk::kSets], const Place& place,
                                          const BackwardData<T, Walk::kWide>& data) {
  C dz[kOctet];
  C d[kOctet];
  gradient_of_z<kHeavy, Walk>(job, plain, k, place, data, dz, d);
  if (job.grad_residual != nullptr) {
    store_octet<Walk>(static_cast<T*>(job.grad_residual), place,
                      Octet<T>::rounded([&](int e) { return dz[e]; }));
  }
  if (job.grad_x == nullptr) return;
  // Constant statistics: no 0 * (x - m), which would be NaN where x is infinite.
  const bool fixed = job.statistics == Statistics::kFixed;
  const auto out = Octet<T>::rounded([&](int e) {
    const int i = Walk::kSets == 1 ? 0 : e;
    const C v =
        fixed ? dz[e] * k.a[i] : multiply_add(dz[e], k.a[i], multiply_add(d[e], q[i], r[i]));
    return (place.live >> e & 1u) != 0 ? v : C(0);
  });
  store_octet<Walk>(static_cast<T*>(job.grad_x), place, out);
}

template <class Walk, class C>
FUSEREG_DEVICE_INLINE Kept<C, Walk::kSets> kept_coefficients(const Walk& walk,
                                                             const ChannelNumbers<C>& all) {
  Kept<C, Walk::kSets> k;
  FUSEREG_UNROLL
  for (int e = 0; e < Walk::kSets; ++e) {
    const int c = walk.channel(e);
    k.m[e] = all.m[c];
    k.a[e] = all.a[c];
    k.b[e] = all.b[c];
  }
  return k;
}

template <class Walk, class C>
FUSEREG_DEVICE_INLINE void kept_gradient(const Walk& walk, const ChannelNumbers<C>& all,
                                         C (&q)[Walk::kSets], C (&r)[Walk::kSets]) {
  FUSEREG_UNROLL
  for (int e = 0; e < Walk::kSets; ++e) {
    q[e] = all.q[walk.channel(e)];
    r[e] = all.r[walk.channel(e)];
  }
}

}  // namespace fusereg::batch_norm
