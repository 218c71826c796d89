// The element types that kernels take, and the one switch that turns a run-time DType into a type.
//
// The 16-bit types are plain bit patterns with conversions written here: neither the CUDA toolkit's
// cuda_fp16.h nor a compiler's _Float16 is needed, so the same kernel source builds everywhere.
#pragma once

#include <cstdint>
#include <cstring>
#include <stdexcept>

#if defined(__CUDACC__)
#define FUSEREG_HD __host__ __device__
#define FUSEREG_INLINE static __host__ __device__ __forceinline__
#else
#define FUSEREG_HD
// Internal linkage and always inlined: these functions are compiled once per instruction set, and
// an out-of-line copy built for AVX-512 must never be the one that the linker keeps for a baseline
// caller.
#define FUSEREG_INLINE static inline __attribute__((always_inline))
#endif

namespace fusereg {

enum class DType : std::uint8_t { kFloat64, kFloat32, kFloat16, kBFloat16 };

struct Half {
  std::uint16_t bits;
};

struct BFloat16 {
  std::uint16_t bits;
};

template <class To, class From>
FUSEREG_INLINE To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From), "bit_cast needs types of one size");
  To to;
  memcpy(&to, &from, sizeof(to));
  return to;
}

FUSEREG_INLINE float to_float(BFloat16 x) {
  return bit_cast<float>(static_cast<std::uint32_t>(x.bits) << 16);
}

// A NaN keeps its sign and the digits there is room for, and becomes quiet, on every instruction
// set. The device rounds by an instruction from sm_80 on, with the same bits but for NaN, of which
// it makes 0x7fff, as torch does there.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
#define FUSEREG_ROUNDS_PAIRS 1
#else
#define FUSEREG_ROUNDS_PAIRS 0
#endif

FUSEREG_INLINE BFloat16 to_bfloat16(float x) {
#if FUSEREG_ROUNDS_PAIRS
  BFloat16 y;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(y.bits) : "f"(x));
  return y;
#else
  const std::uint32_t u = bit_cast<std::uint32_t>(x);
  if ((u & 0x7fffffffu) > 0x7f800000u) return {static_cast<std::uint16_t>((u >> 16) | 0x40u)};
  // Round to nearest even: add half an ulp, less one where the kept part is even.
  return {static_cast<std::uint16_t>((u + 0x7fffu + ((u >> 16) & 1u)) >> 16)};
#endif
}

FUSEREG_INLINE float to_float(Half x) {
#if defined(__CUDA_ARCH__)
  float y;
  asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x.bits));
  return y;
#else
  // Shift exponent and mantissa into float's place, then let one exact multiplication by 2^112
  // rebias the exponent; it renormalizes subnormals on the way.
  const std::uint32_t sign = static_cast<std::uint32_t>(x.bits & 0x8000u) << 16;
  const std::uint32_t magnitude = static_cast<std::uint32_t>(x.bits & 0x7fffu) << 13;
  if (magnitude >= (0x7c00u << 13)) {
    // A NaN becomes quiet and keeps its digits, as by the instruction.
    const std::uint32_t quiet = magnitude > (0x7c00u << 13) ? 0x400000u : 0u;
    return bit_cast<float>(sign | magnitude | 0x7f800000u | quiet);
  }
  return bit_cast<float>(sign | bit_cast<std::uint32_t>(bit_cast<float>(magnitude) * 0x1p112f));
#endif
}

FUSEREG_INLINE Half to_half(float x) {
#if defined(__CUDA_ARCH__)
  Half y;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(y.bits) : "f"(x));
  return y;
#else
  const std::uint32_t u = bit_cast<std::uint32_t>(x);
  const auto sign = static_cast<std::uint16_t>((u >> 16) & 0x8000u);
  const std::uint32_t magnitude = u & 0x7fffffffu;
  if (magnitude > 0x7f800000u)  // quiet, with the digits there is room for
    return {static_cast<std::uint16_t>(sign | 0x7e00u | (magnitude >> 13 & 0x1ffu))};
  if (magnitude >= 0x477ff000u) return {static_cast<std::uint16_t>(sign | 0x7c00u)};  // >= 65520
  if (magnitude < 0x38800000u) {
    // Below 2^-14 the result is subnormal, a multiple of 2^-24: adding 0.5 in float lets the adder
    // round to nearest even at exactly that bit, and the low bits of the sum are the result.
    const float shifted = bit_cast<float>(magnitude) + 0.5f;
    return {static_cast<std::uint16_t>(sign | (bit_cast<std::uint32_t>(shifted) - 0x3f000000u))};
  }
  const std::uint32_t rounded = magnitude + 0xfffu + ((magnitude >> 13) & 1u);
  return {static_cast<std::uint16_t>(sign | ((rounded - 0x38000000u) >> 13))};
#endif
}

// Traits<T>: the type in which arithmetic on T is done, its DType, and the conversions between
// them.
template <class T>
struct Traits;

template <>
struct Traits<double> {
  using Compute = double;
  static constexpr DType kDType = DType::kFloat64;
  // Magnitudes up to this round to zero when stored as T.
  static constexpr double kRoundsToZero = 0.0;
};
template <>
struct Traits<float> {
  using Compute = float;
  static constexpr DType kDType = DType::kFloat32;
  static constexpr float kRoundsToZero = 0.0f;
};
template <>
struct Traits<Half> {
  using Compute = float;
  static constexpr DType kDType = DType::kFloat16;
  static constexpr float kRoundsToZero = 0x1p-25f;
};
template <>
struct Traits<BFloat16> {
  using Compute = float;
  static constexpr DType kDType = DType::kBFloat16;
  static constexpr float kRoundsToZero = 0x1p-134f;
};

template <class T>
using Compute = typename Traits<T>::Compute;

FUSEREG_INLINE double to_compute(double x) { return x; }
FUSEREG_INLINE float to_compute(float x) { return x; }
FUSEREG_INLINE float to_compute(Half x) { return to_float(x); }
FUSEREG_INLINE float to_compute(BFloat16 x) { return to_float(x); }

template <class T>
FUSEREG_INLINE T from_compute(Compute<T> x) {
  if constexpr (Traits<T>::kDType == DType::kFloat16) {
    return to_half(x);
  } else if constexpr (Traits<T>::kDType == DType::kBFloat16) {
    return to_bfloat16(x);
  } else {
    return x;
  }
}

// The bits of two numbers of a 16-bit type, `low` in the low half.
template <class T>
FUSEREG_INLINE std::uint32_t round_pair(float low, float high) {
#if FUSEREG_ROUNDS_PAIRS
  std::uint32_t pair;
  if constexpr (Traits<T>::kDType == DType::kFloat16) {
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  } else {
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  }
  return pair;
#else
  return from_compute<T>(low).bits | static_cast<std::uint32_t>(from_compute<T>(high).bits) << 16;
#endif
}

// |w|, the square root, and a number with another one's sign bit added. simd.h has them for
// vectors.
FUSEREG_INLINE float square_root(float x) { return __builtin_sqrtf(x); }
FUSEREG_INLINE double square_root(double x) { return __builtin_sqrt(x); }
FUSEREG_INLINE float abs(float w) { return __builtin_fabsf(w); }
FUSEREG_INLINE double abs(double w) { return __builtin_fabs(w); }
FUSEREG_INLINE float with_sign_of(float magnitude, float sign) {
  return __builtin_copysignf(magnitude, sign);
}
FUSEREG_INLINE double with_sign_of(double magnitude, double sign) {
  return __builtin_copysign(magnitude, sign);
}

inline constexpr int dtype_size(DType dtype) {
  return dtype == DType::kFloat64 ? 8 : dtype == DType::kFloat32 ? 4 : 2;
}

inline const char* dtype_name(DType dtype) {
  switch (dtype) {
    case DType::kFloat64:
      return "float64";
    case DType::kFloat32:
      return "float32";
    case DType::kFloat16:
      return "float16";
    case DType::kBFloat16:
      return "bfloat16";
  }
  return "unknown";
}

template <class T>
struct TypeTag {
  using type = T;
};

// dispatch_dtype(dtype, [&](auto tag) { using T = typename decltype(tag)::type; ... });
#if defined(__CUDACC__)
// Host code calls it with host functions, device code with device functions.
#pragma nv_exec_check_disable
#endif
template <class F>
FUSEREG_HD inline auto dispatch_dtype(DType dtype, F&& f) {
  switch (dtype) {
    case DType::kFloat64:
      return f(TypeTag<double>{});
    case DType::kFloat32:
      return f(TypeTag<float>{});
    case DType::kFloat16:
      return f(TypeTag<Half>{});
    default:
      return f(TypeTag<BFloat16>{});
  }
}

}  // namespace fusereg
