#include "core/seed_argument.h"

#include "core/call.h"

namespace fusereg {

std::uint64_t bits_argument(const py::object& number, const char* op, const char* name) {
  if (!PyLong_Check(number.ptr())) {
    throw py::type_error(where(op, name) + " must be an integer, got " + type_name(number));
  }
  const unsigned long long value = PyLong_AsUnsignedLongLongMask(number.ptr());
  if (value == static_cast<unsigned long long>(-1) && PyErr_Occurred() != nullptr)
    throw py::error_already_set();
  return value;
}

SeedPair seed_argument(const py::object& seed, const py::object& offset, const Device& device,
                       const char* op) {
  SeedPair result;
  if (PyLong_Check(seed.ptr())) {
    result.seed = bits_argument(seed, op, "seed");
    result.offset = bits_argument(offset, op, "offset");
    return result;
  }
  RawView view;
  if (!read_raw(seed, view) || !view.integer || view.bytes != 8 || view.numel != 2 ||
      !view.contiguous) {
    throw py::type_error(where(op, "seed") +
                         " must be an integer or a contiguous int64 tensor of 2 elements, got " +
                         description(seed));
  }
  if (view.device != device) {
    throw py::value_error(where(op, "seed") + " must be on " + device.name() +
                          " as the input, got " + view.device.name());
  }
  result.pair = static_cast<const std::int64_t*>(view.data);
  return result;
}

}  // namespace fusereg
