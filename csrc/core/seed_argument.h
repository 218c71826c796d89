// The arguments (seed, offset) of random operations.
#pragma once

#include <cstdint>

#include "core/draw.h"
#include "core/tensor.h"

namespace fusereg {

// A Python integer of up to 64 bits; negative ones wrap.
std::uint64_t bits_argument(const py::object& number, const char* op, const char* name);

// Two integers; or, as `seed`, a contiguous int64 tensor of both on the device, which the kernel
// reads by itself (read_tensor does not know that dtype).
SeedPair seed_argument(const py::object& seed, const py::object& offset, const Device& device,
                       const char* op);

}  // namespace fusereg
