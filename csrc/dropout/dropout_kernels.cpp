// CPU kernels of dropout; compiled once per instruction set. Contract: dropout.h.
#include "core/draw_simd.h"
#include "dropout/dropout.h"

namespace fusereg::dropout::FUSEREG_ISA {
namespace {

using namespace ::fusereg::FUSEREG_ISA;

template <class C>
struct Constants {
  Vector<C> a, b, c;
};

template <class C>
FUSEREG_INLINE Constants<C> constants(const Affine& f) {
  return {broadcast(static_cast<C>(f.a)), broadcast(static_cast<C>(f.b)),
          broadcast(static_cast<C>(f.c))};
}

// keep ? a * x + b : c
template <bool kLinear, class C>
FUSEREG_INLINE Vector<C> apply(Vector<C> x, MaskVector<C> keep, const Constants<C>& k) {
  Vector<C> y = x * k.a;
  if constexpr (kLinear) return bit_cast<Vector<C>>(bit_cast<MaskVector<C>>(y) & keep);
  y += k.b;
  return bit_cast<Vector<C>>((bit_cast<MaskVector<C>>(y) & keep) |
                             (bit_cast<MaskVector<C>>(k.c) & ~keep));
}

#if defined(__AVX512F__)

// The multiplication itself leaves zeros.
template <bool kLinear>
FUSEREG_INLINE Vector<float> apply(Vector<float> x, Bits keep, const Constants<float>& k) {
  const auto mask = static_cast<__mmask16>(keep);
  if constexpr (kLinear) return _mm512_maskz_mul_ps(mask, x, k.a);
  return _mm512_mask_add_ps(k.c, mask, x * k.a, k.b);
}
template <bool kLinear>
FUSEREG_INLINE Vector<double> apply(Vector<double> x, Bits keep, const Constants<double>& k) {
  const auto mask = static_cast<__mmask8>(keep);
  if constexpr (kLinear) return _mm512_maskz_mul_pd(mask, x, k.a);
  return _mm512_mask_add_pd(k.c, mask, x * k.a, k.b);
}

#endif

// Whether elements are computed in pairs.
template <class T, int kBits>
inline constexpr bool kPairs = kLaneBits<kBits> == 16 && Traits<T>::kDType == DType::kBFloat16;

// bfloat16 with 16-bit draws: the elements at even and at odd positions are computed where they
// lie, each in the upper half of a float, so that nothing is ever unpacked or packed.
template <bool kTies>
FUSEREG_INLINE U32Vector round_to_bfloat16(Vector<float> v) {
  // In the upper halves; the lower ones are rubbish. As store(BFloat16*) rounds, but for NaN, which
  // needs no care here: it comes from x, so its lower half is 0, and what is added carries nothing
  // into the upper one. Where no number lies in the middle between two of bfloat16 (kTies), half a
  // last place more does it.
  const auto u = bit_cast<U32Vector>(v);
  if constexpr (!kTies) return u + 0x8000u;
#if defined(__AVX512F__)
  const __m512i up = bit_cast<__m512i>(u + 0x7fffu);
  const __mmask16 odd = _mm512_test_epi32_mask(bit_cast<__m512i>(u), _mm512_set1_epi32(0x10000));
  return bit_cast<U32Vector>(_mm512_mask_sub_epi32(up, odd, up, _mm512_set1_epi32(-1)));
#else
  return u + (((u >> 16) & 1u) + 0x7fffu);
#endif
}

// Whether the product of some bfloat16 number and a lies in the middle between two of them: mostly
// not. The digits of a product depend on its exponent only where it is subnormal, which it never is
// for exponents of x above the first two.
[[maybe_unused]] __attribute__((noinline)) static bool has_ties(float a) {
  if (!(a >= 0.5f)) return true;
  constexpr std::uint32_t kPatterns = 3 << 7;
  U32Vector x{};
  for (int i = 0; i < kWidth<float>; ++i) x[i] = static_cast<std::uint32_t>(i);
  U32Vector found{};
  for (std::uint32_t i = 0; i < kPatterns; i += kWidth<float>) {
    const auto u = bit_cast<U32Vector>(bit_cast<Vector<float>>((x + i) << 16) * broadcast(a));
    found |= bit_cast<U32Vector>((u << 16) == 0x80000000u);
  }
  std::uint32_t any = 0;
  for (int i = 0; i < kWidth<float>; ++i) any |= found[i];
  return any != 0;
}

template <bool kLinear, bool kTies>
FUSEREG_INLINE void bfloat16_vector(const BFloat16* x, BFloat16* y, U64Vector draws,
                                    DrawVector<16> threshold, const Constants<float>& k) {
  U32Vector u;
  memcpy(&u, x, sizeof(u));
  Vector<float> even = bit_cast<Vector<float>>(u << 16) * k.a;
  Vector<float> odd = bit_cast<Vector<float>>(u & 0xffff0000u) * k.a;
  if constexpr (!kLinear) {
    even += k.b;
    odd += k.b;
  }
  const auto pair = bit_cast<DrawVector<16>>((round_to_bfloat16<kTies>(even) >> 16) |
                                             (round_to_bfloat16<kTies>(odd) & 0xffff0000u));
  DrawVector<16> dropped{};
  if constexpr (!kLinear) {
    const U32Vector c = round_to_bfloat16<true>(k.c);
    dropped = bit_cast<DrawVector<16>>((c >> 16) | (c & 0xffff0000u));
  }
  const DrawVector<16> result = bit_cast<DrawVector<16>>(draws) < threshold ? pair : dropped;
  memcpy(y, &result, sizeof(result));
}

// One block of elements, all of them there; `block` counts blocks from index 0.
template <class T, int kBits, bool kLinear, bool kTies>
FUSEREG_INLINE void whole_block(const T* x, T* y, std::uint64_t block, MaskDraws<kBits>& mask_draws,
                                DrawVector<kBits> threshold, const Constants<Compute<T>>& k) {
  using C = Compute<T>;
  constexpr int kHalf = kBlock<kBits> / 2;
  U64Vector draws[2];
  mask_draws.make(block, draws);
  FUSEREG_UNROLL_10
  for (int half = 0; half < 2; ++half) {
    if constexpr (kPairs<T, kBits>) {
      bfloat16_vector<kLinear, kTies>(x + half * kHalf, y + half * kHalf, draws[half], threshold,
                                      k);
    } else {
      const auto masks = Masks<C, kBits>::make(draws[half], threshold);
      FUSEREG_UNROLL_10
      for (int i = 0; i < Masks<C, kBits>::kParts; ++i) {
        const int at = half * kHalf + i * kWidth<C>;
        store(y + at, apply<kLinear>(load(x + at), masks.part(i), k));
      }
    }
  }
}

// Asks for the lines that a later block will read and write. Between a block's loads lie so many
// rounds of Philox that the processor looks only a few blocks ahead by itself: from memory, this
// alone makes float32 2.5 times as fast. Addresses past the end do no harm.
template <class T, int kBits>
FUSEREG_INLINE void prefetch_block(const T* x, const T* y) {
  constexpr std::uintptr_t kAhead = 2048;  // bytes
  constexpr std::uintptr_t kLine = 64;
  const auto from = reinterpret_cast<std::uintptr_t>(x) + kAhead;
  const auto to = reinterpret_cast<std::uintptr_t>(y) + kAhead;
  for (std::uintptr_t b = 0; b < kBlock<kBits> * sizeof(T); b += kLine) {
    __builtin_prefetch(reinterpret_cast<const void*>(from + b), 0);
    __builtin_prefetch(reinterpret_cast<const void*>(to + b), 1);
  }
}

template <class T, int kBits, bool kLinear, bool kTies>
void elements(const T* x, T* y, std::int64_t n, std::uint64_t index, const Stream& s) {
  const MaskKeys keys(s.seed);
  MaskDraws<kBits> mask_draws(keys, s.low, s.draw);
  const DrawVector<kBits> threshold =
      DrawVector<kBits>{} + static_cast<typename DrawType<kBits>::type>(s.draw.threshold);
  const auto k = constants<Compute<T>>(s.affine);
  constexpr auto kSize = static_cast<std::uint64_t>(kBlock<kBits>);
  std::uint64_t block = index / kSize;
  // The first and the last block may be there in part: they go through a buffer.
  auto partial = [&](std::int64_t skip, std::int64_t count) {
    T buffer[kBlock<kBits>];
    memset(buffer, 0, sizeof(buffer));
    memcpy(buffer + skip, x, static_cast<std::size_t>(count) * sizeof(T));
    whole_block<T, kBits, kLinear, kTies>(buffer, buffer, block, mask_draws, threshold, k);
    memcpy(y, buffer + skip, static_cast<std::size_t>(count) * sizeof(T));
    x += count;
    y += count;
    n -= count;
    ++block;
  };
  const auto skip = static_cast<std::int64_t>(index % kSize);
  if (skip != 0) partial(skip, n < kBlock<kBits> - skip ? n : kBlock<kBits> - skip);
  for (; n >= kBlock<kBits>; n -= kBlock<kBits>) {
    prefetch_block<T, kBits>(x, y);
    whole_block<T, kBits, kLinear, kTies>(x, y, block, mask_draws, threshold, k);
    x += kBlock<kBits>;
    y += kBlock<kBits>;
    ++block;
  }
  if (n > 0) partial(0, n);
}

void elements_any(DType dtype, const void* x, void* y, std::int64_t n, std::uint64_t index,
                  const Stream& s) {
  dispatch_dtype(dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    const T* const from = static_cast<const T*>(x);
    T* const to = static_cast<T*>(y);
    dispatch_bits(s.draw, [&](auto bits) {
      constexpr int kBits = decltype(bits)::value;
      if (!s.affine.linear()) {
        elements<T, kBits, false, true>(from, to, n, index, s);
        return;
      }
      if constexpr (kPairs<T, kBits>) {
        // Processors are slow at subnormal numbers: to look takes as long as thousands of elements.
        constexpr std::int64_t kWorthLooking = 4096;
        if (n >= kWorthLooking && !has_ties(static_cast<float>(s.affine.a))) {
          elements<T, kBits, true, false>(from, to, n, index, s);
          return;
        }
      }
      elements<T, kBits, true, true>(from, to, n, index, s);
    });
  });
}

// --- rows ---

// As apply() with the same mask for each line, given as one word of ones or zeros an element.
template <class T, bool kLinear>
FUSEREG_INLINE void masked_line(const T* x, T* y, std::int64_t n,
                                const typename MaskType<Compute<T>>::type* keep,
                                const Constants<Compute<T>>& k) {
  using C = Compute<T>;
  constexpr int kW = kWidth<C>;
  for (std::int64_t i = 0; i < n; i += kW) {
    MaskVector<C> mask;
    memcpy(&mask, keep + i, sizeof(mask));
    if (n - i >= kW) {
      store(y + i, apply<kLinear>(load(x + i), mask, k));
    } else {
      store_partial(y + i, apply<kLinear>(load_partial(x + i, n - i), mask, k), n - i);
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
    store(y + i, linear ? apply<true>(v, all, k) : apply<false>(v, all, k));
  }
  if (i < n) {
    const Vector<C> v = load_partial(x + i, n - i);
    store_partial(y + i, linear ? apply<true>(v, all, k) : apply<false>(v, all, k), n - i);
  }
}

void row_any(DType dtype, const void* x, void* y, std::int64_t n, bool keep, const Affine& affine) {
  dispatch_dtype(dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    row(static_cast<const T*>(x), static_cast<T*>(y), n, keep, affine);
  });
}

template <class T, bool kLinear>
void columns(const T* x, T* y, std::int64_t n, std::int64_t repeat, std::int64_t stride,
             std::uint64_t index, const Stream& s) {
  using M = typename MaskType<Compute<T>>::type;
  const auto k = constants<Compute<T>>(s.affine);
  M keep[kMaxColumns + 64];
  memset(keep, 0, sizeof(keep));
  std::uint32_t mask = 0;
  for (std::int64_t i = 0; i < n; ++i) {
    const std::uint64_t at = index + static_cast<std::uint64_t>(i);
    if (i == 0 || at % kGroup == 0) mask = keep_mask(s.seed, s.low, at / kGroup, s.draw);
    keep[i] = -static_cast<M>(mask >> (at % kGroup) & 1u);
  }
  for (std::int64_t r = 0; r < repeat; ++r)
    masked_line<T, kLinear>(x + r * stride, y + r * stride, n, keep, k);
}

void columns_any(DType dtype, const void* x, void* y, std::int64_t n, std::int64_t repeat,
                 std::int64_t stride, std::uint64_t index, const Stream& s) {
  dispatch_dtype(dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    if (s.affine.linear()) {
      columns<T, true>(static_cast<const T*>(x), static_cast<T*>(y), n, repeat, stride, index, s);
    } else {
      columns<T, false>(static_cast<const T*>(x), static_cast<T*>(y), n, repeat, stride, index, s);
    }
  });
}

int words(int rounds, std::uint64_t seed, std::uint64_t low, std::uint64_t high,
          std::uint32_t* out) {
  U64Vector draws[2];
  static_assert(sizeof(draws) <= kMaxWords * sizeof(std::uint32_t), "the caller's buffer");
  if (rounds == kMaskRounds) {
    philox_chunks(MaskKeys(seed), low, high, draws);
  } else {
    philox_chunks(PhiloxKeys<kNumberRounds>(seed), low, high, draws);
  }
  memcpy(out, draws, sizeof(draws));
  return kPhiloxChunks;
}

}  // namespace

const CpuKernels kernels = {&elements_any, &row_any, &columns_any, &words};

}  // namespace fusereg::dropout::FUSEREG_ISA
