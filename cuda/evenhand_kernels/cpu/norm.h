// RMSNorm over rows, with the addition of the residual stream before it.
#pragma once

#include <omp.h>

#include <cmath>

#include "vec.h"

// The sum of squares in LANES partial sums; `size` need not be a multiple of LANES.
static inline float sum_of_squares(const float* x, long size) {
  Vec total = {};
  long i = 0;
  for (; i + LANES <= size; i += LANES) total += load(x + i) * load(x + i);
  float result = sum(total);
  for (; i < size; i++) result += x[i] * x[i];
  return result;
}

static inline void rms_norm_row(const float* x, const float* weight, float* y, long size, float eps) {
  const float scale = 1.0f / std::sqrt(sum_of_squares(x, size) / static_cast<float>(size) + eps);
  for (long i = 0; i < size; i++) y[i] = x[i] * scale * weight[i];
}

// residual += x, unless x is null; y = norm(residual) * weight.
static void add_rms_norm(const float* x, float* residual, const float* weight, float* y, long rows, long size, float eps,
                         int num_threads) {
#pragma omp parallel for schedule(static) num_threads(num_threads)
  for (long row = 0; row < rows; row++) {
    float* r = residual + row * size;
    if (x)
      for (long i = 0; i < size; i++) r[i] += x[row * size + i];
    rms_norm_row(r, weight, y + row * size, size, eps);
  }
}
