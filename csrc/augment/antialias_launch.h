// Antialiasing on the CPU. Contract: augment.h.
#pragma once

#include "augment/augment.h"

namespace fusereg::augment {

// The rows of the batch that a job antialiases, of images that are not float64.
void run_antialiased(const Job& job);

}  // namespace fusereg::augment
