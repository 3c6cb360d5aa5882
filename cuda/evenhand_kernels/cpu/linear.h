// Linear layers: y = x W^T + bias, and silu(x G^T) * (x U^T), for few or many rows x and weights in any format of weight.h.
//
// Threads share out the panels. Few rows take every weight from memory into registers, once. With more, a panel's block of
// inputs is widened into the first-level cache and all rows pass over it, while the next block is prefetched, so that from
// two dozen rows on the arithmetic hides the memory traffic.
//
// With activations of bfloat16, rows are rounded to it first, and the plain weights that many rows pass over are too: two inputs
// are multiplied at once where the processor can (vdpbf16ps). With those of 8 bits four are (vpdpbusd). Codes of weights are
// multiplied as they lie in both cases (coded.h), and so they are by AVX2 with rows of 16 and 8 bits (integers.h), where codes are unpacked
// once for many rows (unpacked.h). Elsewhere the same rounded numbers are multiplied in float32. Sums are float32.
#pragma once

#include <algorithm>
#include <vector>

#include "activations.h"
#include "formats.h"
#include "integers.h"
#include "panel.h"
#include "pool.h"
#include "unpacked.h"

constexpr int MAX_BLOCK_ROWS = 264;  // rows that pass over a panel together: whole tiles, of 4, 6 or 12 rows

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

// Calls visit(panel) for all panels. A piece is half a fair share of what is left then, so threads read memory in long runs and yet
// end together (guided self-scheduling, Polychronopoulos and Kuck, 1987).
template <typename Visit>
static void for_each_panel(Pool& pool, long panels, const Visit& visit) {
  std::vector<long> ends;
  for (long end = 0; end < panels;) ends.push_back(end += std::max(1L, (panels - end) / (2 * pool.num_threads())));
  pool.run(static_cast<long>(ends.size()), [&](long piece) {
    for (long panel = piece ? ends[piece - 1] : 0; panel < ends[piece]; panel++) visit(panel);
  });
}

static inline void write_rows(const float* c, int rows, int width, float* y, long ldy) {
  for (int m = 0; m < rows; m++, c += PANEL, y += ldy) {
    if (width == PANEL)
      store(y, load(c)), store(y + LANES, load(c + LANES));  // a copy of varying size is a call
    else
      std::copy(c, c + width, y);
  }
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

// What the rows of a linear layer are multiplied as.
enum class Products { FLOATS, PAIRS, CODES, CODED_PAIRS };

template <typename F>
static Products products_of(const Weight& weight, bool is_few) {
  const bool takes_codes = F::GROUPED && weight.group % LANES == 0;
  if (weight.activations == INT8 && takes_codes && HAS_CODE_PRODUCTS) return Products::CODES;
  if (weight.activations == BFLOAT16 && takes_codes && HAS_PAIR_PRODUCTS) return Products::CODED_PAIRS;
  return weight.activations == BFLOAT16 && !F::GROUPED && !is_few ? Products::PAIRS : Products::FLOATS;
}

// y: the bias and what multiply(first row, rows, panel, c) adds to it, for all panels and rows: as many at a time as are whole tiles.
template <typename F, typename Multiply>
static void compute(Pool& pool, const Weight& weight, float* y, Tiles tiles, const Multiply& multiply) {
  const long width = rows_per_panel(weight.gated), ldy = weight.gated ? weight.outputs / 2 : weight.outputs;
  const long most_tiles = MAX_BLOCK_ROWS / tiles.most;
  for (long tile = 0; tile < tiles.number(); tile += most_tiles) {
    const long row = tiles.first(tile);
    const int block_rows = static_cast<int>(tiles.first(std::min(tile + most_tiles, tiles.number())) - row);
    for_each_panel(pool, num_panels(weight), [&](long p) {
      alignas(64) float c[MAX_BLOCK_ROWS * PANEL];
      const Pair bias = weight.bias ? load_pair(weight.bias + p * PANEL) : Pair{Vec{}, Vec{}};
      for (int m = 0; m < block_rows; m++) store(c + m * PANEL, bias.low), store(c + m * PANEL + LANES, bias.high);
      multiply(row, block_rows, weight.packed + p * F::panel_bytes(weight.inputs, weight.group), c);
      (weight.gated ? write_gated_rows : write_rows)(c, block_rows, static_cast<int>(std::min(width, ldy - p * width)),
                                                     y + row * ldy + p * width, ldy);
    });
  }
}

#if defined(__AVX2__) && !defined(__AVX512F__)
template <typename F, typename P, int CHUNK>
static void linear_of_integers(Pool& pool, const Weight& weight, const float* x, float* y, long rows) {
  const IntegerRows<P, CHUNK> integers(pool, {x, rows, weight.inputs}, weight.group, largest_code(weight.activations), P::MOST_ROWS);
  compute<F>(pool, weight, y, integers.tiles, [&](long row, int block_rows, const char* panel, float* c) {
    if (rows >= FEWEST_UNPACKED_ROWS)
      multiply_unpacked<F>(integers, row, block_rows, panel, weight.inputs, weight.group, c);
    else
      multiply_integers<F>(integers, row, block_rows, panel, weight.inputs, weight.group, c);
  });
}

template <typename F, typename P>
static void linear_of_integers(Pool& pool, const Weight& weight, const float* x, float* y, long rows) {
  if constexpr (F::UNIT <= 16)
    if (weight.group % 32) return linear_of_integers<F, P, 16>(pool, weight, x, y, rows);
  linear_of_integers<F, P, 32>(pool, weight, x, y, rows);
}

template <typename F>
static void linear_of_integers(Pool& pool, const Weight& weight, const float* x, float* y, long rows) {
  if constexpr (F::CODE_BITS == 4)
    if (weight.activations == INT8) return linear_of_integers<F, ByteCodeProducts<F>>(pool, weight, x, y, rows);
  linear_of_integers<F, ShortProducts<F>>(pool, weight, x, y, rows);
}
#endif

template <typename F>
static void linear_in(Pool& pool, const Weight& weight, const float* x, float* y, long rows) {
  const long inputs = weight.inputs, group = weight.group, groups = inputs / group;
#if defined(__AVX2__) && !defined(__AVX512F__)
  if constexpr (F::GROUPED)
    if ((weight.activations == INT16 || weight.activations == INT8) && group % 16 == 0) return linear_of_integers<F>(pool, weight, x, y, rows);
#endif
  const bool is_few = rows <= FEW_ROWS;
  const Products products = products_of<F>(weight, is_few);
  std::vector<BFloat16Pair> pairs;
  std::vector<float> rounded_x, sums;
  CodedMemory coded;
  if (products == Products::PAIRS) {
    pairs = to_pairs(pool, {x, rows, inputs});
  } else if (products == Products::CODES) {
    if constexpr (F::GROUPED) coded = to_codes<F>(pool, {x, rows, inputs}, group);
  } else if (products == Products::CODED_PAIRS) {
    if constexpr (F::GROUPED) coded = to_coded_pairs<F>(pool, {x, rows, inputs}, group);
  } else if (weight.activations != FLOAT32) {
    rounded_x = rounded(pool, {x, rows, inputs}, weight.activations, F::GROUPED ? group : CODE_GROUP);
    x = rounded_x.data();
  }
  if constexpr (F::GROUPED)
    if (F::HAS_MINIMA && is_few && products == Products::FLOATS) {
      sums.resize(rows * groups);
      sum_groups(x, rows * inputs, group, sums.data());
    }
  compute<F>(pool, weight, y, {rows, MAX_ROWS}, [&](long row, int block_rows, const char* panel, float* c) {
    if (products == Products::CODES) {
      if constexpr (F::GROUPED)
        multiply_coded<F, ByteProducts>(block_rows, coded.rows().from(row, inputs / 4, groups), panel, inputs, group, c);
    } else if (products == Products::CODED_PAIRS) {
      if constexpr (F::GROUPED)
        multiply_coded<F, PairProducts>(block_rows, coded.rows().from(row, inputs / 2, groups), panel, inputs, group, c);
    } else if (products == Products::PAIRS) {
      multiply_many<F>(block_rows, pairs.data() + row * num_pairs(inputs), panel, inputs, group, c);
    } else if (is_few) {
      multiply_few<F>(block_rows, x + row * inputs, sums.data(), panel, inputs, group, c);
    } else {
      multiply_many<F>(block_rows, x + row * inputs, panel, inputs, group, c);
    }
  });
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
