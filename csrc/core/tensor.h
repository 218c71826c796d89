// Python tensors seen by kernels: read through DLPack's C exchange API, which torch (>= 2.10) puts
// on torch.Tensor. Nothing here links torch. https://dmlc.github.io/dlpack/latest/c_api.html
#pragma once

#include <dlpack/dlpack.h>
#include <pybind11/pybind11.h>

#include <cstdint>
#include <string>
#include <utility>
#include <vector>

#include "core/dtype.h"

namespace fusereg {

namespace py = pybind11;

struct Device {
  DLDeviceType type = kDLCPU;
  std::int32_t index = 0;
  bool operator==(const Device& other) const { return type == other.type && index == other.index; }
  bool operator!=(const Device& other) const { return !(*this == other); }
  std::string name() const;
};

// Whether the CUDA kernels serve this device: the device's in a CUDA build, the host's in the build
// that runs them on the host (tests/cuda_on_host).
bool runs_cuda_kernels(const Device& device);

// A tensor's memory. `sizes` and `strides` (in elements) point into the tensor and live as long as
// it is neither freed nor resized: copy what is needed before the GIL is released.
struct TensorView {
  void* data = nullptr;
  DType dtype = DType::kFloat32;
  Device device;
  int ndim = 0;
  const std::int64_t* sizes = nullptr;
  const std::int64_t* strides = nullptr;
  std::int64_t numel = 0;

  // Every element once, without gaps: some order of the dimensions is contiguous.
  bool dense() const;
  // Both lay their elements out in the same order (dimensions of size 1 do not count).
  bool same_layout(const TensorView& other) const;
};

// What a tensor is to the fast path. Everything but kPlain is left to Python, which either prepares
// an ordinary tensor from it or says precisely why it cannot.
enum class Kind {
  kPlain,      // a strided floating-point tensor with memory that the kernels can read
  kElsewhere,  // a subclass, negated or conjugated view, other layout, dtype or device, wrapper,
               // fake
  kNotTensor,
};

// Called at import with torch's types; also fetches the exchange table. Throws ImportError, and
// RuntimeError if it was called with other types before.
void bind_torch(const py::type& tensor, const py::type& parameter,
                const py::object& increment_version);

// Never throws for a strange object; never leaves a Python error set.
//
// Asking a tensor whether its sign is pending (is_neg) costs as much as all the rest, for torch
// releases and takes the GIL around it. So a Parameter or a .grad is asked only where it can be:
// the negated views that torch's public functions make are imaginary parts of complex tensors, with
// a stride of two, and a Parameter or a gradient that is one is not dense (or has one element),
// unless somebody gave it other strides (as_strided) or made it with the private torch._neg_view.
// Other tensors are always asked.
Kind read_tensor(py::handle object, TensorView& view);
Kind read_gradient(py::handle object, TensorView& view);
// Never asked: of what was made a moment ago, or is asked by the kernel's binding.
Kind read_memory(py::handle object, TensorView& view);

// Memory of any dtype: counters, masks, scratch, images. `sizes` and `strides` as above.
struct RawView {
  void* data = nullptr;
  int bytes = 0;         // of an element
  bool integer = false;  // signed
  bool is_uint8 = false;
  int ndim = 0;
  const std::int64_t* sizes = nullptr;
  const std::int64_t* strides = nullptr;
  std::int64_t numel = 0;
  Device device;
  bool contiguous = false;
};

// False for what is no plain strided tensor with memory that the kernels can read.
bool read_raw(py::handle object, RawView& view);

// Exactly torch.Tensor or torch.nn.Parameter, no subclass.
bool is_plain_type(py::handle object);

// One named argument: the view, or an error that names operation, argument, what came and what was
// wanted.
TensorView tensor_argument(py::handle object, const char* op, const char* name);

// What the kernels take as so many bytes: contiguous memory of any dtype on the device, or an error
// that names the argument.
void* memory_argument(py::handle object, std::int64_t bytes, const Device& device, const char* op,
                      const char* name);

// A Python float or int, or an error; other numbers are for Python to convert.
bool is_number(py::handle object);
double number_argument(py::handle object, const char* op, const char* name);

// No tensor has more elements: what is larger is no size, and could overflow in sums.
inline constexpr std::int64_t kMostElements = std::int64_t{1} << 48;
std::int64_t size_argument(std::int64_t size, std::int64_t least, const char* op, const char* name);

// What came, for errors: a tensor's dtype and shape, or another object's type. Neither str() nor
// repr() of it is called: torch crashes when it prints a tensor whose storage was freed.
std::string description(py::handle object);

// t.grad as a new reference, and t.requires_grad, without attribute look-ups.
py::object grad_of(py::handle tensor);
bool requires_grad(py::handle tensor);

// A Parameter is one by its type; others are asked.
bool is_leaf(py::handle tensor);

// Tells autograd that these tensors (a list) are written to; false if it refuses.
bool increment_version(const py::list& tensors);

// The stream on which the framework is working now; null on the CPU. Asked at each call, never
// cached.
void* current_stream(const Device& device);

std::string type_name(py::handle object);

// The last argument of every function that computes: the operation's name, for errors. pybind11
// would make a null pointer of None.
inline py::arg op_argument() { return py::arg("op").none(false); }

}  // namespace fusereg
