// What augmentation draws: Philox of (seed, epoch, id, operation, occurrence), as augment_params.h says.
#pragma once

#include <cmath>
#include <cstdint>

#include "augment/elementary.h"
#include "core/philox.h"

namespace fusereg::augment::params {

enum class Operation : std::uint32_t {
  kRotation = 1,
  kScale,
  kShear,
  kTranslation,
  kAffineChance,
  kFlip,
  kCrop,
  kColor,
  kErase,
  kEraseNoise,
  kMix,
  kMixWeight,
  kMixBox,
  kMixOrder,
  kProgram,
  kProgramNormal,
  kPerspective,
};

struct Source {
  std::uint64_t seed;
  std::uint32_t epoch;
  std::uint64_t id;

  PhiloxWords words(Operation operation, std::uint32_t occurrence,
                    std::uint32_t attempt = 0) const {
    const auto op = static_cast<std::uint64_t>(operation);
    const std::uint64_t low = std::uint64_t{epoch} | op << 32 | std::uint64_t{occurrence} << 40 |
                              std::uint64_t{attempt} << 48 | std::uint64_t{1} << 63;
    return philox<kNumberRounds>(seed, low, id);
  }
};

// [0, 1), a multiple of 2^-32.
inline double unit(std::uint32_t word) { return word * 0x1p-32; }

inline double between(std::uint32_t word, double low, double high) {
  return low + unit(word) * (high - low);
}

// One of 0, 1, ..., count - 1.
inline std::int64_t choice(std::uint32_t word, std::int64_t count) {
  return static_cast<std::int64_t>(std::uint64_t{word} * static_cast<std::uint64_t>(count) >> 32);
}

inline bool happens(std::uint32_t word, double probability) { return unit(word) < probability; }

// As many words as are wanted, one counter after the other.
class Stream {
 public:
  Stream(const Source& source, Operation operation, std::uint32_t occurrence)
      : source_(source), operation_(operation), occurrence_(occurrence) {}
  std::uint32_t next() {
    if (at_ == 4) {
      words_ = source_.words(operation_, occurrence_, attempt_++);
      at_ = 0;
    }
    return words_.word[at_++];
  }
  // (0, 1)
  double open_unit() { return (next() + 0.5) * 0x1p-32; }

 private:
  const Source& source_;
  Operation operation_;
  std::uint32_t occurrence_;
  std::uint32_t attempt_ = 0;
  int at_ = 4;
  PhiloxWords words_{};
};

// Marsaglia's polar method.
inline double normal(Stream& stream) {
  while (true) {
    const double x = 2.0 * stream.open_unit() - 1.0;
    const double y = 2.0 * stream.open_unit() - 1.0;
    const double square = x * x + y * y;
    if (square < 1.0 && square > 0.0) {
      return x * std::sqrt(-2.0 * natural_log(square) / square);
    }
  }
}

// The logarithm of a gamma variate (Marsaglia and Tsang 2000; below 1 by that of alpha + 1 times
// u^(1/alpha), whose logarithm does not underflow).
inline double log_gamma_variate(Stream& stream, double alpha) {
  const double raised = alpha < 1.0 ? alpha + 1.0 : alpha;
  const double boost = alpha < 1.0 ? natural_log(stream.open_unit()) / alpha : 0.0;
  const double d = raised - 1.0 / 3.0;
  const double c = 1.0 / std::sqrt(9.0 * d);
  while (true) {
    const double x = normal(stream);
    const double root = 1.0 + c * x;
    if (root <= 0.0) continue;
    const double v = root * root * root;
    const double log_v = natural_log(v);
    if (natural_log(stream.open_unit()) < 0.5 * x * x + d - d * v + d * log_v) {
      return natural_log(d) + log_v + boost;
    }
  }
}

// Beta(alpha, alpha)
inline double beta_variate(Stream& stream, double alpha) {
  const double first = log_gamma_variate(stream, alpha);
  const double second = log_gamma_variate(stream, alpha);
  return 1.0 / (1.0 + exponential(second - first));
}

}  // namespace fusereg::augment::params
