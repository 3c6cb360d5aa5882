// Products of many rows in whole numbers with a panel: the words of its codes are unpacked once for all of them, block by block, into the
// first-level cache. The sums of a chunk are exact, and are added in the same order as in integers.h, so that a row's result has the same bits.
#pragma once

#include "integers.h"

#if defined(EVENHAND_SHORT_PRODUCTS)

constexpr int UNPACKED_INPUTS = 10240 / PANEL;  // of a block: 20 KB of 16 bits
constexpr int FEWEST_UNPACKED_ROWS = 32;  // that are worth it: so many are at least four tiles, of which none lacks more than two rows

// Some groups of inputs of a panel.
template <typename P>
struct Unpacked {
  alignas(64) IntVec words[UNPACKED_INPUTS / P::INPUTS][2];
  Pair scales[UNPACKED_INPUTS / 16], minima[UNPACKED_INPUTS / 16];

  template <typename F>
  void fill(const char* panel, long first_group, int groups, int group) {
    IntVec(*to)[2] = words;
    for (int g = 0; g < groups; g++) {
      const Place at = F::place(panel, first_group + g, group);
      const char* unit = at.codes;
      for (int i = 0; i < group; i += F::UNIT, unit += F::unit_bytes(), to += F::UNIT / P::INPUTS)
        P::words(unit, [&](int word, IntVec low, IntVec high) __attribute__((always_inline)) { to[word][0] = low, to[word][1] = high; });
      scales[g] = F::code_scales(at), minima[g] = F::minima_beside(at, P::OFFSET);
    }
  }
};

// c[ROWS][PANEL] += x[ROWS][some groups of inputs] * panel.
template <typename P, int CHUNK, bool HAS_MINIMA, int ROWS>
static void multiply_unpacked(const Chunk<P, CHUNK>* x, const Unpacked<P>& panel, int groups, int group, float* c) {
  const IntVec(*codes)[2] = panel.words;
  for (int g = 0; g < groups; g++)
    for (int first = 0; first < group; first += CHUNK, x += ROWS, codes += CHUNK / P::INPUTS) {
      IntVec sums[ROWS][2] = {};
#pragma GCC unroll 16
      for (int word = 0; word < CHUNK / P::INPUTS; word++) {
        IntVec low = codes[word][0], high = codes[word][1];
        asm("" : "+v"(low), "+v"(high));  // keep them in registers: GCC would load them again for every row
#pragma GCC unroll 8
        for (int m = 0; m < ROWS; m++) {
          const IntVec left = IntVec{} + x[m].words[word];
          add<P>(sums[m][0], low, left), add<P>(sums[m][1], high, left);
        }
      }
#pragma GCC unroll 8
      for (int m = 0; m < ROWS; m++) {
        add_chunk<P, HAS_MINIMA>(c + m * PANEL, sums[m][0], panel.scales[g].low, panel.minima[g].low, x[m].scale, x[m].sum);
        add_chunk<P, HAS_MINIMA>(c + m * PANEL + LANES, sums[m][1], panel.scales[g].high, panel.minima[g].high, x[m].scale, x[m].sum);
      }
    }
}

// c[rows][PANEL] += x[rows][inputs] * panel, for whole tiles of rows, the first of which is `row`. Each tile asks for some of the next block.
// Calls done(first row of c, rows) as soon as nothing is added to these any more.
template <typename F, typename P, int CHUNK, typename Done>
static void multiply_unpacked(const IntegerRows<P, CHUNK>& x, long row, int rows, const char* panel, long inputs, int group, float* c,
                              const Done& done) {
  Unpacked<P> unpacked;
  const long groups = inputs / group, most = UNPACKED_INPUTS / group, num_blocks = (groups + most - 1) / most;
  for (long block = 0; block < num_blocks; block++) {
    const long begin = groups * block / num_blocks, end = groups * (block + 1) / num_blocks;
    unpacked.template fill<F>(panel, begin, static_cast<int>(end - begin), group);
    const char* next = panel + F::panel_bytes(end * group, group);
    const long next_bytes = F::panel_bytes((end - begin) * group, group) / num_row_tiles(rows, P::MOST_ROWS);
    for_each_row_tile<P::MOST_ROWS, P::MOST_ROWS - 2>(rows, [&](auto tile, int first) {
      constexpr int ROWS = decltype(tile)::value;
      for (const char* end_of_share = next + next_bytes; next < end_of_share; next += 64) __builtin_prefetch(next, 0, 2);
      multiply_unpacked<P, CHUNK, F::HAS_MINIMA || P::OFFSET, ROWS>(x.tile_at(row + first) + begin * group / CHUNK * ROWS, unpacked,
                                                                    static_cast<int>(end - begin), group, c + first * PANEL);
      if (end == groups) done(first, ROWS);
    });
  }
}

#endif
