// Antialiasing on the CPU. Contract: augment.h.
#pragma once

#include "augment/augment.h"

namespace fusereg::augment {

// Of augment_filter.h, in numbers of floats: a row of `count`, in whole blocks; a strip, or a row
// and its planes.
FUSEREG_INLINE std::int64_t filter_pitch(std::int64_t count) {
  return (count + kBlock - 1) / kBlock * kBlock;
}
FUSEREG_INLINE std::int64_t filter_strip(const Job& job, std::int64_t lanes) {
  return job.x.w * (job.x.channels_last ? job.c : 1) * lanes + 32 * kBlock;
}

// The rows of the batch that a job antialiases, of images that are not float64.
void run_antialiased(const Job& job);

}  // namespace fusereg::augment
