// Fixed chunks over OpenMP threads. What a chunk is never depends on the number of threads, each
// chunk's result goes to a slot of its own, and slots are added in their order: so the bits of a
// result do not depend on how many threads there were or which of them ran first.
#pragma once

#include <cstdint>

namespace fusereg {

// A non-owning reference to a callable f(begin, end); it must outlive the call it is passed to.
class RangeFunction {
 public:
  template <class F>
  RangeFunction(const F& f)  // NOLINT(google-explicit-constructor): a lambda is passed as it is
      : context_(&f), call_([](const void* context, std::int64_t begin, std::int64_t end) {
          (*static_cast<const F*>(context))(begin, end);
        }) {}
  void operator()(std::int64_t begin, std::int64_t end) const { call_(context_, begin, end); }

 private:
  const void* context_;
  void (*call_)(const void*, std::int64_t, std::int64_t);
};

// Calls f on contiguous, disjoint ranges that cover [0, n), from as many of the OpenMP threads that
// torch.set_num_threads allows as get `grain` indices each. f must not throw.
void parallel_for(std::int64_t n, std::int64_t grain, RangeFunction f);

// The threads that a team of the calling thread may have. torch.set_num_threads reaches other
// threads than its own only once these ask torch, so each asks before its first team, with what
// ask_for_threads was given. In a process that was forked, one: the threads of the parent's teams
// are not there, and GCC's OpenMP would wait for them forever.
int max_threads();
void ask_for_threads(void (*ask)());

// Adds in index order.
double ordered_sum(const double* values, std::int64_t n);

}  // namespace fusereg
