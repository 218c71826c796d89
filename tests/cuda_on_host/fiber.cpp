#include "fiber.h"

#include <sys/mman.h>

#include <new>
#include <utility>

#if defined(__SANITIZE_ADDRESS__)
#define FUSEREG_HOST_ASAN 1
#elif defined(__has_feature)
#if __has_feature(address_sanitizer)
#define FUSEREG_HOST_ASAN 1
#endif
#endif
#if defined(FUSEREG_HOST_ASAN)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

#if defined(FUSEREG_HOST_ASM_SWITCH)
// Saves what the calling convention asks a function to keep, leaves the stack pointer in *save, and
// continues where `load` was saved.
extern "C" void fusereg_host_switch(void** save, void* load);
asm(R"(
.text
.hidden fusereg_host_switch
.globl fusereg_host_switch
.type fusereg_host_switch, @function
fusereg_host_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size fusereg_host_switch, .-fusereg_host_switch
)");
#endif

namespace fusereg::cuda_on_host {

namespace {

// Enough for a kernel's frames with the sanitizers' red zones between its variables.
constexpr std::size_t kStackBytes = 128 * 1024;
// A kernel that overruns its stack hits this, unreadable, instead of its neighbor's stack. It is
// wide, since a large frame steps over a narrow one.
constexpr std::size_t kGuardBytes = 256 * 1024;

}  // namespace

void Fibers::reset(Fiber* f) {
#if defined(FUSEREG_HOST_ASAN)
  // What was abandoned on this stack left red zones behind.
  __asan_unpoison_memory_region(f->stack, kStackBytes);
#endif
  f->fake_stack = nullptr;
#if defined(FUSEREG_HOST_ASM_SWITCH)
  // As if entry_ had been called: below a return address of 0, which ends every backtrace.
  auto* top = reinterpret_cast<void**>(f->stack + kStackBytes);
  *--top = nullptr;
  *--top = reinterpret_cast<void*>(entry_);
  for (int i = 0; i < 6; ++i) *--top = nullptr;
  f->stack_pointer = top;
#else
  getcontext(&f->context);
  f->context.uc_stack.ss_sp = f->stack;
  f->context.uc_stack.ss_size = kStackBytes;
  f->context.uc_link = nullptr;
  makecontext(&f->context, entry_, 0);
#endif
}

Fiber* Fibers::acquire() {
  if (free_.empty()) {
    void* memory = mmap(nullptr, kStackBytes + kGuardBytes, PROT_READ | PROT_WRITE,
                        MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED) throw std::bad_alloc();
    if (mprotect(memory, kGuardBytes, PROT_NONE) != 0) throw std::bad_alloc();
    auto fiber = std::make_unique<Fiber>();
    fiber->stack = static_cast<unsigned char*>(memory) + kGuardBytes;
    reset(fiber.get());
    free_.push_back(fiber.get());
    all_.push_back(std::move(fiber));
  }
  Fiber* f = free_.back();
  free_.pop_back();
  return f;
}

void Fibers::reset_all() {
  free_.clear();
  for (const auto& f : all_) {
    reset(f.get());
    free_.push_back(f.get());
  }
}

// The first thing on the stack that has been switched to.
void Fibers::arrived(void* fake_stack) {
#if defined(FUSEREG_HOST_ASAN)
  const void* bottom = nullptr;
  std::size_t size = 0;
  __sanitizer_finish_switch_fiber(fake_stack, &bottom, &size);
  if (left_main_) {
    main_stack_ = bottom;
    main_stack_size_ = size;
  }
#endif
  (void)fake_stack;
}

void Fibers::switch_to(Fiber* from, Fiber* to) {
  Fiber* const source = from ? from : &main_;
  Fiber* const target = to ? to : &main_;
  left_main_ = from == nullptr;
#if defined(FUSEREG_HOST_ASAN)
  __sanitizer_start_switch_fiber(&source->fake_stack, to ? to->stack : main_stack_,
                                 to ? kStackBytes : main_stack_size_);
#endif

#if defined(FUSEREG_HOST_ASM_SWITCH)
  fusereg_host_switch(&source->stack_pointer, target->stack_pointer);
#else
  swapcontext(&source->context, &target->context);
#endif
  arrived(source->fake_stack);
}

}  // namespace fusereg::cuda_on_host
