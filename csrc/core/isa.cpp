#include "core/isa.h"

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
bool runs_here(Isa isa) {
#if defined(FUSEREG_X86_ISAS)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                    __builtin_cpu_supports("bmi2") && __builtin_cpu_supports("f16c");
  switch (isa) {
    case Isa::kBaseline:
      return true;
    case Isa::kAvx2:
      return avx2;
    case Isa::kAvx512:
      return avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
             __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
             __builtin_cpu_supports("avx512cd");
  }
  return false;
#else
  return isa == Isa::kBaseline;
#endif
}

std::string join_available() {
  std::string names;
  for (const Isa isa : available_isas())
    names += (names.empty() ? "" : ", ") + std::string(isa_name(isa));
  return names;
}

Isa parse(const std::string& name, const std::string& where) {
  for (int i = 0; i < 3; ++i) {
    if (name != kNames[i]) continue;
    const auto isa = static_cast<Isa>(i);
    if (runs_here(isa)) return isa;
    throw std::invalid_argument(where + ": this machine or build cannot run '" + name +
                                "'; available: " + join_available());
  }
  throw std::invalid_argument(where + ": unknown instruction set '" + name +
                              "'; available: " + join_available());
}

}  // namespace

const char* isa_name(Isa isa) { return kNames[static_cast<int>(isa)]; }

std::vector<Isa> available_isas() {
  std::vector<Isa> isas;
  for (const Isa isa : {Isa::kBaseline, Isa::kAvx2, Isa::kAvx512}) {
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
  g_isa.store(static_cast<int>(parse(name, "fusereg._C.set_cpu_isa")), std::memory_order_relaxed);
}

}  // namespace fusereg
