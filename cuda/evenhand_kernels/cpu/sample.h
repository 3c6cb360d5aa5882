// One token of each row of logits, as sampler.py defines it: the inverse of the cumulative distribution, in the order of
// token ids, at a number that depends on (seed, counter) alone. Rows are drawn in parallel.
#pragma once

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>
#include <functional>
#include <vector>

#include "pool.h"
#include "vec.h"

struct Draw {
  float temperature, top_p;  // temperature 0: the likeliest token; top_p 1: all
  int32_t top_k;             // 0: all
  uint64_t seed, counter;
  const uint32_t* allowed;  // bit t % 32 of word t / 32 is set where token t may come; null: all may
};

constexpr int32_t INVALID = -1;  // instead of a token: the row holds a NaN or an infinity, or allows no token
constexpr int RUN = 256;         // tokens whose weights are summed before one of them is looked for

// The first output of numpy's Philox(key=seed, counter=start), Philox4x64-10 (doi 10.1145/2063384.2063405), as [0, 1).
static inline double uniform(uint64_t seed, uint64_t start) {
  uint64_t counter[4] = {start + 1, start + 1 == 0, 0, 0}, key[2] = {seed, 0};
  for (int round = 0; round < 10; round++) {
    const auto even = static_cast<unsigned __int128>(0xD2E7470EE14C6C93u) * counter[0];
    const auto odd = static_cast<unsigned __int128>(0xCA5A826395121157u) * counter[2];
    counter[0] = static_cast<uint64_t>(odd >> 64) ^ counter[1] ^ key[0];
    counter[1] = static_cast<uint64_t>(odd);
    counter[2] = static_cast<uint64_t>(even >> 64) ^ counter[3] ^ key[1];
    counter[3] = static_cast<uint64_t>(even);
    key[0] += 0x9E3779B97F4A7C15u, key[1] += 0xBB67AE8584CAA73Bu;
  }
  return static_cast<double>(counter[0] >> 11) * 0x1p-53;
}

// A row of logits; those of tokens that may not come are -infinity, whatever they are. A vector begins at a multiple of LANES.
struct AllLogits {
  const float* logits;

  bool is_void(long) const { return false; }  // whether no token of the vector that begins there may come
  Vec vec(long i) const { return load(logits + i); }
  float operator[](long i) const { return logits[i]; }
};

struct AllowedLogits {
  const float* logits;
  const uint32_t* allowed;

  uint32_t bits(long i) const { return allowed[i / 32] >> i % 32 & ((1u << LANES) - 1); }
  bool is_void(long i) const { return bits(i) == 0; }
  Vec vec(long i) const {
    IntVec lane;
    for (int l = 0; l < LANES; l++) lane[l] = 1 << l;
    return (lane & static_cast<int32_t>(bits(i))) != 0 ? load(logits + i) : splat(-INFINITY);
  }
  float operator[](long i) const { return allowed[i / 32] >> i % 32 & 1 ? logits[i] : -INFINITY; }
};

// The largest logit; NaN if there is one.
template <typename Logits>
static inline float highest(const Logits& logits, long size) {
  Vec high = splat(-INFINITY);
  IntVec unordered = {};
  long i = 0;
  for (; i + LANES <= size; i += LANES) {
    if (logits.is_void(i)) continue;
    const Vec v = logits.vec(i);
    high = max(high, v), unordered |= v != v;
  }
  float result = largest(high);
  bool has_nan = any(unordered);
  for (; i < size; i++) result = std::max(result, logits[i]), has_nan |= logits[i] != logits[i];
  return has_nan ? NAN : result;
}

// The first token with this logit, which there is.
template <typename Logits>
static inline int32_t first(const Logits& logits, long size, float logit) {
  long i = 0;
  while (i + LANES <= size && (logits.is_void(i) || !any(logits.vec(i) == logit))) i += LANES;
  while (logits[i] != logit) i++;
  return static_cast<int32_t>(i);
}

// Weights relative to the largest one's; what is below e^-87 counts as 0, as an excluded token does.
template <typename Logits>
static inline void weigh(const Logits& logits, float* weights, long size, float high, float temperature) {
  const float factor = 1.0f / temperature;
  long i = 0;
  for (; i + LANES <= size; i += LANES) {
    const Vec x = logits.is_void(i) ? splat(-INFINITY) : (logits.vec(i) - high) * factor;
    store(weights + i, x > -87.0f ? exp(x) : Vec{});
  }
  for (; i < size; i++) {
    const float x = (logits[i] - high) * factor;
    weights[i] = x > -87.0f ? std::exp(x) : 0.0f;
  }
}

// Sums of runs of those weights that are at least `least`.
static inline double sum_runs(const float* weights, long size, float least, std::vector<double>& runs) {
  runs.clear();
  double total = 0;
  for (long run = 0; run < size; run += RUN) {
    const long end = std::min(size, run + RUN);
    Vec sums = {};
    long i = run;
    for (; i + LANES <= end; i += LANES) {
      const Vec v = load(weights + i);
      sums += v >= least ? v : Vec{};
    }
    double partial = sum(sums);
    for (; i < end; i++) partial += weights[i] >= least ? weights[i] : 0;
    runs.push_back(partial);
    total += partial;
  }
  return total;
}

// The weights that are at least `bound`, which is above 0.
static std::vector<float> at_least(const float* weights, long size, float bound) {
  std::vector<float> result;
  long i = 0;
  for (; i + LANES <= size; i += LANES) {
    if (!any(load(weights + i) >= bound)) continue;
    for (int lane = 0; lane < LANES; lane++)
      if (weights[i + lane] >= bound) result.push_back(weights[i + lane]);
  }
  for (; i < size; i++)
    if (weights[i] >= bound) result.push_back(weights[i]);
  return result;
}

// Keeps of many weights those in one bin of a histogram over their leading bits: that in which the walk of `walk_down` ends.
// Takes what lies above it off `num` and `mass`.
static void keep_last_bin(std::vector<float>& weights, long& num, double& mass) {
  constexpr int SHIFT = 19, BINS = 1 << 12;  // a float's sign, which is 0, and 19 bits of its fraction do not count
  const auto bin_of = [](float weight) {
    uint32_t bits;
    std::memcpy(&bits, &weight, 4);
    return bits >> SHIFT;
  };
  std::vector<double> masses(BINS);
  std::vector<int32_t> counts(BINS);
  for (const float weight : weights) masses[bin_of(weight)] += weight, counts[bin_of(weight)]++;
  uint32_t last = 0;
  for (int bin = BINS - 1; bin >= 0; bin--) {
    if (counts[bin] == 0) continue;
    last = bin;
    if (counts[bin] >= num || masses[bin] >= mass) break;
    num -= counts[bin], mass -= masses[bin];
  }
  std::erase_if(weights, [&](float weight) { return bin_of(weight) != last; });
}

// Walks down the weights that are at least `bound`, from the largest, until `num` of them or this mass is reached; the last
// one seen.
static float walk_down(const float* weights, long size, float bound, long num, double mass) {
  constexpr size_t MANY = 1024;
  std::vector<float> candidates = at_least(weights, size, bound);
  if (candidates.size() > MANY) keep_last_bin(candidates, num, mass);
  std::sort(candidates.begin(), candidates.end(), std::greater<float>());
  for (const float weight : candidates)
    if (--num == 0 || (mass -= weight) <= 0) return weight;
  return candidates.back();
}

// The least weight that top_k, then top_p keep; what equals it is kept too, whatever its place.
static float least_kept(const float* weights, long size, const Draw& draw, std::vector<double>& runs) {
  float least = 0x1p-149f;
  if (draw.top_k > 0 && draw.top_k < size) least = walk_down(weights, size, least, draw.top_k, INFINITY);
  if (draw.top_p < 1) {
    const double mass = sum_runs(weights, size, least, runs);
    // All tokens below this bound together have less than the mass that top_p leaves out.
    const float bound = std::max(least, static_cast<float>((1 - draw.top_p) * mass / size * 0.999));
    least = walk_down(weights, size, bound, size + 1, draw.top_p * mass);
  }
  return least;
}

template <typename Logits>
static int32_t draw_row(const Logits& logits, long size, const Draw& draw) {
  thread_local std::vector<float> scratch;  // stays in the core's cache from one row to the next
  const float high = highest(logits, size);
  if (!std::isfinite(high)) return INVALID;
  if (draw.temperature == 0) return first(logits, size, high);
  if (scratch.size() < static_cast<size_t>(size)) scratch.resize(size);
  float* weights = scratch.data();
  weigh(logits, weights, size, high, draw.temperature);
  std::vector<double> runs;
  const float least = least_kept(weights, size, draw, runs);
  double target = uniform(draw.seed, draw.counter) * sum_runs(weights, size, least, runs);
  long run = 0, last = 0;
  for (long i = 0; i < static_cast<long>(runs.size()); i++)
    if (runs[i] > 0) last = i;  // where rounding may carry the target at most
  for (; run < last && target >= runs[run]; run++) target -= runs[run];
  int32_t token = 0;
  for (long i = run * RUN; i < std::min(size, (run + 1) * RUN); i++) {
    if (weights[i] < least) continue;
    token = static_cast<int32_t>(i);
    if ((target -= weights[i]) < 0) break;
  }
  return token;
}

// The same where few may come: of these alone, whatever the size of the vocabulary.
static int32_t draw_of_few(const float* logits, long size, const Draw& draw) {
  thread_local std::vector<float> few;
  thread_local std::vector<int32_t> tokens;
  few.clear(), tokens.clear();
  for (long word = 0; word * 32 < size; word++) {
    for (uint32_t bits = draw.allowed[word]; bits != 0; bits &= bits - 1) {
      const long token = word * 32 + std::countr_zero(bits);
      if (token < size) few.push_back(logits[token]), tokens.push_back(static_cast<int32_t>(token));
    }
  }
  const int32_t place = draw_row(AllLogits{few.data()}, static_cast<long>(few.size()), draw);
  return place == INVALID ? INVALID : tokens[place];
}

static int32_t draw_allowed(const float* logits, long size, const Draw& draw) {
  constexpr long FEW = 16;  // of so many tokens one, at most
  long num_allowed = 0;
  for (long word = 0; word * 32 < size; word++) num_allowed += std::popcount(draw.allowed[word]);
  return num_allowed * FEW <= size ? draw_of_few(logits, size, draw)
                                   : draw_row(AllowedLogits{logits, draw.allowed}, size, draw);
}

static void draw_rows(Pool& pool, const float* logits, long rows, long size, const Draw* draws, int32_t* token_ids) {
  pool.run(rows, [&](long row) {
    const Draw& draw = draws[row];
    const float* begin = logits + row * size;
    token_ids[row] = draw.allowed == nullptr ? draw_row(AllLogits{begin}, size, draw) : draw_allowed(begin, size, draw);
  });
}
