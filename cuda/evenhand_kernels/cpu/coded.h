// Products of rows with the codes of a panel as they lie: four inputs at a time with rows in codes of 8 bits (vpdpbusd), two with
// rows in bfloat16 (vdpbf16ps), which holds a code of 4 or 8 bits exactly. Nothing of a weight is rounded:
//
//     sum(x * weight) = scale * sum(x * (code + offset)) + (minimum - offset * scale) * sum(x), for each group of inputs
#pragma once

#include "activations.h"
#include "multiply.h"
#include "weight.h"

constexpr long PREFETCH_BYTES = 2048;  // how far weights are asked for ahead
constexpr int MAX_CODED_ROWS = LANES == 16 ? 11 : 6;  // of a tile: 22 sums leave registers for codes, scales and minima

// Sums of products of rows in codes of 8 bits.
struct ByteProducts {
  using Sums = IntVec;
  static constexpr int INPUTS = 4;  // of a word of a row
  static constexpr bool SCALED = true;  // a group of a row has a scale
  template <typename F>
  static constexpr int OFFSET = F::BYTE_OFFSET;

  template <typename F, typename Visit>
  static inline __attribute__((always_inline)) void words(const char* unit, const Visit& visit) { F::unsigned_codes(unit, visit); }
  static inline IntVec add(IntVec sums, IntVec codes, IntVec row) { return dot(sums, codes, row); }
  static inline Vec total(IntVec sums) { return __builtin_convertvector(sums, Vec); }
};

// Of rows in bfloat16.
struct PairProducts {
  using Sums = Vec;
  static constexpr int INPUTS = 2;
  static constexpr bool SCALED = false;
  template <typename F>
  static constexpr int OFFSET = F::PAIR_OFFSET;

  template <typename F, typename Visit>
  static inline __attribute__((always_inline)) void words(const char* unit, const Visit& visit) { F::code_pairs(unit, visit); }
  static inline Vec add(Vec sums, IntVec codes, IntVec row) {
    return multiply_add(sums, (Vec)row, (Vec)codes, static_cast<const BFloat16Pair*>(nullptr));
  }
  static inline Vec total(Vec sums) { return sums; }
};

// c[ROWS][PANEL] += x[ROWS][inputs] * panel.
template <typename F, typename P, int ROWS>
static void multiply_coded(CodedRows x, const char* panel, long inputs, int group, float* c) {
  constexpr int CHAINS = ROWS == 1 ? 4 : ROWS == 2 ? 2 : 1;  // so that no addition waits for the one before
  constexpr int WORDS = F::UNIT / P::INPUTS, OFFSET = P::template OFFSET<F>;
  const long groups = inputs / group, stride = inputs / P::INPUTS;
  const Word* row = x.words;
  for (long g = 0; g < groups; g++) {
    typename P::Sums acc[ROWS][CHAINS][2] = {};
    const Place at = F::place(panel, g, group);
    const char* unit = at.codes;
    for (int i = 0; i < group; i += F::UNIT, row += WORDS, unit += F::unit_bytes()) {
      for (int line = 0; line < F::unit_bytes(); line += 64) __builtin_prefetch(unit + PREFETCH_BYTES + line, 0, 3);
      P::template words<F>(unit, [&](int word, IntVec low, IntVec high) __attribute__((always_inline)) {
#pragma GCC unroll 12
        for (int m = 0; m < ROWS; m++) {
          const IntVec left = IntVec{} + row[m * stride + word];
          acc[m][word % CHAINS][0] = P::add(acc[m][word % CHAINS][0], low, left);
          acc[m][word % CHAINS][1] = P::add(acc[m][word % CHAINS][1], high, left);
        }
      });
    }
    const Pair scale = F::code_scales(at), minimum = F::minima_beside(at, OFFSET);
#pragma GCC unroll 12
    for (int m = 0; m < ROWS; m++) {
      const float sum = x.sums[m * groups + g];
      for (int half = 0; half < 2; half++) {
        auto sums = acc[m][0][half];
        for (int chain = 1; chain < CHAINS; chain++) sums += acc[m][chain][half];
        Vec by = half ? scale.high : scale.low;
        if constexpr (P::SCALED) by *= x.scales[m * groups + g];
        float* to = c + m * PANEL + half * LANES;
        Vec result = load(to) + P::total(sums) * by;
        if constexpr (F::HAS_MINIMA || OFFSET) result += (half ? minimum.high : minimum.low) * sum;
        store(to, result);
      }
    }
  }
}

// The same for any number of rows.
template <typename F, typename P>
static void multiply_coded(int rows, CodedRows x, const char* panel, long inputs, int group, float* c) {
  for_each_row_tile<MAX_CODED_ROWS>(rows, [&](auto tile, int first) {
    multiply_coded<F, P, decltype(tile)::value>(x.from(first, inputs / P::INPUTS, inputs / group), panel, inputs, group, c + first * PANEL);
  });
}
