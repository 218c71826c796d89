// Memory of the CPU launchers, a piece for each thread that begins with a cache line.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>

namespace fusereg::augment {

class ScratchMemory {
 public:
  ScratchMemory(std::int64_t bytes, std::int64_t parts)
      : each_(static_cast<std::size_t>(bytes + kLine - 1) / kLine * kLine),
        memory_(new char[each_ * static_cast<std::size_t>(parts) + kLine]) {
    const auto base = reinterpret_cast<std::uintptr_t>(memory_.get());
    first_ = memory_.get() + (kLine - base % kLine) % kLine;
  }
  char* of(std::int64_t part) const { return first_ + each_ * static_cast<std::size_t>(part); }

 private:
  static constexpr std::size_t kLine = 64;
  std::size_t each_;
  std::unique_ptr<char[]> memory_;
  char* first_;
};

}  // namespace fusereg::augment
