// How this machine's processor reads memory.
#pragma once

namespace fusereg {

// Whether kernels should ask for memory ahead of time also where they read it from end to end,
// which processors notice by themselves. Intel's then read faster (see the kernels that use it),
// AMD's more slowly: what is asked for takes places from their own prefetching. The same results.
bool asking_ahead_pays();

}  // namespace fusereg
