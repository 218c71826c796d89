// fusereg._C: parameters of augmentation. Contract: augment_params.h, _C.pyi.
#include <pybind11/stl.h>

#include <stdexcept>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "augment/augment_params.h"
#include "augment/elementary.h"
#include "core/call.h"
#include "core/seed_argument.h"
#include "core/tensor.h"

namespace fusereg::augment {
namespace {

using StepTuple = std::tuple<int, int, std::vector<double>>;

std::vector<params::Step> read_steps(const std::vector<StepTuple>& steps, const char* op) {
  std::vector<params::Step> result;
  for (const auto& [kind, occurrence, values] : steps) {
    if (kind < 0 || kind >= params::kStepKinds ||
        values.size() != static_cast<std::size_t>(params::kStepValues[kind]) || occurrence < 0 ||
        occurrence > 255) {
      throw py::value_error(where(op, "steps") +
                            " has a step that is not as augment_params.h says");
    }
    result.push_back(
        {static_cast<params::StepKind>(kind), static_cast<std::uint32_t>(occurrence), values});
  }
  return result;
}

double* doubles(const py::object& tensor, std::int64_t numel, const char* op, const char* name) {
  const TensorView view = tensor_argument(tensor, op, name);
  if (view.dtype != DType::kFloat64 || view.device.type != kDLCPU || view.numel != numel ||
      !view.dense()) {
    throw py::value_error(where(op, name) + " must be a contiguous float64 tensor on the CPU");
  }
  return static_cast<double*>(view.data);
}

std::int64_t* integers(const py::object& tensor, std::int64_t numel, const char* op,
                       const char* name) {
  RawView view;
  if (!read_raw(tensor, view) || view.bytes != 8 || view.device.type != kDLCPU ||
      view.numel != numel || !view.contiguous) {
    throw py::value_error(where(op, name) + " must be a contiguous int64 tensor on the CPU");
  }
  return static_cast<std::int64_t*>(view.data);
}

// Fills records [n, 30], draws [n, 16] and keys [n, 2]; gives the output's (height, width).
std::tuple<std::int64_t, std::int64_t> augment_params(
    const py::object& records, const py::object& draws, const py::object& keys,
    const py::object& ids, const py::object& seed, std::uint32_t epoch,
    const std::vector<std::pair<std::int64_t, std::int64_t>>& sizes,
    const std::vector<StepTuple>& steps, const char* op) {
  RawView id_view;
  if (!read_raw(ids, id_view)) {
    throw py::value_error(where(op, "ids") + " must be a contiguous int64 tensor on the CPU");
  }
  params::Job job;
  job.samples = id_view.numel;
  job.ids = integers(ids, job.samples, op, "ids");
  job.records = doubles(records, job.samples * params::kRecordSize, op, "records");
  job.draws = doubles(draws, job.samples * params::kDrawsSize, op, "draws");
  job.keys = integers(keys, job.samples * 2, op, "keys");
  job.steps = read_steps(steps, op);
  job.seed = bits_argument(seed, op, "seed");
  job.epoch = epoch;
  for (const auto& [height, width] : sizes) job.inputs.push_back({height, width});
  if (sizes.empty() ||
      (sizes.size() != 1 && static_cast<std::int64_t>(sizes.size()) != job.samples))
    throw py::value_error(where(op, "sizes") + " must be one, or one for each sample");
  params::Size size;
  try {
    size = params::output_size(job);
  } catch (const std::invalid_argument& error) {
    throw py::value_error(where(op, error.what()));
  }
  params::draw(job);
  return {size.height, size.width};
}

// Fills out [n, columns]: uniform numbers, and in the last columns standard normal ones.
void augment_numbers(const py::object& out, const py::object& ids, const py::object& seed,
                     std::uint32_t epoch, std::uint32_t occurrence, std::int64_t columns,
                     std::int64_t normals, const char* op) {
  RawView id_view;
  if (!read_raw(ids, id_view) || occurrence > 255 || normals < 0 || normals > columns ||
      columns > 32768) {
    throw py::value_error(where(op, "ids") + " must be a contiguous int64 tensor on the CPU");
  }
  params::Job job;
  job.samples = id_view.numel;
  job.ids = integers(ids, job.samples, op, "ids");
  job.seed = bits_argument(seed, op, "seed");
  job.epoch = epoch;
  params::draw_numbers(job, occurrence, columns, normals,
                       doubles(out, job.samples * columns, op, "out"));
}

// What the composition is made of, for the tests: sine and cosine of degrees, log, exp.
py::tuple augment_elementary(double x) {
  double sine = 0.0;
  double cosine = 0.0;
  sine_cosine(x, sine, cosine);
  const double log = x > 0.0 ? natural_log(x) : 0.0;
  return py::make_tuple(sine, cosine, log, exponential(x));
}

}  // namespace

void bind_params(py::module_& m) {
  using py::arg;
  m.attr("AUGMENT_RECORD") = params::kRecordSize;
  m.attr("AUGMENT_DRAWS") = params::kDrawsSize;
  m.def("augment_params", &augment_params, arg("records"), arg("draws"), arg("keys"), arg("ids"),
        arg("seed"), arg("epoch"), arg("sizes"), arg("steps"), op_argument());
  m.def("augment_numbers", &augment_numbers, arg("out"), arg("ids"), arg("seed"), arg("epoch"),
        arg("occurrence"), arg("columns"), arg("normals"), op_argument());
  m.def("augment_elementary", &augment_elementary, arg("x"));
}

}  // namespace fusereg::augment
