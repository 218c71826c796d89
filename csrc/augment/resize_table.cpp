// The weights of antialiased resizing, an axis at a time. Contract: resize.h.
#include <algorithm>
#include <vector>

#include "augment/augment_math.h"
#include "augment/resize.h"

namespace fusereg::augment {
namespace {

struct Row {
  std::int64_t first = 0;
  std::vector<double> weights;
};

// Without the zeros at both ends.
Row trimmed(std::int64_t first, const std::vector<double>& weights) {
  auto nonzero = [](double w) { return w != 0.0; };
  const auto begin = std::find_if(weights.begin(), weights.end(), nonzero);
  const auto end = std::find_if(weights.rbegin(), weights.rend(), nonzero).base();
  if (begin >= end) return {first, {}};
  return {first + (begin - weights.begin()), std::vector<double>(begin, end)};
}

std::vector<Row> rows_of(std::int64_t from, std::int64_t to, Interpolation how, bool transposed) {
  const double ratio = static_cast<double>(from) / static_cast<double>(to);
  std::vector<Row> rows(static_cast<std::size_t>(to));
  for (std::int64_t i = 0; i < to; ++i) {
    const double at = (static_cast<double>(i) + 0.5) * ratio - 0.5;
    const Span<double> span =
        make_span<double>(at, ratio, static_cast<std::int32_t>(from), how, FillMode::kConstant);
    std::vector<double> weights;
    for (std::int32_t k = span.first; k <= span.last; ++k)
      weights.push_back(weight_in(span, k, how));
    rows[static_cast<std::size_t>(i)] = trimmed(span.first, weights);
  }
  if (!transposed) return rows;
  std::vector<Row> columns(static_cast<std::size_t>(from));
  for (std::int64_t i = 0; i < to; ++i) {
    const Row& row = rows[static_cast<std::size_t>(i)];
    for (std::size_t k = 0; k < row.weights.size(); ++k) {
      Row& column = columns[static_cast<std::size_t>(row.first) + k];
      if (column.weights.empty()) column.first = i;
      column.weights.resize(static_cast<std::size_t>(i - column.first), 0.0);
      column.weights.push_back(row.weights[k]);
    }
  }
  return columns;
}

}  // namespace

std::int64_t resize_taps(std::int64_t from, std::int64_t to, Interpolation how, bool transposed) {
  std::size_t taps = 1;
  for (const Row& row : rows_of(from, to, how, transposed))
    taps = std::max(taps, row.weights.size());
  return static_cast<std::int64_t>(taps);
}

void resize_band(std::int64_t from, std::int64_t to, Interpolation how, bool transposed,
                 std::int64_t taps, std::int32_t* first, double* weights) {
  const std::int64_t size = transposed ? to : from;
  for (const Row& row : rows_of(from, to, how, transposed)) {
    // All of a row's taps are within the image.
    const std::int64_t begin = std::clamp<std::int64_t>(row.first, 0, size - taps);
    *first++ = static_cast<std::int32_t>(begin);
    std::fill(weights, weights + taps, 0.0);
    std::copy(row.weights.begin(), row.weights.end(), weights + (row.first - begin));
    weights += taps;
  }
}

}  // namespace fusereg::augment
