// Fibers: stacks of their own on one thread of the process, and the switch between them, which
// AddressSanitizer is told of.
#pragma once

#include <cstddef>
#include <memory>
#include <vector>

// A switch written by hand is a dozen instructions; swapcontext makes a system call each time.
#if defined(__x86_64__) && !defined(__CET__) && !defined(FUSEREG_HOST_UCONTEXT)
#define FUSEREG_HOST_ASM_SWITCH 1
#else
#include <ucontext.h>
#endif

namespace fusereg::cuda_on_host {

// A stack and where to continue on it.
struct Fiber {
  unsigned char* stack = nullptr;  // above its guard
  void* fake_stack = nullptr;
#if defined(FUSEREG_HOST_ASM_SWITCH)
  void* stack_pointer = nullptr;
#else
  ucontext_t context{};
#endif
};

class Fibers {
 public:
  // What a fresh fiber runs. It must call started() first, and never return.
  explicit Fibers(void (*entry)()) : entry_(entry) {}

  Fiber* acquire();
  // The fiber may still run, up to its next switch_to().
  void release(Fiber* f) { free_.push_back(f); }
  // All are fresh and free again, whatever was left on their stacks.
  void reset_all();
  // A null pointer stands for the launching thread's own stack.
  void switch_to(Fiber* from, Fiber* to);
  void started() { arrived(nullptr); }

 private:
  void reset(Fiber* f);
  void arrived(void* fake_stack);

  void (*entry_)();
  std::vector<std::unique_ptr<Fiber>> all_;
  std::vector<Fiber*> free_;
  Fiber main_;
  const void* main_stack_ = nullptr;
  std::size_t main_stack_size_ = 0;
  bool left_main_ = false;
};

}  // namespace fusereg::cuda_on_host
