// Lists of tensors, as penalties and optimizers take them.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <string>
#include <vector>

#include "core/tensor.h"

namespace fusereg {

// What a call over a list did. Python acts on everything but kDone, and nothing was written then.
enum class ListStatus : int {
  kDone = 0,
  kNeedsFloat64Value = 1,  // an input is float64, the 0-d result that was passed is not
  kNeedsPreparation = 2,   // a tensor that only Python can prepare, or can explain why it cannot
};

// The items of a Python list or tuple, as they were when the call began: another thread may change
// the list while a kernel runs, and so may an item that is asked for its value.
class ObjectList {
 public:
  ObjectList(const py::object& sequence, const char* op, const char* name)
      : items_(py::reinterpret_steal<py::object>(PySequence_Tuple(sequence.ptr()))) {
    if (!items_) {
      PyErr_Clear();
      throw py::type_error(std::string("fusereg.") + op + ": " + name + " must be a list, got " +
                           type_name(sequence));
    }
  }
  std::size_t size() const { return static_cast<std::size_t>(PyTuple_GET_SIZE(items_.ptr())); }
  py::handle operator[](std::size_t i) const {
    return PyTuple_GET_ITEM(items_.ptr(), static_cast<Py_ssize_t>(i));
  }

 private:
  py::object items_;
};

// Thousands of small tensors lie all over memory, and what a step of theirs takes is the waiting
// for it. A tensor's object has a pointer to the tensor right behind its header, or (torch < 2.13)
// behind a flag there; where it has not, the hint is a wrong one and does no harm.
inline void prefetch_object(const PyObject* object) {
  if (object != nullptr) __builtin_prefetch(object);
}
inline void prefetch_tensor(PyObject* object) {
  if (object == nullptr || Py_TYPE(object)->tp_basicsize < 32) return;
  std::uintptr_t words[2];
  std::memcpy(words, reinterpret_cast<const char*>(object) + 16, sizeof(words));
  // A flag is no address: looking in vain for its page takes longer than a hint is worth.
  const std::uintptr_t at = words[0] > 1 ? words[0] : words[1];
  if (at <= 1) return;
  for (int line = 0; line < 3; ++line)
    __builtin_prefetch(reinterpret_cast<const char*>(at) + 64 * line);
}

// A strength that is one number for all tensors or one for each.
class PerTensor {
 public:
  PerTensor(const py::object& value, std::size_t count, const char* op, const char* name) {
    if (is_number(value)) {
      values_.push_back(check(number_argument(value, op, name), op, name));
      return;
    }
    const ObjectList list(value, op, name);
    if (list.size() != count) {
      throw py::value_error(std::string("fusereg.") + op + ": " + name + " must be one number or " +
                            std::to_string(count) + " of them (one per tensor), got " +
                            std::to_string(list.size()));
    }
    for (std::size_t i = 0; i < count; ++i) {
      const double x = PyFloat_AsDouble(list[i].ptr());
      if (x == -1.0 && PyErr_Occurred() != nullptr) {
        PyErr_Clear();
        throw py::type_error(std::string("fusereg.") + op + ": " + name + "[" + std::to_string(i) +
                             "] must be a number, got " + type_name(list[i]));
      }
      values_.push_back(check(x, op, name));
    }
    single_ = false;
  }
  double operator[](std::size_t i) const { return values_[single_ ? 0 : i]; }

 private:
  static double check(double x, const char* op, const char* name) {
    if (std::isfinite(x) && x >= 0.0) return x;
    throw py::value_error(std::string("fusereg.") + op + ": " + name +
                          " must be finite and not negative, got " +
                          std::string(py::str(py::float_(x))));
  }

  std::vector<double> values_;
  bool single_ = true;
};

// Memory that a call is about to write, from all the tensors of its list.
class WrittenRanges {
 public:
  void reserve(std::size_t count) { ranges_.reserve(count); }
  void add(const void* data, std::int64_t bytes) {
    if (bytes == 0) return;
    const auto begin = reinterpret_cast<std::uintptr_t>(data);
    ascending_ = ascending_ && (ranges_.empty() || begin >= ranges_.back().end);
    descending_ = descending_ && (ranges_.empty() || begin + bytes <= ranges_.back().begin);
    ranges_.push_back({begin, begin + static_cast<std::uintptr_t>(bytes)});
  }
  // Gradients are mostly allocated one after the other, forwards or backwards; only else is there
  // work.
  bool overlap() {
    if (ascending_ || descending_) return false;
    std::sort(ranges_.begin(), ranges_.end(),
              [](const Range& a, const Range& b) { return a.begin < b.begin; });
    for (std::size_t i = 1; i < ranges_.size(); ++i) {
      if (ranges_[i].begin < ranges_[i - 1].end) return true;
    }
    return false;
  }

 private:
  struct Range {
    std::uintptr_t begin;
    std::uintptr_t end;
  };
  std::vector<Range> ranges_;
  bool ascending_ = true;
  bool descending_ = true;
};

// Addresses seen so far; open addressing, because lists have thousands of entries and calls
// microseconds.
class AddressSet {
 public:
  explicit AddressSet(std::size_t count) {
    std::size_t slots = 16;
    while (slots < 2 * count) slots *= 2;
    slots_.assign(slots, Slot{});
  }
  // The index that `address` was inserted with before, or -1 after inserting it now.
  std::int64_t insert(const void* address, std::int64_t index) {
    std::size_t at = (reinterpret_cast<std::uintptr_t>(address) >> 4) * 0x9e3779b97f4a7c15ull >> 20;
    for (;; ++at) {
      Slot& slot = slots_[at & (slots_.size() - 1)];
      if (slot.address == address) return slot.index;
      if (slot.address == nullptr) {
        slot = {address, index};
        return -1;
      }
    }
  }

 private:
  struct Slot {
    const void* address = nullptr;
    std::int64_t index = 0;
  };
  std::vector<Slot> slots_;
};

}  // namespace fusereg
