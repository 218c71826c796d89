// fusereg._C: the choice of CUDA kernels for a batch normalization, for tests and for the curious.
// Contract: batch_norm_plan.h, _C.pyi.
#include <algorithm>
#include <string>

#include "batch_norm/batch_norm_plan.h"
#include "core/tensor.h"

namespace fusereg::batch_norm {
namespace {

DType dtype_argument(const std::string& name) {
  for (const DType dtype : {DType::kFloat64, DType::kFloat32, DType::kFloat16, DType::kBFloat16}) {
    if (name == dtype_name(dtype)) return dtype;
  }
  throw py::value_error("fusereg.batch_norm: dtype must be a floating-point one, got " + name);
}

py::dict tiling_dict(const Tiling& t) {
  py::dict d;
  d["columns"] = t.columns;
  d["wide"] = t.wide;
  d["pack"] = t.pack;
  d["width"] = t.width;
  d["rows_at_once"] = t.rows_at_once;
  d["slabs"] = t.slabs;
  d["groups"] = t.groups;
  d["splits"] = t.splits;
  d["share"] = t.share;
  d["bundle"] = t.bundle;
  return d;
}

// layout: (outer, channels, inner, group_rows); device: (sm_count, shared_per_sm,
// shared_per_block).
py::dict batch_norm_plan(const py::tuple& layout, const std::string& dtype, bool backward,
                         const py::tuple& device, bool aligned, bool mask, bool bits,
                         bool resident) {
  if (py::len(layout) != 4 || py::len(device) != 3) {
    throw py::value_error("fusereg.batch_norm: layout must have 4 numbers and device 3, got " +
                          std::to_string(py::len(layout)) + " and " +
                          std::to_string(py::len(device)));
  }
  Layout l;
  l.outer = layout[0].cast<std::int64_t>();
  l.channels = layout[1].cast<std::int64_t>();
  l.inner = layout[2].cast<std::int64_t>();
  l.group_rows = layout[3].cast<std::int64_t>();
  const std::int64_t most =
      kMostElements / std::max<std::int64_t>(l.channels, 1) / std::max<std::int64_t>(l.inner, 1);
  if (l.outer < 0 || l.channels < 1 || l.inner < 0 || l.group_rows < 1 || l.outer > most ||
      l.channels > kMostElements || l.inner > kMostElements || l.group_rows > kMostElements) {
    throw py::value_error("fusereg.batch_norm: layout must hold sizes, got " +
                          std::string(py::str(layout)));
  }
  const DeviceLimits limits = {device[0].cast<int>(), device[1].cast<int>(), device[2].cast<int>()};
  constexpr int kMostOfDevice = 1 << 24;
  for (const int limit : {limits.sm_count, limits.shared_per_sm, limits.shared_per_block}) {
    if (limit < 1 || limit > kMostOfDevice) {
      throw py::value_error("fusereg.batch_norm: device must hold its limits, got " +
                            std::string(py::str(device)));
    }
  }
  const Plan plan =
      make_plan(l, dtype_argument(dtype), backward ? Direction::kBackward : Direction::kForward,
                aligned, mask, bits, resident, limits);
  py::dict d;
  d["kind"] = plan.kind == KernelKind::kResident ? "resident" : "streaming";
  d["reduce"] = tiling_dict(plan.reduce);
  d["apply"] = tiling_dict(plan.apply);
  d["teams"] = plan.teams;
  d["steps"] = plan.steps;
  d["shared_bytes"] = plan.shared_bytes;
  return d;
}

}  // namespace

void bind_plan(py::module_& m) {
  using py::arg;
  m.def("batch_norm_plan", &batch_norm_plan, arg("layout"), arg("dtype"), arg("backward"),
        arg("device"), arg("aligned") = true, arg("mask") = false, arg("bits") = false,
        arg("resident") = true);
  m.def(
      "batch_norm_force",
      [](const std::string& kind, std::int64_t splits, std::int64_t counters) {
        force_plan(kind.c_str(), splits, counters);
      },
      arg("kind"), arg("splits") = 0, arg("counters") = 0);
}

}  // namespace fusereg::batch_norm
