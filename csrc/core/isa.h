// Which CPU instruction set the kernels use. Every CPU kernel file is compiled once per set, in a
// namespace of its own (fusereg::<room>::baseline / avx2 / avx512); the choice is made once, at the
// first call, from what the processor and the operating system support.
#pragma once

#include <string>
#include <vector>

namespace fusereg {

// Named as their namespaces, slowest first.
enum class Isa { baseline, avx2, avx512 };

const char* isa_name(Isa isa);

// The instruction sets that this build holds, and those of them that this machine can run; slowest
// first.
std::vector<Isa> built_isas();
std::vector<Isa> available_isas();

// The one in use: the best available, or the one that FUSEREG_CPU_ISA names.
// Throws std::invalid_argument if the variable names one that is unknown or cannot run here.
Isa current_isa();

// Changes it for the whole process (for tests and benchmarks). Throws std::invalid_argument.
void set_isa(const std::string& name);

}  // namespace fusereg

// X(isa, ...) for each instruction set that was built (FUSEREG_ISAS of CMakeLists.txt).
#if defined(FUSEREG_BUILT_avx2)
#define FUSEREG_IF_AVX2(...) __VA_ARGS__
#else
#define FUSEREG_IF_AVX2(...)
#endif
#if defined(FUSEREG_BUILT_avx512)
#define FUSEREG_IF_AVX512(...) __VA_ARGS__
#else
#define FUSEREG_IF_AVX512(...)
#endif
#define FUSEREG_EACH_ISA(X, ...) \
  X(baseline, __VA_ARGS__)       \
  FUSEREG_IF_AVX2(X(avx2, __VA_ARGS__)) FUSEREG_IF_AVX512(X(avx512, __VA_ARGS__))

// One line in a room's header: declares the table NAME in the namespaces of the instruction sets
// that were built, and cpu_NAME(), which is that of the one in use.
#define FUSEREG_DECLARE_PER_ISA(TYPE, NAME)              \
  FUSEREG_EACH_ISA(FUSEREG_DECLARE_TABLE, TYPE, NAME)    \
  inline const TYPE& cpu_##NAME() {                      \
    switch (::fusereg::current_isa()) {                  \
      FUSEREG_EACH_ISA(FUSEREG_CASE_OF_TABLE, NAME)      \
      default: /* current_isa() is one of those built */ \
        return baseline::NAME;                           \
    }                                                    \
  }
#define FUSEREG_DECLARE_TABLE(ISA, TYPE, NAME) \
  namespace ISA {                              \
  extern const TYPE NAME;                      \
  }
#define FUSEREG_CASE_OF_TABLE(ISA, NAME) \
  case ::fusereg::Isa::ISA:              \
    return ISA::NAME;
