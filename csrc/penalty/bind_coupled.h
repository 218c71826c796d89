// What bind.cpp binds of coupled channels.
#pragma once

#include <pybind11/pybind11.h>

namespace fusereg::penalty {

void bind_coupled(pybind11::module_& m);

}  // namespace fusereg::penalty
