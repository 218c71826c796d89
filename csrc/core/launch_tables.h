// Memory of the device for the tables of launches over long lists of tensors (launch_table.cuh).
#pragma once

#include <cstddef>
#include <vector>

namespace fusereg {

// The table of one stream's launches. They run one after the other, and what writes the table runs
// between them: what is overwritten has been read.
struct TableMemory {
  void* data = nullptr;  // at 16-byte alignment
  std::size_t bytes = 0;
  std::vector<unsigned char> held;  // what was last written to `data`; empty where nothing was
  std::vector<unsigned char> next;  // what the launch at hand wants there
};

// What one owner of lists, an optimizer say, has of them: one for each device and stream. Two
// owners have memory of their own, so that their lists do not take turns in it.
class LaunchTables {
 public:
  virtual ~LaunchTables() = default;
  // At least so many bytes. Throws where there are none to be had.
  virtual TableMemory& reserve(int device, void* stream, std::size_t bytes) = 0;
};

}  // namespace fusereg
