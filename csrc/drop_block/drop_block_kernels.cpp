// CPU kernels of DropBlock; compiled once per instruction set. Contract: drop_block.h.
#include "core/draw_simd.h"
#include "drop_block/drop_block.h"

namespace fusereg::drop_block::FUSEREG_ISA {
namespace {

using namespace ::fusereg::FUSEREG_ISA;

// --- corners to bits ---
// Bit e is set if element e of a vector of draws is kept.
template <int kBits>
FUSEREG_INLINE std::uint64_t kept_bits(U64Vector draws, DrawVector<kBits> threshold) {
#if defined(__AVX512F__)
  return Masks<float, kBits>::make(draws, threshold).bits;
#else
  const auto keep = bit_cast<DrawVector<kBits>>(draws) < threshold;
#if defined(__AVX2__)
  if constexpr (kBits == 32) {
    return static_cast<std::uint32_t>(_mm256_movemask_ps(bit_cast<__m256>(keep)));
  } else {
    const int twice = _mm256_movemask_epi8(bit_cast<__m256i>(keep));
    return _pext_u32(static_cast<std::uint32_t>(twice), 0x55555555u);
  }
#elif defined(__SSE2__)
  if constexpr (kBits == 32) {
    return static_cast<std::uint32_t>(_mm_movemask_ps(bit_cast<__m128>(keep)));
  } else {
    const __m128i m = bit_cast<__m128i>(keep);
    return static_cast<std::uint32_t>(_mm_movemask_epi8(_mm_packs_epi16(m, m))) & 0xffu;
  }
#elif defined(__aarch64__)
  if constexpr (kBits == 32) {
    return bits_of(bit_cast<uint32x4_t>(keep));
  } else {
    return bits_of(bit_cast<uint16x8_t>(keep));
  }
#else
  std::uint64_t bits = 0;
  for (int e = 0; e < kBlock<kBits> / 2; ++e) bits |= static_cast<std::uint64_t>(keep[e] != 0) << e;
  return bits;
#endif
#endif
}

FUSEREG_INLINE void set_bits(std::uint32_t* bits, std::int64_t at, std::int64_t n) {
  std::uint32_t* word = bits + at / 32;
  const auto from = static_cast<int>(at % 32);
  if (from + n <= 32) {
    *word |= (0xffffffffu >> (32 - n)) << from;
    return;
  }
  *word++ |= 0xffffffffu << from;
  n -= 32 - from;
  for (; n >= 32; n -= 32) *word++ = 0xffffffffu;
  if (n > 0) *word |= 0xffffffffu >> (32 - n);
}

// Blocks overlap, and corners are rare: marking each block costs about 2 p / b operations an
// element.
template <int kBits>
void mark_blocks(const Job& job, const Tile& tile, std::uint32_t* bits) {
  const Geometry& g = job.geometry;
  const MaskKeys keys(job.random.key());
  MaskDraws<kBits> mask_draws(keys, job.random.low(), job.draw);
  const DrawVector<kBits> threshold =
      DrawVector<kBits>{} + static_cast<typename DrawType<kBits>::type>(job.draw.threshold);
  constexpr std::int64_t kSize = kBlock<kBits>;
  constexpr auto kAll = ~std::uint64_t{0} >> (64 - kSize);
  const Runs runs = corner_runs(g, tile);
  for (std::int64_t run = 0; run < runs.count; ++run) {
    const std::int64_t first = runs.first + run * runs.stride;
    const std::uint64_t index = job.index_offset + static_cast<std::uint64_t>(first);
    auto skip = static_cast<std::int64_t>(index % kSize);
    std::uint64_t block = index / kSize;
    for (std::int64_t at = -skip; at < runs.length; at += kSize, ++block) {
      U64Vector draws[2];
      mask_draws.make(block, draws);
      std::uint64_t corners = kAll & ~(kept_bits<kBits>(draws[0], threshold) |
                                       kept_bits<kBits>(draws[1], threshold) << (kSize / 2));
      if (at < 0) corners &= kAll << -at;
      if (runs.length - at < kSize) corners &= kAll >> (kSize - (runs.length - at));
      for (; corners != 0; corners &= corners - 1) {
        const std::int64_t corner = first + at + __builtin_ctzll(corners);
        for_block(g, tile, corner,
                  [bits](std::int64_t bit, std::int64_t n) { set_bits(bits, bit, n); });
      }
    }
  }
}

std::int64_t mark(const Job& job, const Tile& tile, std::uint32_t* bits) {
  const Geometry& g = job.geometry;
  const std::int64_t planes = g.channels_last ? g.tile_planes : tile.planes;
  const std::int64_t words = (planes * tile.rows * g.w + 31) / 32;
  memset(bits, 0, static_cast<std::size_t>(words) * sizeof(*bits));
  dispatch_bits(job.draw,
                [&](auto draw_bits) { mark_blocks<decltype(draw_bits)::value>(job, tile, bits); });
  std::int64_t dropped = 0;
  for (std::int64_t i = 0; i < words; ++i) dropped += __builtin_popcount(bits[i]);
  return dropped;
}

// --- bits to elements ---
// x * scale, 0 where the low bits of `dropped` say so.
template <class C>
FUSEREG_INLINE Vector<C> scaled(Vector<C> x, std::uint32_t dropped, Vector<C> scale) {
#if defined(__AVX512F__)
  if constexpr (sizeof(C) == 4) {
    return _mm512_maskz_mul_ps(static_cast<__mmask16>(~dropped), x, scale);
  } else {
    return _mm512_maskz_mul_pd(static_cast<__mmask8>(~dropped), x, scale);
  }
#else
  using M = typename MaskType<C>::type;
  MaskVector<C> lane{};
  for (int i = 0; i < kWidth<C>; ++i) lane[i] = M{1} << i;
  const MaskVector<C> keep = ((MaskVector<C>{} + static_cast<M>(dropped)) & lane) == 0;
  return bit_cast<Vector<C>>(bit_cast<MaskVector<C>>(x * scale) & keep);
#endif
}

// n consecutive elements, whose bits begin at `bit`, a multiple of the vector's width if n is.
template <class T>
FUSEREG_INLINE void apply_line(const T* x, T* y, std::int64_t n, const std::uint32_t* bits,
                               std::int64_t bit, Vector<Compute<T>> scale) {
  constexpr int kW = kWidth<Compute<T>>;
  for (std::int64_t i = 0; i < n; i += kW) {
    const std::uint32_t dropped = bits[(bit + i) / 32] >> ((bit + i) % 32);
    if (n - i >= kW) {
      store(y + i, scaled<Compute<T>>(load(x + i), dropped, scale));
    } else {
      store_partial(y + i, scaled<Compute<T>>(load_partial(x + i, n - i), dropped, scale), n - i);
    }
  }
}

template <class T>
void apply_tile(const T* x, T* y, const Geometry& g, const Tile& tile, const std::uint32_t* bits,
                double scale) {
  const auto by = broadcast(static_cast<Compute<T>>(scale));
  x += tile.start;
  y += tile.start;
  if (!g.channels_last) {
    apply_line(x, y, tile.planes * tile.rows * g.w, bits, 0, by);
    return;
  }
  for (std::int64_t pixel = 0; pixel < tile.rows * g.w; ++pixel)
    apply_line(x + pixel * g.c, y + pixel * g.c, tile.planes, bits, pixel * g.tile_planes, by);
}

void apply(const Job& job, const Tile& tile, const std::uint32_t* bits, double scale) {
  dispatch_dtype(job.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    apply_tile(static_cast<const T*>(job.x), static_cast<T*>(job.y), job.geometry, tile, bits,
               scale);
  });
}

}  // namespace

const CpuKernels kernels = {&mark, &apply};

}  // namespace fusereg::drop_block::FUSEREG_ISA
