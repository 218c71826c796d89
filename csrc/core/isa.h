// Which CPU instruction set the kernels use. Every CPU kernel file is compiled once per set, in a
// namespace of its own (fusereg::<room>::baseline / avx2 / avx512); the choice is made once, at the
// first call, from what the processor and the operating system support.
#pragma once

#include <string>
#include <vector>

namespace fusereg {

enum class Isa { kBaseline = 0, kAvx2 = 1, kAvx512 = 2 };

const char* isa_name(Isa isa);

// The instruction sets that this build holds and this machine can run, slowest first.
std::vector<Isa> available_isas();

// The one in use: the best available, or the one that FUSEREG_CPU_ISA names.
// Throws std::invalid_argument if the variable names one that is unknown or cannot run here.
Isa current_isa();

// Changes it for the whole process (for tests and benchmarks). Throws std::invalid_argument.
void set_isa(const std::string& name);

// Picks this ISA's entry of a room's tables; a table that was not built is null.
template <class Table>
const Table& select_isa(const Table* baseline, const Table* avx2, const Table* avx512) {
  switch (current_isa()) {
    case Isa::kAvx512:
      return *avx512;
    case Isa::kAvx2:
      return *avx2;
    default:
      return *baseline;
  }
}

}  // namespace fusereg

// One line in a room's header: declares NAME in the namespaces of the instruction sets that were
// built.
#if defined(FUSEREG_X86_ISAS)
#define FUSEREG_DECLARE_PER_ISA(TYPE, NAME)                                    \
  namespace baseline {                                                         \
  extern const TYPE NAME;                                                      \
  }                                                                            \
  namespace avx2 {                                                             \
  extern const TYPE NAME;                                                      \
  }                                                                            \
  namespace avx512 {                                                           \
  extern const TYPE NAME;                                                      \
  }                                                                            \
  inline const TYPE& cpu_##NAME() {                                            \
    return ::fusereg::select_isa(&baseline::NAME, &avx2::NAME, &avx512::NAME); \
  }
#else
#define FUSEREG_DECLARE_PER_ISA(TYPE, NAME)                                \
  namespace baseline {                                                     \
  extern const TYPE NAME;                                                  \
  }                                                                        \
  inline const TYPE& cpu_##NAME() {                                        \
    return ::fusereg::select_isa<TYPE>(&baseline::NAME, nullptr, nullptr); \
  }
#endif
