// One optimization step over lists of tensors, with the penalty's gradient or its proximal step in
// the same pass.
//
// For a parameter p with gradient g and the penalty (penalty.h, groups are the slices along
// dimension 0)
//
//   R(p) = l1 * sum |p_i|  +  l2/2 * sum p_i^2  +  group * sum_r sqrt(n_r) * ||p_r||_2
//
// a step does, in this order,
//
//   g = +-g / grad_scale * min(1, max_norm / (norm / grad_scale + 1e-6))   (- to maximize)
//   g = g + weight_decay * p          coupled decay; decoupled: p = (1 - lr * weight_decay) * p
//   g = g + dR/dp                     Prox::kNone
//   p = update(p, g, state)           t counts the steps from 1
//     SGD      b = momentum * b + (1 - dampening) * g  (b = g at first);
//              d = nesterov ? g + momentum * b : b;       p = p - lr * d
//     Adam     m = m + (1 - beta1) * (g - m);  v = beta2 * v + (1 - beta2) * g^2;
//              amsgrad: u = max(u, v), else u = v;
//              D = sqrt(u) / sqrt(1 - beta2^t) + eps;     p = p - lr / (1 - beta1^t) * m / D
//     Adagrad  s = s + g^2;  D = sqrt(s) + eps;     p = p - lr_t * g / D,
//              lr_t = lr / (1 + (t - 1) * lr_decay)
//     RMSprop  v = alpha * v + (1 - alpha) * g^2;  centered: a = a + (1 - alpha) * (g - a), else 0;
//              D = sqrt(v - a^2) + eps;  b = momentum * b + g / D;      p = p - lr * b
//     NAdam    m, v, D as Adam's;  mu_t = beta1 * (1 - 0.96^(t * momentum_decay) / 2);
//              M = mu_1 * ... * mu_t;  p = p - lr * ((1 - mu_t) / (1 - M) * g
//                                                    + mu_(t+1) / (1 - M * mu_(t+1)) * m) / D
//     Lion     c = beta1 * m + (1 - beta1) * g;  m = m + (1 - beta2) * (g - m);
//              p = p - lr * sign(c)
//     LAMB     m, v, D as Adam's;  u = m / (1 - beta1^t) / D + weight_decay * p;
//              r = ||p|| / ||u|| over the whole parameter, at most `third` if that is not 0; 1 where
//              a norm is 0, and without weight_decay unless `nesterov`;       p = p - lr * r * u
//     FTRL     n' = n + g^2;  Q = (beta + sqrt(n')) / lr;
//              z = g + (p != 0 ? -((Q + l2') * p + l1' * sign(p)) : min(max(z, -l1'), l1'));
//              p = -soft(z, l1) / (Q + l2),  with l1', l2' of the parameter's last step, at first 0
//   p = prox(p)
//     kDecoupled         row by row v = soft(p, lr * l1),
//                        p = v * max(0, 1 - lr * group * sqrt(n_r) / ||v_r||) / (1 + lr * l2)
//     kPreconditioned    p_i = soft(p_i, lr * l1 / D_i) / (1 + lr * l2 / D_i): the proximal step in
//                        the metric of the update; with a group term row by row
//                        p_i = soft(D_i * p_i, lr * l1) / (D_i + lr * l2 + lr * group * sqrt(n) / y)
//                        with y the norm of the result, a root that Newton's method finds; 0 where
//                        the norm of the numerators is at most lr * group * sqrt(n);
//                        SGD: as kDecoupled with lr * (1 - dampening) / (1 - momentum) for lr
//     kCapped            the same with D'_i = max(D_i, (l1 + l2 * |p_i|) / 2) for D_i, so that
//                        without l2 no weight moves by more than 2 * lr; and p_i as it is while
//                        its sum of squared gradients is 0 and t < 1 / (1 - beta2) (Adagrad:
//                        t < 1000). A stationary point has |gradient| = l1 + l2 * |p| <= D, so the
//                        fixed points are those of kPreconditioned. With a group term also
//                        D' = D' * max(1, group * sqrt(n) / (2 * ||D'||)): no row moves by more than
//                        2 * lr, and where a row rests ||D|| >= ||gradient|| >= group * sqrt(n), or
//                        it is zero either way. SGD: as kPreconditioned;
//                        centered RMSprop: without that floor, for its D may be smaller
//     Lion has no D: for kPreconditioned and kCapped (which waits as above, while m and c are 0)
//                        p = p - lr * sign(c + l1 * sign(p) + l2 * p), a step that would change the
//                        sign of p ends at 0, and a p of 0 moves only if |c| > l1
//
//     LAMB's proximal step has lr * r for lr; its weight_decay is never part of the gradient.
//
//   a = a + (1 - ema_decay) * (p - a)   the average of the weights, if there is one
//
// with soft(p, t) = sign(p) * max(|p| - t, 0); zeros come out as +0.0. lr in the proximal step of
// Adagrad is lr_t. Sources: kDecoupled follows Loshchilov and Hutter's decoupled decay (2019),
// kPreconditioned ProxGen (Yun, Lozano, Yang 2021, "Adaptive proximal gradient methods for
// structured neural networks") and, for Adagrad, Duchi, Hazan, Singer 2011; FTRL is McMahan et al.
// 2013, "Ad click prediction", per-coordinate FTRL-Proximal. Its z sums g - sigma * p with
// sigma = Q - (Q of the last step): for p != 0 that is the form above, which needs neither z's past
// nor the last rate, and loses nothing where a rate was near 0. At a rate of 0 FTRL rests.
//
// Value: R of the parameters before the step (FTRL: with its l1 and l2), over those with a
// gradient. found_inf != 0: nothing is written but the value (and masters, as below).
//
// Dtypes: p, g, and the states each float64, float32, float16 or bfloat16 (the states of one
// parameter share theirs); `copy`, if there, receives the new p rounded to its own dtype (p is then
// a master weight). Where p does not round to the bits of `copy`, someone has changed that element
// since the last step: it is taken as the master. FTRL's z holds such a master of a 16-bit p
// without a copy: -soft(z, l1') / (Q' + l2') if that rounds to p, with Q' of the last step.
// The average is float32 (float64 where p is), of p as it is stored. Arithmetic is in float32, in float64 where p is float64; sums run in float64.
// Bytes moved per element in float32: SGD 12 (20 with momentum), Adam 28 (36 with amsgrad), Adagrad
// 20, FTRL 28, LAMB 40; 8 more with an average, 2 more to compare a master. With a group term a row
// is walked again, from cache as long as it fits there (a row of up to some 10^5 elements); then 8
// bytes more. Deterministic: chunks, slots and the order of
// additions depend on shapes alone.
#pragma once

#include <cstdint>
#include <vector>

#include "core/dtype.h"
#include "core/isa.h"

namespace fusereg {
class LaunchTables;
}

namespace fusereg::optim {

// LAMB is two calls: kLambNorms updates m and v and leaves the norms of p and u in Job::norms, kLamb
// does the rest (it reads no gradient, and counts the step). In between, the shards of a parameter
// may add their norms' squares.
enum class Algorithm : std::uint8_t {
  kSgd,
  kAdam,
  kAdagrad,
  kFtrl,
  kRmsprop,
  kNadam,
  kLion,
  kLamb,
  kLambNorms
};
inline constexpr int kAlgorithms = 9;
enum class Prox : std::uint8_t { kNone, kDecoupled, kPreconditioned, kCapped };

inline constexpr int kMaxStates = 3;

// A number of the host's, or one that the kernel finds in memory of the tensors' device.
struct Scalar {
  double host = 0.0;
  const void* device = nullptr;
  DType dtype = DType::kFloat32;
  std::uint8_t unused[7] = {};  // no padding: see Hyper
};

struct Flags {
  Prox prox = Prox::kNone;
  bool maximize = false;
  bool amsgrad = false;
  bool nesterov = false;  // LAMB: r without weight_decay, too
  bool decoupled_decay = false;
  bool momentum = false;  // SGD, RMSprop: there is a momentum buffer
  bool centered = false;  // RMSprop: the variance
};

// The numbers of a parameter's last step that FTRL comes back to; all 0 before the first. NAdam:
// l1 is its product. LAMB: l1 and l2 are ||p||^2 and ||u||^2.
struct LastStep {
  double l1 = 0.0;
  double l2 = 0.0;
  double lr = 0.0;
  double beta = 0.0;
};

// What a group of parameters shares. `first` and `second` are momentum and dampening, beta1 and
// beta2, lr_decay and nothing, beta and nothing, momentum and alpha (RMSprop); `third` is NAdam's
// momentum_decay, LAMB's largest r. Without padding, as Target.
struct Hyper {
  Scalar lr, first, second, eps, weight_decay, l1, l2, group, ema_decay, third;
  Flags flags;
  std::uint8_t unused[1] = {};
};
static_assert(sizeof(Scalar) == 24 && sizeof(Hyper) == 10 * sizeof(Scalar) + sizeof(Flags) + 1);

// One parameter: all its tensors dense, in the same memory order. What stays from step to step;
// without padding, so that tables of these compare as bytes.
struct Target {
  void* p = nullptr;
  void* copy = nullptr;
  void* state[kMaxStates] = {nullptr, nullptr, nullptr};
  void* average = nullptr;  // of p: float64 where p is, else float32
  // How many steps there were, in step_dtype. FTRL: a LastStep in numbers of the average's dtype.
  // SGD: null. NAdam: state[2] is the product of its mu, in step_dtype.
  void* step = nullptr;
  std::int64_t numel = 0;
  std::int64_t row = 0;  // elements of a group's row; 0: no group term; 1: it is one of l1
  std::int32_t hyper = 0;
  DType p_dtype = DType::kFloat32;
  DType copy_dtype = DType::kFloat32;
  DType g_dtype = DType::kFloat32;
  DType state_dtype = DType::kFloat32;
  DType step_dtype = DType::kFloat32;  // or float64
  bool fresh = false;  // SGD: the momentum buffer is zero and gets the whole gradient
  std::uint8_t unused[6] = {};
};

struct Item : Target {
  const void* g = nullptr;
};

struct Job {
  Algorithm algorithm = Algorithm::kSgd;
  std::vector<Hyper> hypers;
  std::vector<Item> items;
  void* value = nullptr;  // 0-d, null where it is not wanted
  DType value_dtype = DType::kFloat32;
  Scalar grad_scale{1.0};
  Scalar found_inf{0.0};
  Scalar norm{0.0};       // of all gradients as they come, still scaled
  double max_norm = 0.0;  // 0: no clipping
  // LAMB: of each item ||p||^2 and ||u||^2, then 2 numbers for each chunk of kChunk elements.
  double* norms = nullptr;
};

// Elements a chunk on the CPU: its fixed costs vanish, and large tensors spread over threads.
inline constexpr std::int64_t kChunk = 16384;

void run_cpu(const Job& job);

// --- norms of lists of gradients, and clipping by them ---

enum class Norm : std::uint8_t { kOne, kTwo, kInfinity };

struct NormItem {
  void* data = nullptr;
  std::int64_t numel = 0;
  DType dtype = DType::kFloat32;
};

struct NormJob {
  Norm norm = Norm::kTwo;
  std::vector<NormItem> items;
  void* out = nullptr;  // the norm over all elements, 0-d
  DType out_dtype = DType::kFloat32;
};

// Reads each element once. Sums run in float64, so float16 and large float32 do not overflow; NaN
// and infinity come through.
void run_cpu(const NormJob& job);

// x = x * min(1, max_norm / (norm + 1e-6)), `norm` as in NormJob::out. On the CPU nothing is read
// where the factor is 1.
struct ClipJob {
  std::vector<NormItem> items;
  Scalar norm;
  double max_norm = 0.0;
  double limit = -1.0;  // >= 0: x = min(max(x, -limit), limit) instead, NaN stays
};
void run_cpu(const ClipJob& job);

// Adaptive clipping (Brock et al. 2021): each row g_r of a gradient becomes
//
//   g_r * limit_r / max(||g_r||, 1e-6)  unless  ||g_r|| < limit_r = factor * max(||p_r||, eps)
//
// Sums run in float64. Bytes moved per element in float32: 8, and 8 more for rows that are clipped.
struct AdaptiveItem {
  const void* p = nullptr;
  std::int64_t numel = 0;
  std::int64_t row = 0;  // elements of a row, at least 1
  DType p_dtype = DType::kFloat32;
  DType g_dtype = DType::kFloat32;
  std::uint8_t unused[6] = {};
};
struct AdaptiveJob {
  std::vector<AdaptiveItem> items;
  std::vector<void*> grads;
  double factor = 0.0;
  double eps = 0.0;
};
void run_cpu(const AdaptiveJob& job);

// CUDA only: `workspace` is kWorkspaceBytes of device memory whose first 8 bytes are zero; it is
// left so. A step is one launch, as are a norm and clipping: of up to some 300 parameters in up to
// 8 groups, or some 1100 gradients, as it is; of more with `tables`, plus launches that write the
// table when a tensor but a gradient (of some 3800 parameters, a gradient too) lies elsewhere than
// the last time, or where more than 8 groups' numbers change. While a CUDA graph is captured, and
// where `tables` is null, longer lists take several launches: p and states get the same bits; the
// value and the norm are then added in another order, in float64.
inline constexpr std::int64_t kMaxBlocks = 4096;
inline constexpr std::int64_t kWorkspaceBytes = 16 + 8 * kMaxBlocks;
void run_cuda(const Job& job, void* workspace, LaunchTables* tables, int device, void* stream);
void run_cuda(const NormJob& job, void* workspace, LaunchTables* tables, int device, void* stream);
void run_cuda(const ClipJob& job, LaunchTables* tables, int device, void* stream);
void run_cuda(const AdaptiveJob& job, LaunchTables* tables, int device, void* stream);

// --- what the CPU kernels of one instruction set provide (optim_kernels.cpp) ---

struct Sums {
  double absolute = 0.0;  // sum |p|
  double square = 0.0;    // sum p^2
  double groups = 0.0;    // sum over rows of sqrt(n) * ||p_r||
  double update = 0.0;    // kLambNorms: sum u^2
};

// What an update computes with, made of a Hyper's numbers and the step (coefficients.h).
template <class C>
struct Coefficients {
  C grad = 1;       // factor of the gradient: sign, unscaling, clipping
  C l1 = 0;         // the penalty's gradient: l1 * sign(p) ...
  C l2 = 0;         // ... + l2 * p, with a coupled weight_decay in it
  C decay = 1;      // decoupled: p = decay * p; LAMB: weight_decay
  C rate = 0;       // step size
  C first = 0;      // momentum; 1 - beta1; FTRL: 1 / lr
  C second = 0;     // weight of the gradient in the momentum; beta2; FTRL: beta / lr
  C third = 0;      // 1 - beta2; FTRL: l1 of the last step
  C root = 1;       // 1 / sqrt(1 - beta2^t); FTRL: l2 of the last step
  C eps = 0;        // FTRL: 1 / lr of the last step
  C threshold = 0;  // proximal step: lr * l1; FTRL: l1
  C shrink = 0;     // proximal step: lr * l2; FTRL: l2
  C factor = 1;     // 1 / (1 + shrink); FTRL: beta / lr of the last step
  C other = 0;  // NAdam: step size for the average, `rate` is that for the gradient; LAMB: lr * r
  C floor_l1 = 0;  // kCapped: the least metric is floor_l1 + floor_l2 * |p| ...
  C floor_l2 = 0;
  C spared = -1;      // ... and weights whose sum of squared gradients is at most this stay
  C floor_group = 0;  // and of a group the least length of its metric
  C group = 0;        // lr * group in the proximal step, group in the gradient; times sqrt(n)
  C largest_zero = 0;
  C average = 0;  // weight of the new p in the average
};

struct CpuKernels {
  // Elements [begin, begin + n) of an item. Gives the sums where they are wanted.
  Sums (*elements)(Algorithm algorithm, const Item& item, const Flags& flags,
                   const Coefficients<double>& c, std::int64_t begin, std::int64_t n, bool sums);
  // Rows that start at element `begin`, n elements in all.
  Sums (*rows)(Algorithm algorithm, const Item& item, const Flags& flags,
               const Coefficients<double>& c, std::int64_t begin, std::int64_t n, bool sums);
  // sum |x|, sum x^2 or max |x| of consecutive elements.
  double (*norm)(Norm norm, DType dtype, const void* x, std::int64_t n);
  void (*scale)(DType dtype, void* x, std::int64_t n, double factor);
  void (*clamp)(DType dtype, void* x, std::int64_t n, double limit);
  // Elements [begin, begin + n): take what was changed in `copy`; and the average alone.
  void (*take_changed)(const Item& item, std::int64_t begin, std::int64_t n);
  void (*average)(const Item& item, std::int64_t begin, std::int64_t n, double weight);
};

FUSEREG_DECLARE_PER_ISA(CpuKernels, kernels)

}  // namespace fusereg::optim
