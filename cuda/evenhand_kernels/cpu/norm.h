// RMSNorm over rows, with the addition of the residual stream before it.
#pragma once

#include <algorithm>
#include <cmath>

#include "pool.h"
#include "vec.h"

constexpr long PIECE_ELEMENTS = 8192;  // of a row-wise operation: some microseconds of work

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

// Calls visit(row) for rows of `size` elements.
template <typename Visit>
static void for_each_row(Pool& pool, long rows, long size, const Visit& visit) {
  const long per_piece = std::max(1L, PIECE_ELEMENTS / size);
  pool.run((rows + per_piece - 1) / per_piece, [&](long piece) {
    const long end = std::min(rows, (piece + 1) * per_piece);
    for (long row = piece * per_piece; row < end; row++) visit(row);
  });
}

// sum = residual + x, or x where residual is null; y = norm(sum) * weight. `sum` may be either of the others.
static inline void add_rms_norm_row(const float* x, const float* residual, float* sum, const float* weight, float* y, long size, float eps) {
  for (long i = 0; i < size; i++) sum[i] = residual ? residual[i] + x[i] : x[i];
  rms_norm_row(sum, weight, y, size, eps);
}

// The same for rows.
static void add_rms_norm(Pool& pool, const float* x, const float* residual, float* sum, const float* weight, float* y, long rows, long size,
                         float eps) {
  for_each_row(pool, rows, size, [&](long row) {
    const long at = row * size;
    add_rms_norm_row(x + at, residual ? residual + at : nullptr, sum + at, weight, y + at, size, eps);
  });
}
