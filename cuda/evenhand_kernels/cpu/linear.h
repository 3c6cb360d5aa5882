// Linear layers: y = x W^T + bias, and silu(x G^T) * (x U^T), for few or many rows x and weights in any format of weight.h.
//
// Threads share out the panels. Few rows take every weight from memory into registers, once (without bfloat16 units any number does of bfloat16),
// and each thread makes for itself what enters, which takes less time than to wait until another has. With more, a panel's block of
// inputs is widened into the first-level cache and all rows pass over it, while the next block is prefetched, so that from
// two dozen rows on the arithmetic hides the memory traffic.
//
// With activations of bfloat16, rows are rounded to it first, and the plain weights that many rows pass over are too: two inputs
// are multiplied at once where the processor can (vdpbf16ps), or whole tiles (paired_tiles.h). With those of 8 bits four are
// (vpdpbusd). Codes of weights are multiplied as they lie in both cases (coded.h), and so they are by AVX2 and AVX-512 with rows of 16
// bits, and without VNNI with those of 8 (integers.h), where groups are whole chunks; codes are unpacked once for many rows
// (unpacked.h), or multiplied by tiles too. Elsewhere the same rounded numbers are multiplied in float32. Sums are float32.
#pragma once

#include <algorithm>
#include <vector>

#include "activations.h"
#include "entering.h"
#include "formats.h"
#include "integers.h"
#include "paired_tiles.h"
#include "panel.h"
#include "pool.h"
#include "unpacked.h"

constexpr int MAX_BLOCK_ROWS = 264;  // rows that pass over a panel together: whole tiles, of 4, 6, 12 or 16 rows

struct Weight {
  int64_t outputs, inputs;
  int32_t format, group, gated;  // format: see dispatch_format; group: inputs that share a scale, 1 for plain numbers
  int32_t tiled;                 // whether many rows are multiplied by tiles of AMX
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

// Calls visit(panel) for all panels. Threads read memory in long runs and yet end together.
template <typename Visit>
static void for_each_panel(Pool& pool, long panels, const Visit& visit) {
  pool.share(panels, [&](Pool::Claims& claims) {
    do
      for (long panel = claims.first; panel < claims.end; panel++) visit(panel);
    while (claims.next());
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

// y: the bias and what multiply(prepared, first row, rows, panel, c, done) adds to it, for all panels and rows: as many at a time as are
// whole tiles; prepared = prepare(pool, what enters). It calls done(first row of c, rows) for each row once, as early as it can: they are
// far apart in y, so that to write them takes long, but little of what is computed meanwhile.
template <typename F, typename RowTiles, typename Prepare, typename Multiply>
static void compute(Pool& pool, const Weight& weight, const Entering& entering, float* y, RowTiles tiles, const Readings& after,
                    const Prepare& prepare, const Multiply& multiply) {
  const long width = rows_per_panel(weight.gated), ldy = weight.gated ? weight.outputs / 2 : weight.outputs;
  const long rows = tiles.rows, panels = num_panels(weight), panel_bytes = F::panel_bytes(weight.inputs, weight.group);
  const auto compute_panel = [&](const auto& prepared, long row, int block_rows, long p) {
    alignas(64) float c[MAX_BLOCK_ROWS * PANEL];
    const Pair bias = weight.bias ? load_pair(weight.bias + p * PANEL) : Pair{Vec{}, Vec{}};
    for (int m = 0; m < block_rows; m++) store(c + m * PANEL, bias.low), store(c + m * PANEL + LANES, bias.high);
    multiply(prepared, row, block_rows, weight.packed + p * panel_bytes, c, [&](int first, int num_rows) {
      (weight.gated ? write_gated_rows : write_rows)(c + first * PANEL, num_rows, static_cast<int>(std::min(width, ldy - p * width)),
                                                     y + (row + first) * ldy + p * width, ldy);
    });
  };
  if (rows == 0) return;
  if (rows <= FEW_ROWS) {
    pool.share(
        panels,
        [&](Pool::Claims& claims) {
          const char* first = weight.packed + claims.first * panel_bytes;
          for (long line = 0; line < PREFETCH_BYTES; line += 64) __builtin_prefetch(first + line, 0, 3);
          const EnteringHere here(entering, rows, weight.inputs);
          const auto prepared = prepare(Pool::alone(), here.x());
          do {
            if (claims.first == 0) here.store_sum();
            for (long p = claims.first; p < claims.end; p++) compute_panel(prepared, 0, static_cast<int>(rows), p);
          } while (claims.next());
        },
        after);
    return;
  }
  const auto prepared = prepare(pool, normed_by_all(pool, entering, rows, weight.inputs));
  const long most_tiles = MAX_BLOCK_ROWS / tiles.most;
  for (long tile = 0; tile < tiles.number(); tile += most_tiles) {
    const long row = tiles.first(tile);
    const int block_rows = static_cast<int>(tiles.first(std::min(tile + most_tiles, tiles.number())) - row);
    for_each_panel(pool, panels, [&](long p) { compute_panel(prepared, row, block_rows, p); });
  }
}

#if defined(EVENHAND_SHORT_PRODUCTS)
template <typename F, typename P, int CHUNK>
static void linear_of_integers(Pool& pool, const Weight& weight, const Entering& entering, float* y, long rows, const Readings& after) {
  using Integers = IntegerRows<P, CHUNK>;
  const auto prepare = [&](Pool& threads, const float* x) {
    return Integers(threads, {x, rows, weight.inputs}, weight.group, largest_code(weight.activations), P::MOST_ROWS);
  };
  const Tiles tiles = {rows, P::MOST_ROWS};
  compute<F>(pool, weight, entering, y, tiles, after, prepare,
             [&](const Integers& x, long row, int block_rows, const char* panel, float* c, const auto& done) {
    if (rows >= FEWEST_UNPACKED_ROWS) return multiply_unpacked<F>(x, row, block_rows, panel, weight.inputs, weight.group, c, done);
    multiply_integers<F>(x, row, block_rows, panel, weight.inputs, weight.group, c);
    done(0, block_rows);
  });
}

template <typename F, typename P>
static void linear_of_integers(Pool& pool, const Weight& weight, const Entering& entering, float* y, long rows, const Readings& after) {
  if constexpr (F::SMALL_CHUNK < F::CHUNK)
    if (weight.group % F::CHUNK) return linear_of_integers<F, P, F::SMALL_CHUNK>(pool, weight, entering, y, rows, after);
  linear_of_integers<F, P, F::CHUNK>(pool, weight, entering, y, rows, after);
}

template <typename F>
static void linear_of_integers(Pool& pool, const Weight& weight, const Entering& entering, float* y, long rows, const Readings& after) {
  if constexpr (F::CODE_BITS == 4 && !HAS_CODE_PRODUCTS)
    if (weight.activations == INT8) return linear_of_integers<F, ByteCodeProducts<F>>(pool, weight, entering, y, rows, after);
  linear_of_integers<F, ShortProducts<F>>(pool, weight, entering, y, rows, after);
}
#endif

#if defined(EVENHAND_TILES)
template <typename F>
static bool suits_tiles(const Weight& weight, long rows) {
  const bool suits = F::GROUPED ? weight.activations == INT16 && rows >= FEWEST_TILED_CODE_ROWS : weight.activations == BFLOAT16 && rows > FEW_ROWS;
  const int group = weight.group;
  return weight.tiled && suits && weight.inputs % TILE_INPUTS == 0 && (group % TILE_INPUTS == 0 || TILE_INPUTS % group == 0);
}

template <typename F>
static void linear_of_tiles(Pool& pool, const Weight& weight, const Entering& entering, float* y, long rows, const Readings& after) {
  using Paired = PairedRows<F::GROUPED ? 2 : 1>;
  const auto prepare = [&](Pool& threads, const float* x) { return Paired(threads, {x, rows, weight.inputs}); };
  compute<F>(pool, weight, entering, y, TileRows{rows}, after, prepare,
             [&](const Paired& x, long row, int block_rows, const char* panel, float* c, const auto& done) {
    multiply_tiled<F>(x, row, block_rows, panel, weight.inputs, weight.group, c, done);
  });
}
#endif

// Rows in all forms that products take; of which one is there.
struct Prepared {
  const float* x;
  std::vector<BFloat16Pair> pairs;
  std::vector<float> rounded_x, sums;
  CodedMemory coded;
};

template <typename F>
static void linear_in(Pool& pool, const Weight& weight, const Entering& entering, float* y, long rows, const Readings& after) {
  const long inputs = weight.inputs, group = weight.group, groups = inputs / group;
#if defined(EVENHAND_TILES)
  if (suits_tiles<F>(weight, rows)) return linear_of_tiles<F>(pool, weight, entering, y, rows, after);
#endif
#if defined(EVENHAND_SHORT_PRODUCTS)
  if constexpr (F::GROUPED)
    if ((weight.activations == INT16 || (weight.activations == INT8 && !HAS_CODE_PRODUCTS)) && group % F::SMALL_CHUNK == 0)
      return linear_of_integers<F>(pool, weight, entering, y, rows, after);
#endif
  const bool is_few = rows <= FEW_ROWS || (WIDENS_IN_REGISTERS<F> && weight.activations != BFLOAT16);
  const Products products = products_of<F>(weight, is_few);
  const auto prepare = [&](Pool& threads, const float* x) {
    Prepared result = {x, {}, {}, {}, {}};
    if (products == Products::PAIRS) {
      result.pairs = to_pairs(threads, {x, rows, inputs});
    } else if (products == Products::CODES) {
      if constexpr (F::GROUPED) result.coded = to_codes<F>(threads, {x, rows, inputs}, group);
    } else if (products == Products::CODED_PAIRS) {
      if constexpr (F::GROUPED) result.coded = to_coded_pairs<F>(threads, {x, rows, inputs}, group);
    } else if (weight.activations != FLOAT32) {
      result.rounded_x = rounded(threads, {x, rows, inputs}, weight.activations, F::GROUPED ? group : CODE_GROUP);
      result.x = result.rounded_x.data();
    }
    if constexpr (F::GROUPED)
      if (F::HAS_MINIMA && is_few && products == Products::FLOATS) {
        result.sums.resize(rows * groups);
        sum_groups(result.x, rows * inputs, group, result.sums.data());
      }
    return result;
  };
  compute<F>(pool, weight, entering, y, Tiles{rows, MAX_ROWS}, after, prepare,
             [&](const Prepared& prepared, long row, int block_rows, const char* panel, float* c, const auto& done) {
    if (products == Products::CODES) {
      if constexpr (F::GROUPED)
        multiply_coded<F, ByteProducts>(block_rows, prepared.coded.rows().from(row, inputs / 4, groups), panel, inputs, group, c);
    } else if (products == Products::CODED_PAIRS) {
      if constexpr (F::GROUPED)
        multiply_coded<F, PairProducts>(block_rows, prepared.coded.rows().from(row, inputs / 2, groups), panel, inputs, group, c);
    } else if (products == Products::PAIRS) {
      multiply_many<F>(block_rows, prepared.pairs.data() + row * num_pairs(inputs), panel, inputs, group, c);
    } else if (is_few) {
      multiply_few<F>(block_rows, prepared.x + row * inputs, prepared.sums.data(), panel, inputs, group, c);
    } else {
      multiply_many<F>(block_rows, prepared.x + row * inputs, panel, inputs, group, c);
    }
    done(0, block_rows);
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

// `after`: what is read next.
static void linear(Pool& pool, const Weight& weight, const Entering& entering, float* y, long rows, const Readings& after = {}) {
  dispatch_format(weight.format, [&](auto format) { linear_in<decltype(format)>(pool, weight, entering, y, rows, after); });
}

// What computing it reads.
static Reading reading(const Weight& weight) {
  Reading result = {weight.packed, num_panels(weight), 0};
  dispatch_format(weight.format, [&](auto format) { result.item_bytes = decltype(format)::panel_bytes(weight.inputs, weight.group); });
  return result;
}

static void embedding(Pool& pool, const Weight& weight, const int32_t* ids, float* y, long rows) {
  dispatch_format(weight.format, [&](auto format) { embedding_in<decltype(format)>(pool, weight, ids, y, rows); });
}
