// CPU kernels of augmentation; compiled once per instruction set. Contract: augment.h.
#include "augment/augment.h"

#include "augment/augment_math.h"
#include "augment/augment_vector.h"

namespace fusereg::augment::FUSEREG_ISA {
namespace {

// --- forward, one pixel after the other: float64, antialiasing ------------------------------------

template <class T, int kGroup>
void plain_row(const Job& job, std::int64_t sample, std::int64_t row) {
  for (std::int64_t col = 0; col < job.y.w; ++col) {
    const std::int64_t at = sample * job.y.sample + row * job.y.row + col * job.y.pixel;
    for (int c = 0; c < job.c; c += kGroup) {
      Number<T> v[kGroup];
      augmented<T, kGroup>(job, sample, col, row, c, v);
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

// --- forward, by blocks ---------------------------------------------------------------------------

FUSEREG_INLINE Floats clamped(Floats v, float limit) {
  return select(v < 0.0f, Floats{}, select(v > limit, broadcast(limit), v));
}

// Columns of a box that are in a block, as places in the block; nothing in other rows.
struct Cut {
  int begin, end;
};
FUSEREG_INLINE Cut cut_block(const Box& box, std::int64_t row, std::int64_t first, int count) {
  if (row < box.y0 || row >= box.y1 || box.x1 <= first || box.x0 >= first + count) return {0, 0};
  const std::int64_t begin = box.x0 - first;
  const std::int64_t end = box.x1 - first;
  return {begin > 0 ? static_cast<int>(begin) : 0, end < count ? static_cast<int>(end) : count};
}

void erase_block(const Job& job, const Frame& f, std::int64_t row, std::int64_t first,
                 const Cut& where, float* out, std::int64_t stride) {
  for (int c = 0; c < job.c; ++c) {
    float* const line = out + c * stride;
    const std::int64_t index = (c * job.y.h + row) * job.y.w + first;
    for (int i = where.begin; i < where.end; ++i) {
      line[i] = job.erase_noise
                    ? normal_at(job.keys + 2 * f.sample, static_cast<std::uint64_t>(index + i))
                    : static_cast<float>(job.erase[c]);
    }
  }
}

// Colour, clamp and normalization of a block's values.
FUSEREG_INLINE void finish_block(const Job& job, const Frame& f, float* out, std::int64_t stride) {
  const double* const m = f.record + 16;
  const auto limit = static_cast<float>(job.limit);
  for (int p = 0; p < kBlock; p += kLanes) {
    float* const at = out + p;
    if (job.colour && job.c == 3) {
      const Floats v0 = load(at), v1 = load(at + stride), v2 = load(at + 2 * stride);
      for (int k = 0; k < 3; ++k) {
        const double* const r = m + 4 * k;
        const Floats sum = (v0 * static_cast<float>(r[0]) + v1 * static_cast<float>(r[1])) +
                           v2 * static_cast<float>(r[2]);
        store(at + k * stride, clamped(sum + static_cast<float>(r[3]), limit));
      }
    }
    for (int c = 0; c < job.c; ++c) {
      Floats v = load(at + c * stride);
      if (job.colour && job.c != 3)
        v = clamped(v * static_cast<float>(m[0]) + static_cast<float>(m[3]), limit);
      store(at + c * stride,
            v * static_cast<float>(job.scale[c]) + static_cast<float>(job.shift[c]));
    }
  }
}

// A(sample) for the 16 pixels of a block, of which `count` are there.
template <class T, Interpolation kHow>
void unmixed_block(const Job& job, const Frame& f, std::int64_t row, std::int64_t first, int count,
                   float* out, std::int64_t stride) {
  const Cut erased = cut_block(f.erase, row, first, count);
  if (erased.end - erased.begin < count) {
    warp_block<T, kHow>(job, f, row, first, out, stride);
    finish_block(job, f, out, stride);
  }
  if (erased.begin < erased.end) erase_block(job, f, row, first, erased, out, stride);
}

template <class U>
FUSEREG_INLINE U narrowed(float v) {
  if constexpr (sizeof(U) == 1) {
    return to_uint8(v);
  } else {
    return from_compute<U>(v);
  }
}

// Planes of values to the result, whatever its layout.
template <class U>
void store_block(const Job& job, U* y, const float* values, int count) {
  if constexpr (sizeof(U) == 4) {
    if (count == kBlock && job.c == 3 && job.y.pixel == 3) {
      for (int p = 0; p < kBlock; p += kLanes, y += 3 * kLanes) {
        Floats mixed[3];
        interleave(load(values + p), load(values + kBlock + p), load(values + 2 * kBlock + p),
                   mixed);
        for (int k = 0; k < 3; ++k) store(y + k * kLanes, mixed[k]);
      }
      return;
    }
  }
  for (int c = 0; c < job.c; ++c) {
    const float* const line = values + c * kBlock;
    U* const to = y + c * job.y.channel;
    for (int i = 0; i < count; ++i) to[i * job.y.pixel] = narrowed<U>(line[i]);
  }
}

template <class T, Interpolation kHow>
void block_rows(const Job& job, std::int64_t begin, std::int64_t end) {
  Frame frame;
  Frame partner;
  std::int64_t sample = -1;
  float values[kMaxChannels * kBlock];
  float others[kMaxChannels * kBlock];
  const bool direct = job.y.type == Element::kFloat32 && job.y.pixel == 1;
  for (std::int64_t i = begin; i < end; ++i) {
    const std::int64_t row = i % job.y.h;
    if (i / job.y.h != sample) {
      sample = i / job.y.h;
      make_frame(job, sample, frame);
      if (frame.partner >= 0) make_frame(job, frame.partner, partner);
    }
    const double lam = frame.record[15];
    for (std::int64_t first = 0; first < job.y.w; first += kBlock) {
      const std::int64_t left = job.y.w - first;
      const int count = left < kBlock ? static_cast<int>(left) : kBlock;
      const std::int64_t at = sample * job.y.sample + row * job.y.row + first * job.y.pixel;
      const Cut mixed = frame.partner >= 0 ? cut_block(frame.mix, row, first, count) : Cut{0, 0};
      // Whole blocks of float32 planes are written where they belong.
      const bool in_place = direct && count == kBlock;
      float* const out = in_place ? static_cast<float*>(job.y.data) + at : values;
      const std::int64_t stride = in_place ? job.y.channel : kBlock;
      if (mixed.end - mixed.begin < count || lam != 0.0)
        unmixed_block<T, kHow>(job, frame, row, first, count, out, stride);
      if (mixed.begin < mixed.end) {
        unmixed_block<T, kHow>(job, partner, row, first, count, others, kBlock);
        const auto share = static_cast<float>(lam);
        const auto rest = static_cast<float>(1.0 - lam);
        for (int c = 0; c < job.c; ++c) {
          for (int k = mixed.begin; k < mixed.end; ++k) {
            float& v = out[c * stride + k];
            const float other = others[c * kBlock + k];
            v = lam == 0.0 ? other : v * share + other * rest;
          }
        }
      }
      if (in_place) continue;
      dispatch_element(job.y.type, [&](auto tag) {
        using U = typename decltype(tag)::type;
        if constexpr (sizeof(U) == 8) {
          double* const y = static_cast<double*>(job.y.data) + at;
          for (int c = 0; c < job.c; ++c) {
            for (int k = 0; k < count; ++k)
              y[c * job.y.channel + k * job.y.pixel] = static_cast<double>(values[c * kBlock + k]);
          }
        } else {
          store_block(job, static_cast<U*>(job.y.data) + at, values, count);
        }
      });
    }
  }
}

template <class T>
void forward_of(const Job& job, std::int64_t begin, std::int64_t end) {
  // Offsets within a channel, or a channels-last image, are 32 bits wide.
  const bool small = job.x.h * job.x.row < (std::int64_t{1} << 29);
  if constexpr (sizeof(T) < 8) {
    if (!job.antialias && small) {
      switch (job.interpolation) {
        case Interpolation::kNearest:
          block_rows<T, Interpolation::kNearest>(job, begin, end);
          return;
        case Interpolation::kBilinear:
          block_rows<T, Interpolation::kBilinear>(job, begin, end);
          return;
        case Interpolation::kBicubic:
          block_rows<T, Interpolation::kBicubic>(job, begin, end);
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

// --- backward -------------------------------------------------------------------------------------

// Adds what one output image gives to the rows [row_begin, row_end) of grad_x[sample].
template <class T, int kGroup>
void add_gradient(const Job& job, std::int64_t sample, std::int64_t out, bool as_partner,
                  std::int64_t row_begin, std::int64_t row_end) {
  using C = Number<T>;
  const double* const m = job.records + sample * kRecord;
  C* const grad = static_cast<C*>(job.grad_x.data) + sample * job.grad_x.sample;
  for (std::int64_t row = 0; row < job.y.h; ++row) {
    for (std::int64_t col = 0; col < job.y.w; ++col) {
      for (int c = 0; c < job.c; c += kGroup) {
        C g[kGroup];
        if (!gradient_at<T, kGroup>(job, sample, out, as_partner, col, row, c, g)) continue;
        for_taps<C>(job, m, col, row, [&](std::int32_t x, std::int32_t y, C weight) {
          if (y < row_begin || y >= row_end) return;
          C* const at = grad + y * job.grad_x.row + x * job.grad_x.pixel;
          for (int k = 0; k < kGroup; ++k)
            at[(c + k) * job.grad_x.channel] =
                add(at[(c + k) * job.grad_x.channel], multiply(weight, g[k]));
        });
      }
    }
  }
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
  add_gradient<T, kGroup>(job, sample, sample, false, row_begin, row_end);
  for (std::int64_t out = 0; out < job.n; ++out) {
    if (partner_of(job.records + out * kRecord, job.n) == sample)
      add_gradient<T, kGroup>(job, sample, out, true, row_begin, row_end);
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

const CpuKernels kernels = {&forward, &backward};

}  // namespace fusereg::augment::FUSEREG_ISA
