// What the CUDA runtime says of this machine.
#pragma once

#include <pybind11/pybind11.h>

namespace fusereg {

// One dict per device; empty where there is none or no driver, and cuda_error() then says why.
pybind11::list cuda_device_info();
pybind11::str cuda_error();

}  // namespace fusereg
