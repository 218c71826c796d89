// CPU kernels of the penalties; compiled once per instruction set. Contract: penalty.h.
//
// Sums are kept in kLanes columns, element i in column i % kLanes, whatever the vector width: so
// every instruction set adds the same numbers in the same order and gives the same bits.
#include "core/simd.h"
#include "core/soft_threshold.h"
#include "penalty/penalty.h"

namespace fusereg::penalty::FUSEREG_ISA {
namespace {

using namespace ::fusereg::FUSEREG_ISA;

constexpr int kLanes = 32;
constexpr int kStepsPerFlush = 8;  // float32 terms a lane adds before it goes to float64
constexpr std::int64_t kFlush = kLanes * kStepsPerFlush;  // elements

// Which terms are there; a strength of 0 must not touch inf or NaN.
enum class Terms { kL1, kL2, kBoth };
constexpr bool has_l1(Terms t) { return t != Terms::kL2; }
constexpr bool has_l2(Terms t) { return t != Terms::kL1; }

constexpr bool gives_sums(Op op) { return op == Op::kValue || op == Op::kAddGrad; }

// Lane i and lane i + width, until one is left.
template <int kVectors, int kWide>
FUSEREG_INLINE double add_lanes(const Vector<double> (&sums)[kVectors][kWide]) {
  double lanes[kLanes];
  static_assert(sizeof(lanes) == sizeof(sums), "one sum a lane");
  memcpy(lanes, sums, sizeof(lanes));
  for (int i = 0; i < 16; ++i) lanes[i] += lanes[i + 16];
  for (int i = 0; i < 8; ++i) lanes[i] += lanes[i + 8];
  for (int i = 0; i < 4; ++i) lanes[i] += lanes[i + 4];
  return (lanes[0] + lanes[2]) + (lanes[1] + lanes[3]);
}

FUSEREG_INLINE bool is_finite(double x) { return x - x == 0.0; }

// One vector of elements.
template <class T, Op op, Terms terms>
FUSEREG_INLINE Vector<Compute<T>> gradient_or_prox(Vector<Compute<T>> w, Vector<Compute<T>> g,
                                                   Vector<Compute<T>> l1, Vector<Compute<T>> l2) {
  using V = Vector<Compute<T>>;
  if constexpr (op == Op::kProx) {
    // Here l2 holds the factor.
    return soft_threshold<T>(w, l1, l2);
  } else {
    V d = op == Op::kAddGrad ? g : V{};
    if constexpr (has_l1(terms)) d += l1 * sign(w);
    if constexpr (has_l2(terms)) d += l2 * w;
    return d;
  }
}

template <class T>
Sums sums_in_double(const T* w, std::int64_t n) {
  Sums sums;
  for (std::int64_t i = 0; i < n; ++i) {
    const double x = to_compute(w[i]);
    sums.absolute += x < 0 ? -x : x;
    sums.square += x * x;
  }
  return sums;
}

template <class T, Op op, Terms terms>
Sums elements(T* w, T* g, std::int64_t n, const Coefficients& c) {
  using C = Compute<T>;
  using V = Vector<C>;
  constexpr int kW = kWidth<C>;
  constexpr int kVectors = kLanes / kW;
  constexpr bool kSums = gives_sums(op);
  const bool prox = op == Op::kProx;
  const V l1 = broadcast(static_cast<C>(prox ? c.l1 : c.l1 * c.scale));
  const V l2 = broadcast(static_cast<C>(prox ? c.scale : c.l2 * c.scale));
  T* const out = prox ? w : g;

  constexpr int kWide = static_cast<int>(sizeof(double) / sizeof(C));
  Vector<double> absolute[kVectors][kWide] = {};
  Vector<double> square[kVectors][kWide] = {};
  V step_absolute[kVectors] = {};
  V step_square[kVectors] = {};
  auto add = [&](int v, V x) __attribute__((always_inline)) {
    if constexpr (kSums && has_l1(terms)) step_absolute[v] += abs(x);
    if constexpr (kSums && has_l2(terms)) step_square[v] += x * x;
  };
  auto flush = [&]() __attribute__((always_inline)) {
    if constexpr (kSums) {
      for (int v = 0; v < kVectors; ++v) {
        if constexpr (has_l1(terms)) add_widened(step_absolute[v], absolute[v]);
        if constexpr (has_l2(terms)) add_widened(step_square[v], square[v]);
        step_absolute[v] = step_square[v] = V{};
      }
    }
  };
  auto step = [&](std::int64_t i) __attribute__((always_inline)) {
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) {
      const std::int64_t at = i + v * kW;
      const V x = load(w + at);
      add(v, x);
      if constexpr (op != Op::kValue) {
        V before{};
        if constexpr (op == Op::kAddGrad) before = load(g + at);
        store(out + at, gradient_or_prox<T, op, terms>(x, before, l1, l2));
      }
    }
  };

  std::int64_t i = 0;
  for (; n - i >= kFlush; i += kFlush) {
    for (int s = 0; s < kStepsPerFlush; ++s) step(i + s * kLanes);
    flush();
  }
  for (; n - i >= kLanes; i += kLanes) step(i);
  for (int v = 0; i < n; i += kW, ++v) {
    const std::int64_t rest = n - i < kW ? n - i : kW;
    const V x = load_partial(w + i, rest);
    add(v, x);
    if constexpr (op != Op::kValue) {
      V before{};
      if constexpr (op == Op::kAddGrad) before = load_partial(g + i, rest);
      store_partial(out + i, gradient_or_prox<T, op, terms>(x, before, l1, l2), rest);
    }
  }
  flush();
  Sums sums;
  if constexpr (kSums) {
    if constexpr (has_l1(terms)) sums.absolute = add_lanes(absolute);
    if constexpr (has_l2(terms)) sums.square = add_lanes(square);
    // |w| >= 1.8e19 squares to infinity in float32 although the sum may be finite.
    if (sizeof(C) == 4 && (!is_finite(sums.absolute) || !is_finite(sums.square))) {
      const Sums again = sums_in_double(w, n);
      if (has_l1(terms)) sums.absolute = again.absolute;
      if (has_l2(terms)) sums.square = again.square;
    }
  }
  return sums;
}

template <class T, Op op>
Sums elements_with(T* w, T* g, std::int64_t n, const Coefficients& c) {
  if constexpr (op == Op::kProx) {
    return elements<T, op, Terms::kBoth>(w, g, n, c);
  } else {
    if (op == Op::kWriteGrad && c.l1 == 0.0 && c.l2 == 0.0) {
      memset(g, 0, static_cast<std::size_t>(n) * sizeof(T));  // of NaN, too
      return {};
    }
    if (c.l2 == 0.0) return elements<T, op, Terms::kL1>(w, g, n, c);
    if (c.l1 == 0.0) return elements<T, op, Terms::kL2>(w, g, n, c);
    return elements<T, op, Terms::kBoth>(w, g, n, c);
  }
}

Sums elements_any(Op op, DType dtype, void* w, void* g, std::int64_t n, const Coefficients& c) {
  return dispatch_dtype(dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    T* const typed_w = static_cast<T*>(w);
    T* const typed_g = static_cast<T*>(g);
    switch (op) {
      case Op::kValue:
        return elements_with<T, Op::kValue>(typed_w, typed_g, n, c);
      case Op::kAddGrad:
        return elements_with<T, Op::kAddGrad>(typed_w, typed_g, n, c);
      case Op::kWriteGrad:
        return elements_with<T, Op::kWriteGrad>(typed_w, typed_g, n, c);
      default:
        return elements_with<T, Op::kProx>(typed_w, typed_g, n, c);
    }
  });
}

// --- groups ---

// A float32 sum of squares, done again in float64 (through `again`) where float32 squares overflow or
// lose their bits: a group of tiny weights must not look like an all-zero one.
template <class C, class Again>
FUSEREG_INLINE double safe_square(double square, Again again) {
  constexpr double kSmallest = 1e-28;
  if (sizeof(C) == 4 && (square < kSmallest || !is_finite(square))) square = again();
  return square;
}

struct GroupTerms {
  double value;   // the group's share of R
  double l2;      // the coefficient of w in its gradient
  double factor;  // of its proximal step
};

FUSEREG_INLINE GroupTerms group_terms(const Strengths& s, double group_sqrt_n, double absolute,
                                      double square, double norm) {
  GroupTerms t;
  t.value = group_sqrt_n * norm;
  if (s.l1 != 0.0) t.value += s.l1 * absolute;
  if (s.l2 != 0.0) t.value += 0.5 * s.l2 * square;
  t.l2 = s.l2 + group_gradient_factor(group_sqrt_n, norm);
  t.factor = group_prox_factor(group_sqrt_n, norm) / (1.0 + s.l2);
  return t;
}

// Sum of squares after soft-thresholding, in float64 throughout (only the sparse group step needs
// it).
template <class T>
double shrunk_square(const T* w, std::int64_t n, double threshold) {
  double square = 0.0;
  for (std::int64_t i = 0; i < n; ++i) {
    const double x = soft_threshold<double>(static_cast<double>(to_compute(w[i])), threshold, 1.0);
    square += x * x;
  }
  return square;
}

// Whether the elements of a group lie in runs long enough for vectors.
bool by_runs(const GroupShape& shape) {
  constexpr std::int64_t kShortRun = 64;
  return shape.outer == 1 || shape.inner >= kShortRun;
}

// Whether all elements are zero: groups that a penalty has made so are many, and then their sums
// must not be done again one element at a time.
template <class T>
bool all_zero(T* w, std::int64_t n) {
  const Coefficients absolute_only{1.0, 0.0, 1.0};
  return elements<T, Op::kValue, Terms::kL1>(w, nullptr, n, absolute_only).absolute == 0.0;
}

// The sums of one group of runs: of |v| where there is an l1, and of v^2.
template <class T, Op op>
Sums run_sums(T* w, const GroupShape& shape, double l1, std::int64_t index) {
  const std::int64_t stride = shape.groups * shape.inner;
  T* const first = w + index * shape.inner;
  const bool thresholded = op == Op::kProx && l1 != 0.0;
  Sums sums;
  for (std::int64_t o = 0; o < shape.outer; ++o) {
    T* const run = first + o * stride;
    if (thresholded) {
      sums.square += shrunk_square(run, shape.inner, l1);
      continue;
    }
    const Coefficients both{1.0, 1.0, 1.0};
    const Sums part = l1 != 0.0
                          ? elements<T, Op::kValue, Terms::kBoth>(run, nullptr, shape.inner, both)
                          : elements<T, Op::kValue, Terms::kL2>(run, nullptr, shape.inner, both);
    sums.absolute += part.absolute;
    sums.square += part.square;
  }
  if (thresholded) return sums;
  sums.square = safe_square<Compute<T>>(sums.square, [&] {
    double square = 0.0;
    for (std::int64_t o = 0; o < shape.outer; ++o) {
      T* const run = first + o * stride;
      if (!all_zero(run, shape.inner)) square += sums_in_double(run, shape.inner).square;
    }
    return square;
  });
  return sums;
}

// Group by group: each is read twice, the second time from cache.
template <class T, Op op>
double groups_by_runs(T* w, T* g, const Item& item, double scale, std::int64_t begin,
                      std::int64_t end) {
  const GroupShape& shape = item.shape;
  const Strengths& s = item.strengths;
  const double group_sqrt_n = s.group * __builtin_sqrt(static_cast<double>(shape.group_size()));
  const std::int64_t stride = shape.groups * shape.inner;
  double value = 0.0;
  for (std::int64_t index = begin; index < end; ++index) {
    const std::int64_t first = index * shape.inner;
    const Sums sums = run_sums<T, op>(w, shape, s.l1, index);
    const double norm = __builtin_sqrt(sums.square);
    const GroupTerms t = group_terms(s, group_sqrt_n, sums.absolute, sums.square, norm);
    value += t.value;
    if constexpr (op != Op::kValue) {
      const Coefficients c =
          op == Op::kProx ? Coefficients{s.l1, 0.0, t.factor} : Coefficients{s.l1, t.l2, scale};
      // The sums are known: kAddGrad's own would be dead work, but they cost less than a second
      // code path.
      for (std::int64_t o = 0; o < shape.outer; ++o) {
        const std::int64_t at = first + o * stride;
        elements_with<T, op>(w + at, op == Op::kProx ? nullptr : g + at, shape.inner, c);
      }
    }
  }
  return value;
}

// Groups of short runs with a stride between them (columns of a matrix): a tile of neighboring
// columns is walked row by row, so that memory is read in order; the second walk comes from cache.
constexpr int kMaxColumns = 512;

// As many groups at once as keep a tile in the L2 cache, within what the accumulators hold.
template <class T>
std::int64_t groups_of_tile(const GroupShape& shape) {
  constexpr std::int64_t kTileBytes = 512 * 1024;
  constexpr std::int64_t kFewest = 64;
  std::int64_t columns = kTileBytes / (shape.outer * static_cast<std::int64_t>(sizeof(T)));
  columns = columns > kMaxColumns ? kMaxColumns : columns < kFewest ? kFewest : columns;
  return columns / shape.inner;
}

// The sums of the groups [begin, end) of a tile.
template <class T, Op op>
void column_sums(const T* w, const GroupShape& shape, double l1, std::int64_t begin,
                 std::int64_t end, Sums* sums) {
  using C = Compute<T>;
  using V = Vector<C>;
  constexpr int kW = kWidth<C>;
  const std::int64_t stride = shape.groups * shape.inner;
  const std::int64_t first = begin * shape.inner;
  const auto columns = static_cast<int>((end - begin) * shape.inner);
  const bool prox = op == Op::kProx;
  const V threshold = broadcast(static_cast<C>(l1));

  double absolute[kMaxColumns];
  double square[kMaxColumns];
  memset(absolute, 0, sizeof(absolute));
  memset(square, 0, sizeof(square));
  C part_absolute[kMaxColumns + 64];
  C part_square[kMaxColumns + 64];
  for (std::int64_t row = 0; row < shape.outer; row += kStepsPerFlush) {
    const std::int64_t last =
        shape.outer - row < kStepsPerFlush ? shape.outer : row + kStepsPerFlush;
    memset(part_absolute, 0, sizeof(part_absolute));
    memset(part_square, 0, sizeof(part_square));
    for (std::int64_t o = row; o < last; ++o) {
      const T* const line = w + first + o * stride;
      for (int i = 0; i < columns; i += kW) {
        V x = i + kW <= columns ? load(line + i) : load_partial(line + i, columns - i);
        if (prox) x = soft_threshold<C>(x, threshold, broadcast(C(1)));
        store(part_absolute + i, load(part_absolute + i) + abs(x));
        store(part_square + i, load(part_square + i) + x * x);
      }
    }
    for (int i = 0; i < columns; ++i) {
      absolute[i] += static_cast<double>(part_absolute[i]);
      square[i] += static_cast<double>(part_square[i]);
    }
  }
  const auto inner = static_cast<int>(shape.inner);
  for (int start = 0; start < columns; start += inner) {
    Sums group;
    for (int i = start; i < start + inner; ++i) {
      group.absolute += absolute[i];
      group.square += square[i];
    }
    group.square = safe_square<C>(group.square, [&] {
      if (group.absolute == 0.0) return 0.0;
      double again = 0.0;
      for (std::int64_t o = 0; o < shape.outer; ++o) {
        const T* const run = w + first + o * stride + start;
        again += prox ? shrunk_square(run, inner, l1) : sums_in_double(run, inner).square;
      }
      return again;
    });
    sums[start / inner] = group;
  }
}

// The gradient or proximal step of columns with a coefficient each.
template <class T, Op op>
void column_step(T* w, T* g, const GroupShape& shape, std::int64_t first, int columns,
                 const Compute<T>* l1, const Compute<T>* coefficient) {
  using V = Vector<Compute<T>>;
  constexpr int kW = kWidth<Compute<T>>;
  const std::int64_t stride = shape.groups * shape.inner;
  for (std::int64_t o = 0; o < shape.outer; ++o) {
    const std::int64_t at = first + o * stride;
    for (int i = 0; i < columns; i += kW) {
      const std::int64_t rest = columns - i < kW ? columns - i : kW;
      const bool whole = rest == kW;
      const V x = whole ? load(w + at + i) : load_partial(w + at + i, rest);
      V before{};
      if constexpr (op == Op::kAddGrad)
        before = whole ? load(g + at + i) : load_partial(g + at + i, rest);
      const V y =
          gradient_or_prox<T, op, Terms::kBoth>(x, before, load(l1 + i), load(coefficient + i));
      T* const out = (op == Op::kProx ? w : g) + at + i;
      if (whole) {
        store(out, y);
      } else {
        store_partial(out, y, rest);
      }
    }
  }
}

// Coefficients of a tile's columns.
template <class C>
struct ColumnFactors {
  C l1[kMaxColumns + 64];
  C second[kMaxColumns + 64];
  ColumnFactors() {
    memset(l1, 0, sizeof(l1));
    memset(second, 0, sizeof(second));
  }
  void set(int start, int inner, double first, double next) {
    for (int i = start; i < start + inner; ++i) {
      l1[i] = static_cast<C>(first);
      second[i] = static_cast<C>(next);
    }
  }
};

template <class T, Op op>
double column_tile(T* w, T* g, const Item& item, double scale, std::int64_t begin,
                   std::int64_t end) {
  const GroupShape& shape = item.shape;
  const Strengths& s = item.strengths;
  const double group_sqrt_n = s.group * __builtin_sqrt(static_cast<double>(shape.group_size()));
  const bool prox = op == Op::kProx;
  Sums sums[kMaxColumns];
  column_sums<T, op>(w, shape, s.l1, begin, end, sums);
  ColumnFactors<Compute<T>> factors;
  const auto inner = static_cast<int>(shape.inner);
  double value = 0.0;
  for (std::int64_t i = 0; i < end - begin; ++i) {
    const double norm = __builtin_sqrt(sums[i].square);
    const GroupTerms t = group_terms(s, group_sqrt_n, sums[i].absolute, sums[i].square, norm);
    value += t.value;
    factors.set(static_cast<int>(i) * inner, inner, prox ? s.l1 : s.l1 * scale,
                prox ? t.factor : t.l2 * scale);
  }
  if constexpr (op != Op::kValue) {
    column_step<T, op>(w, g, shape, begin * shape.inner, static_cast<int>(end - begin) * inner,
                       factors.l1, factors.second);
  }
  return value;
}

template <class T, Op op>
double groups_with(T* w, T* g, const Item& item, double scale, std::int64_t begin,
                   std::int64_t end) {
  if (by_runs(item.shape)) return groups_by_runs<T, op>(w, g, item, scale, begin, end);
  const std::int64_t step = groups_of_tile<T>(item.shape);
  double value = 0.0;
  for (std::int64_t tile = begin; tile < end; tile += step) {
    value += column_tile<T, op>(w, g, item, scale, tile, end - tile < step ? end : tile + step);
  }
  return value;
}

double groups_any(Op op, const Item& item, double scale, std::int64_t begin, std::int64_t end) {
  return dispatch_dtype(item.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    T* const w = static_cast<T*>(item.w);
    T* const g = static_cast<T*>(item.g);
    switch (op) {
      case Op::kValue:
        return groups_with<T, Op::kValue>(w, g, item, scale, begin, end);
      case Op::kAddGrad:
        return groups_with<T, Op::kAddGrad>(w, g, item, scale, begin, end);
      case Op::kWriteGrad:
        return groups_with<T, Op::kWriteGrad>(w, g, item, scale, begin, end);
      default:
        return groups_with<T, Op::kProx>(w, g, item, scale, begin, end);
    }
  });
}

// --- slices of groups that lie in several tensors ---

template <class T, Op op>
void slice_sums_with(T* w, const Item& item, std::int64_t begin, std::int64_t end, Sums* sums) {
  const GroupShape& shape = item.shape;
  const double l1 = item.strengths.l1;
  if (shape.group_size() == 1) {
    for (std::int64_t i = begin; i < end; ++i) {
      double x = to_compute(w[i]);
      if (op == Op::kProx && l1 != 0.0) x = soft_threshold<double>(x, l1, 1.0);
      sums[i - begin].absolute = x < 0 ? -x : x;
      sums[i - begin].square = x * x;
    }
  } else if (by_runs(shape)) {
    for (std::int64_t i = begin; i < end; ++i) sums[i - begin] = run_sums<T, op>(w, shape, l1, i);
  } else {
    const std::int64_t step = groups_of_tile<T>(shape);
    for (std::int64_t tile = begin; tile < end; tile += step) {
      const std::int64_t last = end - tile < step ? end : tile + step;
      column_sums<T, op>(w, shape, l1, tile, last, sums + (tile - begin));
    }
  }
}

void slice_sums_any(Op op, const Item& item, std::int64_t begin, std::int64_t end, Sums* sums) {
  dispatch_dtype(item.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    T* const w = static_cast<T*>(item.w);
    if (op == Op::kProx) {
      slice_sums_with<T, Op::kProx>(w, item, begin, end, sums);
    } else {
      slice_sums_with<T, Op::kValue>(w, item, begin, end, sums);
    }
  });
}

template <class T, Op op>
void slices_with(T* w, T* g, const Item& item, const std::int32_t* slot_of, const double* factors,
                 std::int64_t slots, std::int64_t begin, std::int64_t end) {
  using C = Compute<T>;
  const GroupShape& shape = item.shape;
  const double l1 = item.strengths.l1;
  const bool prox = op == Op::kProx;
  const auto has_slot = [&](std::int64_t i) { return slot_of[i] >= 0 && slot_of[i] < slots; };
  if (by_runs(shape)) {
    const std::int64_t stride = shape.groups * shape.inner;
    for (std::int64_t i = begin; i < end; ++i) {
      if (!has_slot(i)) continue;
      const double factor = factors[slot_of[i]];
      for (std::int64_t o = 0; o < shape.outer; ++o) {
        const std::int64_t at = i * shape.inner + o * stride;
        if (shape.inner == 1) {
          const C x = to_compute(w[at]);
          if constexpr (op == Op::kProx) {
            w[at] =
                from_compute<T>(soft_threshold<T>(x, static_cast<C>(l1), static_cast<C>(factor)));
          } else {
            g[at] = from_compute<T>((l1 == 0.0 ? C(0) : static_cast<C>(l1) * sign(x)) +
                                    static_cast<C>(factor) * x);
          }
        } else {
          const Coefficients c{l1, prox ? 0.0 : factor, prox ? factor : 1.0};
          elements_with<T, op>(w + at, prox ? nullptr : g + at, shape.inner, c);
        }
      }
    }
    return;
  }
  const std::int64_t step = groups_of_tile<T>(shape);
  const auto inner = static_cast<int>(shape.inner);
  for (std::int64_t tile = begin; tile < end; tile += step) {
    const std::int64_t last = end - tile < step ? end : tile + step;
    ColumnFactors<C> of_columns;
    for (std::int64_t i = tile; i < last; ++i) {
      if (has_slot(i))
        of_columns.set(static_cast<int>(i - tile) * inner, inner, l1, factors[slot_of[i]]);
    }
    // Those that are left alone keep their bits: what lies between them, one by one.
    std::int64_t to = tile;
    for (std::int64_t from = tile; from < last; from = to) {
      const bool there = has_slot(from);
      for (to = from + 1; to < last && has_slot(to) == there;) ++to;
      if (!there) continue;
      const auto skipped = static_cast<int>(from - tile) * inner;
      column_step<T, op>(w, g, shape, from * shape.inner, static_cast<int>(to - from) * inner,
                         of_columns.l1 + skipped, of_columns.second + skipped);
    }
  }
}

void slices_any(Op op, const Item& item, const std::int32_t* slot_of, const double* factors,
                std::int64_t slots, std::int64_t begin, std::int64_t end) {
  dispatch_dtype(item.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    T* const w = static_cast<T*>(item.w);
    T* const g = static_cast<T*>(item.g);
    if (op == Op::kProx) {
      slices_with<T, Op::kProx>(w, g, item, slot_of, factors, slots, begin, end);
    } else {
      slices_with<T, Op::kWriteGrad>(w, g, item, slot_of, factors, slots, begin, end);
    }
  });
}

}  // namespace

const CpuKernels kernels = {&elements_any, &groups_any, &slice_sums_any, &slices_any};

}  // namespace fusereg::penalty::FUSEREG_ISA
