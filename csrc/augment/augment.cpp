// CPU kernels of augmentation; compiled once per instruction set. Contract: augment.h.
#include "augment/augment.h"

#include "augment/augment_math.h"

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

void forward(const Job& job, std::int64_t begin, std::int64_t end) {
  dispatch_element(job.x.type, [&](auto tag) {
    using T = typename decltype(tag)::type;
    plain_rows<T>(job, begin, end);
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
