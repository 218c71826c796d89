// CPU kernels of Gaussian dropout; compiled once per instruction set. Contract: gaussian_dropout.h.
#include "core/draw_simd.h"
#include "core/normal_simd.h"
#include "gaussian_dropout/gaussian_dropout.h"

namespace fusereg::gaussian_dropout::FUSEREG_ISA {
namespace {

using namespace ::fusereg::FUSEREG_ISA;

FUSEREG_INLINE Vector<float> load_as(const float* p, float) { return load(p); }
FUSEREG_INLINE Vector<double> load_as(const float* p, double) {
  typedef float HalfVector __attribute__((vector_size(kVectorBytes / 2)));
  HalfVector v;
  memcpy(&v, p, sizeof(v));
#if defined(__AVX512F__)
  return _mm512_maskz_cvtps_pd(0xff, v);
#else
  return __builtin_convertvector(v, Vector<double>);
#endif
}

template <class T>
FUSEREG_INLINE void whole_block(const T* x, T* y, std::uint64_t block, const NormalKeys& keys,
                                std::uint64_t low, Vector<Compute<T>> strength) {
  using C = Compute<T>;
  float n[kNormalsAtOnce];
  normals(keys, low, block, n);
  FUSEREG_UNROLL_10
  for (int i = 0; i < kNormalsAtOnce / kWidth<C>; ++i) {
    const int at = i * kWidth<C>;
    store(y + at, load(x + at) * (load_as(n + at, C{}) * strength + C{1}));
  }
}

// As dropout's elements(): the first and the last block may be there in part.
template <class T>
void elements(const T* x, T* y, std::int64_t n, std::uint64_t index, const Job& job) {
  const NormalKeys keys(job.random.key());
  const std::uint64_t low = job.random.low();
  const auto strength = broadcast(static_cast<Compute<T>>(job.strength));
  std::uint64_t block = index / kNormalsAtOnce;
  auto partial = [&](std::int64_t skip, std::int64_t count) {
    T buffer[kNormalsAtOnce];
    memset(buffer, 0, sizeof(buffer));
    memcpy(buffer + skip, x, static_cast<std::size_t>(count) * sizeof(T));
    whole_block(buffer, buffer, block, keys, low, strength);
    memcpy(y, buffer + skip, static_cast<std::size_t>(count) * sizeof(T));
    x += count;
    y += count;
    n -= count;
    ++block;
  };
  const auto skip = static_cast<std::int64_t>(index % kNormalsAtOnce);
  if (skip != 0) partial(skip, n < kNormalsAtOnce - skip ? n : kNormalsAtOnce - skip);
  for (; n >= kNormalsAtOnce; n -= kNormalsAtOnce) {
    whole_block(x, y, block, keys, low, strength);
    x += kNormalsAtOnce;
    y += kNormalsAtOnce;
    ++block;
  }
  if (n > 0) partial(0, n);
}

void elements_any(const Job& job, std::int64_t begin, std::int64_t end) {
  dispatch_dtype(job.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    elements(static_cast<const T*>(job.x) + begin, static_cast<T*>(job.y) + begin, end - begin,
             job.index_offset + static_cast<std::uint64_t>(begin), job);
  });
}

}  // namespace

const CpuKernels kernels = {&elements_any};

}  // namespace fusereg::gaussian_dropout::FUSEREG_ISA
