#include "core/seed_argument.h"

#include <string>

namespace fusereg {
namespace {

std::string where(const char* op, const char* name) {
  return std::string("fusereg.") + op + ": " + name;
}

}  // namespace

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
  const bool good = is_plain_type(seed) && py::cast<std::int64_t>(seed.attr("numel")()) == 2 &&
                    py::cast<bool>(seed.attr("is_contiguous")()) &&
                    std::string(py::str(seed.attr("dtype"))) == "torch.int64";
  if (!good) {
    throw py::type_error(where(op, "seed") +
                         " must be an integer or a contiguous int64 tensor of 2 elements, got " +
                         std::string(py::repr(seed)));
  }
  const std::string type = py::cast<std::string>(seed.attr("device").attr("type"));
  if (type != (device.type == kDLCPU ? "cpu" : "cuda")) {
    throw py::value_error(where(op, "seed") + " must be on " + device.name() +
                          " as the input, got " + type);
  }
  result.pair =
      reinterpret_cast<const std::int64_t*>(py::cast<std::uintptr_t>(seed.attr("data_ptr")()));
  return result;
}

}  // namespace fusereg
