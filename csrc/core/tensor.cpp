#include "core/tensor.h"

#include <algorithm>
#include <stdexcept>

#include "core/parallel.h"

namespace fusereg {
namespace {

// References held for the life of the process, as the types themselves are.
struct TorchApi {
  PyTypeObject* tensor = nullptr;
  PyTypeObject* parameter = nullptr;
  const DLPackExchangeAPI* exchange = nullptr;
  PyObject* grad = nullptr;           // getset descriptor of Tensor.grad
  PyObject* requires_grad = nullptr;  // of Tensor.requires_grad
  PyObject* is_leaf = nullptr;        // of Tensor.is_leaf
  PyObject* is_neg = nullptr;         // method descriptor
  PyObject* increment_version = nullptr;
  PyObject* get_num_threads = nullptr;
};
TorchApi g_torch;

bool convert_dtype(const DLDataType& from, DType& to) {
  if (from.lanes != 1) return false;
  if (from.code == kDLBfloat) {
    to = DType::kBFloat16;
    return from.bits == 16;
  }
  if (from.code != kDLFloat) return false;
  switch (from.bits) {
    case 64:
      to = DType::kFloat64;
      return true;
    case 32:
      to = DType::kFloat32;
      return true;
    case 16:
      to = DType::kFloat16;
      return true;
    default:
      return false;
  }
}

bool known_device(DLDeviceType type) {
#if defined(FUSEREG_CUDA)
  if (type == kDLCUDA) return true;
#endif
  return type == kDLCPU;
}

// Torch hands its number of threads to OpenMP, for the calling thread, when that asks for it.
void ask_torch_for_threads() {
  const py::gil_scoped_acquire gil;
  PyObject* const threads = PyObject_CallNoArgs(g_torch.get_num_threads);
  if (threads == nullptr) PyErr_Clear();
  Py_XDECREF(threads);
}

py::object descriptor_value(PyObject* descriptor, py::handle object) {
  PyObject* const value = Py_TYPE(descriptor)
                              ->tp_descr_get(descriptor, object.ptr(),
                                             reinterpret_cast<PyObject*>(Py_TYPE(object.ptr())));
  if (value == nullptr) throw py::error_already_set();
  return py::reinterpret_steal<py::object>(value);
}

}  // namespace

std::string Device::name() const {
  if (type == kDLCPU) return "cpu";
  if (type == kDLCUDA) return "cuda:" + std::to_string(index);
  return "device type " + std::to_string(static_cast<int>(type));
}

bool runs_cuda_kernels([[maybe_unused]] const Device& device) {
#if defined(FUSEREG_HOST_IS_DEVICE)
  return true;
#elif defined(FUSEREG_CUDA)
  return device.type == kDLCUDA;
#else
  return false;
#endif
}

bool TensorView::dense() const {
  std::int64_t expected = 1;
  bool contiguous = true;
  for (int d = ndim - 1; d >= 0; --d) {
    if (sizes[d] == 1) continue;
    contiguous = contiguous && strides[d] == expected;
    expected *= sizes[d];
  }
  if (contiguous || numel < 2) return true;
  // Some permutation: by growing stride, each must be the product of the sizes before it.
  std::vector<int> order;
  for (int d = 0; d < ndim; ++d) {
    if (sizes[d] != 1) order.push_back(d);
  }
  std::sort(order.begin(), order.end(), [this](int a, int b) { return strides[a] < strides[b]; });
  expected = 1;
  for (const int d : order) {
    if (strides[d] != expected) return false;
    expected *= sizes[d];
  }
  return true;
}

bool TensorView::same_layout(const TensorView& other) const {
  if (ndim != other.ndim || numel != other.numel) return false;
  for (int d = 0; d < ndim; ++d) {
    if (sizes[d] != other.sizes[d]) return false;
    if (sizes[d] > 1 && strides[d] != other.strides[d] && numel > 0) return false;
  }
  return true;
}

void bind_torch(const py::type& tensor, const py::type& parameter,
                const py::object& increment_version) {
  const char* const kAttribute = "__dlpack_c_exchange_api__";
  if (!py::hasattr(tensor, kAttribute)) {
    throw py::import_error(
        "fusereg needs torch >= 2.10: this torch.Tensor has no __dlpack_c_exchange_api__");
  }
  const py::object capsule = tensor.attr(kAttribute);
  const auto* api = static_cast<const DLPackExchangeAPI*>(
      PyCapsule_GetPointer(capsule.ptr(), "dlpack_exchange_api"));
  if (api == nullptr) throw py::error_already_set();
  // A newer torch may put a newer table in front; the chain leads to the one that we know.
  const DLPackExchangeAPIHeader* header = &api->header;
  while (header != nullptr && header->version.major != DLPACK_MAJOR_VERSION)
    header = header->prev_api;
  api = reinterpret_cast<const DLPackExchangeAPI*>(header);
  if (api == nullptr || api->dltensor_from_py_object_no_sync == nullptr ||
      api->current_work_stream == nullptr) {
    throw py::import_error("fusereg: this torch offers no DLPack exchange API of major version " +
                           std::to_string(DLPACK_MAJOR_VERSION) + "; a newer fusereg is needed");
  }
  const auto* const tensor_type = reinterpret_cast<PyTypeObject*>(tensor.ptr());
  const auto* const parameter_type = reinterpret_cast<PyTypeObject*>(parameter.ptr());
  if (g_torch.tensor != nullptr) {
    if (g_torch.tensor == tensor_type && g_torch.parameter == parameter_type &&
        g_torch.increment_version == increment_version.ptr()) {
      return;
    }
    throw std::runtime_error("fusereg._C is bound to torch already, with other types");
  }
  TorchApi torch;
  torch.exchange = api;
  torch.tensor = reinterpret_cast<PyTypeObject*>(py::object(tensor).release().ptr());
  torch.parameter = reinterpret_cast<PyTypeObject*>(py::object(parameter).release().ptr());
  torch.grad = py::object(tensor.attr("__base__").attr("__dict__")["grad"]).release().ptr();
  torch.requires_grad =
      py::object(tensor.attr("__base__").attr("__dict__")["requires_grad"]).release().ptr();
  torch.is_leaf = py::object(tensor.attr("__base__").attr("__dict__")["is_leaf"]).release().ptr();
  torch.is_neg = py::object(tensor.attr("is_neg")).release().ptr();
  torch.increment_version = py::object(increment_version).release().ptr();
  for (PyObject* const descriptor : {torch.grad, torch.requires_grad, torch.is_leaf}) {
    if (Py_TYPE(descriptor)->tp_descr_get == nullptr) {
      throw py::import_error(
          "fusereg: torch.Tensor.grad and its like are no descriptors in this torch");
    }
  }
  torch.get_num_threads =
      py::object(py::module_::import("torch").attr("get_num_threads")).release().ptr();
  g_torch = torch;
  ask_for_threads(&ask_torch_for_threads);
}

bool is_plain_type(py::handle object) {
  const PyTypeObject* const type = Py_TYPE(object.ptr());
  return type == g_torch.tensor || type == g_torch.parameter;
}

Kind read_memory(py::handle object, TensorView& view) {
  if (g_torch.exchange == nullptr)
    throw std::runtime_error("fusereg._C is used through the package fusereg");
  if (!is_plain_type(object)) {
    return PyType_IsSubtype(Py_TYPE(object.ptr()), g_torch.tensor) ? Kind::kElsewhere
                                                                   : Kind::kNotTensor;
  }
  DLTensor t;
  if (g_torch.exchange->dltensor_from_py_object_no_sync(object.ptr(), &t) != 0) {
    PyErr_Clear();
    return Kind::kElsewhere;
  }
  if (!convert_dtype(t.dtype, view.dtype) || !known_device(t.device.device_type))
    return Kind::kElsewhere;
  view.data = t.data == nullptr ? nullptr : static_cast<char*>(t.data) + t.byte_offset;
  view.device = {t.device.device_type, t.device.device_id};
  view.ndim = t.ndim;
  view.sizes = t.shape;
  view.strides = t.strides;
  view.numel = 1;
  for (int d = 0; d < t.ndim; ++d) view.numel *= t.shape[d];
  // Fake tensors, freed storage and zero-tensors export a null pointer without an error.
  if (view.numel > 0 && view.data == nullptr) return Kind::kElsewhere;
  return Kind::kPlain;
}

namespace {

// A negated view is exported as if its sign were not pending.
bool is_negated(py::handle object) {
  PyObject* const arguments[] = {object.ptr()};
  PyObject* const negative = PyObject_Vectorcall(g_torch.is_neg, arguments, 1, nullptr);
  if (negative == nullptr) {
    PyErr_Clear();
    return true;
  }
  Py_DECREF(negative);
  return negative == Py_True;
}

}  // namespace

Kind read_tensor(py::handle object, TensorView& view) {
  const Kind kind = read_memory(object, view);
  if (kind != Kind::kPlain) return kind;
  const bool exempt = Py_TYPE(object.ptr()) == g_torch.parameter && view.numel > 1 && view.dense();
  return !exempt && is_negated(object) ? Kind::kElsewhere : kind;
}

Kind read_gradient(py::handle object, TensorView& view) {
  const Kind kind = read_memory(object, view);
  if (kind != Kind::kPlain) return kind;
  const bool exempt = view.numel > 1 && view.dense();
  return !exempt && is_negated(object) ? Kind::kElsewhere : kind;
}

bool read_raw(py::handle object, RawView& view) {
  if (g_torch.exchange == nullptr)
    throw std::runtime_error("fusereg._C is used through the package fusereg");
  if (!is_plain_type(object)) return false;
  DLTensor t;
  if (g_torch.exchange->dltensor_from_py_object_no_sync(object.ptr(), &t) != 0) {
    PyErr_Clear();
    return false;
  }
  if (t.dtype.lanes != 1 || t.dtype.bits % 8 != 0 || !known_device(t.device.device_type))
    return false;
  view.data = t.data == nullptr ? nullptr : static_cast<char*>(t.data) + t.byte_offset;
  view.bytes = t.dtype.bits / 8;
  view.integer = t.dtype.code == kDLInt;
  view.is_uint8 = t.dtype.code == kDLUInt && t.dtype.bits == 8;
  view.ndim = t.ndim;
  view.sizes = t.shape;
  view.strides = t.strides;
  view.device = {t.device.device_type, t.device.device_id};
  view.numel = 1;
  view.contiguous = true;
  for (int d = t.ndim - 1; d >= 0; --d) {
    if (t.shape[d] != 1 && t.strides[d] != view.numel) view.contiguous = false;
    view.numel *= t.shape[d];
  }
  if (view.numel == 0) view.contiguous = true;
  return view.numel == 0 || view.data != nullptr;
}

TensorView tensor_argument(py::handle object, const char* op, const char* name) {
  TensorView view;
  const std::string where = std::string("fusereg.") + op + ": " + name + " must be ";
  switch (read_tensor(object, view)) {
    case Kind::kPlain:
      return view;
    case Kind::kNotTensor:
      throw py::type_error(where + "a torch.Tensor, got " + type_name(object));
    default:
      throw py::value_error(
          where +
          "a strided float64, float32, float16 or bfloat16 tensor in CPU or CUDA memory, got " +
          std::string(py::str(object.attr("dtype"))) + ", " +
          std::string(py::str(object.attr("layout"))) + " on " +
          std::string(py::str(object.attr("device"))) + " (" + type_name(object) + ")");
  }
}

void* memory_argument(py::handle object, std::int64_t bytes, const Device& device, const char* op,
                      const char* name) {
  RawView view;
  constexpr std::uintptr_t kAlignment = 8;
  if (!read_raw(object, view) || !view.contiguous || view.device != device ||
      view.numel * view.bytes < bytes ||
      reinterpret_cast<std::uintptr_t>(view.data) % kAlignment != 0) {
    throw py::value_error(std::string("fusereg.") + op + ": " + name + " must have " +
                          std::to_string(bytes) + " contiguous bytes on " + device.name() +
                          ", got " + description(object));
  }
  return view.data;
}

bool is_number(py::handle object) {
  return PyFloat_Check(object.ptr()) || PyLong_Check(object.ptr());
}

double number_argument(py::handle object, const char* op, const char* name) {
  const double value = PyFloat_AsDouble(object.ptr());
  if (value == -1.0 && PyErr_Occurred() != nullptr) {
    PyErr_Clear();
    throw py::value_error(std::string("fusereg.") + op + ": " + name +
                          " must be a number that fits a float, got " + type_name(object));
  }
  return value;
}

std::int64_t size_argument(std::int64_t size, std::int64_t least, const char* op,
                           const char* name) {
  if (size < least || size > kMostElements) {
    throw py::value_error(std::string("fusereg.") + op + ": " + name + " must be within [" +
                          std::to_string(least) + ", 2**48], got " + std::to_string(size));
  }
  return size;
}

std::string description(py::handle object) {
  if (!is_plain_type(object)) return type_name(object);
  return std::string(py::str(object.attr("dtype"))) + " of shape " +
         std::string(py::str(py::tuple(object.attr("shape"))));
}

py::object grad_of(py::handle tensor) { return descriptor_value(g_torch.grad, tensor); }

bool requires_grad(py::handle tensor) {
  return descriptor_value(g_torch.requires_grad, tensor).ptr() == Py_True;
}

bool is_leaf(py::handle tensor) {
  return Py_TYPE(tensor.ptr()) == g_torch.parameter ||
         descriptor_value(g_torch.is_leaf, tensor).ptr() == Py_True;
}

bool increment_version(const py::list& tensors) {
  PyObject* const done = PyObject_CallOneArg(g_torch.increment_version, tensors.ptr());
  if (done == nullptr) {
    PyErr_Clear();
    return false;
  }
  Py_DECREF(done);
  return true;
}

void* current_stream(const Device& device) {
  if (device.type == kDLCPU) return nullptr;
  void* stream = nullptr;
  if (g_torch.exchange->current_work_stream(device.type, device.index, &stream) != 0) {
    throw py::error_already_set();
  }
  return stream;
}

std::string type_name(py::handle object) { return Py_TYPE(object.ptr())->tp_name; }

}  // namespace fusereg
