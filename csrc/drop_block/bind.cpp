// fusereg._C: DropBlock. Contract: drop_block.h, _C.pyi.
#include <string>

#include "core/call.h"
#include "core/seed_argument.h"
#include "core/tensor.h"
#include "drop_block/drop_block.h"

namespace fusereg::drop_block {
namespace {

// Contiguous as (N, C, H, W), or with the channels last; else false.
bool find_layout(const TensorView& x, bool& channels_last) {
  auto contiguous = [&x](const int (&order)[4]) {
    std::int64_t expected = 1;
    for (int i = 3; i >= 0; --i) {
      const int d = order[i];
      if (x.sizes[d] != 1 && x.strides[d] != expected) return false;
      expected *= x.sizes[d];
    }
    return true;
  };
  channels_last = !contiguous({0, 1, 2, 3});
  return !channels_last || contiguous({0, 2, 3, 1});
}

// A float64 vector of `size` numbers on the input's device.
double* numbers_argument(const py::object& numbers, std::int64_t size, const Device& device,
                         const char* op, const char* name) {
  const TensorView view = tensor_argument(numbers, op, name);
  if (view.dtype != DType::kFloat64 || view.numel != size || !view.dense() ||
      view.device != device) {
    throw py::value_error(where(op, name) + " must be a dense float64 tensor of " +
                          std::to_string(size) + " elements on " + device.name());
  }
  return static_cast<double*>(view.data);
}

// Forward and backward are one kernel, on x or on the gradient. 0: done; 2: Python must prepare a
// tensor first, and nothing has been written.
int apply(const py::object& y, const py::object& x, const py::object& kept, const py::object* slots,
          const py::object& seed, const py::object& offset, double p, std::int64_t block_size,
          const py::object& index_offset, const char* op) {
  if (!(p > 0.0 && p <= 1.0))
    throw py::value_error(where(op, "p") + " must be within (0, 1] for the kernel");
  if (block_size < 1) throw py::value_error(where(op, "block_size") + " must be at least 1");
  TensorView in;
  TensorView out;
  if (read_tensor(x, in) != Kind::kPlain || read_tensor(y, out) != Kind::kPlain ||
      in.dtype != out.dtype || in.device != out.device || !in.same_layout(out)) {
    return kNeedsPreparation;
  }
  if (in.ndim != 4)
    throw py::value_error(where(op, "x") + " must have 4 dimensions, got " +
                          std::to_string(in.ndim));
  bool channels_last = false;
  if (!find_layout(in, channels_last)) return kNeedsPreparation;
  if (in.numel == 0) return kDone;
  if (in.sizes[3] > kMaxWidth) {
    throw py::value_error(where(op, "x") + " must be at most " + std::to_string(kMaxWidth) +
                          " wide, got " + std::to_string(in.sizes[3]));
  }
  Job job;
  job.x = in.data;
  job.y = out.data;
  job.dtype = in.dtype;
  job.geometry =
      make_geometry(in.sizes[0], in.sizes[1], in.sizes[2], in.sizes[3], block_size, channels_last);
  job.index_offset = bits_argument(index_offset, op, "index_offset");
  job.random = seed_argument(seed, offset, in.device, op);
  job.draw = make_draw(corner_probability(job.geometry, p));
  job.kept = numbers_argument(kept, 1, in.device, op, "kept");
  job.counts = slots != nullptr;
  if (slots != nullptr && runs_cuda_kernels(in.device))
    job.slots = numbers_argument(*slots, kCountSlots, in.device, op, "slots");
  run_job(job, in.device, job.geometry.numel());
  return kDone;
}

int drop_block_forward(const py::object& y, const py::object& x, const py::object& kept,
                       const py::object& slots, const py::object& seed, const py::object& offset,
                       double p, std::int64_t block_size, const py::object& index_offset,
                       const char* op) {
  return apply(y, x, kept, &slots, seed, offset, p, block_size, index_offset, op);
}

int drop_block_backward(const py::object& grad_x, const py::object& grad_y, const py::object& kept,
                        const py::object& seed, const py::object& offset, double p,
                        std::int64_t block_size, const py::object& index_offset, const char* op) {
  return apply(grad_x, grad_y, kept, nullptr, seed, offset, p, block_size, index_offset, op);
}

}  // namespace

void bind(py::module_& m) {
  using py::arg;
  m.attr("DROP_BLOCK_SLOTS") = kCountSlots;
  m.def("drop_block_forward", &drop_block_forward, arg("y"), arg("x"), arg("kept"), arg("slots"),
        arg("seed"), arg("offset"), arg("p"), arg("block_size"), arg("index_offset"),
        op_argument());
  m.def("drop_block_backward", &drop_block_backward, arg("grad_x"), arg("grad_y"), arg("kept"),
        arg("seed"), arg("offset"), arg("p"), arg("block_size"), arg("index_offset"),
        op_argument());
}

}  // namespace fusereg::drop_block
