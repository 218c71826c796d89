// The pages of memory that results are written to.
#pragma once

#include <cstdint>

namespace fusereg {

// Asks the system to hold results that are about to be written in large pages, where it gives them
// to those who ask (Linux, transparent huge pages on "madvise"). Memory that torch has just
// allocated has no pages yet, and for a result of many megabytes to take one fault for every 4 KB
// costs several times what the kernel does. A hint: contents, and memory that has its pages, stay
// as they are; nothing is done for less than 4 MB.
void ask_for_large_pages(void* data, std::int64_t bytes);

}  // namespace fusereg
