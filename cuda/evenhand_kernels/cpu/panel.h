// Products of rows with a panel, of any format, in float32 or of pairs of bfloat16.
#pragma once

#include <algorithm>
#include <type_traits>

#include "coded.h"
#include "multiply.h"
#include "weight.h"

constexpr int FEW_ROWS = 4;

// Whether any number of rows takes weights into registers as they lie, tile by tile: a shift or a mask widens a vector of bfloat16, which is
// little beside the products of a tile with it, and saves a block of twice the size in the first-level cache.
template <typename F>
constexpr bool WIDENS_IN_REGISTERS = F::PAIRED && !HAS_PAIR_PRODUCTS;

// Rows of a tile that does.
template <typename F>
constexpr int MOST_FEW_ROWS = WIDENS_IN_REGISTERS<F> ? MAX_ROWS : FEW_ROWS;

constexpr int MAX_DEPTH = 320;  // rows of a block: with PANEL floats or pairs each it leaves room in a first-level cache of 32 KB

// Sums of each group of inputs of each row: [rows][inputs / group].
static inline void sum_groups(const float* x, long size, int group, float* sums) {
  for (long i = 0; i < size; i += group, sums++) {
    Vec total = {};
    float rest = 0;
    int j = 0;
    for (; j + LANES <= group; j += LANES) total += load(x + i + j);
    for (; j < group; j++) rest += x[i + j];
    *sums = sum(total) + rest;
  }
}

// c[ROWS][PANEL] += x[ROWS][inputs] * panel, with weights widened in registers. CHAINS sums of each output, so that no addition waits for the one before.
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
  const auto store_totals = [&]() __attribute__((always_inline)) {
    for (int m = 0; m < ROWS; m++)
      for (int half = 0; half < 2; half++) store(c + m * PANEL + half * LANES, load(c + m * PANEL + half * LANES) + total(m, half));
  };
  if constexpr (F::GROUPED) {
    const long groups = inputs / group;
    for (long g = 0; g < groups; g++) {
      const Place at = F::place(panel, g, group);
      const char* unit = at.codes;
      for (int i = 0; i < group; i += F::UNIT, x += F::UNIT, unit += F::unit_bytes()) {
        for (int line = 0; line < F::unit_bytes(); line += 64) __builtin_prefetch(unit + PREFETCH_BYTES + line, 0, 3);
        F::codes(unit, [&](int j, Pair code) __attribute__((always_inline)) { add(x + j, j % CHAINS, code); });
      }
      const Pair scale = F::scales(at), minimum = F::minima(at);
      for (int m = 0; m < ROWS; m++) {
        Vec low = load(c + m * PANEL) + total(m, 0) * scale.low, high = load(c + m * PANEL + LANES) + total(m, 1) * scale.high;
        if constexpr (F::HAS_MINIMA) low += sums[m * groups + g] * minimum.low, high += sums[m * groups + g] * minimum.high;
        store(c + m * PANEL, low), store(c + m * PANEL + LANES, high);
        for (int chain = 0; chain < CHAINS; chain++) acc[m][chain][0] = acc[m][chain][1] = Vec{};
      }
    }
  } else if constexpr (F::PAIRED) {
    constexpr int WORDS = std::max(1, CHAINS / 2);  // of pairs
    long k = 0;
    const auto add_pairs = [&](int word, const char* at) __attribute__((always_inline)) {
      F::widen_pair(at, [&](int j, Pair right) __attribute__((always_inline)) { add(x + k + 2 * word + j, (2 * word + j) % CHAINS, right); });
    };
    for (; k + 2 * WORDS <= inputs; k += 2 * WORDS, panel += WORDS * PANEL * 4) {
      for (int line = 0; line < WORDS * PANEL * 4; line += 64) __builtin_prefetch(panel + PREFETCH_BYTES + line, 0, 3);
#pragma GCC unroll 2
      for (int word = 0; word < WORDS; word++) add_pairs(word, panel + word * PANEL * 4);
    }
    for (; k + 2 <= inputs; k += 2, panel += PANEL * 4) add_pairs(0, panel);
    if (k < inputs) F::widen_pair(panel, [&](int j, Pair right) { if (j == 0) add(x + k, 0, right); });
    store_totals();
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
    store_totals();
  }
}

template <typename F>
static void multiply_few(int rows, const float* x, const float* sums, const char* panel, long inputs, int group, float* c) {
  for_each_row_tile<MOST_FEW_ROWS<F>>(rows, [&](auto tile, int first) {
    multiply_few<F, decltype(tile)::value>(x + first * inputs, sums, panel, inputs, group, c + first * PANEL);
  });
}

// Inputs that an element of a block or of a row stands for.
template <typename T>
constexpr long INPUTS = std::is_same_v<T, BFloat16Pair> ? 2 : 1;

// c[rows][PANEL] += x[rows][inputs] * panel, in blocks of about MAX_DEPTH rows. T: float or BFloat16Pair, which x consists of.
template <typename F, typename T>
static void multiply_many(int rows, const T* x, const char* panel, long inputs, int group, float* c) {
  constexpr bool AS_IT_LIES = F::template LIES_AS<T>;
  const long most = MAX_DEPTH * INPUTS<T>, num_blocks = (inputs + most - 1) / most, unit = std::max(8, group);
  const long step = ((inputs + num_blocks - 1) / num_blocks + unit - 1) / unit * unit, ldx = (inputs + INPUTS<T> - 1) / INPUTS<T>;
  alignas(64) T block[AS_IT_LIES ? 1 : (MAX_DEPTH + MAX_GROUP) * PANEL];
  for (long k = 0; k < inputs; k += step) {
    const long end = std::min(k + step, inputs);
    const int depth = static_cast<int>((end - k + INPUTS<T> - 1) / INPUTS<T>);
    const T* b = block;
    if constexpr (AS_IT_LIES)
      b = reinterpret_cast<const T*>(panel) + k / INPUTS<T> * PANEL;
    else
      F::widen(panel, k, static_cast<int>(end - k), group, Block<T>{block});
    const long bytes = F::panel_bytes(end, group) - F::panel_bytes(k, group);
    const Prefetch next_block = {panel + F::panel_bytes(end, group), bytes / depth / num_row_tiles(rows)};
    multiply<2>(rows, x + k / INPUTS<T>, ldx, RightSide<T>{&b, depth, PANEL}, depth, c, PANEL, next_block);
  }
}
