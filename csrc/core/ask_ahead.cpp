#include "core/ask_ahead.h"

namespace fusereg {

bool asking_ahead_pays() {
#if defined(__x86_64__)
  static const bool intel = [] {
    __builtin_cpu_init();
    return __builtin_cpu_is("intel") != 0;
  }();
  return intel;
#else
  return false;
#endif
}

}  // namespace fusereg
