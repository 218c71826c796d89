// The normals of many elements at once, for files that are compiled once per instruction set. Element
// e has what normal.h makes of its words: those of chunk e / 4 (philox.h), pairs of them in order.
#pragma once

#include "core/normal.h"
#include "core/simd.h"

namespace fusereg::FUSEREG_ISA {

// Elements that one vector call of Philox serves.
inline constexpr int kNormalsAtOnce = 4 * kPhiloxChunks;

using NormalKeys = PhiloxKeys<kNumberRounds>;

// The normals of the elements [block * kNormalsAtOnce, ...), in their order.
FUSEREG_INLINE void normals(const NormalKeys& keys, std::uint64_t low, std::uint64_t block,
                            float* out) {
  constexpr std::uint64_t kLow = 0xffffffffu;
  U64Vector draws[2];
  philox_chunks(keys, low, block * kPhiloxChunks, draws);
  // Even words and odd words, each of a pair in the same lane: those of draws[0] in even lanes.
  const U64Vector even = (draws[0] & kLow) | (draws[1] << 32);
  const U64Vector odd = (draws[0] >> 32) | (draws[1] & ~kLow);
  Vector<float> first, second;
  normal::normal_pair<Vector<float>, U32Vector>(bit_cast<U32Vector>(even), bit_cast<U32Vector>(odd),
                                                first, second);
  const auto a = bit_cast<U64Vector>(first);
  const auto b = bit_cast<U64Vector>(second);
  store(out, bit_cast<Vector<float>>((a & kLow) | (b << 32)));
  store(out + kNormalsAtOnce / 2, bit_cast<Vector<float>>((a >> 32) | (b & ~kLow)));
}

}  // namespace fusereg::FUSEREG_ISA
