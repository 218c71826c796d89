// fusereg._C: programs of images. Contract: program.h, _C.pyi.
#include <pybind11/stl.h>

#include <algorithm>
#include <string>
#include <vector>

#include "augment/program.h"
#include "core/call.h"
#include "core/tensor.h"

namespace fusereg::augment {

bool read_images(const py::object& tensor, Images& images, std::int64_t (&sizes)[4],
                 Device& device);
void set_pass(Job& job, const py::tuple& a, const std::int64_t (&sizes)[4], const Device& device,
              const char* op);

namespace {

// Whether each argument of an instruction is one that the kernels can take.
bool allowed(const double* row, int channels) {
  if (!(row[0] >= 0 && row[0] < kCodes)) return false;
  for (int k = 1; k < kInstruction; ++k)
    if (!(row[k] >= -1e30 && row[k] <= 1e30)) return false;
  const auto code = static_cast<Code>(row[0]);
  const bool colors = code == Code::kContrast || code == Code::kSaturation || code == Code::kHue ||
                      code == Code::kGray;
  if (colors && channels != 1 && channels != 3) return false;
  const double* const a = row + 1;
  auto taps = [](double k) { return k >= 1 && k <= kMaxTaps && static_cast<int>(k) % 2 == 1; };
  switch (code) {
    case Code::kHue:
      return a[0] >= -0.5 && a[0] <= 0.5;
    case Code::kPosterize:
      return a[0] >= 0 && a[0] <= 8;
    case Code::kSolarizeAdd:
      return a[0] >= 0 && a[0] <= 255;
    case Code::kBlur:
      return taps(a[0]) && taps(a[1]) && a[2] > 0 && a[3] > 0;
    case Code::kWarp:
      return a[6] >= 0 && a[6] <= kPilBicubic;
    default:
      return true;
  }
}

const double* read_programs(const py::object& programs, const ProgramJob& job, const Device& device,
                            int& length, const char* op) {
  const TensorView view = tensor_argument(programs, op, "programs");
  if (view.dtype != DType::kFloat64 || view.ndim != 3 || view.sizes[0] != job.n ||
      view.sizes[2] != kInstruction || !view.dense() || (job.n > 0 && view.device != device)) {
    throw py::value_error(where(op, "programs") +
                          " must be a contiguous float64 tensor of shape (" +
                          std::to_string(job.n) + ", length, " + std::to_string(kInstruction) +
                          ") on " + device.name());
  }
  length = static_cast<int>(view.sizes[1]);
  return static_cast<const double*>(view.data);
}

// The instructions, on the CPU: what the kernels do not check.
void color_program_check(const py::object& programs, int channels, std::int64_t height,
                         std::int64_t width, const char* op) {
  const TensorView view = tensor_argument(programs, op, "programs");
  if (view.dtype != DType::kFloat64 || view.ndim != 3 || view.sizes[2] != kInstruction ||
      !view.dense() || view.device.type != kDLCPU) {
    throw py::value_error(where(op, "programs") +
                          " must be a contiguous float64 tensor [N, length, 8] on the CPU");
  }
  const auto* row = static_cast<const double*>(view.data);
  for (std::int64_t i = 0; i < view.sizes[0] * view.sizes[1]; ++i, row += kInstruction) {
    if (!allowed(row, channels)) {
      throw py::value_error(where(op, "programs") + " has an instruction that images of " +
                            std::to_string(channels) + " channels do not allow: code " +
                            std::to_string(static_cast<int>(row[0])));
    }
    if (static_cast<Code>(row[0]) == Code::kBlur &&
        (static_cast<std::int64_t>(row[1]) / 2 >= width ||
         static_cast<std::int64_t>(row[2]) / 2 >= height)) {
      throw py::value_error(where(op, "kernel_size") +
                            " must be less than twice the images' sides, as they are reflected, "
                            "got " +
                            std::to_string(static_cast<int>(row[1])) + " and " +
                            std::to_string(static_cast<int>(row[2])) + " for " +
                            std::to_string(width) + " and " + std::to_string(height) + " pixels");
    }
  }
}

std::int64_t color_program_scratch(std::int64_t n, int c, std::int64_t h, std::int64_t w) {
  const double elements =
      static_cast<double>(n) * c * static_cast<double>(h) * static_cast<double>(w);
  if (n < 0 || c < 0 || h < 0 || w < 0 || elements > 1e17 ||
      static_cast<double>(n) * static_cast<double>(h) * static_cast<double>(w) > 1e17)
    throw py::value_error("fusereg.program: n, c, h and w must be the sizes of a tensor");
  if (n == 0 || h == 0 || w == 0) return 0;
  ProgramJob job;
  job.c = c;
  job.x.h = h;
  job.x.w = w;
  job.x.sample = c * h * w;
  return n * program_scratch(job);
}

// Images of uint8 in planes, without memory.
Images planes_of(const std::int64_t (&sizes)[4]) {
  Images images;
  images.type = Element::kUInt8;
  images.h = sizes[2];
  images.w = sizes[3];
  images.sample = sizes[1] * sizes[2] * sizes[3];
  images.channel = sizes[2] * sizes[3];
  images.row = sizes[3];
  images.pixel = 1;
  return images;
}

// The passes before and after the programs, with which sizes become those between them.
void set_passes(ProgramJob& job, Forward& first, Forward& last, const py::object& before,
                const py::object& after, std::int64_t (&sizes)[4], std::int64_t (&y_sizes)[4],
                const Device& device, const char* op) {
  if (before.is_none() && after.is_none()) return;
  if (runs_cuda_kernels(device) || y_sizes[0] != sizes[0] || y_sizes[1] != sizes[1])
    throw py::value_error(where(op, "x") + " must have y's batch size and channels, on the CPU");
  if (!before.is_none()) {
    const auto pass = before.cast<py::tuple>();
    if (pass.size() != 13) throw py::value_error(where(op, "before") + " must have 13 values");
    std::int64_t own[4] = {sizes[0], sizes[1], pass[11].cast<std::int64_t>(),
                           pass[12].cast<std::int64_t>()};
    if (own[2] < 1 || own[3] < 1 || own[2] > kMaxSide || own[3] > kMaxSide || sizes[2] < 1 ||
        sizes[3] < 1)
      throw py::value_error(where(op, "before") + " must have images with pixels");
    first.x = job.x;
    first.y = job.x = planes_of(own);
    set_pass(first, pass, sizes, device, op);
    std::copy(own, own + 4, sizes);
    job.before = &first;
  }
  if (!after.is_none()) {
    last.y = job.y;
    last.x = job.y = planes_of(sizes);
    set_pass(last, after.cast<py::tuple>(), sizes, device, op);
    if (last.antialias) throw py::value_error(where(op, "after") + " must not antialias");
    std::copy(sizes, sizes + 4, y_sizes);
    job.after = &last;
  }
}

// 0: done; 2: Python must prepare a tensor first, and nothing has been written.
int color_program(const py::object& y, const py::object& x, const py::object& programs,
                  const std::vector<double>& fill, bool whole_pixels, const py::object& scratch,
                  const py::object& before, const py::object& after, const char* op) {
  ProgramJob job;
  Forward first;
  Forward last;
  Device device;
  Device y_device;
  std::int64_t sizes[4];
  std::int64_t y_sizes[4];
  if (!read_images(x, job.x, sizes, device) || !read_images(y, job.y, y_sizes, y_device) ||
      device != y_device) {
    return kNeedsPreparation;
  }
  set_passes(job, first, last, before, after, sizes, y_sizes, device, op);
  if (job.x.type != Element::kUInt8 || job.y.type != Element::kUInt8)
    throw py::value_error(where(op, "x") + " must be of uint8, and so must y");
  if (!std::equal(sizes, sizes + 4, y_sizes))
    throw py::value_error(where(op, "y") + " must have x's shape");
  if (sizes[1] > kMaxChannels) {
    throw py::value_error(where(op, "x") + " must have at most " + std::to_string(kMaxChannels) +
                          " channels, got " + std::to_string(sizes[1]));
  }
  job.n = sizes[0];
  job.c = static_cast<int>(sizes[1]);
  job.whole_pixels = whole_pixels;
  if (fill.size() != static_cast<std::size_t>(job.c))
    throw py::value_error(where(op, "fill") + " must have a number for each channel");
  for (int c = 0; c < job.c; ++c) {
    const double value = fill[static_cast<std::size_t>(c)];
    job.fill[c] = static_cast<std::uint8_t>(value > 0 ? std::min(value + 0.5, 255.0) : 0.0);
  }
  job.programs = read_programs(programs, job, device, job.length, op);
  if (job.n * job.x.sample == 0) return kDone;
  if (runs_cuda_kernels(device)) {
    RawView raw;
    const std::int64_t wanted = job.n * program_scratch(job);
    if (!read_raw(scratch, raw) || !raw.is_uint8 || !raw.contiguous || raw.numel < wanted ||
        raw.device != device) {
      throw py::value_error(where(op, "scratch") + " must be a contiguous uint8 tensor of " +
                            std::to_string(wanted) + " elements on " + device.name());
    }
    job.scratch = static_cast<std::uint8_t*>(raw.data);
  }
  run_job(job, device, job.n * job.x.sample);
  return kDone;
}

}  // namespace

void bind_program(py::module_& m) {
  using py::arg;
  m.def("color_program", &color_program, arg("y"), arg("x"), arg("programs"), arg("fill"),
        arg("whole_pixels"), arg("scratch"), arg("before"), arg("after"), op_argument());
  m.def("color_program_check", &color_program_check, arg("programs"), arg("channels"),
        arg("height"), arg("width"), op_argument());
  m.def("color_program_scratch", &color_program_scratch, arg("n"), arg("c"), arg("h"), arg("w"));
}

}  // namespace fusereg::augment
