// The vectors of core/simd.h, core/philox.h and core/draw_simd.h against the scalar functions that
// define them. Compiled for 64-bit Arm and run in an emulator, where it tries every 16-bit number
// and one float in 257.
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>

#define FUSEREG_ISA baseline
#include "core/draw_simd.h"
#include "core/philox.h"

namespace fusereg {
const bool has_bfloat16_instructions = false;
}

namespace {

using namespace fusereg;
using namespace fusereg::baseline;

std::int64_t tried = 0;
std::int64_t wrong = 0;

template <class A>
void same(const A& found, const A& wanted, const char* what, std::uint64_t at) {
  ++tried;
  if (std::memcmp(&found, &wanted, sizeof(A)) == 0) return;
  if (++wrong <= 20) std::printf("%s of %llx\n", what, static_cast<unsigned long long>(at));
}

constexpr int kW = kWidth<float>;

template <class T>
void check_loads(const char* what) {
  for (std::uint32_t first = 0; first < 0x10000; first += kW) {
    T numbers[kW];
    for (int i = 0; i < kW; ++i) numbers[i].bits = static_cast<std::uint16_t>(first + i);
    const Vector<float> v = load(numbers);
    for (int i = 0; i < kW; ++i) {
      const float found = v[i];
      same(found, to_float(numbers[i]), what, first + i);
    }
  }
}

template <class T, class Narrow>
void check_stores(const char* what, Narrow narrow) {
  for (std::uint64_t first = 0; first < (std::uint64_t{1} << 32); first += 257 * kW) {
    Vector<float> v{};
    for (int i = 0; i < kW; ++i)
      v[i] = bit_cast<float>(static_cast<std::uint32_t>(first + 257 * i));
    T numbers[kW];
    store(numbers, v);
    for (int i = 0; i < kW; ++i)
      same(numbers[i].bits, narrow(v[i]).bits, what, first + static_cast<std::uint64_t>(257 * i));
  }
}

template <int kRounds>
void check_words() {
  const std::uint64_t key = 0x0123456789abcdefull, low = 0xfedcba9876543210ull;
  const PhiloxKeys<kRounds> keys(key);
  for (std::uint64_t first = 0xffffff00; first < 0x100000100ull; first += kPhiloxChunks) {
    U64Vector draws[2];
    philox_chunks<kRounds>(keys, low, first, draws);
    std::uint32_t words[4 * kPhiloxChunks];
    static_assert(sizeof(words) == sizeof(draws));
    std::memcpy(words, draws, sizeof(words));
    for (int c = 0; c < kPhiloxChunks; ++c) {
      const PhiloxWords wanted = philox<kRounds>(key, low, first + static_cast<std::uint64_t>(c));
      for (int w = 0; w < 4; ++w) same(words[4 * c + w], wanted.word[w], "words", first);
    }
  }
}

template <class C, int kBits>
void check_masks(const Draw& draw) {
  const MaskKeys keys(5);
  MaskDraws<kBits> mask_draws(keys, 3, draw);
  const auto threshold = broadcast(static_cast<typename DrawType<kBits>::type>(draw.threshold));
  // From the first chunk on, and where their number comes to 2^32.
  constexpr std::uint64_t kAround = (std::uint64_t{1} << 32) / kPhiloxChunks;
  for (std::uint64_t i = 0; i < 128; ++i) {
    const std::uint64_t block = i < 64 ? i : kAround - 96 + i;
    U64Vector draws[2];
    mask_draws.make(block, draws);
    std::uint64_t index = block * kBlock<kBits>;
    for (const U64Vector& half : draws) {
      const auto masks = Masks<C, kBits>::make(half, threshold);
      for (int i = 0; i < kBlock<kBits> / 2; ++i, ++index) {
        const auto kept = masks.part(i / kWidth<C>)[i % kWidth<C>];
        const std::uint32_t group = keep_mask(5, 3, index / kGroup, draw);
        same(kept != 0, (group >> (index % kGroup) & 1u) != 0, "mask", index);
        same(kept == 0 || kept == -1, true, "all ones", index);
      }
    }
  }
}

void check_roots() {
  for (std::uint64_t first = 0; first < 0x7f800000; first += 4099 * kW) {
    Vector<float> v{};
    for (int i = 0; i < kW; ++i)
      v[i] = bit_cast<float>(static_cast<std::uint32_t>(first + 4099 * i));
    const Vector<float> roots = square_root(v);
    for (int i = 0; i < kW; ++i) {
      const float found = roots[i];
      same(found, std::sqrt(static_cast<float>(v[i])), "root", first);
    }
  }
}

}  // namespace

int main() {
  check_loads<Half>("float16");
  check_loads<BFloat16>("bfloat16");
  check_stores<Half>("to float16", [](float v) { return to_half(v); });
  check_stores<BFloat16>("to bfloat16", [](float v) { return to_bfloat16(v); });
  check_words<kMaskRounds>();
  check_words<kNumberRounds>();
  check_masks<float, 16>({16, 0x6000});
  check_masks<double, 16>({16, 0x6000});
  check_masks<float, 32>({32, 0x60000000});
  check_masks<double, 32>({32, 0x60000000});
  for (const Draw& draw : {Draw{1, 1}, Draw{2, 1}, Draw{2, 3}}) {
    check_masks<float, kFewBits>(draw);
    check_masks<double, kFewBits>(draw);
  }
  check_roots();
#if defined(__aarch64__)
  for (std::uint32_t bits = 0; bits < 256; ++bits) {
    uint16x8_t of16{};
    uint32x4_t of32{};
    uint64x2_t of64{};
    for (int i = 0; i < 8; ++i) of16[i] = static_cast<std::uint16_t>(-(bits >> i & 1));
    for (int i = 0; i < 4; ++i) of32[i] = -(bits >> i & 1);
    for (int i = 0; i < 2; ++i) of64[i] = -std::uint64_t{bits >> i & 1};
    same(bits_of(of16), bits, "bits", bits);
    same(bits_of(of32), bits & 15, "bits", bits);
    same(bits_of(of64), bits & 3, "bits", bits);
  }
#endif
  std::printf("vectors: %lld of %lld numbers as the scalar functions give them\n",
              static_cast<long long>(tried - wrong), static_cast<long long>(tried));
  return wrong == 0 ? 0 : 1;
}
