// fusereg._C: antialiased resizing. Contract: resize.h, _C.pyi.
#include <pybind11/stl.h>

#include <algorithm>
#include <string>
#include <tuple>
#include <vector>

#include "augment/resize.h"
#include "core/call.h"
#include "core/tensor.h"

namespace fusereg::augment {

bool read_images(const py::object& tensor, Images& images, std::int64_t (&sizes)[4],
                 Device& device);

namespace {

// The matrix of an axis of x, `from` long, that has `to` rows.
Band read_band(const py::object& first, const py::object& weights, std::int64_t from,
               std::int64_t to, DType dtype, const Device& device, const char* op) {
  RawView raw;
  if (!read_raw(first, raw) || raw.bytes != 4 || !raw.integer || !raw.contiguous ||
      raw.numel != to || raw.device != device) {
    throw py::value_error(where(op, "first") + " must be a contiguous int32 tensor of " +
                          std::to_string(to) + " elements on " + device.name());
  }
  const TensorView view = tensor_argument(weights, op, "weights");
  if (view.dtype != dtype || view.ndim != 2 || view.sizes[0] != to || view.sizes[1] < 1 ||
      view.sizes[1] > from || view.strides[1] != 1 ||
      (to > 1 && view.strides[0] != view.sizes[1]) || view.device != device) {
    throw py::value_error(where(op, "weights") + " must be a contiguous " + dtype_name(dtype) +
                          " tensor of shape (" + std::to_string(to) + ", 1 to " +
                          std::to_string(from) + ") on " + device.name());
  }
  return {static_cast<const std::int32_t*>(raw.data), view.data, view.sizes[1]};
}

// 0: done; 2: Python must prepare a tensor first, and nothing has been written.
int augment_resize(const py::object& y, const py::object& x, const py::object& first_row,
                   const py::object& row_weights, const py::object& first_column,
                   const py::object& column_weights, const py::object& scratch,
                   const std::vector<double>& scale, const std::vector<double>& shift,
                   const char* op) {
  ResizeJob job;
  Device device;
  Device y_device;
  std::int64_t sizes[4];
  std::int64_t y_sizes[4];
  if (!read_images(x, job.x, sizes, device) || !read_images(y, job.y, y_sizes, y_device) ||
      device != y_device) {
    return kNeedsPreparation;
  }
  if (y_sizes[0] != sizes[0] || y_sizes[1] != sizes[1])
    throw py::value_error(where(op, "y") + " must have x's batch size and channels");
  const std::int64_t longest = std::max({job.x.h, job.x.w, job.y.h, job.y.w});
  if (sizes[1] > kMaxChannels || longest > kMaxSide) {
    throw py::value_error(where(op, "x") + " must have at most " + std::to_string(kMaxChannels) +
                          " channels and " + std::to_string(kMaxSide) + " pixels a side");
  }
  job.n = sizes[0];
  job.c = static_cast<int>(sizes[1]);
  for (const auto& [name, values, to] :
       {std::tuple{"scale", &scale, job.scale}, std::tuple{"shift", &shift, job.shift}}) {
    if (values->size() != static_cast<std::size_t>(job.c)) {
      throw py::value_error(where(op, name) + " must have " + std::to_string(job.c) +
                            " elements, one a channel, got " + std::to_string(values->size()));
    }
    std::copy(values->begin(), values->end(), to);
  }
  if (job.n * job.y.sample == 0) return kDone;
  if (job.x.sample == 0) throw py::value_error(where(op, "x") + " must have at least one pixel");
  const DType dtype = job.x.type == Element::kFloat64 ? DType::kFloat64 : DType::kFloat32;
  job.rows = read_band(first_row, row_weights, job.x.h, job.y.h, dtype, device, op);
  job.columns = read_band(first_column, column_weights, job.x.w, job.y.w, dtype, device, op);
  if (runs_cuda_kernels(device)) {
    const TensorView view = tensor_argument(scratch, op, "scratch");
    const std::int64_t wanted = job.n * job.c * job.y.h * job.x.w;
    if (view.dtype != dtype || !view.dense() || view.numel < wanted || view.device != device) {
      throw py::value_error(where(op, "scratch") + " must be a contiguous " + dtype_name(dtype) +
                            " tensor of " + std::to_string(wanted) + " elements on " +
                            device.name());
    }
    job.scratch = view.data;
  }
  run_job(job, device, job.n * job.c * job.y.h * job.y.w);
  return kDone;
}

struct Axis {
  std::int64_t from, to;
  Interpolation how;
  bool transposed;
};

Axis axis_of(std::int64_t from, std::int64_t to, int interpolation, bool transposed,
             const char* op) {
  if (from < 1 || to < 1 || from > kMaxSide || to > kMaxSide) {
    throw py::value_error(where(op, "size") + " must be within 1 and " + std::to_string(kMaxSide) +
                          ", got " + std::to_string(from) + " and " + std::to_string(to));
  }
  if (interpolation != 1 && interpolation != 2)
    throw py::value_error(where(op, "interpolation") + " must be 1 or 2");
  return {from, to, static_cast<Interpolation>(interpolation), transposed};
}

std::int64_t augment_resize_taps(std::int64_t from, std::int64_t to, int interpolation,
                                 bool transposed, const char* op) {
  const Axis a = axis_of(from, to, interpolation, transposed, op);
  return resize_taps(a.from, a.to, a.how, a.transposed);
}

// Both on the CPU; weights in float64.
int augment_resize_band(const py::object& first, const py::object& weights, std::int64_t from,
                        std::int64_t to, int interpolation, bool transposed, const char* op) {
  const Axis a = axis_of(from, to, interpolation, transposed, op);
  const Device cpu;
  const std::int64_t rows = transposed ? from : to;
  const std::int64_t size = transposed ? to : from;
  const Band band = read_band(first, weights, size, rows, DType::kFloat64, cpu, op);
  if (band.taps < resize_taps(a.from, a.to, a.how, a.transposed))
    throw py::value_error(where(op, "weights") + " has too few columns");
  resize_band(a.from, a.to, a.how, a.transposed, band.taps, const_cast<std::int32_t*>(band.first),
              const_cast<double*>(static_cast<const double*>(band.weights)));
  return kDone;
}

}  // namespace

void bind_resize(py::module_& m) {
  using py::arg;
  m.def("augment_resize", &augment_resize, arg("y"), arg("x"), arg("first_row"), arg("row_weights"),
        arg("first_column"), arg("column_weights"), arg("scratch"), arg("scale"), arg("shift"),
        op_argument());
  m.def("augment_resize_taps", &augment_resize_taps, arg("size"), arg("new_size"),
        arg("interpolation"), arg("transposed"), op_argument());
  m.def("augment_resize_band", &augment_resize_band, arg("first"), arg("weights"), arg("size"),
        arg("new_size"), arg("interpolation"), arg("transposed"), op_argument());
}

}  // namespace fusereg::augment
