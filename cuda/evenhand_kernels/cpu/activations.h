// What enters a linear layer, rounded to what its products take: pairs of bfloat16, or codes of 8 or 16 bits, of which each group of
// inputs of a row has its own scale.
#pragma once

#include <algorithm>
#include <cmath>
#include <memory>
#include <vector>

#include "norm.h"
#include "pool.h"
#include "vec.h"

enum ActivationDtype : int32_t { FLOAT32, BFLOAT16, INT8, INT16 };

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
  for_each_row(pool, from.rows, from.inputs, [&](long row) {
    narrow(from.x + row * from.inputs, from.inputs, reinterpret_cast<BFloat16*>(pairs.data() + row * num_pairs(from.inputs)));
  });
  return pairs;
}

// Rows whose `inputs` are a multiple of `group`, and that of LANES, as a product with the codes of a weight takes them.
struct CodedRows {
  const Word* words;    // [rows][inputs / those of a word]
  const float* scales;  // [rows][inputs / group]; null: 1
  const float* sums;    // of the rounded inputs of each group, in the same shape

  CodedRows from(long row, long num_words, long num_groups) const {
    return {words + row * num_words, scales ? scales + row * num_groups : nullptr, sums + row * num_groups};
  }
};

// Their memory.
class CodedMemory {
 public:
  CodedMemory() = default;
  CodedMemory(long num_words, long num_groups, bool has_scales)
      : words_(new int32_t[num_words]), scales_(has_scales ? new float[num_groups] : nullptr), sums_(new float[num_groups]) {}

  int32_t* words() { return words_.get(); }
  float* scales() { return scales_.get(); }
  float* sums() { return sums_.get(); }
  CodedRows rows() const { return {words_.get(), scales_.get(), sums_.get()}; }

 private:
  std::unique_ptr<int32_t[]> words_;
  std::unique_ptr<float[]> scales_, sums_;
};

// What the largest of a group of a row becomes.
static inline float largest_code(ActivationDtype dtype) { return dtype == INT8 ? 127.0f : 32767.0f; }

// Of a group of a row: the largest becomes `most_code`. Where anything is not finite, the scale is not a number.
static inline float scale_of(const float* x, int size, float most_code) {
  Vec most = {}, probe = {};
  int i = 0;
  for (; i + LANES <= size; i += LANES) most = max(most, max(load(x + i), -load(x + i))), probe += load(x + i) * 0.0f;
  float result = largest(most), rest = any(probe != probe) ? NAN : 0.0f;
  for (; i < size; i++) result = std::max(result, std::abs(x[i])), rest += x[i] * 0.0f;
  return result / most_code + rest;
}

static inline float inverse_of(float scale) { return scale > 1e-30f ? 1.0f / scale : 0.0f; }

// Codes of 8 bits, in the order in which codes of format F are taken from words.
template <typename F>
static CodedMemory to_codes(Pool& pool, Rows from, int group) {
  const long groups = from.inputs / group;
  CodedMemory result(from.rows * from.inputs / 4, from.rows * groups, true);
  ByteVec order;
  for (int i = 0; i < LANES; i++) order[i] = F::byte_input(i);
  for_each_row(pool, from.rows, from.inputs, [&](long row) {
    for (long g = 0; g < groups; g++) {
      const long first = row * from.inputs + g * group, at = row * groups + g;
      const float scale = result.scales()[at] = scale_of(from.x + first, group, largest_code(INT8)), inverse = inverse_of(scale);
      Vec total = {};
      for (int i = 0; i < group; i += LANES) {
        const Vec codes = nearest(load(from.x + first + i) * inverse);
        total += codes;
        const ByteVec bytes = __builtin_convertvector(__builtin_convertvector(codes, IntVec), ByteVec);
        *reinterpret_cast<ByteVec*>(reinterpret_cast<int8_t*>(result.words()) + first + i) = __builtin_shuffle(bytes, order);
      }
      result.sums()[at] = sum(total) * scale;
    }
  });
  return result;
}

// Pairs of bfloat16, in the order in which codes of format F are.
template <typename F>
static CodedMemory to_coded_pairs(Pool& pool, Rows from, int group) {
  const long groups = from.inputs / group;
  CodedMemory result(from.rows * from.inputs / 2, from.rows * groups, false);
  HalfVec order;
  for (int i = 0; i < LANES; i++) order[i] = F::pair_input(i);
  for_each_row(pool, from.rows, from.inputs, [&](long row) {
    for (long g = 0; g < groups; g++) {
      const long first = row * from.inputs + g * group;
      BFloat16* to = reinterpret_cast<BFloat16*>(result.words()) + first;
      Vec total = {};
      for (int i = 0; i < group; i += LANES) {
        narrow(load(from.x + first + i), to + i);
        total += load(to + i);
        HalfVec* halves = reinterpret_cast<HalfVec*>(to + i);
        *halves = __builtin_shuffle(*halves, order);
      }
      result.sums()[row * groups + g] = sum(total);
    }
  });
  return result;
}

// The same numbers as float32, for products that are made in it: [rows][inputs].
static inline std::vector<float> rounded(Pool& pool, Rows from, ActivationDtype dtype, int group) {
  std::vector<float> result(from.rows * from.inputs);
  for_each_row(pool, from.rows, from.inputs, [&](long row) {
    const float* x = from.x + row * from.inputs;
    float* to = result.data() + row * from.inputs;
    for (long first = 0; first < from.inputs; first += group) {
      const long end = std::min(first + group, from.inputs);
      if (dtype == BFLOAT16) {
        std::transform(x + first, x + end, to + first, through_bfloat16);
        continue;
      }
      const float scale = scale_of(x + first, static_cast<int>(end - first), largest_code(dtype)), inverse = inverse_of(scale);
      for (long k = first; k < end; k++) to[k] = nearest(x[k] * inverse) * scale;
    }
  });
  return result;
}
