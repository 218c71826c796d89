// Rows of a job on the CPU, and antialiasing. Contract: augment.h.
#pragma once

#include <functional>

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

// What a thread does with rows [begin, end) of the batch, in `bytes` of memory of its own. The job may
// be another than row_runner() was given as to where its result goes.
struct RowRunner {
  std::int64_t bytes = 0;
  std::function<void(const Job& job, std::int64_t begin, std::int64_t end, char* memory)> run;
};
RowRunner row_runner(const Job& job);

// The rows of the batch that a job antialiases, of images that are not float64.
void run_antialiased(const Job& job);

}  // namespace fusereg::augment
