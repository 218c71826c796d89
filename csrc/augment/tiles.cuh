// Which kernel a sample of a job that antialiases goes to. Contract: augment.h.
#pragma once

#include "augment/augment_math.h"
#include "core/cuda.cuh"

namespace fusereg::augment {

inline constexpr int kFilterTile = 32;
// What of filters fits into shared memory.
inline constexpr int kFilterTaps = 25;
inline constexpr int kFilterColumns = 160;

// read(), of bytes in one instruction.
template <class T>
FUSEREG_DEVICE_INLINE Number<T> tap(const T* p) {
  if constexpr (sizeof(T) == 1) {
    return static_cast<float>(static_cast<std::int32_t>(*p));
  } else {
    return read(p);
  }
}

// Tiles that read at points, tiles that filter along the axes, or pixel by pixel.
enum class Way : std::uint8_t { kPoints, kFilters, kPixels };

// Whether shared memory has room for a tile whose pixels are so wide and high.
FUSEREG_INLINE bool filters_fit(const Job& job, double across, double down) {
  auto fits = [&](double extent) {
    return most_taps(extent, job.interpolation, kFilterTaps + 1) <= kFilterTaps;
  };
  return fits(across) && fits(down) &&
         across * (kFilterTile - 1) + kFilterTaps + 2 < kFilterColumns;
}

FUSEREG_STATIC Way own_way_of(const Job& job, std::int64_t sample) {
  const double* const record = job.records + sample * kRecord;
  if (is_projective(record)) return Way::kPixels;
  if (!is_axis_aligned(record)) return Way::kPoints;
  return filters_fit(job, __builtin_fabs(record[0]), __builtin_fabs(record[4])) ? Way::kFilters
                                                                                : Way::kPixels;
}

// With its partner: pixel by pixel where they differ. A call, as jobs that do not antialias need none
// of it.
FUSEREG_STATIC_CALL Way way_of(const Job& job, std::int64_t sample) {
  const Way own = own_way_of(job, sample);
  const std::int64_t partner = partner_of(job.records + sample * kRecord, job.n);
  return partner < 0 || own_way_of(job, partner) == own ? own : Way::kPixels;
}

}  // namespace fusereg::augment
