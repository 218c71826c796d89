// How a block walks its share of x, and loads and stores octets. See batch_norm_plan.h for slabs,
// shares and octets.
#pragma once

#include "batch_norm/batch_norm_plan.h"
#include "core/cuda.cuh"

namespace fusereg::batch_norm {

// --- elements ---

// In whole registers, as an octet lies in memory; not kWide: as it is loaded element by element.
template <class T, bool kWide = true>
struct Octet {
  static constexpr int kPart = cuda::kVecSize<T> < kOctet ? cuda::kVecSize<T> : kOctet;
  static constexpr int kParts = kOctet / kPart;
  using Part = cuda::Vec<T, kPart>;
  std::conditional_t<kWide, cuda::Raw<T, kOctet>, cuda::Singles<T, kOctet>> raw;
  FUSEREG_DEVICE_INLINE T operator[](int e) const { return raw[e]; }
  FUSEREG_DEVICE_INLINE Part part(int i) const {
    Part v;
    memcpy(&v, raw.words + i * kPartWords, sizeof(v));
    return v;
  }
  FUSEREG_DEVICE_INLINE void set_part(int i, const Part& v) {
    memcpy(raw.words + i * kPartWords, &v, sizeof(v));
  }
  // f(e) for each element, rounded to T.
  template <class F>
  FUSEREG_DEVICE_INLINE static Octet rounded(const F& f) {
    Octet v;
    FUSEREG_UNROLL
    for (int i = 0; i < kParts; ++i) {
      v.set_part(i, cuda::rounded_to<T, kPart>([&](int e) { return f(i * kPart + e); }));
    }
    return v;
  }

 private:
  static constexpr int kPartWords = static_cast<int>(sizeof(Part)) / 4;
};

// An octet of memory from element `at` on: which of its elements are inside the line, and which of
// those count (the mask).
struct Place {
  std::int64_t at = 0;
  std::int64_t bits_at = 0;
  unsigned inside = 0;
  unsigned live = 0;
};

inline constexpr unsigned kAllInside = 0xffu;

// Whether the octet is moved as vectors. The wide columns' octets are never cut.
template <class Walk>
FUSEREG_DEVICE_INLINE bool is_whole(const Place& place) {
  return Walk::kWide && (Walk::kColumns || place.inside == kAllInside);
}

template <class Walk, class T>
FUSEREG_DEVICE_INLINE Octet<T, Walk::kWide> load_octet(const T* p, const Place& place) {
  Octet<T, Walk::kWide> v;
  const auto one_by_one = [&] {
    v.raw.clear();
    FUSEREG_UNROLL
    for (int e = 0; e < kOctet; ++e) {
      if ((place.inside >> e & 1u) != 0) v.raw.set(e, p[place.at + e]);
    }
  };
  if constexpr (Walk::kWide) {
    is_whole<Walk>(place) ? v.raw.load(p + place.at) : one_by_one();
  } else {
    one_by_one();
  }
  v.raw.join();
  return v;
}

template <class Walk, class T>
FUSEREG_DEVICE_INLINE void store_octet(T* p, const Place& place, const Octet<T>& v) {
  if (is_whole<Walk>(place)) {
    FUSEREG_UNROLL
    for (int i = 0; i < Octet<T>::kParts; ++i) {
      cuda::store_streaming(p + place.at + i * Octet<T>::kPart, v.part(i));
    }
  } else {
    FUSEREG_UNROLL
    for (int e = 0; e < kOctet; ++e) {
      if ((place.inside >> e & 1u) != 0) p[place.at + e] = v[e];
    }
  }
}

FUSEREG_DEVICE_INLINE float multiply_add(float x, float a, float b) { return fmaf(x, a, b); }
FUSEREG_DEVICE_INLINE double multiply_add(double x, double a, double b) { return fma(x, a, b); }

struct Ignore {
  template <class V>
  FUSEREG_DEVICE_INLINE void operator()(const V&) const {}
};

// --- walking a share ---

// A block's place in the work: its slab, group and share. Of each there are fewer than 2^31: a grid
// has no more blocks, a resident kernel's plan no more items.
struct Share {
  int slab, group, split;
};
FUSEREG_DEVICE_INLINE Share share_of(const Tiling& t, unsigned item, unsigned split) {
  const auto slabs = static_cast<unsigned>(t.slabs);
  return {static_cast<int>(item % slabs), static_cast<int>(item / slabs), static_cast<int>(split)};
}
// Of a grid with a block for each share.
FUSEREG_DEVICE_INLINE Share share_of_block(const Tiling& t, unsigned block) {
  const auto splits = static_cast<unsigned>(t.splits);
  return share_of(t, block / splits, block % splits);
}
// The first channel of a share's slab.
FUSEREG_DEVICE_INLINE std::int64_t first_channel(const Tiling& t, const Share& s) {
  return std::int64_t{s.slab} * t.pack;
}

FUSEREG_DEVICE_INLINE std::int64_t first_row(const Tiling& t, std::int64_t group) {
  const std::int64_t row = group * t.group_rows;
  return row < t.outer ? row : t.outer;
}

FUSEREG_DEVICE_INLINE unsigned mask_bits(const std::uint8_t* mask, unsigned inside) {
  unsigned bits = 0;
  FUSEREG_UNROLL
  for (int e = 0; e < kOctet; ++e) {
    if ((inside >> e & 1u) != 0 && mask[e] != 0) bits |= 1u << e;
  }
  return bits;
}

// Lines: one channel; the thread's octets are `step` apart.
template <bool kWide_>
class Lines {
 public:
  static constexpr bool kColumns = false;
  static constexpr bool kWide = kWide_;
  static constexpr int kSets = 1;

  FUSEREG_DEVICE_INLINE Lines(const Tiling& t, const Share& s, const std::uint8_t* mask, int first,
                              int step)
      : t_(t), mask_(mask) {
    const std::int64_t begin = first_row(t, s.group);
    const std::int64_t octets = (first_row(t, s.group + 1) - begin) * t.width;
    const std::int64_t at = s.split * t.share + first;
    const std::int64_t end = (s.split + 1) * t.share < octets ? (s.split + 1) * t.share : octets;
    left_ = at < end ? static_cast<int>((end - at + step - 1) / step) : 0;
    line_ = (begin + at / t.width) * t.channels + s.slab;
    octet_ = static_cast<int>(at % t.width);
    const int width = static_cast<int>(t.width);
    step_line_ = step / width * t.channels;
    step_octet_ = step % width;
  }

  FUSEREG_DEVICE_INLINE bool valid() const { return left_ > 0; }
  FUSEREG_DEVICE_INLINE void next() {
    --left_;
    line_ += step_line_;
    octet_ += step_octet_;
    if (octet_ >= static_cast<int>(t_.width)) {
      octet_ -= static_cast<int>(t_.width);
      line_ += t_.channels;
    }
  }
  // `masked`: with the elements that the mask leaves; else all inside are live.
  FUSEREG_DEVICE_INLINE Place place(bool masked = true) const {
    const std::int64_t start = line_ * t_.inner;
    // Wide octets lie at multiples of 8 elements, in lines that may begin anywhere.
    const std::int64_t position =
        std::int64_t{octet_} * kOctet - (kWide ? start & (kOctet - 1) : 0);
    Place p;
    p.at = start + position;
    p.bits_at = line_ * ((t_.inner + kOctet - 1) / kOctet) + octet_;
    p.inside = kAllInside;
    if (position < 0) p.inside = kAllInside << -position;
    const std::int64_t rest = t_.inner - position;
    if (rest < kOctet) p.inside &= rest > 0 ? (1u << rest) - 1u : 0u;
    p.inside &= kAllInside;
    p.live = p.inside;
    if (masked && mask_ != nullptr) {
      p.live = mask_bits(mask_ + line_ / t_.channels * t_.inner + position, p.inside);
    }
    return p;
  }
  // Of an element of the octet, within the slab.
  FUSEREG_DEVICE_INLINE int channel(int) const { return 0; }

 private:
  const Tiling& t_;
  const std::uint8_t* mask_;
  std::int64_t line_, step_line_;
  int left_, octet_, step_octet_;
};

// Columns: the thread stays in one octet of the row.
template <bool kWide_>
class Columns {
 public:
  static constexpr bool kColumns = true;
  static constexpr bool kWide = kWide_;
  static constexpr int kSets = kOctet;

  FUSEREG_DEVICE_INLINE Columns(const Tiling& t, const Share& s, const std::uint8_t* mask,
                                unsigned thread)
      : t_(t), mask_(mask) {
    octet_ = static_cast<int>(thread) % static_cast<int>(t.width);
    lane_ = static_cast<int>(thread) / static_cast<int>(t.width);
    const std::int64_t pitch = t.channels * t.inner;
    column_ = s.slab * t.width * kOctet + octet_ * kOctet;
    inside_ = 0;
    if (lane_ < t.rows_at_once && column_ < pitch) {
      const std::int64_t rest = pitch - column_;
      inside_ = kWide || rest >= kOctet ? kAllInside : (1u << rest) - 1u;
    }
    const std::int64_t begin = first_row(t, s.group);
    const std::int64_t end = first_row(t, s.group + 1);
    const std::int64_t first = begin + s.split * t.share;
    row_ = first + lane_;
    const std::int64_t rows = (first + t.share < end ? first + t.share : end) - row_;
    // No row of a column that there is not.
    left_ = rows > 0 && inside_ != 0 ? static_cast<int>((rows - 1) / t.rows_at_once) + 1 : 0;
  }

  FUSEREG_DEVICE_INLINE bool valid() const { return left_ > stop_; }
  FUSEREG_DEVICE_INLINE void next() {
    --left_;
    row_ += t_.rows_at_once;
  }
  // Stops after so many rows of each thread; the next call goes on from there.
  FUSEREG_DEVICE_INLINE void run(int rows) { stop_ = left_ > rows ? left_ - rows : 0; }
  FUSEREG_DEVICE_INLINE Place place(bool masked = true) const {
    Place p;
    const std::int64_t pitch = t_.channels * t_.inner;
    p.at = row_ * pitch + column_;
    p.bits_at = kWide ? p.at / kOctet : row_ * ((pitch + kOctet - 1) / kOctet) + column_ / kOctet;
    p.inside = p.live = inside_;
    // A mask comes with inner = 1 only: one byte for the row.
    if (masked && mask_ != nullptr && mask_[row_] == 0) p.live = 0;
    return p;
  }
  FUSEREG_DEVICE_INLINE int channel(int e) const {
    const int column = octet_ * kOctet + e;
    const int c = t_.inner == 1 ? column : column / static_cast<int>(t_.inner);
    return c < t_.pack ? c : 0;
  }
  FUSEREG_DEVICE_INLINE int octet() const { return octet_; }
  FUSEREG_DEVICE_INLINE int lane() const { return lane_; }

 private:
  const Tiling& t_;
  const std::uint8_t* mask_;
  int octet_, lane_;
  int left_, stop_ = 0;  // rows of this thread, and how many are left for another run
  unsigned inside_;
  std::int64_t column_, row_;
};

template <bool kWide>
FUSEREG_DEVICE_INLINE Lines<kWide> walk_share(TypeTag<Lines<kWide>>, const Tiling& t,
                                              const Share& s, const std::uint8_t* mask) {
  return Lines<kWide>(t, s, mask, static_cast<int>(threadIdx.x), kThreads);
}
template <bool kWide>
FUSEREG_DEVICE_INLINE Columns<kWide> walk_share(TypeTag<Columns<kWide>>, const Tiling& t,
                                                const Share& s, const std::uint8_t* mask) {
  return Columns<kWide>(t, s, mask, threadIdx.x);
}

// Calls load(place) for up to kAhead octets before use(place, loaded) for the first of them. Those
// that are not wide have their places twice: the mask would be waited for before they are loaded.
template <int kAhead, class Walk, class Load, class Use>
FUSEREG_DEVICE_INLINE void for_each_octet(Walk& walk, const Load& load, const Use& use) {
  Walk behind = walk;
  while (walk.valid()) {
    Place places[kAhead];
    decltype(load(places[0])) data[kAhead];
    FUSEREG_UNROLL
    for (int u = 0; u < kAhead; ++u) {
      if (walk.valid()) {
        places[u] = walk.place(Walk::kWide);
        data[u] = load(places[u]);
        walk.next();
      }
    }
    FUSEREG_UNROLL
    for (int u = 0; u < kAhead; ++u) {
      if constexpr (!Walk::kWide) {
        if (!behind.valid()) break;
        places[u] = behind.place();
        behind.next();
      }
      if (places[u].inside != 0) use(places[u], data[u]);
    }
  }
}

}  // namespace fusereg::batch_norm
