// fusereg._C: dropout + normalization. Contract: dropout_norm.h, _C.pyi.
#include <string>

#include "core/call.h"
#include "core/seed_argument.h"
#include "core/tensor.h"
#include "dropout_norm/dropout_norm.h"

namespace fusereg::dropout_norm {
namespace {

bool row_major(const TensorView& t) {
  std::int64_t expected = 1;
  for (int d = t.ndim - 1; d >= 0; --d) {
    if (t.sizes[d] != 1 && t.strides[d] != expected && t.numel != 0) return false;
    expected *= t.sizes[d];
  }
  return true;
}

// Whether a group of tensors is float32 beside a 16-bit main tensor.
struct Companions {
  bool known = false;
  bool wide = false;
};

// Reads the arguments of one call: what does not fit together is Python's to prepare or explain.
class Reader {
 public:
  // The tensor that the others are compared with: dtype, device, rows.
  explicit Reader(const py::object& main) {
    fits_ = read_tensor(main, main_) == Kind::kPlain && row_major(main_) && main_.ndim > 0;
    if (!fits_) return;
    length_ = main_.sizes[main_.ndim - 1];
    rows_ = 1;
    for (int d = 0; d + 1 < main_.ndim; ++d) rows_ *= main_.sizes[d];
    compute_ = main_.dtype == DType::kFloat64 ? DType::kFloat64 : DType::kFloat32;
  }

  bool fits() const { return fits_; }
  const TensorView& main() const { return main_; }
  std::int64_t rows() const { return rows_; }
  std::int64_t length() const { return length_; }

  // A tensor or None, of so many elements and this dtype.
  void* get(const py::object& object, std::int64_t numel, DType dtype) {
    TensorView view;
    return read(object, numel, view) && expect(view.dtype == dtype) ? view.data : nullptr;
  }
  // As the main tensor, element for element.
  void* same(const py::object& object) { return get(object, main_.numel, main_.dtype); }
  // Of the main tensor's dtype or, where that has 16 bits, float32; all of a group alike.
  void* companion(const py::object& object, std::int64_t numel, Companions& group) {
    TensorView view;
    if (!read(object, numel, view)) return nullptr;
    const bool wide = view.dtype != main_.dtype;
    if (!expect(!wide || (dtype_size(main_.dtype) == 2 && view.dtype == DType::kFloat32)) ||
        !expect(!group.known || group.wide == wide)) {
      return nullptr;
    }
    group = {true, wide};
    return view.data;
  }
  void* statistics(const py::object& object, bool rms) {
    return get(object, rows_ * statistics_per_row(rms), compute_);
  }
  void* partials(const py::object& object, std::int64_t numel) {
    return get(object, numel, compute_);
  }

 private:
  bool expect(bool good) {
    fits_ = fits_ && good;
    return fits_;
  }
  bool read(const py::object& object, std::int64_t numel, TensorView& view) {
    if (object.is_none()) return false;
    return expect(read_tensor(object, view) == Kind::kPlain && row_major(view) &&
                  view.numel == numel && view.device == main_.device);
  }

  TensorView main_;
  bool fits_ = false;
  std::int64_t rows_ = 0;
  std::int64_t length_ = 0;
  DType compute_ = DType::kFloat32;
};

void set_draw(Problem& problem, double p, const char* op) {
  if (!(p >= 0.0 && p <= 1.0)) throw py::value_error(where(op, "p") + " must be within [0, 1]");
  problem.draw = p == 0.0 ? Draw{0, 0, 1.0} : make_draw(p);
}

void require(const py::object& tensor, const char* op, const char* name) {
  if (tensor.is_none()) throw py::type_error(where(op, name) + " must be a tensor, got None");
}

// 0: done; 2: Python must prepare a tensor first, and nothing has been written.
int dropout_norm_forward(const py::object& y, const py::object& sum, const py::object& statistics,
                         const py::object& x, const py::object& residual, const py::object& weight,
                         const py::object& bias, const py::object& seed, const py::object& offset,
                         double p, double eps, bool rms, const py::object& index_offset,
                         const char* op) {
  Reader in(x);
  if (!in.fits()) return kNeedsPreparation;
  const std::int64_t numel = in.main().numel;
  Forward f;
  Companions sums;
  Companions weights;
  f.rms = rms;
  f.x = in.main().data;
  f.y = in.same(y);
  f.residual = in.companion(residual, numel, sums);
  f.sum = in.companion(sum, numel, sums);
  f.statistics = in.statistics(statistics, rms);
  f.weight = in.companion(weight, in.length(), weights);
  f.bias = in.companion(bias, in.length(), weights);
  if (!in.fits()) return kNeedsPreparation;
  require(y, op, "y");
  f.dtype = in.main().dtype;
  f.wide_sum = sums.wide;
  f.wide_weight = weights.wide;
  f.rows = in.rows();
  f.length = in.length();
  f.eps = eps;
  set_draw(f, p, op);
  f.index_offset = bits_argument(index_offset, op, "index_offset");
  f.random = seed_argument(seed, offset, in.main().device, op);
  run_job(f, in.main().device, f.rows * f.length);
  return kDone;
}

int dropout_norm_backward(const py::object& grad_x, const py::object& grad_residual,
                          const py::object& grad_weight, const py::object& grad_bias,
                          const py::object& grad_y, const py::object& grad_sum,
                          const py::object& sum, const py::object& statistics,
                          const py::object& weight, const py::object& seed,
                          const py::object& offset, double p, bool rms,
                          const py::object& index_offset, const py::object& partials,
                          const py::object& barrier, const char* op) {
  Reader in(grad_y);
  if (!in.fits()) return kNeedsPreparation;
  const std::int64_t numel = in.main().numel;
  const std::int64_t length = in.length();
  Backward b;
  Companions sums;
  Companions weights;
  b.rms = rms;
  b.grad_y = in.main().data;
  b.grad_x = in.same(grad_x);
  b.sum = in.companion(sum, numel, sums);
  b.grad_residual = in.companion(grad_residual, numel, sums);
  b.grad_sum = in.companion(grad_sum, numel, sums);
  b.statistics = in.statistics(statistics, rms);
  b.weight = in.companion(weight, length, weights);
  b.grad_weight = in.companion(grad_weight, length, weights);
  b.grad_bias = in.companion(grad_bias, length, weights);
  const bool on_cuda = runs_cuda_kernels(in.main().device);
  const Chunks chunks = on_cuda ? cuda_chunks(in.rows()) : cpu_chunks(in.rows());
  b.partials = in.partials(partials, chunks.count * b.slots() * length);
  if (!in.fits()) return kNeedsPreparation;
  require(sum, op, "sum");
  require(statistics, op, "statistics");
  if (b.slots() > 0) require(partials, op, "partials");
  b.dtype = in.main().dtype;
  b.wide_sum = sums.wide;
  b.wide_weight = weights.wide;
  b.rows = in.rows();
  b.length = length;
  set_draw(b, p, op);
  b.index_offset = bits_argument(index_offset, op, "index_offset");
  b.random = seed_argument(seed, offset, in.main().device, op);
  unsigned* word = nullptr;
  if (on_cuda && b.slots() > 0) {
    word = static_cast<unsigned*>(
        memory_argument(barrier, sizeof(unsigned), in.main().device, op, "barrier"));
  }
  run_job(b, in.main().device, b.rows * b.length, word);
  return kDone;
}

// How many slots `partials` has for this many rows.
std::int64_t dropout_norm_chunks(std::int64_t rows, bool cuda) {
  size_argument(rows, 0, "dropout_norm_chunks", "rows");
  return (cuda ? cuda_chunks(rows) : cpu_chunks(rows)).count;
}

}  // namespace

void bind(py::module_& m) {
  using py::arg;
  m.def("dropout_norm_forward", &dropout_norm_forward, arg("y"), arg("sum"), arg("statistics"),
        arg("x"), arg("residual"), arg("weight"), arg("bias"), arg("seed"), arg("offset"), arg("p"),
        arg("eps"), arg("rms"), arg("index_offset"), op_argument());
  m.def("dropout_norm_backward", &dropout_norm_backward, arg("grad_x"), arg("grad_residual"),
        arg("grad_weight"), arg("grad_bias"), arg("grad_y"), arg("grad_sum"), arg("sum"),
        arg("statistics"), arg("weight"), arg("seed"), arg("offset"), arg("p"), arg("rms"),
        arg("index_offset"), arg("partials"), arg("barrier"), op_argument());
  m.def("dropout_norm_chunks", &dropout_norm_chunks, arg("rows"), arg("cuda"));
}

}  // namespace fusereg::dropout_norm
