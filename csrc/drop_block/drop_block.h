// DropBlock: dropout of square regions of feature maps, with no stored mask.
//
//   Ghiasi, Lin, Le 2018, "DropBlock: a regularization method for convolutional networks",
//   algorithm 1, for x of shape (N, C, H, W) and blocks of b x b, b = min(block_size, H, W):
//
//   corner_ncij = draw(index_offset + ((n C + c) h + i) w + j) >= threshold,    i < h, j < w
//                 h = H - b + 1, w = W - b + 1: a block fits into the image
//   gamma       = min(1, p H W / (b^2 h w)): the probability of a corner; make_draw(gamma) has the
//                 threshold
//   dropped_nckl = any corner_ncij with i <= k < i + b, j <= l < j + b
//   y           = dropped ? 0 : x * scale,    scale = numel / (number of elements that are kept)
//
// The number of kept elements is counted over the whole tensor, as an exact integer: it does not
// depend on the order of the sum. Forward leaves it, as a float64, for backward, which is the same
// map on the gradient; where nothing is kept, the scale is 0. The mask depends on n, c and the
// position alone: contiguous and channels_last tensors have the same.
//
// Dtypes: float64, float32, float16, bfloat16, x and y alike; one multiplication in float32
// (float64 for float64), rounded to the dtype. A dropped inf or NaN becomes 0. Bytes moved per
// element of size e: 2e. The corners are drawn twice in forward, once for the count (two launches
// on CUDA), and once in backward. y may be x.
#pragma once

#include <cstdint>

#include "core/draw.h"
#include "core/dtype.h"
#include "core/isa.h"

namespace fusereg::drop_block {

// One bit an element of a tile, set if the element is dropped.
inline constexpr std::int64_t kTileBits = 1 << 16;
inline constexpr int kTileWords = static_cast<int>(kTileBits / 32);
// W of an image: a tile has at least one row.
inline constexpr std::int64_t kMaxWidth = kTileBits;

// The tensor, and how it is cut: a tile is `tile_rows` rows of `tile_planes` planes (n, c).
struct Geometry {
  std::int64_t n = 0, c = 0, h = 0, w = 0;
  std::int64_t block = 1;
  bool channels_last = false;
  std::int64_t tile_planes = 1;
  std::int64_t tile_rows = 1;
  std::int64_t plane_tiles = 0;  // of all planes, or of one image's if channels_last
  std::int64_t bands = 0;
  std::int64_t tiles = 0;

  FUSEREG_HD std::int64_t corner_rows() const { return h - block + 1; }
  FUSEREG_HD std::int64_t corner_columns() const { return w - block + 1; }
  FUSEREG_HD std::int64_t numel() const { return n * c * h * w; }
};

Geometry make_geometry(std::int64_t n, std::int64_t c, std::int64_t h, std::int64_t w,
                       std::int64_t block_size, bool channels_last);

// gamma; needs p > 0.
double corner_probability(const Geometry& g, double p);

struct Tile {
  std::int64_t plane;  // the first, counted over all n and c
  std::int64_t planes;
  std::int64_t row;
  std::int64_t rows;
  std::int64_t start;  // of its memory, in elements
};

FUSEREG_INLINE Tile tile_at(const Geometry& g, std::int64_t index) {
  Tile t;
  const std::int64_t slice = index / g.bands;
  t.row = index % g.bands * g.tile_rows;
  t.rows = g.h - t.row < g.tile_rows ? g.h - t.row : g.tile_rows;
  std::int64_t left;
  if (g.channels_last) {
    const std::int64_t image = slice / g.plane_tiles;
    const std::int64_t channel = slice % g.plane_tiles * g.tile_planes;
    t.plane = image * g.c + channel;
    left = g.c - channel;
    t.start = (image * g.h + t.row) * g.w * g.c + channel;
  } else {
    t.plane = slice * g.tile_planes;
    left = g.n * g.c - t.plane;
    t.start = (t.plane * g.h + t.row) * g.w;
  }
  t.planes = left < g.tile_planes ? left : g.tile_planes;
  return t;
}

// Where the bits of a tile lie. One element after the other in memory's order, but for
// channels_last tile_planes bits a pixel: a power of two.
struct BitStrides {
  std::int64_t plane, row, column;
};

FUSEREG_INLINE BitStrides bit_strides(const Geometry& g, const Tile& t) {
  if (g.channels_last) return {1, g.w * g.tile_planes, g.tile_planes};
  return {t.rows * g.w, g.w, 1};
}

// The corners whose blocks reach a tile, as runs of consecutive indices.
struct Runs {
  std::int64_t count;
  std::int64_t length;
  std::int64_t first;   // index of the first run's first corner, without index_offset
  std::int64_t stride;  // from run to run
};

FUSEREG_INLINE Runs corner_runs(const Geometry& g, const Tile& t) {
  const std::int64_t rows = g.corner_rows();
  const std::int64_t columns = g.corner_columns();
  if (g.bands == 1) {
    return {1, t.planes * rows * columns, t.plane * rows * columns, 0};
  }
  const std::int64_t from = t.row < g.block ? 0 : t.row - g.block + 1;
  const std::int64_t to = t.row + t.rows < rows ? t.row + t.rows : rows;
  const std::int64_t length = to > from ? (to - from) * columns : 0;
  return {t.planes, length, (t.plane * rows + from) * columns, rows * columns};
}

// Calls set(bit, n) for each run of n bits, side by side, that the block at this corner drops.
template <class F>
FUSEREG_INLINE void for_block(const Geometry& g, const Tile& t, std::int64_t corner, F&& set) {
  const std::int64_t columns = g.corner_columns();
  const std::int64_t line = corner / columns;
  const std::int64_t column = corner % columns;
  const std::int64_t plane = line / g.corner_rows() - t.plane;
  const std::int64_t row = line % g.corner_rows() - t.row;
  const std::int64_t from = row < 0 ? 0 : row;
  const std::int64_t to = row + g.block < t.rows ? row + g.block : t.rows;
  const BitStrides s = bit_strides(g, t);
  for (std::int64_t r = from; r < to; ++r) {
    const std::int64_t at = plane * s.plane + r * s.row + column * s.column;
    if (s.column == 1) {
      set(at, g.block);
    } else {
      for (std::int64_t i = 0; i < g.block; ++i) set(at + i * s.column, std::int64_t{1});
    }
  }
}

struct Job {
  const void* x = nullptr;
  void* y = nullptr;
  DType dtype = DType::kFloat32;
  Geometry geometry;
  std::uint64_t index_offset = 0;
  SeedPair random;
  Draw draw;
  // How many elements are kept: written if `counts`, else read.
  double* kept = nullptr;
  bool counts = true;
  // CUDA, with `counts`: kCountSlots numbers.
  double* slots = nullptr;
};

inline constexpr int kCountSlots = 1024;

FUSEREG_INLINE double make_scale(const Geometry& g, double kept) {
  return kept > 0.0 ? static_cast<double>(g.numel()) / kept : 0.0;
}

void run_cpu(const Job& job);

// Two launches with `counts`, one without.
void run_cuda(const Job& job, int device, void* stream);

// --- what the CPU kernels of one instruction set provide (drop_block_kernels.cpp) ---

struct CpuKernels {
  // Sets the bits of a tile's dropped elements, and returns how many there are.
  std::int64_t (*mark)(const Job& job, const Tile& tile, std::uint32_t* bits);
  void (*apply)(const Job& job, const Tile& tile, const std::uint32_t* bits, double scale);
};

FUSEREG_DECLARE_PER_ISA(CpuKernels, kernels)

}  // namespace fusereg::drop_block
