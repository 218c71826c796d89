// CPU kernels of programs; compiled once per instruction set. Contract: program.h.
//
// Values are taken in runs of kRun: local arrays of one length, which the compiler turns into
// vectors of this instruction set.
#include "augment/program_math.h"
#include "core/simd.h"

namespace fusereg::augment::FUSEREG_ISA {
namespace {

using namespace ::fusereg::FUSEREG_ISA;

constexpr int kRun = 64;

typedef std::int32_t Whole __attribute__((vector_size(kVectorBytes)));

void histogram(const std::uint8_t* v, std::int64_t n, std::uint32_t* counts) {
  // Four of them, so that equal neighbors do not wait for each other.
  std::uint32_t part[4][256] = {};
  std::int64_t i = 0;
  for (; i + 4 <= n; i += 4) {
    ++part[0][v[i]];
    ++part[1][v[i + 1]];
    ++part[2][v[i + 2]];
    ++part[3][v[i + 3]];
  }
  for (; i < n; ++i) ++part[0][v[i]];
  for (int k = 0; k < 256; ++k) counts[k] += part[0][k] + part[1][k] + part[2][k] + part[3][k];
}

// A vector of bytes is looked up in the 16 rows of the table, of 16 each: in a row that is not that
// of a byte its index has the highest bit, for which the instruction gives 0.
#if defined(__AVX512BW__) || defined(__AVX2__)
#if defined(__AVX512BW__)
typedef __m512i Bytes;
FUSEREG_INLINE Bytes row_of(const std::uint8_t* p) {
  return _mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}
FUSEREG_INLINE Bytes found(Bytes row, Bytes v, int k) {
  const Bytes at = _mm512_adds_epu8(
      _mm512_xor_si512(v, _mm512_set1_epi8(static_cast<char>(16 * k))), _mm512_set1_epi8(0x70));
  return _mm512_shuffle_epi8(row, at);
}
#else
typedef __m256i Bytes;
FUSEREG_INLINE Bytes row_of(const std::uint8_t* p) {
  return _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}
FUSEREG_INLINE Bytes found(Bytes row, Bytes v, int k) {
  const Bytes at = _mm256_adds_epu8(
      _mm256_xor_si256(v, _mm256_set1_epi8(static_cast<char>(16 * k))), _mm256_set1_epi8(0x70));
  return _mm256_shuffle_epi8(row, at);
}
#endif

#if defined(__AVX512BW__)
// The byte at each of 128 places. (By its name: this file is compiled for processors without it.)
FUSEREG_INLINE Bytes permuted(Bytes at, Bytes low, Bytes high) {
  asm("vpermi2b %2, %1, %0" : "+v"(at) : "v"(low), "v"(high));
  return at;
}
#endif

void look_up(std::uint8_t* v, std::int64_t n, const std::uint8_t* table) {
  constexpr std::int64_t kBytes = sizeof(Bytes);
  std::int64_t i = 0;
#if defined(__AVX512BW__)
  if (has_byte_permutations) {
    Bytes part[4];
    memcpy(part, table, 256);
    for (; i + kBytes <= n; i += kBytes) {
      Bytes from;
      memcpy(&from, v + i, sizeof(from));
      const Bytes to =
          _mm512_mask_blend_epi8(_mm512_movepi8_mask(from), permuted(from, part[0], part[1]),
                                 permuted(from, part[2], part[3]));
      memcpy(v + i, &to, sizeof(to));
    }
  }
#endif
  Bytes rows[16];
  for (int k = 0; k < 16; ++k) rows[k] = row_of(table + 16 * k);
  for (; i + kBytes <= n; i += kBytes) {
    Bytes from;
    memcpy(&from, v + i, sizeof(from));
    Bytes to = found(rows[0], from, 0);
    for (int k = 1; k < 16; ++k) to |= found(rows[k], from, k);
    memcpy(v + i, &to, sizeof(to));
  }
  for (; i < n; ++i) v[i] = table[v[i]];
}
#else
void look_up(std::uint8_t* v, std::int64_t n, const std::uint8_t* table) {
  for (std::int64_t i = 0; i < n; ++i) v[i] = table[v[i]];
}
#endif

struct Run {
  float value[3][kRun];
};

FUSEREG_INLINE void widen(const std::uint8_t* v, std::int64_t count, float* to) {
  std::uint8_t bytes[kRun];
  if (count == kRun) {
    memcpy(bytes, v, kRun);
  } else {
    memset(bytes, 0, kRun);
    memcpy(bytes, v, static_cast<std::size_t>(count));
  }
  for (int i = 0; i < kRun; ++i) to[i] = static_cast<float>(static_cast<std::int32_t>(bytes[i]));
}

FUSEREG_INLINE void narrow(std::uint8_t* v, std::int64_t count, const std::int32_t* from) {
  std::uint8_t bytes[kRun];
  for (int i = 0; i < kRun; ++i) bytes[i] = static_cast<std::uint8_t>(from[i]);
  if (count == kRun) {
    memcpy(v, bytes, kRun);
  } else {
    memcpy(v, bytes, static_cast<std::size_t>(count));
  }
}

FUSEREG_INLINE void read_run(const std::uint8_t* v, std::int64_t plane, std::int64_t count,
                             Run& run) {
  for (int c = 0; c < 3; ++c) widen(v + c * plane, count, run.value[c]);
}

std::uint64_t gray_sum(const std::uint8_t* v, std::int64_t plane) {
  std::uint64_t sum = 0;
  for (std::int64_t at = 0; at < plane; at += kRun) {
    const std::int64_t count = plane - at < kRun ? plane - at : kRun;
    Run run;
    read_run(v + at, plane, count, run);
    std::int32_t part = 0;  // what is past the end is 0
    for (int i = 0; i < kRun; ++i)
      part += gray_of(run.value[0][i], run.value[1][i], run.value[2][i]);
    sum += static_cast<std::uint64_t>(part);
  }
  return sum;
}

template <class F>
FUSEREG_INLINE void for_each_run(std::uint8_t* v, std::int64_t plane, const F& f) {
  for (std::int64_t at = 0; at < plane; at += kRun) {
    const std::int64_t count = plane - at < kRun ? plane - at : kRun;
    Run run;
    std::int32_t out[3][kRun];
    read_run(v + at, plane, count, run);
    f(run, out);
    for (int c = 0; c < 3; ++c) narrow(v + c * plane + at, count, out[c]);
  }
}

void colors(std::uint8_t* v, std::int64_t plane, Code code, double argument) {
  const auto f = static_cast<float>(argument);
  const auto g = static_cast<float>(1.0 - argument);
  if (code == Code::kSaturation) {
    for_each_run(v, plane, [&](const Run& run, std::int32_t (&out)[3][kRun]) {
      for (int i = 0; i < kRun; ++i) {
        const auto gray =
            static_cast<float>(gray_of(run.value[0][i], run.value[1][i], run.value[2][i]));
        out[0][i] = blended(run.value[0][i], gray, f, g);
        out[1][i] = blended(run.value[1][i], gray, f, g);
        out[2][i] = blended(run.value[2][i], gray, f, g);
      }
    });
  } else if (code == Code::kGray) {
    for_each_run(v, plane, [&](const Run& run, std::int32_t (&out)[3][kRun]) {
      for (int i = 0; i < kRun; ++i) {
        out[0][i] = gray_of(run.value[0][i], run.value[1][i], run.value[2][i]);
        out[1][i] = out[0][i];
        out[2][i] = out[0][i];
      }
    });
  } else {
    for_each_run(v, plane, [&](const Run& run, std::int32_t (&out)[3][kRun]) {
      for (int i = 0; i < kRun; i += kWidth<float>) {
        Vector<float> rgb[3];
        for (int c = 0; c < 3; ++c) rgb[c] = load(run.value[c] + i);
        turn_hue(broadcast(f), rgb);
        for (int c = 0; c < 3; ++c) {
          const Whole whole = __builtin_convertvector(rgb[c], Whole);
          memcpy(out[c] + i, &whole, sizeof(whole));
        }
      }
    });
  }
}

void sharpen(const std::uint8_t* v, std::uint8_t* y, const Planes& size, double argument) {
  const auto g = static_cast<float>(1.0 - argument);
  const std::int64_t w = size.w;
  for (std::int64_t row = 0; row < size.c * size.h; ++row) {
    const std::uint8_t* const p = v + row * w;
    std::uint8_t* const to = y + row * w;
    memcpy(to, p, static_cast<std::size_t>(w));
    const std::int64_t r = row % size.h;
    if (r == 0 || r == size.h - 1) continue;
    for (std::int64_t next = 1; next + 1 < w; next += kRun) {
      // The last run ends with the row, where that is long enough.
      const std::int64_t last = w - 1 - kRun;
      const std::int64_t at = next > last && last >= 1 ? last : next;
      const std::int64_t count = w - 1 - at < kRun ? w - 1 - at : kRun;
      std::int32_t column[kRun + 2];
      std::int32_t own[kRun + 2];
      std::int32_t out[kRun];
      if (count == kRun) {
        for (int i = 0; i < kRun + 2; ++i) {
          const std::uint8_t* const q = p + at - 1 + i;
          own[i] = q[0];
          column[i] = q[-w] + q[0] + q[w];
        }
      } else {
        for (int i = 0; i < kRun + 2; ++i) {
          const std::int64_t k = i < count + 2 ? i : count + 1;
          const std::uint8_t* const q = p + at - 1 + k;
          own[i] = q[0];
          column[i] = q[-w] + q[0] + q[w];
        }
      }
      for (int i = 0; i < kRun; ++i)
        out[i] = sharpened(own[i + 1], column[i] + column[i + 1] + column[i + 2] - own[i + 1], g);
      narrow(to + at, count, out);
    }
  }
}

// sum[i] = first weight * from[0][i] + ..., each product and sum rounded by itself.
template <class From>
FUSEREG_INLINE void weighted(const From& from, const float* weights, int taps, float* to,
                             std::int64_t n) {
  constexpr std::int64_t kN = kWidth<float>;
  std::int64_t i = 0;
  for (; i + 4 * kN <= n; i += 4 * kN) {
    Vector<float> sum[4] = {};
    for (int k = 0; k < taps; ++k) {
      const float* const p = from(k) + i;
      for (int q = 0; q < 4; ++q) sum[q] = sum[q] + load(p + q * kN) * weights[k];
    }
    for (int q = 0; q < 4; ++q) store(to + i + q * kN, sum[q]);
  }
  for (; i < n; ++i) {
    float sum = 0.0f;
    for (int k = 0; k < taps; ++k) sum = add(sum, multiply(from(k)[i], weights[k]));
    to[i] = sum;
  }
}

void blur(const std::uint8_t* v, std::uint8_t* y, const Planes& size, const float* weights_x,
          int taps_x, const float* weights_y, int taps_y, float* scratch) {
  const std::int64_t h = size.h;
  const std::int64_t w = size.w;
  float* const row = scratch;                   // w + kMaxTaps
  float* const plane = scratch + w + kMaxTaps;  // h w
  for (std::int64_t r = 0; r < h; ++r) {
    for (std::int64_t i = 0; i < w; ++i) row[taps_x / 2 + i] = static_cast<float>(v[r * w + i]);
    for (std::int64_t i = 1; i <= taps_x / 2; ++i) {
      row[taps_x / 2 - i] = static_cast<float>(v[r * w + reflected(-i, w)]);
      row[taps_x / 2 + w - 1 + i] = static_cast<float>(v[r * w + reflected(w - 1 + i, w)]);
    }
    weighted([&](int k) { return row + k; }, weights_x, taps_x, plane + r * w, w);
  }
  for (std::int64_t r = 0; r < h; ++r) {
    weighted([&](int k) { return plane + reflected(r - taps_y / 2 + k, h) * w; }, weights_y, taps_y,
             row, w);
    for (std::int64_t i = 0; i < w; ++i) y[r * w + i] = to_uint8(row[i]);
  }
}

void to_planes(const std::uint8_t* x, std::uint8_t* v, const Planes& size) {
  const std::int64_t plane = size.plane();
  if (size.c == 3) {
    for (std::int64_t i = 0; i < plane; ++i, x += 3) {
      v[i] = x[0];
      v[plane + i] = x[1];
      v[2 * plane + i] = x[2];
    }
    return;
  }
  for (int c = 0; c < size.c; ++c)
    for (std::int64_t i = 0; i < plane; ++i) v[c * plane + i] = x[i * size.c + c];
}

void from_planes(const std::uint8_t* v, std::uint8_t* y, const Planes& size) {
  const std::int64_t plane = size.plane();
  if (size.c == 3) {
    for (std::int64_t i = 0; i < plane; ++i, y += 3) {
      y[0] = v[i];
      y[1] = v[plane + i];
      y[2] = v[2 * plane + i];
    }
    return;
  }
  for (int c = 0; c < size.c; ++c)
    for (std::int64_t i = 0; i < plane; ++i) y[i * size.c + c] = v[c * plane + i];
}

}  // namespace

const ProgramKernels program_kernels = {&histogram, &look_up, &gray_sum,  &colors,
                                        &sharpen,   &blur,    &to_planes, &from_planes};

}  // namespace fusereg::augment::FUSEREG_ISA
