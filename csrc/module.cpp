// fusereg._C: one bind() per technique, and what the package needs to know about the build.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "core/drawn.h"
#include "core/gate.h"
#include "core/isa.h"
#include "core/launch_tables_python.h"
#include "core/tensor.h"
#include "core/tensor_list.h"
#include "rooms.h"  // made by CMake: calls bind(m) of each folder that has a bind.cpp

#if defined(FUSEREG_CUDA)
#include "core/cuda_info.h"
#endif
#if defined(FUSEREG_CUDA_ON_HOST)
#include "cuda_on_host.h"
#endif

namespace fusereg {
namespace {

std::vector<std::string> names(const std::vector<Isa>& isas) {
  std::vector<std::string> found;
  found.reserve(isas.size());
  for (const Isa isa : isas) found.emplace_back(isa_name(isa));
  return found;
}

py::dict build_info() {
  py::dict info;
  info["version"] = FUSEREG_VERSION;
  info["compiler"] = FUSEREG_COMPILER;
  info["pybind11"] =
      PYBIND11_TOSTRING(PYBIND11_VERSION_MAJOR) "." PYBIND11_TOSTRING(PYBIND11_VERSION_MINOR);
  info["dlpack"] =
      std::to_string(DLPACK_MAJOR_VERSION) + "." + std::to_string(DLPACK_MINOR_VERSION);
  info["isas"] = names(built_isas());
#if defined(_OPENMP)
  info["openmp"] = true;
#else
  info["openmp"] = false;
#endif
#if defined(FUSEREG_HOST_IS_DEVICE)
  info["cuda"] = "on host";
#elif defined(FUSEREG_CUDA)
  info["cuda"] = FUSEREG_CUDA_VERSION;
#else
  info["cuda"] = py::none();
#endif
#if defined(FUSEREG_CUDA_ARCHITECTURES)
  info["cuda_architectures"] = FUSEREG_CUDA_ARCHITECTURES;
#else
  info["cuda_architectures"] = "";
#endif
  return info;
}

// One dict per device; empty where there is none or no driver, and cuda_error() then says why.
// The stream that torch works on on this device; None while a graph is captured on it.
std::optional<std::uintptr_t> working_stream([[maybe_unused]] int device) {
#if defined(FUSEREG_CUDA)
  void* const stream = current_stream({kDLCUDA, device});
  if (cuda::is_capturing("fusereg.working_stream", stream)) return std::nullopt;
  return reinterpret_cast<std::uintptr_t>(stream);
#else
  return 0;  // whose kernels are refused later
#endif
}

// What makes a device current again that has no context: torch's function, which waits until the device
// is used.
void set_restore_device(const py::object& exchange) {
#if defined(FUSEREG_CUDA)
  static PyObject* lazily = nullptr;
  lazily = exchange.inc_ref().ptr();
  cuda::set_restore_device([](int device) {
    if (cuda::has_context(device) || PyGILState_Check() == 0) {
      cuda::set_device(device);
      return;
    }
    PyObject* const done = PyObject_CallFunction(lazily, "i", device);
    if (done == nullptr) PyErr_Clear();
    Py_XDECREF(done);
  });
#else
  (void)exchange;
#endif
}

py::list cuda_device_info() {
  py::list devices;
#if defined(FUSEREG_CUDA)
  const cuda::DeviceReport report = cuda::device_info();
  for (const cuda::DeviceInfo& d : report.devices) {
    py::dict entry;
    entry["index"] = d.index;
    entry["name"] = d.name;
    entry["capability"] = std::to_string(d.major) + "." + std::to_string(d.minor);
    entry["sm_count"] = d.sm_count;
    entry["memory_bytes"] = d.total_memory;
    entry["driver"] = report.driver_version;
    entry["runtime"] = report.runtime_version;
    devices.append(entry);
  }
#endif
  return devices;
}

std::string cuda_error() {
#if defined(FUSEREG_CUDA)
  return cuda::device_info().error;
#else
  return "this build has no CUDA kernels";
#endif
}

// Whether all are exactly torch.Tensor or Parameter, and the indices of those that are the same
// object as an earlier one.
py::tuple scan(const py::object& tensors) {
  const ObjectList list(tensors, "scan", "tensors");
  std::vector<std::int64_t> repeated;
  bool plain = true;
  AddressSet seen(list.size());
  for (std::size_t i = 0; i < list.size(); ++i) {
    plain = plain && is_plain_type(list[i]);
    const auto index = static_cast<std::int64_t>(i);
    if (seen.insert(list[i].ptr(), index) >= 0) repeated.push_back(index);
  }
  return py::make_tuple(plain, repeated);
}

// The kind of one object: 0 plain, 1 to be prepared in Python, 2 no tensor; and whether it is
// dense.
py::tuple inspect(const py::object& object) {
  TensorView view;
  const Kind kind = read_tensor(object, view);
  return py::make_tuple(static_cast<int>(kind), kind == Kind::kPlain && view.dense());
}

}  // namespace
}  // namespace fusereg

// Without pybind11::mod_gil_not_used: lists and dicts are read under the GIL, so a free-threaded
// interpreter turns it on at import. Torch's types are those of one interpreter.
PYBIND11_MODULE(FUSEREG_MODULE_NAME, m, pybind11::multiple_interpreters::not_supported()) {
  using namespace fusereg;
  m.doc() = "fusereg's compiled kernels; use them through the package fusereg.";
  bind_gate_functions(m);
  bind_drawn(m);
  m.def("bind_torch", &bind_torch, py::arg("tensor"), py::arg("parameter"),
        py::arg("increment_version"));
  m.def("build_info", &build_info);
  m.def("cpu_isa", [] { return std::string(isa_name(current_isa())); });
  m.def("cpu_isas", [] { return names(available_isas()); });
  m.def("set_cpu_isa", &set_isa, py::arg("name"));
  m.def("scan", &scan, py::arg("tensors"));
  m.def("inspect", &inspect, py::arg("tensor"));
  m.def("cuda_device_info", &cuda_device_info);
  m.def("cuda_error", &cuda_error);
  m.def("working_stream", &working_stream, py::arg("device"));
  m.def("set_restore_device", &set_restore_device, py::arg("exchange"));
#if defined(FUSEREG_HOST_IS_DEVICE)
  m.attr("CUDA_ON_HOST") = true;
  m.def("_set_capturing", [](bool capturing) { cuda_on_host::device().capturing = capturing; });
#else
  m.attr("CUDA_ON_HOST") = false;
#endif
#if defined(FUSEREG_CUDA_ON_HOST)
  m.def("_launch_count", &cuda_on_host::launch_count);
  m.def("_parameter_bytes", &cuda_on_host::parameter_bytes);
  m.def("_grant_sms", [](int count) { cuda_on_host::device().granted_sms = count; });
#endif
  bind_launch_tables(m);
  bind_rooms(m);
}
