// Linear layers: y = x W^T + bias, and silu(x G^T) * (x U^T), for few or many rows x and weights in any format of weight.h.
//
// Threads share out the panels. Few rows take every weight from memory into registers, once. With more, a panel's block of
// inputs is widened into the first-level cache and all rows pass over it, while the next block is prefetched, so that from
// two dozen rows on the arithmetic hides the memory traffic.
//
// With activations of bfloat16, rows are rounded to it first, and the weights that many rows pass over are too: two inputs are
// multiplied at once where the processor can (vdpbf16ps). With those of 8 bits, four are, and codes of weights stay as they
// lie (vpdpbusd). Elsewhere the same rounded numbers are multiplied in float32. Sums are float32, those of a group's codes exact.
#pragma once

#include <algorithm>
#include <vector>

#include "activations.h"
#include "multiply.h"
#include "pool.h"
#include "weight.h"

constexpr int FEW_ROWS = 4;
constexpr int MAX_DEPTH = 320;       // rows of a block: with PANEL floats or pairs each it leaves room in a first-level cache of 32 KB
constexpr int MAX_BLOCK_ROWS = 256;  // rows that pass over a panel together
constexpr long PREFETCH_BYTES = 2048;  // how far few rows ask for weights ahead

struct Weight {
  int64_t outputs, inputs;
  int32_t format, group, gated;  // format: see dispatch_format; group: inputs that share a scale, 1 for plain numbers
  ActivationDtype activations;   // what they are rounded to
  char* packed;
  const float* bias;  // packed like a plain weight of one input; null: none
};

// A gated panel holds LANES rows of the gate, then the LANES rows of `up` at the same places.
static inline long rows_per_panel(bool gated) { return gated ? LANES : PANEL; }

static inline long num_panels(const Weight& weight) {
  const long rows = weight.gated ? weight.outputs / 2 : weight.outputs;
  return (rows + rows_per_panel(weight.gated) - 1) / rows_per_panel(weight.gated);
}

// The output that this lane of a panel computes; -1: none.
static inline long source_row(const Weight& weight, long panel, int lane) {
  const long rows = weight.gated ? weight.outputs / 2 : weight.outputs;
  const long row = panel * rows_per_panel(weight.gated) + lane % rows_per_panel(weight.gated);
  return row >= rows ? -1 : lane < rows_per_panel(weight.gated) ? row : rows + row;
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

// Sums of each group of inputs of each row: [rows][inputs / group].
static inline void sum_groups(const float* x, long size, int group, float* sums) {
  for (long i = 0; i < size; i += group, sums++) {
    Vec total = {};
    for (int j = 0; j < group; j += LANES) total += load(x + i + j);
    *sums = sum(total);
  }
}

// c[ROWS][PANEL] += x[ROWS][inputs] * panel. CHAINS sums of each output, so that no addition waits for the one before.
template <typename F, int ROWS>
static void multiply_few(const float* x, const float* sums, const char* panel, long inputs, int group, float* c) {
  constexpr int CHAINS = ROWS == 1 ? 4 : ROWS == 2 ? 2 : 1;
  Vec acc[ROWS][CHAINS][2] = {};
  const auto add = [&](const float* left, int chain, Pair right) __attribute__((always_inline)) {
    for (int m = 0; m < ROWS; m++) {
      const Vec factor = splat(left[m * inputs]);
      acc[m][chain][0] += factor * right.low;
      acc[m][chain][1] += factor * right.high;
    }
  };
  const auto total = [&](int m, int half) __attribute__((always_inline)) {
    Vec result = acc[m][0][half];
    for (int chain = 1; chain < CHAINS; chain++) result += acc[m][chain][half];
    return result;
  };
  if constexpr (F::GROUPED) {
    const long groups = inputs / group;
    for (long g = 0; g < groups; g++) {
      const char* unit = panel + F::header_bytes();
      for (int i = 0; i < group; i += F::UNIT, x += F::UNIT, unit += F::unit_bytes()) {
        for (int line = 0; line < F::unit_bytes(); line += 64) __builtin_prefetch(unit + PREFETCH_BYTES + line, 0, 3);
        F::codes(unit, [&](int j, Pair code) __attribute__((always_inline)) { add(x + j, j % CHAINS, code); });
      }
      const Pair scale = F::scales(panel), minimum = F::minima(panel);
      for (int m = 0; m < ROWS; m++) {
        Vec low = load(c + m * PANEL) + total(m, 0) * scale.low, high = load(c + m * PANEL + LANES) + total(m, 1) * scale.high;
        if constexpr (F::HAS_MINIMA) low += sums[m * groups + g] * minimum.low, high += sums[m * groups + g] * minimum.high;
        store(c + m * PANEL, low), store(c + m * PANEL + LANES, high);
        for (int chain = 0; chain < CHAINS; chain++) acc[m][chain][0] = acc[m][chain][1] = Vec{};
      }
      panel += F::group_bytes(group);
    }
  } else {
    using T = typename F::Element;
    const T* weights = reinterpret_cast<const T*>(panel);
    long k = 0;
    for (; k + CHAINS <= inputs; k += CHAINS, weights += CHAINS * PANEL) {
      constexpr int BYTES = CHAINS * PANEL * sizeof(T);
      for (int line = 0; line < BYTES; line += 64) __builtin_prefetch(reinterpret_cast<const char*>(weights) + PREFETCH_BYTES + line, 0, 3);
#pragma GCC unroll 4
      for (int chain = 0; chain < CHAINS; chain++) add(x + k + chain, chain, load_pair(weights + chain * PANEL));
    }
    for (; k < inputs; k++, weights += PANEL) add(x + k, 0, load_pair(weights));
    for (int m = 0; m < ROWS; m++)
      for (int half = 0; half < 2; half++) store(c + m * PANEL + half * LANES, load(c + m * PANEL + half * LANES) + total(m, half));
  }
}

template <typename F>
static void multiply_few(int rows, const float* x, const float* sums, const char* panel, long inputs, int group, float* c) {
  switch (rows) {
    case 1: return multiply_few<F, 1>(x, sums, panel, inputs, group, c);
    case 2: return multiply_few<F, 2>(x, sums, panel, inputs, group, c);
    case 3: return multiply_few<F, 3>(x, sums, panel, inputs, group, c);
    case 4: return multiply_few<F, 4>(x, sums, panel, inputs, group, c);
  }
}

// Inputs that an element of a block or of a row stands for.
template <typename T>
constexpr long INPUTS = std::is_same_v<T, BFloat16Pair> ? 2 : 1;

// c[rows][PANEL] += x[rows][inputs] * panel, in blocks of about MAX_DEPTH rows. T: float or BFloat16Pair, which x consists of.
template <typename F, typename T>
static void multiply_many(int rows, const T* x, const char* panel, long inputs, int group, float* c) {
  constexpr bool AS_IT_LIES = F::WIDE && std::is_same_v<T, float>;
  const long most = MAX_DEPTH * INPUTS<T>, num_blocks = (inputs + most - 1) / most, unit = std::max(8, group);
  const long step = ((inputs + num_blocks - 1) / num_blocks + unit - 1) / unit * unit, ldx = (inputs + INPUTS<T> - 1) / INPUTS<T>;
  alignas(64) T block[AS_IT_LIES ? 1 : (MAX_DEPTH + MAX_GROUP) * PANEL];
  for (long k = 0; k < inputs; k += step) {
    const long end = std::min(k + step, inputs);
    const int depth = static_cast<int>((end - k + INPUTS<T> - 1) / INPUTS<T>);
    const T* b = block;
    if constexpr (AS_IT_LIES)
      b = reinterpret_cast<const T*>(panel) + k * PANEL;
    else
      F::widen(panel, k, static_cast<int>(end - k), group, Block<T>{block});
    const long bytes = F::panel_bytes(end, group) - F::panel_bytes(k, group);
    const Prefetch next_block = {panel + F::panel_bytes(end, group), bytes / depth / num_row_tiles(rows)};
    multiply<2>(rows, x + k / INPUTS<T>, ldx, RightSide<T>{&b, depth, PANEL}, depth, c, PANEL, next_block);
  }
}

// c[ROWS][PANEL] += what codes of 8 bits say of x[ROWS][inputs] * panel: sums of a group are whole numbers.
template <typename F, int ROWS>
static void multiply_codes(const int8_t* x, const float* scales, const int32_t* sums, const char* panel, long inputs, int group, float* c) {
  const long groups = inputs / group;
  for (long g = 0; g < groups; g++, panel += F::group_bytes(group)) {
    IntVec acc[ROWS][2];
    for (int m = 0; m < ROWS; m++) acc[m][0] = acc[m][1] = IntVec{} - F::OFFSET * sums[m * groups + g];
    const char* unit = panel + F::header_bytes();
    for (int i = 0; i < group; i += F::UNIT, x += F::UNIT, unit += F::unit_bytes()) {
      for (int line = 0; line < F::unit_bytes(); line += 64) __builtin_prefetch(unit + PREFETCH_BYTES + line, 0, 3);
      F::unsigned_codes(unit, [&](int quad, IntVec low, IntVec high) __attribute__((always_inline)) {
#pragma GCC unroll 12
        for (int m = 0; m < ROWS; m++) {
          const IntVec left = IntVec{} + *reinterpret_cast<const Word*>(x + m * inputs + 4 * quad);
          acc[m][0] = dot(acc[m][0], low, left);
          acc[m][1] = dot(acc[m][1], high, left);
        }
      });
    }
    const Pair scale = F::code_scales(panel), minimum = F::minima(panel);
    for (int m = 0; m < ROWS; m++) {
      const float of_row = scales[m * groups + g], sum = of_row * static_cast<float>(sums[m * groups + g]);
      float* to = c + m * PANEL;
      store(to, load(to) + __builtin_convertvector(acc[m][0], Vec) * (scale.low * of_row) + minimum.low * sum);
      store(to + LANES, load(to + LANES) + __builtin_convertvector(acc[m][1], Vec) * (scale.high * of_row) + minimum.high * sum);
    }
  }
}

template <typename F>
static void linear_in(Pool& pool, const Weight& weight, const float* x, float* y, long rows) {
  const long inputs = weight.inputs, group = weight.group;
  const long width = rows_per_panel(weight.gated), ldy = weight.gated ? weight.outputs / 2 : weight.outputs;
  const bool is_few = rows <= FEW_ROWS, as_pairs = weight.activations == BFLOAT16 && !is_few;
  const bool as_codes = weight.activations == INT8 && F::GROUPED && HAS_CODE_PRODUCTS && group % LANES == 0;
  std::vector<BFloat16Pair> pairs;
  CodedRows coded;
  std::vector<float> rounded_x;
  if (as_pairs) {
    pairs = to_pairs(pool, {x, rows, inputs});
  } else if (as_codes) {
    if constexpr (F::GROUPED) coded = to_codes<F::EVEN_FIRST>(pool, {x, rows, inputs}, group);
  } else if (weight.activations != FLOAT32) {
    rounded_x = rounded(pool, {x, rows, inputs}, weight.activations, F::GROUPED ? group : CODE_GROUP);
    x = rounded_x.data();
  }
  std::vector<float> sums;
  if constexpr (F::GROUPED)
    if (F::HAS_MINIMA && is_few && !as_codes) {
      sums.resize(rows * inputs / group);
      sum_groups(x, rows * inputs, group, sums.data());
    }
  for (long row = 0; row < rows; row += MAX_BLOCK_ROWS) {
    const int block_rows = static_cast<int>(std::min<long>(MAX_BLOCK_ROWS, rows - row));
    for_each_panel(pool, num_panels(weight), [&](long p) {
      alignas(64) float c[MAX_BLOCK_ROWS * PANEL];
      for (int m = 0; m < block_rows; m++)
        for (int j = 0; j < PANEL; j++) c[m * PANEL + j] = weight.bias ? weight.bias[p * PANEL + j] : 0;
      const char* panel = weight.packed + p * F::panel_bytes(inputs, group);
      if (as_codes) {
        if constexpr (F::GROUPED)
          for_each_row_tile(block_rows, [&](auto tile, int first) {
            const long groups = inputs / group, from = row + first;
            multiply_codes<F, decltype(tile)::value>(coded.codes.data() + from * inputs, coded.scales.data() + from * groups,
                                                     coded.sums.data() + from * groups, panel, inputs, group, c + first * PANEL);
          });
      } else if (is_few) {
        multiply_few<F>(block_rows, x + row * inputs, sums.data(), panel, inputs, group, c);
      } else if (as_pairs) {
        multiply_many<F>(block_rows, pairs.data() + row * num_pairs(inputs), panel, inputs, group, c);
      } else {
        multiply_many<F>(block_rows, x + row * inputs, panel, inputs, group, c);
      }
      (weight.gated ? write_gated_rows : write_rows)(c, block_rows, static_cast<int>(std::min(width, ldy - p * width)),
                                                     y + row * ldy + p * width, ldy);
    });
  }
}

// y[row] = the weights of output ids[row], which is one lane of a panel.
template <typename F>
static void embedding_in(Pool& pool, const Weight& weight, const int32_t* ids, float* y, long rows) {
  const long inputs = weight.inputs, group = weight.group;
  pool.run(rows, [&](long row) {
    const char* panel = weight.packed + ids[row] / PANEL * F::panel_bytes(inputs, group);
    alignas(64) float block[MAX_GROUP * PANEL];
    for (long k = 0; k < inputs; k += MAX_GROUP) {
      const int depth = static_cast<int>(std::min<long>(MAX_GROUP, inputs - k));
      F::widen(panel, k, depth, group, Block<float>{block});
      for (int i = 0; i < depth; i++) y[row * inputs + k + i] = block[i * PANEL + ids[row] % PANEL];
    }
  });
}

static void linear(Pool& pool, const Weight& weight, const float* x, float* y, long rows) {
  dispatch_format(weight.format, [&](auto format) { linear_in<decltype(format)>(pool, weight, x, y, rows); });
}

static void embedding(Pool& pool, const Weight& weight, const int32_t* ids, float* y, long rows) {
  dispatch_format(weight.format, [&](auto format) { embedding_in<decltype(format)>(pool, weight, ids, y, rows); });
}
