// CPU kernels of augmentation; compiled once per instruction set. Contract: augment.h.
#include "augment/augment.h"
#include "augment/augment_filter.h"
#include "augment/augment_gradient.h"
#include "augment/augment_math.h"
#include "augment/augment_scatter.h"
#include "augment/augment_vector.h"
#include "augment/augment_words.h"
#include "core/normal_simd.h"

namespace fusereg::augment::FUSEREG_ISA {
namespace {

// --- forward, one pixel after the other: what no other kernel does ---
template <class T, int kGroup>
void plain_row(const Job& job, std::int64_t sample, std::int64_t row) {
  for (std::int64_t col = 0; col < job.y.w; ++col) {
    const std::int64_t at = sample * job.y.sample + row * job.y.row + col * job.y.pixel;
    for (int c = 0; c < job.c; c += kGroup) {
      Number<T> v[kGroup];
      augmented<T, kGroup, Antialias::kAny>(job, sample, col, row, c, v);
      for (int k = 0; k < kGroup; ++k)
        write(job.y.data, job.y.type, at + (c + k) * job.y.channel, v[k]);
    }
  }
}

template <class T>
void plain_rows(const Job& job, std::int64_t begin, std::int64_t end) {
  for (std::int64_t i = begin; i < end; ++i) {
    if (job.c == 3) {
      plain_row<T, 3>(job, i / job.y.h, i % job.y.h);
    } else {
      plain_row<T, 1>(job, i / job.y.h, i % job.y.h);
    }
  }
}

// --- forward, by blocks ---
FUSEREG_INLINE Floats clamped(Floats v, float limit) {
  return select(v < 0.0f, Floats{}, select(v > limit, broadcast(limit), v));
}

// Whether anything in a row is erased or mixed.
FUSEREG_INLINE bool touches(const Frame& f, std::int64_t row) {
  return (row >= f.erase.y0 && row < f.erase.y1) ||
         (f.partner >= 0 && row >= f.mix.y0 && row < f.mix.y1);
}

// Standard normals of a sample's elements, a vector of them at a time; each channel's last one stays.
class Noise {
 public:
  // Elements [index, index + count) of a channel.
  void copy(const Job& job, std::int64_t sample, int channel, std::uint64_t index, int count,
            float* to) {
    const std::int64_t* const key = job.keys + 2 * sample;
    if (sample != sample_) {
      for (int c = 0; c < job.c; ++c) block_[c] = ~std::uint64_t{0};
      sample_ = sample;
    }
    float* const found = found_[channel];
    while (count > 0) {
      const std::uint64_t block = index / kNormalsAtOnce;
      if (block != block_[channel]) {
        normals(NormalKeys(static_cast<std::uint64_t>(key[0])), static_cast<std::uint64_t>(key[1]),
                block, found);
        block_[channel] = block;
      }
      const int skip = static_cast<int>(index % kNormalsAtOnce);
      const int part = count < kNormalsAtOnce - skip ? count : kNormalsAtOnce - skip;
      memcpy(to, found + skip, static_cast<std::size_t>(part) * sizeof(float));
      index += static_cast<std::uint64_t>(part);
      to += part;
      count -= part;
    }
  }

 private:
  std::int64_t sample_ = -1;
  std::uint64_t block_[kMaxChannels];
  alignas(kVectorBytes) float found_[kMaxChannels][kNormalsAtOnce];
};

void erase_block(const Job& job, const Frame& f, std::int64_t row, std::int64_t first,
                 const Cut& where, float* out, Noise& noise) {
  for (int c = 0; c < job.c; ++c, out += kBlock) {
    if (!job.erase_noise) {
      for (int i = where.begin; i < where.end; ++i) out[i] = static_cast<float>(job.erase[c]);
      continue;
    }
    const auto index =
        static_cast<std::uint64_t>((c * job.y.h + row) * job.y.w + first + where.begin);
    noise.copy(job, f.sample, c, index, where.end - where.begin, out + where.begin);
  }
}

// What concerns all samples, in float32.
struct Finish {
  float scale[kMaxChannels], shift[kMaxChannels];
  float limit;
  bool unchanged;  // by scale and shift
};
void make_finish(const Job& job, Finish& finish) {
  finish.unchanged = true;
  for (int c = 0; c < job.c; ++c) {
    finish.scale[c] = static_cast<float>(job.scale[c]);
    finish.shift[c] = static_cast<float>(job.shift[c]);
    finish.unchanged = finish.unchanged && finish.scale[c] == 1.0f && finish.shift[c] == 0.0f;
  }
  finish.limit = static_cast<float>(job.limit);
}

// Color, clamp and normalization of kLanes pixels; f(channel, values) takes one after the other.
template <bool kThree, class F>
FUSEREG_INLINE void finish_channels(const Job& job, const Finish& finish, const double* record,
                                    const float* at, const F& f) {
  const double* const m = record + 16;
  const int channels = kThree ? 3 : job.c;
  auto normalized = [&](int c, Floats v) { return v * finish.scale[c] + finish.shift[c]; };
  if (!job.color) {
    FUSEREG_UNROLL_10
    for (int c = 0; c < channels; ++c) f(c, normalized(c, load(at + c * kBlock)));
  } else if (kThree) {
    const Floats v0 = load(at), v1 = load(at + kBlock), v2 = load(at + 2 * kBlock);
    FUSEREG_UNROLL_10
    for (int k = 0; k < 3; ++k) {
      const double* const r = m + 4 * k;
      const Floats sum = (v0 * static_cast<float>(r[0]) + v1 * static_cast<float>(r[1])) +
                         v2 * static_cast<float>(r[2]);
      f(k, normalized(k, clamped(sum + static_cast<float>(r[3]), finish.limit)));
    }
  } else {
    for (int c = 0; c < channels; ++c) {
      const Floats v = load(at + c * kBlock) * static_cast<float>(m[0]) + static_cast<float>(m[3]);
      f(c, normalized(c, clamped(v, finish.limit)));
    }
  }
}
template <class F>
FUSEREG_INLINE void finish_part(const Job& job, const Finish& finish, const double* record,
                                const float* at, const F& f) {
  if (job.c == 3) {
    finish_channels<true>(job, finish, record, at, f);
  } else {
    finish_channels<false>(job, finish, record, at, f);
  }
}

// A(sample) for the 16 pixels of a block, of which `count` are there; warp() gives those of the warp.
template <class F>
void unmixed_block(const Job& job, const Finish& finish, const Frame& f, std::int64_t row,
                   std::int64_t first, int count, float* out, Noise& noise, const F& warp) {
  const Cut erased = cut_block(f.erase, row, first, count);
  if (erased.end - erased.begin < count) {
    warp(f, row, first, out);
    for (int p = 0; p < kBlock; p += kLanes) {
      finish_part(job, finish, f.record, out + p,
                  [&](int c, Floats v) { store(out + c * kBlock + p, v); });
    }
  }
  if (erased.begin < erased.end) erase_block(job, f, row, first, erased, out, noise);
}

// --- the result's dtypes and layouts ---
FUSEREG_INLINE bool three_last(const Job& job, const Images& images) {
  return job.c == 3 && images.pixel == 3;
}

// Planes of values to the result, whatever its layout.
template <class U, bool kPast>
void store_block(const Job& job, std::int64_t at, const float* values, int count) {
  U* y = static_cast<U*>(job.y.data) + at;
  const bool whole = count == kBlock;
  if constexpr (sizeof(U) == 8) {
    for (int c = 0; c < job.c; ++c) {
      for (int i = 0; i < count; ++i)
        y[c * job.y.channel + i * job.y.pixel] = static_cast<double>(values[c * kBlock + i]);
    }
  } else if (three_last(job, job.y)) {
    alignas(kVectorBytes) U part[3 * kBlock];
    for (int p = 0; p < kBlock; p += kLanes) {
      Floats mixed[3];
      interleave(load(values + p), load(values + kBlock + p), load(values + 2 * kBlock + p), mixed);
      for (int k = 0; k < 3; ++k) {
        if (whole) {
          put<kPast>(y + 3 * p + k * kLanes, mixed[k]);
        } else {
          store_as(part + 3 * p + k * kLanes, mixed[k]);
        }
      }
    }
    if (!whole) memcpy(y, part, static_cast<std::size_t>(3 * count) * sizeof(U));
  } else {
    for (int c = 0; c < job.c; ++c, values += kBlock, y += job.y.channel) {
      alignas(kVectorBytes) U part[kBlock];
      if (whole && job.y.pixel == 1) {
        for (int p = 0; p < kBlock; p += kLanes) put<kPast>(y + p, load(values + p));
        continue;
      }
      for (int p = 0; p < kBlock; p += kLanes) store_as(part + p, load(values + p));
      for (int i = 0; i < count; ++i) y[i * job.y.pixel] = part[i];
    }
  }
}

// Of a whole block that is neither erased nor mixed, from its warped values on.
template <class U, bool kPast>
void finish_block(const Job& job, const Finish& finish, const double* record, std::int64_t at,
                  float* values) {
  if constexpr (sizeof(U) < 8) {
    U* const y = static_cast<U*>(job.y.data) + at;
    for (int p = 0; p < kBlock; p += kLanes) {
      if (three_last(job, job.y)) {
        Floats v[3], mixed[3];
        finish_channels<true>(job, finish, record, values + p,
                              [&](int c, Floats part) { v[c] = part; });
        interleave(v[0], v[1], v[2], mixed);
        for (int k = 0; k < 3; ++k) put<kPast>(y + 3 * p + k * kLanes, mixed[k]);
      } else if (job.y.pixel == 1) {
        finish_part(job, finish, record, values + p,
                    [&](int c, Floats v) { put<kPast>(y + c * job.y.channel + p, v); });
      }
    }
    if (three_last(job, job.y) || job.y.pixel == 1) return;
  }
  for (int p = 0; p < kBlock; p += kLanes) {
    finish_part(job, finish, record, values + p,
                [&](int c, Floats v) { store(values + c * kBlock + p, v); });
  }
  store_block<U, kPast>(job, at, values, kBlock);
}

// Of a whole row without color that is neither erased nor mixed: channels every `stride` floats, and
// whole vectors of them.
template <class U, bool kPast>
void finish_row(const Job& job, const Finish& finish, std::int64_t at, const float* values,
                std::int64_t stride) {
  U* to = static_cast<U*>(job.y.data) + at;
  const std::int64_t width = job.y.w;
  auto normalized = [&](int c, std::int64_t i) {
    return load(values + c * stride + i) * finish.scale[c] + finish.shift[c];
  };
  if (three_last(job, job.y)) {
    for (std::int64_t i = 0; i < width; i += kLanes, to += 3 * kLanes) {
      Floats pixels[3];
      interleave(normalized(0, i), normalized(1, i), normalized(2, i), pixels);
      if (i + kLanes <= width) {
        for (int k = 0; k < 3; ++k) put<kPast>(to + k * kLanes, pixels[k]);
        continue;
      }
      U part[3 * kLanes];
      for (int k = 0; k < 3; ++k) store_as(part + k * kLanes, pixels[k]);
      memcpy(to, part, static_cast<std::size_t>(3 * (width - i)) * sizeof(U));
    }
    return;
  }
  for (int c = 0; c < job.c; ++c, to += job.y.channel) {
    std::int64_t i = 0;
    for (; i + kLanes <= width; i += kLanes) put<kPast>(to + i, normalized(c, i));
    if (i == width) continue;
    U part[kLanes];
    store_as(part, normalized(c, i));
    memcpy(to + i, part, static_cast<std::size_t>(width - i) * sizeof(U));
  }
}

// Asks for what is needed an image later or, of larger ones, some rows later, as much as is a row's
// share: a warp reads an image in an order that the processor does not foresee.
template <class T>
FUSEREG_INLINE void ask_ahead(const Job& job, std::int64_t sample, std::int64_t row) {
  constexpr std::int64_t kLine = 64;
  constexpr std::int64_t kMost = 1024 * 1024;  // that waits in the cache
  constexpr auto kSize = static_cast<std::int64_t>(sizeof(T));
  if (job.each == nullptr && job.x.sample == 0) return;  // one image, which is in the cache
  auto image_of = [&](std::int64_t i) -> const Images& {
    return job.each != nullptr ? job.each[i] : job.x;
  };
  auto bytes_of = [&](const Images& image) { return image.h * image.w * job.c * kSize; };
  std::int64_t bytes = bytes_of(image_of(sample));
  std::int64_t at = row + (bytes <= kMost ? job.y.h : job.y.h * (kMost / 2) / bytes);
  if (at >= job.y.h) {
    at -= job.y.h;
    ++sample;
  }
  if (sample >= job.n) return;
  bytes = bytes_of(image_of(sample));
  const char* p = static_cast<const char*>(image_of(sample).data);
  if (job.each == nullptr) p += sample * bytes;
  const int planes = job.x.channels_last ? 1 : job.c;
  const std::int64_t plane = bytes / planes;
  const std::int64_t begin = plane * at / job.y.h;
  const std::int64_t end = plane * (at + 1) / job.y.h;
  for (int c = 0; c < planes; ++c, p += plane) {
    for (std::int64_t i = begin; i < end; i += kLine) __builtin_prefetch(p + i, 0, 2);
  }
}

// Copies a whole row that is a run of pixels of the image, mirrored or not, and only normalized.
// False where it is something else.
template <class T, class U, bool kPast>
bool copy_row(const Job& job, const Finish& finish, const Frame& f, std::int64_t row) {
  const Images& x = f.view.x;
  const bool mirrored = f.m[0] < 0.0;
  const std::int64_t width = job.y.w;
  const auto from = static_cast<std::int64_t>(f.m[2]) - (mirrored ? width - 1 : 0);
  const auto line = static_cast<std::int64_t>(f.m[5]) + (f.m[4] < 0.0 ? -row : row);
  if (from < 0 || from + width > x.w || line < 0 || line >= x.h || touches(f, row)) {
    return false;
  }
  const T* at = static_cast<const T*>(x.data) + f.view.offset + line * x.row + from * x.pixel;
  U* to = static_cast<U*>(job.y.data) + f.sample * job.y.sample + row * job.y.row;
  if constexpr (sizeof(T) == 1 && sizeof(U) == 1) {
    if (finish.unchanged && !mirrored && x.pixel == job.y.pixel) {
      const bool last = x.pixel != 1;
      for (int c = 0; c < (last ? 1 : job.c); ++c, at += x.channel, to += job.y.channel)
        memcpy(to, at, static_cast<std::size_t>(width * x.pixel));
      return true;
    }
  }
  // Where vector i of the result comes from.
  auto source = [&](std::int64_t i) { return mirrored ? width - kLanes - i : i; };
  if (x.pixel == 1 && job.y.pixel != 1) {
    for (std::int64_t i = 0; i < width; i += kLanes, to += 3 * kLanes) {
      Floats v[3], pixels[3];
      for (int k = 0; k < 3; ++k) {
        const Floats own = load_run(at + k * x.channel + source(i));
        v[k] = (mirrored ? reversed(own) : own) * finish.scale[k] + finish.shift[k];
      }
      interleave(v[0], v[1], v[2], pixels);
      for (int k = 0; k < 3; ++k) put<kPast>(to + k * kLanes, pixels[k]);
    }
    return true;
  }
  if (x.pixel == 1) {
    for (int c = 0; c < job.c; ++c, at += x.channel, to += job.y.channel) {
      const Floats scale = broadcast(finish.scale[c]);
      const Floats shift = broadcast(finish.shift[c]);
      for (std::int64_t i = 0; i < width; i += kLanes) {
        const Floats v = load_run(at + source(i));
        put<kPast>(to + i, (mirrored ? reversed(v) : v) * scale + shift);
      }
    }
    return true;
  }
  if (job.y.pixel == 1) {
    for (std::int64_t i = 0; i < width; i += kLanes) {
      Floats v[3];
      if (mirrored) {
        load_planes<true>(at + 3 * source(i), v);
      } else {
        load_planes<false>(at + 3 * i, v);
      }
      for (int k = 0; k < 3; ++k)
        put<kPast>(to + k * job.y.channel + i, v[k] * finish.scale[k] + finish.shift[k]);
    }
    return true;
  }
  Floats scale[3], shift[3];
  interleave(broadcast(finish.scale[0]), broadcast(finish.scale[1]), broadcast(finish.scale[2]),
             scale);
  interleave(broadcast(finish.shift[0]), broadcast(finish.shift[1]), broadcast(finish.shift[2]),
             shift);
  for (std::int64_t i = 0; i < width; i += kLanes, to += 3 * kLanes) {
    Floats v[3];
    load_pixels(at + 3 * source(i), mirrored, v);
    for (int k = 0; k < 3; ++k) put<kPast>(to + k * kLanes, v[k] * scale[k] + shift[k]);
  }
  return true;
}

// What depends on the result's dtype, and on whether it goes past the cache.
struct Writer {
  void (*store)(const Job& job, std::int64_t at, const float* values, int count);
  void (*finish)(const Job& job, const Finish& finish, const double* record, std::int64_t at,
                 float* values);
  // Of rows, or null where they are of another layout.
  bool (*copy)(const Job& job, const Finish& finish, const Frame& f, std::int64_t row);
  void (*row)(const Job& job, const Finish& finish, std::int64_t at, const float* values,
              std::int64_t stride);
};

template <class T>
Writer make_writer(const Job& job) {
  // A result that no cache holds is written past it: else each line would be read first.
  constexpr std::int64_t kLarge = std::int64_t{1} << 23;
  return dispatch_element(job.y.type, [&](auto tag) -> Writer {
    using U = typename decltype(tag)::type;
    if constexpr (sizeof(U) == 8) {
      return {&store_block<U, false>, &finish_block<U, false>, nullptr, nullptr};
    } else {
      constexpr auto kSize = static_cast<std::int64_t>(sizeof(U));
      const bool rows = !job.color && (job.y.pixel == 1 || three_last(job, job.y));
      const bool copies =
          rows && job.y.w % kLanes == 0 && (job.x.pixel == 1 || three_last(job, job.x));
      const bool aligned = (reinterpret_cast<std::uintptr_t>(job.y.data) |
                            static_cast<std::uintptr_t>(job.y.w * kSize)) %
                               (kLanes * sizeof(U)) ==
                           0;
      if (aligned && job.n * job.y.sample * kSize >= kLarge) {
        return {&store_block<U, true>, &finish_block<U, true>,
                copies ? &copy_row<T, U, true> : nullptr, rows ? &finish_row<U, true> : nullptr};
      }
      return {&store_block<U, false>, &finish_block<U, false>,
              copies ? &copy_row<T, U, false> : nullptr, rows ? &finish_row<U, false> : nullptr};
    }
  });
}

// Warped pixels, interpolated at points: block by block.
template <class T, Interpolation kHow>
class PointRows {
 public:
  static constexpr bool kWhole = false;  // rows are there as a whole
  PointRows(const Job& job, void*) : job_(job) {}
  bool start(const Frame&, const Frame&) { return true; }
  void find(const Frame& f, const Frame&, std::int64_t row, std::int64_t first) {
    if (first / kBlock % kPlaces != 0) return;
    const std::int64_t left = (job_.y.w - first + kBlock - 1) / kBlock;
    find_blocks<kHow>(f, row, first, left < kPlaces ? static_cast<int>(left) : kPlaces, places_);
  }
  void own(const Frame& f, std::int64_t row, std::int64_t first, float* out) {
    warp_block<T, kHow>(job_, f, places_[first / kBlock % kPlaces], row, first, out);
  }
  void other(const Frame& partner, std::int64_t row, std::int64_t first, float* out) {
    Place16 place;
    find_blocks<kHow>(partner, row, first, 1, &place);
    warp_block<T, kHow>(job_, partner, place, row, first, out);
  }

 private:
  static constexpr int kPlaces = 64;
  const Job& job_;
  Place16 places_[kPlaces];
};

template <class T, class Rows>
void block_rows(const Job& job, std::int64_t begin, std::int64_t end, void* scratch) {
  const Writer writer = make_writer<T>(job);
  Finish finish;
  make_finish(job, finish);
  Frame frame;
  Frame partner;
  Rows rows(job, scratch);
  Noise noise;
  std::int64_t sample = -1;
  bool supported = true;
  alignas(kVectorBytes) float values[kMaxChannels * kBlock];
  alignas(kVectorBytes) float others[kMaxChannels * kBlock];
  auto own = [&](const Frame& f, std::int64_t row, std::int64_t first, float* out) {
    rows.own(f, row, first, out);
  };
  auto other = [&](const Frame& f, std::int64_t row, std::int64_t first, float* out) {
    rows.other(f, row, first, out);
  };
  for (std::int64_t i = begin; i < end; ++i) {
    const std::int64_t row = i % job.y.h;
    if (i / job.y.h != sample) {
      sample = i / job.y.h;
      make_frame(job, sample, frame);
      if (frame.partner >= 0) make_frame(job, frame.partner, partner);
      supported = rows.start(frame, partner);
    }
    if (!supported) {
      plain_rows<T>(job, i, i + 1);
      continue;
    }
    ask_ahead<T>(job, sample, row);
    if (frame.copies && writer.copy != nullptr && writer.copy(job, finish, frame, row)) continue;
    const bool touched = touches(frame, row);
    if constexpr (Rows::kWhole) {
      if (!touched && writer.row != nullptr) {
        rows.find(frame, partner, row, 0);
        const std::int64_t at = sample * job.y.sample + row * job.y.row;
        writer.row(job, finish, at, rows.line(row), rows.stride());
        continue;
      }
    }
    for (std::int64_t first = 0; first < job.y.w; first += kBlock) {
      rows.find(frame, partner, row, first);
      const std::int64_t at = sample * job.y.sample + row * job.y.row + first * job.y.pixel;
      if (!touched && first + kBlock <= job.y.w) {
        // What most blocks of a batch are.
        rows.own(frame, row, first, values);
        writer.finish(job, finish, frame.record, at, values);
        continue;
      }
      const std::int64_t left = job.y.w - first;
      const int count = left < kBlock ? static_cast<int>(left) : kBlock;
      const Cut mixed = frame.partner >= 0 ? cut_block(frame.mix, row, first, count) : Cut{0, 0};
      const double lam = frame.record[15];
      if (mixed.end - mixed.begin < count || lam != 0.0)
        unmixed_block(job, finish, frame, row, first, count, values, noise, own);
      if (mixed.begin < mixed.end) {
        unmixed_block(job, finish, partner, row, first, count, others, noise, other);
        const auto share = static_cast<float>(lam);
        const auto rest = static_cast<float>(1.0 - lam);
        for (int c = 0; c < job.c; ++c) {
          for (int k = mixed.begin; k < mixed.end; ++k) {
            float& v = values[c * kBlock + k];
            const float from = others[c * kBlock + k];
            v = lam == 0.0 ? from : v * share + from * rest;
          }
        }
      }
      writer.store(job, at, values, count);
    }
  }
#if defined(__SSE2__)
  _mm_sfence();
#endif
}

template <class T>
void forward_of(const Job& job, std::int64_t begin, std::int64_t end) {
  // Offsets within a channel, or a channels-last image, are 32 bits wide.
  const bool small = job.x.h * job.x.row < (std::int64_t{1} << 29);
  if constexpr (sizeof(T) == 1) {
    if (small && copies_words(job)) {
      copy_rows(job, begin, end, [](const Job& j, std::int64_t first, std::int64_t last) {
        block_rows<T, PointRows<T, Interpolation::kNearest>>(j, first, last, nullptr);
      });
      return;
    }
  }
  if constexpr (sizeof(T) < 8) {
    if (!job.antialias && small) {
      switch (job.interpolation) {
        case Interpolation::kNearest:
          block_rows<T, PointRows<T, Interpolation::kNearest>>(job, begin, end, nullptr);
          return;
        case Interpolation::kBilinear:
          block_rows<T, PointRows<T, Interpolation::kBilinear>>(job, begin, end, nullptr);
          return;
        case Interpolation::kBicubic:
          block_rows<T, PointRows<T, Interpolation::kBicubic>>(job, begin, end, nullptr);
          return;
      }
    }
  }
  plain_rows<T>(job, begin, end);
}

void forward(const Job& job, std::int64_t begin, std::int64_t end) {
  dispatch_element(job.x.type, [&](auto tag) {
    using T = typename decltype(tag)::type;
    forward_of<T>(job, begin, end);
  });
}

void filtered(const Job& job, std::int64_t begin, std::int64_t end, void* scratch) {
  dispatch_element(job.x.type, [&](auto tag) {
    using T = typename decltype(tag)::type;
    if constexpr (sizeof(T) < 8) block_rows<T, FilteredRows<T>>(job, begin, end, scratch);
  });
}

// --- backward ---
struct Rows {
  std::int64_t begin, end;
};

// Adds what columns of an output row give to these rows of grad_x[sample].
template <class T, int kGroup>
void add_pixels(const Job& job, std::int64_t sample, std::int64_t out, bool as_partner,
                std::int64_t row, std::int64_t first, std::int64_t last, const Rows& rows) {
  using C = Number<T>;
  View view, values;
  view_of(job, job.grad_x, sample, view);
  const Reduced z = view.reduces ? reduced_of(view.m, view.x) : Reduced{};
  if (job.color) view_to_warp<Antialias::kAny>(job, sample, values);
  auto own_row = [&](std::int32_t y) { return y >= rows.begin && y < rows.end; };
  auto any = [](std::int32_t) { return true; };
  C* const grad = static_cast<C*>(job.grad_x.data) + sample * job.grad_x.sample;
  for (std::int64_t col = first; col < last; ++col) {
    for (int c = 0; c < job.c; c += kGroup) {
      C g[kGroup];
      if (!gradient_at<T, kGroup, Antialias::kAny>(job, values, sample, out, as_partner, col, row,
                                                   c, g))
        continue;
      for_taps<C, Antialias::kAny>(
          job, view, z, col, row, own_row, any, [&](std::int32_t x, std::int32_t y, C weight) {
            C* const at = grad + y * job.grad_x.row + x * job.grad_x.pixel;
            for (int k = 0; k < kGroup; ++k)
              at[(c + k) * job.grad_x.channel] =
                  add(at[(c + k) * job.grad_x.channel], multiply(weight, g[k]));
          });
    }
  }
}

// What the sample's own output gives, by blocks.
template <class T, int kGroup, Interpolation kHow>
void add_blocks(const Job& job, std::int64_t sample, const Rows& rows) {
  Frame f;
  make_frame(job, sample, f);
  f.runs = false;  // what is added reaches every tap
  for (std::int64_t row = 0; row < job.y.h; ++row) {
    const bool touched = touches(f, row);
    for (std::int64_t first = 0; first < job.y.w; first += kBlock) {
      const std::int64_t last = first + kBlock < job.y.w ? first + kBlock : job.y.w;
      Place16 place;
      find_blocks<kHow>(f, row, first, 1, &place);
      if (place.where == Where::kOutside) continue;
      if (place.where == Where::kPartly || touched) {
        add_pixels<T, kGroup>(job, sample, sample, false, row, first, last, rows);
      } else if (f.view.top + place.top < rows.end && f.view.top + place.bottom >= rows.begin) {
        scatter_block<kHow, kGroup == 3>(job, f, place, row, first, static_cast<int>(last - first),
                                         rows.begin, rows.end);
      }
    }
  }
}

// Adds what one output image gives.
template <class T, int kGroup>
void add_gradient(const Job& job, std::int64_t sample, std::int64_t out, bool as_partner,
                  const Rows& rows) {
  if constexpr (sizeof(T) < 8) {
    if (!as_partner && !job.color && !job.antialias) {
      switch (job.interpolation) {
        case Interpolation::kNearest:
          return add_blocks<T, kGroup, Interpolation::kNearest>(job, sample, rows);
        case Interpolation::kBilinear:
          return add_blocks<T, kGroup, Interpolation::kBilinear>(job, sample, rows);
        case Interpolation::kBicubic:
          return add_blocks<T, kGroup, Interpolation::kBicubic>(job, sample, rows);
      }
    }
  }
  for (std::int64_t row = 0; row < job.y.h; ++row)
    add_pixels<T, kGroup>(job, sample, out, as_partner, row, 0, job.y.w, rows);
}

template <class T, int kGroup>
void backward_rows(const Job& job, std::int64_t sample, std::int64_t row_begin,
                   std::int64_t row_end) {
  using C = Number<T>;
  const Images& grad_x = job.grad_x;
  C* const grad = static_cast<C*>(grad_x.data) + sample * grad_x.sample;
  for (int c = 0; c < job.c; ++c) {
    for (std::int64_t y = row_begin; y < row_end; ++y) {
      for (std::int64_t x = 0; x < grad_x.w; ++x)
        grad[c * grad_x.channel + y * grad_x.row + x * grad_x.pixel] = C{0};
    }
  }
  const Rows rows = {row_begin, row_end};
  add_gradient<T, kGroup>(job, sample, sample, false, rows);
  for (std::int64_t out = 0; out < job.n; ++out) {
    if (partner_of(job.records + out * kRecord, job.n) == sample)
      add_gradient<T, kGroup>(job, sample, out, true, rows);
  }
}

void backward(const Job& job, std::int64_t sample, std::int64_t row_begin, std::int64_t row_end) {
  dispatch_element(job.x.type, [&](auto tag) {
    using T = typename decltype(tag)::type;
    if (job.c == 3) {
      backward_rows<T, 3>(job, sample, row_begin, row_end);
    } else {
      backward_rows<T, 1>(job, sample, row_begin, row_end);
    }
  });
}

}  // namespace

const CpuKernels kernels = {kLanes, &forward, &filtered, &backward};

}  // namespace fusereg::augment::FUSEREG_ISA
