// Dropout fused with its neighbors: one pass over memory instead of one for each operation. The
// mask is dropout's: drawn from (seed, offset, index), never stored, drawn again in backward
// (core/draw.h); index_i = index_offset + (position of element i in memory).
//
//   add         y_i = residual_i + (keep_i ? a * (x_i + bias_c) : 0)      c = i mod columns
//   rows        y_i = residual_i + (keep_n ? a * x_i : 0)                 one draw for each row n
//   activate    y_i = keep_i ? a * f(x_i) : 0                             f: relu, gelu, silu, ...
//
//   backward of add         grad_x_i = keep_i ? a * grad_i : 0,  grad_bias_c = sum of grad_x_i
//   backward of activate    grad_x_i = keep_i ? a * grad_i * f'(x_i) : 0
//                           relu: grad_x_i = y_i > 0 (or NaN) ? a * grad_i : 0, with no draw
//
// a = 1 / keep of make_draw(p); p = 0 draws nothing, a = 1; p = 1 keeps nothing. The backward of
// the residual is the gradient itself, that of x without a bias is dropout's.
//
// A dropped term is selected away, never multiplied: inf and NaN become 0. Rows that are dropped
// are not read: y is their residual.
//
// Dtypes: float64, float32, float16, bfloat16, all tensors alike. Arithmetic in float32 (float64
// for float64), each operation rounded, the result once more to the dtype. y may be x or residual,
// grad_x may be grad. Bytes moved per element of size e: add 3e, its backward 2e, activate 2e, its
// backward 3e (+ columns * e for a bias).
//
// grad_bias adds the unrounded a * grad_i: on the CPU in float64, on CUDA in float64 after at most
// 8 float32 terms. The rows are cut into chunks that depend on the shape alone; a chunk's sums go
// to a slot of its own, and the slots are added in their order: the same bits for any number of
// threads, and on every CPU instruction set. CUDA does it in the same launch: the last block of a
// tile of columns adds that tile's slots.
#pragma once

#include <cstdint>

#include "core/ceil_div.h"
#include "core/draw.h"
#include "core/dtype.h"
#include "core/isa.h"
#include "fused_dropout/fused_dropout_math.h"

namespace fusereg::fused_dropout {

// What one launch does.
enum class Form : std::uint8_t { kAdd, kRows, kActivate, kBiasBackward, kActivateBackward };

struct Job {
  Form form = Form::kAdd;
  Activation activation = Activation::kNone;
  DType dtype = DType::kFloat32;
  const void* x = nullptr;      // or the gradient
  const void* bias = nullptr;   // kAdd: may be null
  const void* other = nullptr;  // the residual; backward: x, or y for relu
  void* y = nullptr;            // or the gradient of x
  void* grad_bias = nullptr;    // kBiasBackward
  std::int64_t numel = 0;
  std::int64_t columns = 1;  // elements of the bias
  std::int64_t rows = 1;     // kRows
  std::uint64_t index_offset = 0;
  SeedPair random;
  Draw draw;
  double scale = 1.0;            // a
  double* partials = nullptr;    // kBiasBackward: partial_count() of them
  unsigned* counters = nullptr;  // CUDA, kBiasBackward: kMaxTiles, zero; they are zero again after
};

void run_cpu(const Job& job);
void run_cuda(const Job& job, int device, void* stream);

// --- the chunks of grad_bias ---

// Short rows are taken several at a time: a row of `width` elements is as many of bias's columns
// over and over as make it long enough for vectors. Slot k has the sums of the rows
// [k * chunk_rows, ...), `width` of them.
struct Chunks {
  std::int64_t width;
  std::int64_t rows;  // the last may be shorter
  std::int64_t chunk_rows;
  std::int64_t count;
};

struct ChunkRule {
  std::int64_t min_width;
  std::int64_t tile;      // columns that are walked together
  std::int64_t elements;  // what a chunk of a tile should have at least
  std::int64_t max_count;
};
inline constexpr ChunkRule kCpuRule = {1024, 2048, 65536, 256};
inline constexpr ChunkRule kCudaRule = {256, 256, 8192, 256};
// Counters of the CUDA kernel.
inline constexpr std::int64_t kMaxTiles = 4096;

inline Chunks make_chunks(std::int64_t numel, std::int64_t columns, const ChunkRule& rule) {
  Chunks c{};
  c.width = columns >= rule.min_width ? columns : columns * ceil_div(rule.min_width, columns);
  c.rows = ceil_div(numel, c.width);
  const std::int64_t tile = c.width < rule.tile ? c.width : rule.tile;
  const std::int64_t enough = ceil_div(rule.elements, tile);
  const std::int64_t few = ceil_div(c.rows, rule.max_count);
  c.chunk_rows = enough > few ? enough : few;
  c.count = ceil_div(c.rows, c.chunk_rows);
  return c;
}

// --- what the CPU kernels of one instruction set provide (fused_dropout_kernels.cpp) ---

// One call's constants, `low` being offset / 4.
struct Stream {
  std::uint64_t seed;
  std::uint64_t low;
  Draw draw;
  double scale;
};

// n consecutive elements, the first of which has this index and stands in this column.
struct Span {
  const void* x;
  const void* bias;
  const void* other;
  void* y;
  std::int64_t n;
  std::uint64_t index;
  std::int64_t column;
  std::int64_t columns;
};

struct CpuKernels {
  void (*add)(DType dtype, const Span& span, const Stream& s);
  void (*activate)(DType dtype, Activation activation, const Span& span, const Stream& s);
  void (*activate_backward)(DType dtype, Activation activation, const Span& span, const Stream& s);
  // Also adds to sums[column], sums[column + 1], ..., sums[columns - 1], sums[0], ...
  void (*bias_backward)(DType dtype, const Span& span, double* sums, const Stream& s);
  // A row that is kept: y = residual + a x.
  void (*row)(DType dtype, const void* x, const void* residual, void* y, std::int64_t n,
              double scale);
};

FUSEREG_DECLARE_PER_ISA(CpuKernels, kernels)

}  // namespace fusereg::fused_dropout
