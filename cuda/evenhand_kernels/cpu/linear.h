// Linear layers: y = x W^T + bias, and silu(x G^T) * (x U^T), for few or many rows x and weights of 16 or 32 bits.
//
// The weight is packed into panels of PANEL outputs: element (n, k) lies at panel[n / PANEL][k][n % PANEL]. Threads share
// out the panels. A panel's block of DEPTH inputs stays in the L1 cache while all rows pass over it, and meanwhile the
// next block is prefetched, so that for a few dozen rows the arithmetic hides the memory traffic.
#pragma once

#include <omp.h>

#include <algorithm>

#include "vec.h"

constexpr int PANEL = 2 * LANES;
constexpr int MAX_DEPTH = 256;   // inputs of a block: 16 KiB of float32
constexpr int MAX_BLOCK_ROWS = 96;  // rows that pass over a panel together: their inputs should stay in the L2 cache

// A gated panel holds LANES rows of the gate, then the LANES rows of `up` at the same places.
static inline long source_row(long panel, int lane, long outputs, bool gated) {
  if (!gated) return panel * PANEL + lane;
  return lane < LANES ? panel * LANES + lane : outputs / 2 + panel * LANES + (lane - LANES);
}

static inline long num_panels(long outputs, bool gated) {
  const long per_panel = gated ? LANES : PANEL, rows = gated ? outputs / 2 : outputs;
  return (rows + per_panel - 1) / per_panel;
}

template <typename T>
static void pack(const T* weight, T* packed, long outputs, long inputs, bool gated, int num_threads) {
  const long rows = gated ? outputs / 2 : outputs;
#pragma omp parallel for schedule(dynamic, 4) num_threads(num_threads)
  for (long p = 0; p < num_panels(outputs, gated); p++) {
    T* panel = packed + p * PANEL * inputs;
    for (int lane = 0; lane < PANEL; lane++) {
      const long row = source_row(p, lane, outputs, gated);
      const bool exists = gated ? p * LANES + lane % LANES < rows : row < rows;
      for (long k = 0; k < inputs; k++) panel[k * PANEL + lane] = exists ? weight[row * inputs + k] : T{};
    }
  }
}

static inline const float* widened(const float* block, long, float*) { return block; }

template <typename T>
static inline const float* widened(const T* block, long size, float* scratch) {
  for (long i = 0; i < size; i += LANES) store(scratch + i, load(block + i));
  return scratch;
}

static inline void write_rows(const float* c, int rows, int width, float* y, long ldy) {
  for (int m = 0; m < rows; m++) std::copy(c + m * PANEL, c + m * PANEL + width, y + m * ldy);
}

static inline void write_gated_rows(const float* c, int rows, int width, float* y, long ldy) {
  for (int m = 0; m < rows; m++) {
    const Vec gate = load(c + m * PANEL), up = load(c + m * PANEL + LANES);
    const Vec result = gate / (1.0f + exp(-gate)) * up;
    if (width == LANES) {
      store(y + m * ldy, result);
    } else {
      for (int j = 0; j < width; j++) y[m * ldy + j] = result[j];
    }
  }
}

// bias, if any, is in the order of the packed outputs and padded as they are.
template <typename T>
static void linear(const float* x, const T* packed, const float* bias, float* y, long rows, long outputs, long inputs,
                   bool gated, int num_threads) {
  const long panels = num_panels(outputs, gated), ldy = gated ? outputs / 2 : outputs;
  const int per_panel = gated ? LANES : PANEL;
  const long num_blocks = (inputs + MAX_DEPTH - 1) / MAX_DEPTH;
  const long step = ((inputs + num_blocks - 1) / num_blocks + 7) / 8 * 8;
  for (long row0 = 0; row0 < rows; row0 += MAX_BLOCK_ROWS) {
    const int block_rows = static_cast<int>(std::min<long>(MAX_BLOCK_ROWS, rows - row0));
    const int tiles = num_row_tiles(block_rows);
    const int lines_per_tile = static_cast<int>(step * PANEL * sizeof(T) / 64 + tiles - 1) / tiles;
#pragma omp parallel for schedule(dynamic, 2) num_threads(num_threads)
    for (long p = 0; p < panels; p++) {
      alignas(64) float c[MAX_BLOCK_ROWS * PANEL];
      alignas(64) float scratch[sizeof(T) == 4 ? 1 : (MAX_DEPTH + 8) * PANEL];
      for (int m = 0; m < block_rows; m++)
        for (int j = 0; j < PANEL; j++) c[m * PANEL + j] = bias ? bias[p * PANEL + j] : 0;
      for (long k = 0; k < inputs; k += step) {
        const int depth = static_cast<int>(std::min(step, inputs - k));
        const T* block = packed + (p * inputs + k) * PANEL;
        const float* b = widened(block, depth * PANEL, scratch);
        const char* next = reinterpret_cast<const char*>(block + depth * PANEL);
        for (int i = 0; i < tiles; i++, next += lines_per_tile * 64) {
          const int first = first_row(i, tiles, block_rows), end = first_row(i + 1, tiles, block_rows);
          multiply_tile<2>(end - first, x + (row0 + first) * inputs + k, inputs, b, PANEL, depth, c + first * PANEL,
                           PANEL, next, lines_per_tile);
        }
      }
      const int width = static_cast<int>(std::min<long>(per_panel, ldy - p * per_panel));
      (gated ? write_gated_rows : write_rows)(c, block_rows, width, y + row0 * ldy + p * per_panel, ldy);
    }
  }
}
