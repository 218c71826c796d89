// How both launchers of DropBlock cut the tensor. Contract: drop_block.h.
#include <algorithm>

#include "core/ceil_div.h"
#include "drop_block/drop_block.h"

namespace fusereg::drop_block {
namespace {

// Elements of a tile: of small planes, several make one.
constexpr std::int64_t kTileElements = 1 << 13;
// channels_last: elements side by side in memory, and a tile high enough to draw few corners twice.
constexpr std::int64_t kTileChannels = 32;
constexpr std::int64_t kTileElementsLast = 1 << 15;

}  // namespace

Geometry make_geometry(std::int64_t n, std::int64_t c, std::int64_t h, std::int64_t w,
                       std::int64_t block_size, bool channels_last) {
  Geometry g;
  g.n = n;
  g.c = c;
  g.h = h;
  g.w = w;
  g.block = std::min({block_size, h, w});
  g.channels_last = channels_last;
  if (channels_last) {
    g.tile_planes = kTileChannels;
    while (g.tile_planes * w > kTileBits) g.tile_planes /= 2;
    g.tile_rows = std::clamp<std::int64_t>(kTileElementsLast / (g.tile_planes * w), 1, h);
    g.plane_tiles = ceil_div(c, g.tile_planes);
  } else if (h * w <= kTileBits) {
    g.tile_planes = std::max<std::int64_t>(1, kTileElements / (h * w));
    g.tile_rows = h;
    g.plane_tiles = ceil_div(n * c, g.tile_planes);
  } else {
    g.tile_rows = kTileBits / w;
    g.plane_tiles = n * c;
  }
  g.bands = ceil_div(h, g.tile_rows);
  g.tiles = (channels_last ? n : 1) * g.plane_tiles * g.bands;
  return g;
}

double corner_probability(const Geometry& g, double p) {
  const auto image = static_cast<double>(g.h) * static_cast<double>(g.w);
  const auto corners =
      static_cast<double>(g.corner_rows()) * static_cast<double>(g.corner_columns());
  const auto block = static_cast<double>(g.block) * static_cast<double>(g.block);
  return std::min(1.0, p * image / (block * corners));
}

}  // namespace fusereg::drop_block
