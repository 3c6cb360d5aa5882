// What enters a linear layer, rounded to what its products take: pairs of bfloat16, or codes of 8 bits, of which each group of
// inputs of a row has its own scale.
#pragma once

#include <algorithm>
#include <vector>

#include "pool.h"
#include "vec.h"

enum ActivationDtype : int32_t { FLOAT32, BFLOAT16, INT8 };

constexpr int CODE_GROUP = 32;  // inputs that share a scale where the weight has no groups

static inline long num_pairs(long inputs) { return (inputs + 1) / 2; }

// Rows of `inputs` numbers.
struct Rows {
  const float* x;
  long rows, inputs;
};

// [rows][inputs / 2, rounded up].
static inline std::vector<BFloat16Pair> to_pairs(Pool& pool, Rows from) {
  std::vector<BFloat16Pair> pairs(from.rows * num_pairs(from.inputs));
  pool.run(from.rows, [&](long row) {
    const float* x = from.x + row * from.inputs;
    BFloat16* to = reinterpret_cast<BFloat16*>(pairs.data() + row * num_pairs(from.inputs));
    long k = 0;
    for (; k + LANES <= from.inputs; k += LANES) narrow(load(x + k), to + k);
    for (; k < from.inputs; k++) narrow(x[k], to + k);
  });
  return pairs;
}

// Codes of rows whose `inputs` are a multiple of `group`, and that of LANES.
struct CodedRows {
  std::vector<int8_t> codes;    // [rows][inputs]
  std::vector<float> scales;    // [rows][inputs / group]
  std::vector<int32_t> sums;    // of the codes of each group
};

// Of a group of a row: the largest becomes 127. Where anything is not finite, the scale is not a number.
static inline float scale_of(const float* x, int size) {
  Vec most = {}, probe = {};
  int i = 0;
  for (; i + LANES <= size; i += LANES) most = max(most, max(load(x + i), -load(x + i))), probe += load(x + i) * 0.0f;
  float result = largest(most), rest = sum(probe);
  for (; i < size; i++) result = std::max(result, std::abs(x[i])), rest += x[i] * 0.0f;
  return result / 127.0f + rest;
}

static inline float inverse_of(float scale) { return scale > 1e-30f ? 1.0f / scale : 0.0f; }

// EVEN_FIRST: of eight inputs those at even places come first, as codes of 4 bits are taken from a word.
template <bool EVEN_FIRST>
static CodedRows to_codes(Pool& pool, Rows from, int group) {
  const long groups = from.inputs / group;
  CodedRows result = {std::vector<int8_t>(from.rows * from.inputs), std::vector<float>(from.rows * groups),
                      std::vector<int32_t>(from.rows * groups)};
  ByteVec order;
  for (int i = 0; i < LANES; i++) order[i] = EVEN_FIRST ? i / 8 * 8 + i % 4 * 2 + i % 8 / 4 : i;
  pool.run(from.rows, [&](long row) {
    for (long g = 0; g < groups; g++) {
      const long first = row * from.inputs + g * group, at = row * groups + g;
      const float scale = result.scales[at] = scale_of(from.x + first, group), inverse = inverse_of(scale);
      IntVec total = {};
      for (int i = 0; i < group; i += LANES) {
        const IntVec codes = __builtin_convertvector(nearest(load(from.x + first + i) * inverse), IntVec);
        total += codes;
        *reinterpret_cast<ByteVec*>(result.codes.data() + first + i) = __builtin_shuffle(__builtin_convertvector(codes, ByteVec), order);
      }
      for (int i = 0; i < LANES; i++) result.sums[at] += total[i];
    }
  });
  return result;
}

// The same numbers as float32, for products that are made in it: [rows][inputs].
static inline std::vector<float> rounded(Pool& pool, Rows from, ActivationDtype dtype, int group) {
  std::vector<float> result(from.rows * from.inputs);
  pool.run(from.rows, [&](long row) {
    const float* x = from.x + row * from.inputs;
    float* to = result.data() + row * from.inputs;
    for (long first = 0; first < from.inputs; first += group) {
      const long end = std::min(first + group, from.inputs);
      const float scale = dtype == INT8 ? scale_of(x + first, static_cast<int>(end - first)) : 0.0f, inverse = inverse_of(scale);
      for (long k = first; k < end; k++) to[k] = dtype == INT8 ? nearest(x[k] * inverse) * scale : through_bfloat16(x[k]);
    }
  });
  return result;
}
