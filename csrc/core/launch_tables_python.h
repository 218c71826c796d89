// LaunchTables whose memory Python gives.
#pragma once

#include <pybind11/pybind11.h>

#include "core/launch_tables.h"

namespace fusereg {

// Adds launch_tables(allocate) to the module: allocate(device, bytes) gives a tensor of so many
// bytes on that device, which is kept.
void bind_launch_tables(pybind11::module_& m);

// An argument that was made by launch_tables(), or None: null.
LaunchTables* launch_tables_argument(pybind11::handle object, const char* op, const char* name);

}  // namespace fusereg
