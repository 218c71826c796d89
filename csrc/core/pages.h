// The pages of memory that results are written to.
#pragma once

#include <cstdint>

namespace fusereg {

// Asks the system for the pages of a result that is about to be written. Memory that torch has just
// allocated has none yet, and to take one fault for every 4 KB costs several times what the kernel
// does. A hint: contents, and memory that has its pages, stay as they are.
//
// From 512 KB on, what is not there is made by few calls (Linux 5.14), for half of what the faults
// cost (measured in a virtual machine: 1.9 us for 4 KB by a fault, 1.0 so); from 4 MB on in large
// pages, where the system gives them to those who ask (transparent huge pages on "madvise").
void prepare_pages(void* data, std::int64_t bytes);

}  // namespace fusereg
