#include "core/isa.h"

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <stdexcept>

namespace fusereg {
namespace {

constexpr const char* kNames[] = {"baseline", "avx2", "avx512"};
constexpr int kUnset = -1;
std::atomic<int> g_isa{kUnset};

// __builtin_cpu_supports asks the operating system as well (XGETBV), so a set whose registers the
// kernel does not save is not reported.
bool runs_here([[maybe_unused]] Isa isa) {
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                    __builtin_cpu_supports("bmi2") && __builtin_cpu_supports("f16c");
  if (isa == Isa::avx2) return avx2;
  if (isa == Isa::avx512) {
    return avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
           __builtin_cpu_supports("avx512cd");
  }
#endif
  return isa == Isa::baseline;
}

std::string join_available() {
  std::string names;
  for (const Isa isa : available_isas())
    names += (names.empty() ? "" : ", ") + std::string(isa_name(isa));
  return names;
}

Isa parse(const std::string& name, const std::string& where) {
  const std::string available = "; available: " + join_available();
  for (int i = 0; i < 3; ++i) {
    if (name != kNames[i]) continue;
    const auto isa = static_cast<Isa>(i);
    const std::vector<Isa> built = built_isas();
    if (std::find(built.begin(), built.end(), isa) == built.end()) {
      throw std::invalid_argument(where + ": this build has no kernels for '" + name +
                                  "' (build with FUSEREG_ISAS=all)" + available);
    }
    if (runs_here(isa)) return isa;
    throw std::invalid_argument(where + ": this machine cannot run '" + name + "'" + available);
  }
  throw std::invalid_argument(where + ": unknown instruction set '" + name + "'" + available);
}

}  // namespace

// Declared in simd.h, whose files see no more of the library than they must. Extensions of AVX-512: of
// Cooper Lake, Sapphire Rapids, Zen 4; of Cannon Lake, Ice Lake, Zen 4; and what came after them.
extern const bool has_bfloat16_instructions;
extern const bool has_byte_permutations;
#if defined(__x86_64__)
const bool has_bfloat16_instructions =
    (__builtin_cpu_init(), __builtin_cpu_supports("avx512bf16")) != 0;
const bool has_byte_permutations =
    (__builtin_cpu_init(), __builtin_cpu_supports("avx512vbmi")) != 0;
#else
const bool has_bfloat16_instructions = false;
const bool has_byte_permutations = false;
#endif

const char* isa_name(Isa isa) { return kNames[static_cast<int>(isa)]; }

std::vector<Isa> built_isas() {
#define FUSEREG_LIST(ISA, TYPE) TYPE::ISA,
  return {FUSEREG_EACH_ISA(FUSEREG_LIST, Isa)};
#undef FUSEREG_LIST
}

std::vector<Isa> available_isas() {
  std::vector<Isa> isas;
  for (const Isa isa : built_isas()) {
    if (runs_here(isa)) isas.push_back(isa);
  }
  return isas;
}

Isa current_isa() {
  const int isa = g_isa.load(std::memory_order_relaxed);
  if (isa != kUnset) return static_cast<Isa>(isa);
  const char* name = std::getenv("FUSEREG_CPU_ISA");
  const Isa chosen =
      name != nullptr && *name != '\0' ? parse(name, "FUSEREG_CPU_ISA") : available_isas().back();
  g_isa.store(static_cast<int>(chosen), std::memory_order_relaxed);
  return chosen;
}

void set_isa(const std::string& name) {
  g_isa.store(static_cast<int>(parse(name, "fusereg.cpu.set_instruction_set")),
              std::memory_order_relaxed);
}

}  // namespace fusereg
