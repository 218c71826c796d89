// CPU kernels of dropout; compiled once per instruction set. Contract: dropout.h.
#include "dropout/dropout.h"

#include "core/philox.h"
#include "core/simd.h"
#include "dropout/dropout_math.h"

namespace fusereg::dropout::FUSEREG_ISA {
namespace {

using namespace ::fusereg::FUSEREG_ISA;

// Draws of a vector call, and elements that share it: two vectors of draws.
template <int kBits>
inline constexpr int kBlock = 2 * kVectorBytes * 8 / kBits;

template <int kBits>
struct DrawType;
template <>
struct DrawType<16> {
  using type = std::uint16_t;
  using Signed = std::int16_t;
};
template <>
struct DrawType<32> {
  using type = std::uint32_t;
  using Signed = std::int32_t;
};

// All ones where the element is kept, as wide as the type that computes.
template <class C>
struct MaskType {
  using type = std::int32_t;
};
template <>
struct MaskType<double> {
  using type = std::int64_t;
};
template <class C>
using MaskVector = Vector<typename MaskType<C>::type>;

template <class C>
struct Constants {
  Vector<C> a, b, c;
};

template <class C>
FUSEREG_INLINE Constants<C> constants(const Affine& f) {
  return {broadcast(static_cast<C>(f.a)), broadcast(static_cast<C>(f.b)), broadcast(static_cast<C>(f.c))};
}

// keep ? a * x + b : c
template <bool kLinear, class C>
FUSEREG_INLINE Vector<C> apply(Vector<C> x, MaskVector<C> keep, const Constants<C>& k) {
  Vector<C> y = x * k.a;
  if constexpr (kLinear) return bit_cast<Vector<C>>(bit_cast<MaskVector<C>>(y) & keep);
  y += k.b;
  return bit_cast<Vector<C>>((bit_cast<MaskVector<C>>(y) & keep) | (bit_cast<MaskVector<C>>(k.c) & ~keep));
}

// The masks of one vector of draws, widened to those of the vectors of C that they stand for.
template <class C, int kBits>
struct Masks {
  using D = typename DrawType<kBits>::type;
  using S = typename DrawType<kBits>::Signed;
  using M = typename MaskType<C>::type;
  static constexpr int kParts = static_cast<int>(sizeof(M) / sizeof(S));
  typedef S Part __attribute__((vector_size(kVectorBytes / kParts)));
  struct Parts {
    Part part[kParts];
  };
  MaskVector<C> mask[kParts];

  static __attribute__((always_inline)) inline Masks make(U64Vector draws, Vector<D> threshold) {
    const auto keep = bit_cast<Parts>(bit_cast<Vector<D>>(draws) < threshold);
    Masks masks;
    FUSEREG_UNROLL_10
    for (int i = 0; i < kParts; ++i) {
      if constexpr (kParts == 1) {
        masks.mask[i] = keep.part[i];
      } else {
        masks.mask[i] = __builtin_convertvector(keep.part[i], MaskVector<C>);
      }
    }
    return masks;
  }
};

// One block of elements, all of them there; `block` counts blocks from index 0.
template <class T, int kBits, bool kLinear>
FUSEREG_INLINE void whole_block(const T* x, T* y, std::uint64_t block, const Stream& s,
                                const Constants<Compute<T>>& k) {
  using C = Compute<T>;
  using D = typename DrawType<kBits>::type;
  constexpr int kW = kWidth<C>;
  U64Vector draws[2];
  philox_chunks(s.seed, s.low, block * kPhiloxChunks, draws);
  const Vector<D> threshold = Vector<D>{} + static_cast<D>(s.draw.threshold);
  FUSEREG_UNROLL_10
  for (int half = 0; half < 2; ++half) {
    const auto masks = Masks<C, kBits>::make(draws[half], threshold);
    FUSEREG_UNROLL_10
    for (int i = 0; i < Masks<C, kBits>::kParts; ++i) {
      const int at = half * (kBlock<kBits> / 2) + i * kW;
      store(y + at, apply<kLinear, C>(load(x + at), masks.mask[i], k));
    }
  }
}

template <class T, int kBits, bool kLinear>
void elements(const T* x, T* y, std::int64_t n, std::uint64_t index, const Stream& stream) {
  // A copy that nobody else can see: the compiler may keep it in registers across the stores to y.
  const Stream s = stream;
  const auto k = constants<Compute<T>>(s.affine);
  constexpr auto kSize = static_cast<std::uint64_t>(kBlock<kBits>);
  std::uint64_t block = index / kSize;
  // The first and the last block may be there in part: they go through a buffer.
  auto partial = [&](std::int64_t skip, std::int64_t count) {
    T buffer[kBlock<kBits>];
    memset(buffer, 0, sizeof(buffer));
    memcpy(buffer + skip, x, static_cast<std::size_t>(count) * sizeof(T));
    whole_block<T, kBits, kLinear>(buffer, buffer, block, s, k);
    memcpy(y, buffer + skip, static_cast<std::size_t>(count) * sizeof(T));
    x += count;
    y += count;
    n -= count;
    ++block;
  };
  const auto skip = static_cast<std::int64_t>(index % kSize);
  if (skip != 0) partial(skip, n < kBlock<kBits> - skip ? n : kBlock<kBits> - skip);
  for (; n >= kBlock<kBits>; n -= kBlock<kBits>) {
    whole_block<T, kBits, kLinear>(x, y, block, s, k);
    x += kBlock<kBits>;
    y += kBlock<kBits>;
    ++block;
  }
  if (n > 0) partial(0, n);
}

void elements_any(DType dtype, const void* x, void* y, std::int64_t n, std::uint64_t index, const Stream& s) {
  dispatch_dtype(dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    const T* const from = static_cast<const T*>(x);
    T* const to = static_cast<T*>(y);
    if (s.draw.bits == 16) {
      if (s.affine.linear()) {
        elements<T, 16, true>(from, to, n, index, s);
      } else {
        elements<T, 16, false>(from, to, n, index, s);
      }
    } else if (s.affine.linear()) {
      elements<T, 32, true>(from, to, n, index, s);
    } else {
      elements<T, 32, false>(from, to, n, index, s);
    }
  });
}

// --- rows ---

// As apply() with the same mask for each line, given as one word of ones or zeros an element.
template <class T, bool kLinear>
FUSEREG_INLINE void masked_line(const T* x, T* y, std::int64_t n, const typename MaskType<Compute<T>>::type* keep,
                                const Constants<Compute<T>>& k) {
  using C = Compute<T>;
  constexpr int kW = kWidth<C>;
  for (std::int64_t i = 0; i < n; i += kW) {
    MaskVector<C> mask;
    memcpy(&mask, keep + i, sizeof(mask));
    if (n - i >= kW) {
      store(y + i, apply<kLinear, C>(load(x + i), mask, k));
    } else {
      store_partial(y + i, apply<kLinear, C>(load_partial(x + i, n - i), mask, k), n - i);
    }
  }
}

template <class T>
void row(const T* x, T* y, std::int64_t n, bool keep, const Affine& affine) {
  using C = Compute<T>;
  constexpr int kW = kWidth<C>;
  const auto k = constants<C>(affine);
  std::int64_t i = 0;
  if (!keep) {
    for (; i + kW <= n; i += kW) store(y + i, k.c);
    if (i < n) store_partial(y + i, k.c, n - i);
    return;
  }
  // -0.0 + 0.0 is +0.0, so a b of 0 must not be added.
  const bool linear = affine.linear();
  const MaskVector<C> all = ~MaskVector<C>{};
  for (; i + kW <= n; i += kW) {
    const Vector<C> v = load(x + i);
    store(y + i, linear ? apply<true, C>(v, all, k) : apply<false, C>(v, all, k));
  }
  if (i < n) {
    const Vector<C> v = load_partial(x + i, n - i);
    store_partial(y + i, linear ? apply<true, C>(v, all, k) : apply<false, C>(v, all, k), n - i);
  }
}

void row_any(DType dtype, const void* x, void* y, std::int64_t n, bool keep, const Affine& affine) {
  dispatch_dtype(dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    row(static_cast<const T*>(x), static_cast<T*>(y), n, keep, affine);
  });
}

template <class T, bool kLinear>
void columns(const T* x, T* y, std::int64_t n, std::int64_t repeat, std::int64_t stride, std::uint64_t index,
             const Stream& s) {
  using M = typename MaskType<Compute<T>>::type;
  const auto k = constants<Compute<T>>(s.affine);
  M keep[kMaxColumns + 64];
  memset(keep, 0, sizeof(keep));
  std::uint32_t mask = 0;
  for (std::int64_t i = 0; i < n; ++i) {
    const std::uint64_t at = index + static_cast<std::uint64_t>(i);
    if (i == 0 || at % kGroup == 0) {
      mask = s.draw.bits == 16 ? keep_mask<16>(s.seed, s.low, at / kGroup, s.draw.threshold)
                               : keep_mask<32>(s.seed, s.low, at / kGroup, s.draw.threshold);
    }
    keep[i] = -static_cast<M>(mask >> (at % kGroup) & 1u);
  }
  for (std::int64_t r = 0; r < repeat; ++r) masked_line<T, kLinear>(x + r * stride, y + r * stride, n, keep, k);
}

void columns_any(DType dtype, const void* x, void* y, std::int64_t n, std::int64_t repeat, std::int64_t stride,
                 std::uint64_t index, const Stream& s) {
  dispatch_dtype(dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    if (s.affine.linear()) {
      columns<T, true>(static_cast<const T*>(x), static_cast<T*>(y), n, repeat, stride, index, s);
    } else {
      columns<T, false>(static_cast<const T*>(x), static_cast<T*>(y), n, repeat, stride, index, s);
    }
  });
}

int words(std::uint64_t seed, std::uint64_t low, std::uint64_t high, std::uint32_t* out) {
  U64Vector draws[2];
  static_assert(sizeof(draws) <= kMaxWords * sizeof(std::uint32_t), "the caller's buffer");
  philox_chunks(seed, low, high, draws);
  memcpy(out, draws, sizeof(draws));
  return kPhiloxChunks;
}

}  // namespace

const CpuKernels kernels = {&elements_any, &row_any, &columns_any, &words};

}  // namespace fusereg::dropout::FUSEREG_ISA
