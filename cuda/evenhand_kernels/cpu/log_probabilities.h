// What a row of logits says of one token, and of the likeliest ones: in two passes over the row, of which the second takes
// the exponentials. Rows are looked at in parallel.
#pragma once

#include <algorithm>
#include <cmath>

#include "pool.h"
#include "sample.h"
#include "vec.h"

// The largest `num` of a row, best first; of equal ones the first one first.
struct Top {
  long num, found = 0;
  int32_t* tokens;
  float* values;

  float least() const { return found < num ? -INFINITY : values[num - 1]; }

  // Rows are shown from their beginning to their end.
  void show(int32_t token, float value) {
    if (found == num && !(value > least())) return;
    long place = found < num ? found++ : num - 1;
    for (; place > 0 && values[place - 1] < value; place--)
      tokens[place] = tokens[place - 1], values[place] = values[place - 1];
    tokens[place] = token, values[place] = value;
  }
};

static inline void find_top(const float* logits, long size, Top& top) {
  if (top.num == 0) return;
  long i = 0;
  for (; i + LANES <= size; i += LANES) {
    if (top.found == top.num && !any(load(logits + i) > top.least())) continue;
    for (int lane = 0; lane < LANES; lane++) top.show(static_cast<int32_t>(i + lane), logits[i + lane]);
  }
  for (; i < size; i++) top.show(static_cast<int32_t>(i), logits[i]);
}

// Tokens that are likelier.
static inline long count_above(const float* logits, long size, float bound) {
  IntVec counts = {};
  long i = 0;
  for (; i + LANES <= size; i += LANES) counts -= load(logits + i) > bound;
  long result = 0;
  for (int lane = 0; lane < LANES; lane++) result += counts[lane];
  for (; i < size; i++) result += logits[i] > bound;
  return result;
}

// log(sum(exp(logits))), whose largest is `high`.
static inline double log_total(const float* logits, long size, float high) {
  double total = 0;
  for (long run = 0; run < size; run += RUN) {
    const long end = std::min(size, run + RUN);
    Vec sums = {};
    long i = run;
    for (; i + LANES <= end; i += LANES) {
      const Vec x = load(logits + i) - high;
      sums += x > -87.0f ? exp(x) : Vec{};
    }
    total += sum(sums);
    for (; i < end; i++) total += std::exp(logits[i] - high);
  }
  return high + std::log(total);
}

// Of each row: the log probability of its token and its rank, counted from 1; the `num_top` likeliest tokens and theirs.
// NaN where the row holds one.
static void log_probabilities(Pool& pool, const float* logits, long rows, long size, const int32_t* token_ids,
                              long num_top, float* own, int32_t* ranks, int32_t* top_token_ids, float* top) {
  pool.run(rows, [&](long row) {
    const float* values = logits + row * size;
    Top best{.num = num_top, .tokens = top_token_ids + row * num_top, .values = top + row * num_top};
    find_top(values, size, best);
    const double total = log_total(values, size, highest(AllLogits{values}, size));
    const float chosen = values[token_ids[row]];
    own[row] = static_cast<float>(chosen - total);
    ranks[row] = static_cast<int32_t>(count_above(values, size, chosen) + 1);
    for (long i = 0; i < num_top; i++) best.values[i] = static_cast<float>(best.values[i] - total);
  });
}
