// Which kernel a sample of a job that antialiases goes to. Contract: augment.h.
#pragma once

#include "augment/augment_math.h"

namespace fusereg::augment {

inline constexpr int kFilterTile = 32;
// What of filters fits into shared memory.
inline constexpr int kFilterTaps = 24;
inline constexpr int kFilterColumns = 160;

// Tiles that read at points, tiles that filter along the axes, or pixel by pixel.
enum class Way : std::uint8_t { kPoints, kFilters, kPixels };

FUSEREG_STATIC Way own_way_of(const Job& job, std::int64_t sample) {
  const double* const record = job.records + sample * kRecord;
  if (is_projective(record)) return Way::kPixels;
  if (!is_axis_aligned(record)) return Way::kPoints;
  auto fits = [&](double extent) {
    return most_taps(extent, job.interpolation, kFilterTaps + 1) <= kFilterTaps;
  };
  const double across = __builtin_fabs(record[0]);
  const bool all = fits(across) && fits(__builtin_fabs(record[4])) &&
                   across * (kFilterTile - 1) + kFilterTaps + 2 < kFilterColumns;
  return all ? Way::kFilters : Way::kPixels;
}

// With its partner: pixel by pixel where they differ. A call, as jobs that do not antialias need none
// of it.
FUSEREG_STATIC_CALL Way way_of(const Job& job, std::int64_t sample) {
  const Way own = own_way_of(job, sample);
  const std::int64_t partner = partner_of(job.records + sample * kRecord, job.n);
  return partner < 0 || own_way_of(job, partner) == own ? own : Way::kPixels;
}

}  // namespace fusereg::augment
