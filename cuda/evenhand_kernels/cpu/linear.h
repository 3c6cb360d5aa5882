// Linear layers: y = x W^T + bias, and silu(x G^T) * (x U^T), for few or many rows x and weights of 16 or 32 bits.
//
// The weight is packed into panels of PANEL outputs: element (n, k) lies at panel[n / PANEL][k][n % PANEL]. Threads share
// out the panels. A panel's block of inputs stays in the caches nearby while all rows pass over it, and meanwhile the next
// block is prefetched, so that from two dozen rows on the arithmetic hides the memory traffic.
#pragma once

#include <algorithm>

#include "pool.h"
#include "vec.h"

constexpr int PANEL = 2 * LANES;
constexpr int MAX_DEPTH = 640;   // inputs of a block: deep, so that a tile is seldom loaded and stored; a panel's must fit into the L2 cache
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

// Calls visit(panel) for all panels, those of a piece in order, so that the end of one prefetches the next.
template <typename Visit>
static void for_each_panel(Pool& pool, long panels, const Visit& visit) {
  const long per_piece = std::max(1L, panels / (pool.num_threads() * PIECES_PER_THREAD));
  pool.run((panels + per_piece - 1) / per_piece, [&](long piece) {
    const long end = std::min(panels, (piece + 1) * per_piece);
    for (long panel = piece * per_piece; panel < end; panel++) visit(panel);
  });
}

template <typename T>
static void pack(Pool& pool, const T* weight, T* packed, long outputs, long inputs, bool gated) {
  const long rows = gated ? outputs / 2 : outputs, rows_per_panel = gated ? LANES : PANEL;
  for_each_panel(pool, num_panels(outputs, gated), [&](long p) {
    T* panel = packed + p * PANEL * inputs;
    for (int lane = 0; lane < PANEL; lane++) {
      const bool exists = p * rows_per_panel + lane % rows_per_panel < rows;
      const T* row = weight + source_row(p, lane, outputs, gated) * inputs;
      for (long k = 0; k < inputs; k++) panel[k * PANEL + lane] = exists ? row[k] : T{};
    }
  });
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

// One panel of outputs for up to MAX_BLOCK_ROWS rows; `step` is how many inputs a block has.
template <typename T>
static void linear_panel(const float* x, const T* panel, const float* bias, float* y, int rows, int width, long ldy,
                         long inputs, long step, bool gated) {
  alignas(64) float c[MAX_BLOCK_ROWS * PANEL];
  alignas(64) float scratch[sizeof(T) == 4 ? 1 : (MAX_DEPTH + 8) * PANEL];
  for (int m = 0; m < rows; m++)
    for (int j = 0; j < PANEL; j++) c[m * PANEL + j] = bias ? bias[j] : 0;
  const long prefetch_stride = PANEL * static_cast<long>(sizeof(T)) / num_row_tiles(rows);
  for (long k = 0; k < inputs; k += step) {
    const int depth = static_cast<int>(std::min(step, inputs - k));
    const T* block = panel + k * PANEL;
    const float* b = widened(block, depth * PANEL, scratch);
    const Prefetch next_block = {reinterpret_cast<const char*>(block + depth * PANEL), prefetch_stride};
    multiply<2>(rows, x + k, inputs, {&b, depth, PANEL}, depth, c, PANEL, next_block);
  }
  (gated ? write_gated_rows : write_rows)(c, rows, width, y, ldy);
}

// bias, if any, is packed like a weight of one input.
template <typename T>
static void linear(Pool& pool, const float* x, const T* packed, const float* bias, float* y, long rows, long outputs,
                   long inputs, bool gated) {
  const long width = gated ? LANES : PANEL, ldy = gated ? outputs / 2 : outputs;
  const long num_blocks = (inputs + MAX_DEPTH - 1) / MAX_DEPTH;
  const long step = ((inputs + num_blocks - 1) / num_blocks + 7) / 8 * 8;
  for (long row = 0; row < rows; row += MAX_BLOCK_ROWS) {
    const int block_rows = static_cast<int>(std::min<long>(MAX_BLOCK_ROWS, rows - row));
    for_each_panel(pool, num_panels(outputs, gated), [&](long p) {
      linear_panel(x + row * inputs, packed + p * PANEL * inputs, bias ? bias + p * PANEL : nullptr,
                   y + row * ldy + p * width, block_rows, static_cast<int>(std::min(width, ldy - p * width)), ldy, inputs,
                   step, gated);
    });
  }
}
