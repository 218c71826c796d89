// fusereg._C: augmentation. Contract: augment.h, _C.pyi.
#include <pybind11/stl.h>

#include <algorithm>
#include <string>
#include <vector>

#include "augment/augment.h"
#include "core/call.h"
#include "core/gate.h"
#include "core/tensor.h"

namespace fusereg::augment {

void bind_params(py::module_& m);
void bind_program(py::module_& m);
void bind_resize(py::module_& m);

// False where Python must prepare the tensor first: other dtypes, layouts, wrappers.
bool read_images(const py::object& tensor, Images& images, std::int64_t (&sizes)[4],
                 Device& device) {
  const std::int64_t* strides = nullptr;
  TensorView view;
  RawView raw;
  int ndim = 0;
  if (read_tensor(tensor, view) == Kind::kPlain) {
    constexpr Element kTypes[] = {Element::kFloat64, Element::kFloat32, Element::kFloat16,
                                  Element::kBFloat16};
    images.type = kTypes[static_cast<int>(view.dtype)];
    images.data = view.data;
    device = view.device;
    ndim = view.ndim;
    strides = view.strides;
    if (ndim == 4) std::copy(view.sizes, view.sizes + 4, sizes);
  } else if (read_raw(tensor, raw) && raw.is_uint8) {
    images.type = Element::kUInt8;
    images.data = raw.data;
    device = raw.device;
    ndim = raw.ndim;
    strides = raw.strides;
    if (ndim == 4) std::copy(raw.sizes, raw.sizes + 4, sizes);
  } else {
    return false;
  }
  if (ndim != 4) return false;
  const bool empty = sizes[0] * sizes[1] * sizes[2] * sizes[3] == 0;
  auto contiguous = [&](const int (&order)[4]) {
    if (empty) return true;
    std::int64_t expected = 1;
    for (int i = 3; i >= 0; --i) {
      const int d = order[i];
      if (sizes[d] != 1 && strides[d] != expected) return false;
      expected *= sizes[d];
    }
    return true;
  };
  images.channels_last = !contiguous({0, 1, 2, 3});
  if (images.channels_last && !contiguous({0, 2, 3, 1})) return false;
  const std::int64_t c = sizes[1];
  images.h = sizes[2];
  images.w = sizes[3];
  images.sample = c * images.h * images.w;
  images.channel = images.channels_last ? 1 : images.h * images.w;
  images.row = images.channels_last ? images.w * c : images.w;
  images.pixel = images.channels_last ? c : 1;
  return true;
}

namespace {

struct Options {
  int interpolation = 0;
  bool antialias = false;
  int fill_mode = 0;
  bool color = false;
  const std::vector<double>& fill;
  const std::vector<double>& scale;
  const std::vector<double>& shift;
  const std::vector<double>& erase;
  bool erase_noise = false;
};

void copy_channels(const std::vector<double>& values, int c, double* target, const char* op,
                   const char* name) {
  if (values.size() != static_cast<std::size_t>(c)) {
    throw py::value_error(where(op, name) + " must have " + std::to_string(c) +
                          " elements, one a channel, got " + std::to_string(values.size()));
  }
  std::copy(values.begin(), values.end(), target);
}

// The samples' records and what concerns all of them; sizes are x's.
void set_options(Job& job, const Options& o, const std::int64_t (&sizes)[4], const Device& device,
                 const py::object& records, const py::object& keys, const char* op) {
  if (sizes[1] > kMaxChannels) {
    throw py::value_error(where(op, "x") + " must have at most " + std::to_string(kMaxChannels) +
                          " channels, got " + std::to_string(sizes[1]));
  }
  job.n = sizes[0];
  job.c = static_cast<int>(sizes[1]);
  if (o.interpolation < 0 || o.interpolation > kPilBicubic)
    throw py::value_error(where(op, "interpolation") + " must be within 0 and 3");
  if (o.fill_mode < 0 || o.fill_mode > 5)
    throw py::value_error(where(op, "fill_mode") + " must be within 0 and 5");
  set_interpolation(job, o.interpolation);
  job.fill_mode = static_cast<FillMode>(o.fill_mode);
  job.antialias = o.antialias && job.interpolation != Interpolation::kNearest;
  job.color = o.color;
  job.limit = job.x.type == Element::kUInt8 ? 255.0 : 1.0;
  copy_channels(o.fill, job.c, job.fill, op, "fill");
  copy_channels(o.scale, job.c, job.scale, op, "scale");
  copy_channels(o.shift, job.c, job.shift, op, "shift");
  copy_channels(o.erase, job.c, job.erase, op, "erase");
  for (const std::int64_t side : {job.x.h, job.x.w, job.y.h, job.y.w}) {
    if (side > kMaxSide) {
      throw py::value_error(where(op, "x") + " must have sides of at most " +
                            std::to_string(kMaxSide) + " pixels, got " + std::to_string(side));
    }
  }
  const TensorView view = tensor_argument(records, op, "records");
  if (view.dtype != DType::kFloat64 || view.ndim != 2 || view.sizes[0] != job.n ||
      view.sizes[1] != kRecord || !view.dense() || (job.n > 1 && view.strides[1] != 1) ||
      (job.n > 0 && view.device != device)) {
    throw py::value_error(where(op, "records") + " must be a contiguous float64 tensor of shape (" +
                          std::to_string(job.n) + ", " + std::to_string(kRecord) + ") on " +
                          device.name());
  }
  job.records = static_cast<const double*>(view.data);
  job.erase_noise = o.erase_noise;
  if (!o.erase_noise) return;
  RawView raw;
  if (!read_raw(keys, raw) || raw.bytes != 8 || !raw.contiguous || raw.numel != 2 * job.n ||
      raw.device != device) {
    throw py::value_error(where(op, "keys") + " must be a contiguous int64 tensor of shape (" +
                          std::to_string(job.n) + ", 2) on " + device.name());
  }
  job.keys = static_cast<const std::int64_t*>(raw.data);
}

}  // namespace

// The settings of a pass that is done with a program, from what augment_forward takes from `records` to
// `erase_noise`. It mixes no samples: a thread has one of them at a time.
void set_pass(Job& job, const py::tuple& a, const std::int64_t (&sizes)[4], const Device& device,
              const char* op) {
  if (a.size() < 11) throw py::value_error(where(op, "before") + " and after must be of a pass");
  std::vector<double> channels[4];
  for (std::size_t k = 0; k < 4; ++k) channels[k] = a[6 + k].cast<std::vector<double>>();
  const Options options{a[2].cast<int>(),  a[3].cast<bool>(), a[4].cast<int>(),
                        a[5].cast<bool>(), channels[0],       channels[1],
                        channels[2],       channels[3],       a[10].cast<bool>()};
  set_options(job, options, sizes, device, a[0], a[1], op);
  for (std::int64_t i = 0; i < job.n; ++i) {
    const double partner = job.records[i * kRecord + 14];
    if (partner >= 0.0 && partner < static_cast<double>(job.n))
      throw py::value_error(where(op, "records") + " must not mix samples");
  }
}

namespace {

// What antialiasing on CUDA has the resized images of turned samples in: it lives until the kernels are
// launched, and the stream's next work may have the memory.
py::object room_for_reduced(Job& job, const Device& device, const py::object& x) {
  if (!job.antialias || !runs_cuda_kernels(device)) return py::none();
  py::object room = empty_like(x);
  Images images;
  std::int64_t sizes[4];
  Device own;
  if (!read_images(room, images, sizes, own)) throw std::logic_error("fusereg: x is not dense");
  job.reduced = images.data;
  return room;
}

// 0: done; 2: Python must prepare a tensor first, and nothing has been written.
int augment_forward(const py::object& y, const py::object& x, const py::object& records,
                    const py::object& keys, int interpolation, bool antialias, int fill_mode,
                    bool color, const std::vector<double>& fill, const std::vector<double>& scale,
                    const std::vector<double>& shift, const std::vector<double>& erase,
                    bool erase_noise, const char* op) {
  Forward job;
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
  const Options options{interpolation, antialias, fill_mode, color,      fill,
                        scale,         shift,     erase,     erase_noise};
  set_options(job, options, sizes, device, records, keys, op);
  if (job.n == 0 || job.c == 0 || job.y.h == 0 || job.y.w == 0) return kDone;
  if (job.x.h == 0 || job.x.w == 0)
    throw py::value_error(where(op, "x") + " must have at least one pixel");
  const py::object reduced = room_for_reduced(job, device, x);
  run_job(job, device, job.n * job.c * job.y.h * job.y.w);
  return kDone;
}

// The same with an image [1, C, H, W] for each sample, of several sizes, on the CPU.
int augment_forward_list(const py::object& y, const py::sequence& images, const py::object& records,
                         const py::object& keys, int interpolation, bool antialias, int fill_mode,
                         bool color, const std::vector<double>& fill,
                         const std::vector<double>& scale, const std::vector<double>& shift,
                         const std::vector<double>& erase, bool erase_noise, const char* op) {
  Forward job;
  Device device;
  std::int64_t y_sizes[4];
  std::vector<Images> each(images.size());
  if (!read_images(y, job.y, y_sizes, device) || device.type != kDLCPU) return kNeedsPreparation;
  if (y_sizes[0] != static_cast<std::int64_t>(each.size()))
    throw py::value_error(where(op, "images") + " must be as many as y's batch has samples");
  for (std::size_t i = 0; i < each.size(); ++i) {
    std::int64_t sizes[4];
    Device own;
    if (!read_images(images[i], each[i], sizes, own) || own != device) return kNeedsPreparation;
    if (each[i].type != each[0].type || each[i].channels_last != each[0].channels_last)
      return kNeedsPreparation;
    if (sizes[0] != 1 || sizes[1] != y_sizes[1] || sizes[2] == 0 || sizes[3] == 0) {
      throw py::value_error(where(op, "images") +
                            " must have the shape (1, C, H, W), y's channels and pixels");
    }
    job.x.h = std::max(job.x.h, each[i].h);
    job.x.w = std::max(job.x.w, each[i].w);
  }
  if (each.empty() || y_sizes[1] == 0 || job.y.h == 0 || job.y.w == 0) return kDone;
  const std::int64_t sizes[4] = {y_sizes[0], y_sizes[1], job.x.h, job.x.w};
  job.x.type = each[0].type;
  job.x.channels_last = each[0].channels_last;
  job.x.channel = each[0].channels_last ? 1 : job.x.h * job.x.w;
  job.x.row = each[0].channels_last ? job.x.w * sizes[1] : job.x.w;
  job.x.pixel = each[0].pixel;
  job.each = each.data();
  const Options options{interpolation, antialias, fill_mode, color,      fill,
                        scale,         shift,     erase,     erase_noise};
  set_options(job, options, sizes, device, records, keys, op);
  run_job(job, device, job.n * job.c * job.y.h * job.y.w);
  return kDone;
}

int augment_backward(const py::object& grad_x, const py::object& grad_y, const py::object& x,
                     const py::object& records, int interpolation, bool antialias, int fill_mode,
                     bool color, const std::vector<double>& fill, const std::vector<double>& scale,
                     const std::vector<double>& shift, const std::vector<double>& erase,
                     const char* op) {
  Backward job;
  Device device;
  Device y_device;
  Device x_device;
  std::int64_t sizes[4];
  std::int64_t y_sizes[4];
  std::int64_t x_sizes[4];
  if (!read_images(grad_x, job.grad_x, sizes, device) ||
      !read_images(grad_y, job.y, y_sizes, y_device) || device != y_device) {
    return kNeedsPreparation;
  }
  if (job.grad_x.type != job.y.type ||
      (job.y.type != Element::kFloat32 && job.y.type != Element::kFloat64)) {
    throw py::value_error(where(op, "grad_y") +
                          " and grad_x must both be float32, or both float64, for the kernel");
  }
  if (y_sizes[0] != sizes[0] || y_sizes[1] != sizes[1])
    throw py::value_error(where(op, "grad_y") + " must have x's batch size and channels");
  if (color) {
    if (!read_images(x, job.x, x_sizes, x_device) || x_device != device) return kNeedsPreparation;
    const bool wide = job.x.type == Element::kFloat64;
    if (!std::equal(sizes, sizes + 4, x_sizes) || job.x.type == Element::kUInt8 ||
        wide != (job.y.type == Element::kFloat64)) {
      throw py::value_error(where(op, "x") + " does not match its gradient");
    }
  } else {
    job.x = job.grad_x;
    job.x.data = nullptr;
  }
  const Options options{interpolation, antialias, fill_mode, color, fill,
                        scale,         shift,     erase,     false};
  set_options(job, options, sizes, device, records, py::none(), op);
  if (job.n == 0 || job.c == 0 || job.x.h == 0 || job.x.w == 0) return kDone;
  const py::object reduced = color ? room_for_reduced(job, device, x) : py::none();
  run_job(job, device, job.n * job.c * job.x.h * job.x.w);
  return kDone;
}

}  // namespace

void bind(py::module_& m) {
  using py::arg;
  bind_params(m);
  bind_program(m);
  bind_resize(m);
  m.attr("AUGMENT_MAX_CHANNELS") = kMaxChannels;
  m.def("augment_forward", &augment_forward, arg("y"), arg("x"), arg("records"), arg("keys"),
        arg("interpolation"), arg("antialias"), arg("fill_mode"), arg("color"), arg("fill"),
        arg("scale"), arg("shift"), arg("erase"), arg("erase_noise"), op_argument());
  m.def("augment_forward_list", &augment_forward_list, arg("y"), arg("images"), arg("records"),
        arg("keys"), arg("interpolation"), arg("antialias"), arg("fill_mode"), arg("color"),
        arg("fill"), arg("scale"), arg("shift"), arg("erase"), arg("erase_noise"), op_argument());
  m.def("augment_backward", &augment_backward, arg("grad_x"), arg("grad_y"), arg("x"),
        arg("records"), arg("interpolation"), arg("antialias"), arg("fill_mode"), arg("color"),
        arg("fill"), arg("scale"), arg("shift"), arg("erase"), op_argument());
}

}  // namespace fusereg::augment
