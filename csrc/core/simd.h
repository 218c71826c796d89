// Short vectors of the instruction set that this file is being compiled for, on the compiler's
// vector extension: one source gives SSE2 or NEON, AVX2 and AVX-512 code at the native width.
//
// Everything lives in the ISA's namespace and is always inlined (see FUSEREG_INLINE). No standard
// library beyond <cstring>: an inline function of the library, compiled here with AVX-512, could be
// the copy that the linker keeps for everybody.
#pragma once

#include <cstdint>
#include <cstring>

#include "core/dtype.h"

#if defined(__SSE2__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#if !defined(FUSEREG_ISA)
#error \
    "simd.h is for files that are compiled once per instruction set (FUSEREG_ISA=baseline|avx2|avx512)"
#endif

namespace fusereg {
// Whether the processor has AVX512-BF16, and permutations of bytes (AVX512-VBMI) (isa.cpp).
extern const bool has_bfloat16_instructions;
extern const bool has_byte_permutations;
}  // namespace fusereg

namespace fusereg::FUSEREG_ISA {

#if defined(__AVX512F__)
inline constexpr int kVectorBytes = 64;
#elif defined(__AVX2__)
inline constexpr int kVectorBytes = 32;
#else
inline constexpr int kVectorBytes = 16;
#endif

// Vector<C>: as many C as a register holds.
template <class C>
struct VectorOf {
  typedef C type __attribute__((vector_size(kVectorBytes)));
};
template <class C>
using Vector = typename VectorOf<C>::type;
template <class C>
inline constexpr int kWidth = kVectorBytes / static_cast<int>(sizeof(C));

template <class C>
FUSEREG_INLINE Vector<C> broadcast(C x) {
  return Vector<C>{} + x;
}

FUSEREG_INLINE Vector<float> load(const float* p) {
  Vector<float> v;
  memcpy(&v, p, sizeof(v));
  return v;
}
FUSEREG_INLINE Vector<double> load(const double* p) {
  Vector<double> v;
  memcpy(&v, p, sizeof(v));
  return v;
}
FUSEREG_INLINE void store(float* p, Vector<float> v) { memcpy(p, &v, sizeof(v)); }
FUSEREG_INLINE void store(double* p, Vector<double> v) { memcpy(p, &v, sizeof(v)); }

// 16-bit types: kWidth<float> elements, widened to float and narrowed with round to nearest even.
typedef std::uint16_t U16Vector __attribute__((vector_size(kVectorBytes / 2)));
typedef std::uint32_t U32Vector __attribute__((vector_size(kVectorBytes)));

#if defined(__AVX512F__)
typedef std::int16_t Words __attribute__((vector_size(kVectorBytes)));
// Word 2 i + 1 from word i; word i from word 2 i + 1.
inline constexpr Words kSpread = {0, 0, 1, 1, 2,  2,  3,  3,  4,  4,  5,  5,  6,  6,  7,  7,
                                  8, 8, 9, 9, 10, 10, 11, 11, 12, 12, 13, 13, 14, 14, 15, 15};
inline constexpr Words kGather = {1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31,
                                  1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31};

// A register of 16-bit elements as float, and back: the first argument only says of which type.
FUSEREG_INLINE Vector<float> widened(const BFloat16*, __m256i words) {
  // One permutation puts each word into the high half of its lane and zeros into the low one.
  return bit_cast<Vector<float>>(_mm512_maskz_permutexvar_epi16(
      0xaaaaaaaau, bit_cast<__m512i>(kSpread), _mm512_zextsi256_si512(words)));
}
FUSEREG_INLINE Vector<float> widened(const Half*, __m256i words) { return _mm512_cvtph_ps(words); }

// Half of a last place up, and one less where the bit that stays is even; a NaN keeps its sign and
// becomes quiet. By masks, and one permutation gathers the high halves: 6 instructions, where
// shifts, selections and a narrowing take 11.
FUSEREG_INLINE __m256i narrowed(const BFloat16*, Vector<float> v) {
  // The instruction of AVX512-BF16 gives the same bits but for subnormal numbers, of which it makes
  // zeros. (It is written by its name because this file is compiled for processors without it. The
  // flag is read anew each time, or GCC would make every loop twice.)
  if (*static_cast<const volatile bool*>(&::fusereg::has_bfloat16_instructions) &&
      _mm512_fpclass_ps_mask(v, 0x20) == 0) {
    __m256i words;
    asm("vcvtneps2bf16 %1, %0" : "=v"(words) : "v"(v));
    return words;
  }
  const U32Vector u = bit_cast<U32Vector>(v);
  const auto bits = bit_cast<__m512i>(u);
  const __mmask16 odd = _mm512_test_epi32_mask(bits, bit_cast<__m512i>(U32Vector{} + 0x10000u));
  const auto up = bit_cast<__m512i>(u + 0x7fffu);
  __m512i words = _mm512_mask_add_epi32(up, odd, up, bit_cast<__m512i>(U32Vector{} + 1u));
  words = _mm512_mask_or_epi32(words, _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q), bits,
                               bit_cast<__m512i>(U32Vector{} + 0x400000u));
  words =
      _mm512_maskz_permutexvar_epi16(static_cast<__mmask32>(-1), bit_cast<__m512i>(kGather), words);
  return _mm512_castsi512_si256(words);
}
FUSEREG_INLINE __m256i narrowed(const Half*, Vector<float> v) {
  return _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}

template <class T>
FUSEREG_INLINE Vector<float> load(const T* p) {
  return widened(p, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
template <class T>
FUSEREG_INLINE void store(T* p, Vector<float> v) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), narrowed(p, v));
}
#else
// By instructions of their own, because GCC 12 would widen and narrow by quarters.
FUSEREG_INLINE Vector<float> load(const BFloat16* p) {
#if defined(__AVX2__)
  const __m128i bits = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return bit_cast<Vector<float>>(bit_cast<U32Vector>(_mm256_cvtepu16_epi32(bits)) << 16);
#elif defined(__aarch64__)
  return bit_cast<Vector<float>>(
      vshll_n_u16(vld1_u16(reinterpret_cast<const std::uint16_t*>(p)), 16));
#else
  U16Vector bits;
  memcpy(&bits, p, sizeof(bits));
  return bit_cast<Vector<float>>(__builtin_convertvector(bits, U32Vector) << 16);
#endif
}
FUSEREG_INLINE void store(BFloat16* p, Vector<float> v) {
  const U32Vector u = bit_cast<U32Vector>(v);
  const U32Vector rounded = u + (((u >> 16) & 1u) + 0x7fffu);
  const U32Vector quiet = u | 0x400000u;
#if defined(__AVX2__)
  const auto words = bit_cast<__m256i>((v != v ? quiet : rounded) >> 16);
  _mm_storeu_si128(
      reinterpret_cast<__m128i*>(p),
      _mm_packus_epi32(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1)));
#else
  const U16Vector bits = __builtin_convertvector((v != v ? quiet : rounded) >> 16, U16Vector);
  memcpy(p, &bits, sizeof(bits));
#endif
}

FUSEREG_INLINE Vector<float> load(const Half* p) {
#if defined(__AVX2__)
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
#elif defined(__aarch64__)
  return bit_cast<Vector<float>>(
      vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(reinterpret_cast<const std::uint16_t*>(p)))));
#else
  Vector<float> v;
  for (int i = 0; i < kWidth<float>; ++i) v[i] = to_float(p[i]);
  return v;
#endif
}
FUSEREG_INLINE void store(Half* p, Vector<float> v) {
#if defined(__AVX2__)
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p),
                   _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
#elif defined(__aarch64__)
  vst1_u16(reinterpret_cast<std::uint16_t*>(p),
           vreinterpret_u16_f16(vcvt_f16_f32(bit_cast<float32x4_t>(v))));
#else
  for (int i = 0; i < kWidth<float>; ++i) p[i] = to_half(v[i]);
#endif
}
#endif

// The first n < kWidth elements; the rest of the vector is zero.
template <class T>
FUSEREG_INLINE Vector<Compute<T>> load_partial(const T* p, std::int64_t n) {
  T buffer[kWidth<Compute<T>>];
  memset(buffer, 0, sizeof(buffer));
  memcpy(buffer, p, static_cast<std::size_t>(n) * sizeof(T));
  return load(buffer);
}
template <class T>
FUSEREG_INLINE void store_partial(T* p, Vector<Compute<T>> v, std::int64_t n) {
  T buffer[kWidth<Compute<T>>];
  store(buffer, v);
  memcpy(p, buffer, static_cast<std::size_t>(n) * sizeof(T));
}

typedef std::uint64_t U64Vector __attribute__((vector_size(kVectorBytes)));

#if defined(__aarch64__)
// A bit for each lane of a mask, the first one lowest: NEON has no instruction for it.
FUSEREG_INLINE std::uint32_t bits_of(uint16x8_t mask) {
  return vaddvq_u16(mask & uint16x8_t{1, 2, 4, 8, 16, 32, 64, 128});
}
FUSEREG_INLINE std::uint32_t bits_of(uint32x4_t mask) {
  return vaddvq_u32(mask & uint32x4_t{1, 2, 4, 8});
}
FUSEREG_INLINE std::uint32_t bits_of(uint64x2_t mask) {
  return static_cast<std::uint32_t>(vaddvq_u64(mask & uint64x2_t{1, 2}));
}
#endif

// Adds a vector's elements, widened, to as many float64 sums in memory order.
FUSEREG_INLINE void add_widened(Vector<float> v, Vector<double> (&sums)[2]) {
  typedef float HalfVector __attribute__((vector_size(kVectorBytes / 2)));
  struct Halves {
    HalfVector low, high;
  };
  const auto halves = bit_cast<Halves>(v);
#if defined(__AVX512F__)
  // GCC 12 would convert by quarters.
  sums[0] += _mm512_cvtps_pd(halves.low);
  sums[1] += _mm512_cvtps_pd(halves.high);
#else
  sums[0] += __builtin_convertvector(halves.low, Vector<double>);
  sums[1] += __builtin_convertvector(halves.high, Vector<double>);
#endif
}
FUSEREG_INLINE void add_widened(Vector<double> v, Vector<double> (&sums)[1]) { sums[0] += v; }

}  // namespace fusereg::FUSEREG_ISA

namespace fusereg {

// As the scalar functions of dtype.h, in the same namespace: one set of overloads for formulas that
// serve numbers and vectors. They have internal linkage, so each instruction set keeps its own.
FUSEREG_INLINE FUSEREG_ISA::Vector<float> abs(FUSEREG_ISA::Vector<float> v) {
  return bit_cast<FUSEREG_ISA::Vector<float>>(bit_cast<FUSEREG_ISA::U32Vector>(v) & 0x7fffffffu);
}
FUSEREG_INLINE FUSEREG_ISA::Vector<double> abs(FUSEREG_ISA::Vector<double> v) {
  return bit_cast<FUSEREG_ISA::Vector<double>>(bit_cast<FUSEREG_ISA::U64Vector>(v) &
                                               0x7fffffffffffffffull);
}
FUSEREG_INLINE FUSEREG_ISA::Vector<float> square_root(FUSEREG_ISA::Vector<float> v) {
#if defined(__AVX512F__)
  // Masked, because GCC 12 warns about the undefined operand of the plain one.
  return _mm512_maskz_sqrt_ps(static_cast<__mmask16>(-1), v);
#elif defined(__AVX2__)
  return _mm256_sqrt_ps(v);
#elif defined(__SSE2__)
  return _mm_sqrt_ps(v);
#elif defined(__aarch64__)
  return bit_cast<FUSEREG_ISA::Vector<float>>(vsqrtq_f32(bit_cast<float32x4_t>(v)));
#else
  for (int i = 0; i < FUSEREG_ISA::kWidth<float>; ++i) v[i] = __builtin_sqrtf(v[i]);
  return v;
#endif
}
FUSEREG_INLINE FUSEREG_ISA::Vector<double> square_root(FUSEREG_ISA::Vector<double> v) {
#if defined(__AVX512F__)
  return _mm512_maskz_sqrt_pd(static_cast<__mmask8>(-1), v);
#elif defined(__AVX2__)
  return _mm256_sqrt_pd(v);
#elif defined(__SSE2__)
  return _mm_sqrt_pd(v);
#elif defined(__aarch64__)
  return bit_cast<FUSEREG_ISA::Vector<double>>(vsqrtq_f64(bit_cast<float64x2_t>(v)));
#else
  for (int i = 0; i < FUSEREG_ISA::kWidth<double>; ++i) v[i] = __builtin_sqrt(v[i]);
  return v;
#endif
}
FUSEREG_INLINE FUSEREG_ISA::Vector<float> with_sign_of(FUSEREG_ISA::Vector<float> magnitude,
                                                       FUSEREG_ISA::Vector<float> sign) {
  return bit_cast<FUSEREG_ISA::Vector<float>>(
      bit_cast<FUSEREG_ISA::U32Vector>(magnitude) |
      (bit_cast<FUSEREG_ISA::U32Vector>(sign) & 0x80000000u));
}
FUSEREG_INLINE FUSEREG_ISA::Vector<double> with_sign_of(FUSEREG_ISA::Vector<double> magnitude,
                                                        FUSEREG_ISA::Vector<double> sign) {
  return bit_cast<FUSEREG_ISA::Vector<double>>(
      bit_cast<FUSEREG_ISA::U64Vector>(magnitude) |
      (bit_cast<FUSEREG_ISA::U64Vector>(sign) & 0x8000000000000000ull));
}

}  // namespace fusereg
