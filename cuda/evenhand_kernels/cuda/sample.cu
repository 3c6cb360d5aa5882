// sample: one token for each row of logits, drawn by temperature, min_p, top_k and top_p.
//
// The draw is that of the CPU's sampler (engine: sampler.py): Philox4x64-10 of (seed, index) gives one uniform number, and the
// token is the first, in the order of ids, at which the sum of the kept weights exceeds that share of their total. So a seed
// gives the same token on both, up to the rounding of exp2. What a filter keeps is everything at or above a threshold; ties
// at the threshold are kept. A block is one row; bound by reading it some times, mostly from L2.
#include "vocabulary.cuh"

struct Arguments {
  const Logit* logits;           // [num_rows, vocab_size]
  const float* adjusted;         // [num_adjusted, vocab_size]: rows that adjust.cu has made; null: none
  const int32_t* adjusted_row;   // [num_rows]: the row of `adjusted` to use, or -1: that of `logits`
  const float* temperature;      // [num_rows]; below 1e-5: the best token
  const float* top_p;            // [num_rows]; 1: off
  const float* min_p;            // [num_rows]; 0: off
  const int32_t* top_k;          // [num_rows]; 0: off
  const int64_t* seeds;          // [num_rows]
  const int64_t* indices;        // [num_rows]: output tokens of the request before this one
  const int32_t* seats;          // [num_rows]: row of token_counts, or -1
  uint32_t* token_counts;        // [num_seats, vocab_size]: count_tokens.cu; null: nobody is penalised
  int32_t* token_ids;            // [num_rows]; -1 where a logit is NaN or infinite, or no token is allowed
  int32_t vocab_size;
};

constexpr float MIN_TEMPERATURE = 1e-5f;
constexpr int DIGIT_BITS = 11, NUM_BINS = 1 << DIGIT_BITS;  // 44 bits in four digits

struct Shared {
  uint64_t bins[NUM_BINS];
  uint64_t scratch[NUM_WARPS];
  uint64_t result[2];
};

struct WeighedRow : Row {
  float maximum, scale;

  DEVICE uint64_t weight(float logit) const { return weight_of((logit - maximum) * scale); }
};

// What a token counts for while a threshold is looked for: one, or its weight.
template <bool BY_MASS>
DEVICE uint64_t measure(uint64_t weight) {
  return BY_MASS ? weight : 1;
}

// The largest threshold such that the tokens at or above it measure `target` or more, of those at or above `least`; `least` if
// all of them do not. Finds one digit after the other, from the top.
template <bool BY_MASS>
DEVICE uint64_t find_threshold(Shared& shared, const WeighedRow& row, int vocab_size, uint64_t least, uint64_t target) {
  uint64_t prefix = 0;
  for (int shift = 3 * DIGIT_BITS; shift >= 0; shift -= DIGIT_BITS) {
    __syncthreads();
    for (int bin = threadIdx.x; bin < NUM_BINS; bin += NUM_THREADS) shared.bins[bin] = 0;
    __syncthreads();
    row.for_each(vocab_size, [&](int, float logit) {
      const uint64_t weight = row.weight(logit);
      if (weight >= least && weight >> shift >> DIGIT_BITS == prefix)
        atomicAdd(&shared.bins[weight >> shift & (NUM_BINS - 1)], measure<BY_MASS>(weight));
    });
    __syncthreads();
    if (warp_index() == 0) {  // the bins from the top, 32 at a time: where the target is reached
      uint64_t above = 0;
      int digit = -1;
      for (int top = NUM_BINS - 1; top >= 0 && digit < 0; top -= 32) {
        const uint64_t mine = shared.bins[top - lane_index()];
        uint64_t sum = mine;
#pragma unroll
        for (int distance = 1; distance < 32; distance *= 2) {
          const uint64_t other = __shfl_up_sync(ALL_LANES, sum, distance);
          if (lane_index() >= distance) sum += other;
        }
        const unsigned reached = __ballot_sync(ALL_LANES, above + sum >= target);
        const int lane = reached ? __ffs(reached) - 1 : 31;
        if (reached) {
          digit = top - lane;
          above += __shfl_sync(ALL_LANES, sum - mine, lane);
        } else {
          above += __shfl_sync(ALL_LANES, sum, 31);
        }
      }
      if (lane_index() == 0) {
        shared.result[0] = static_cast<uint64_t>(static_cast<int64_t>(digit));
        shared.result[1] = above;
      }
    }
    __syncthreads();
    const int64_t digit = static_cast<int64_t>(shared.result[0]);
    if (digit < 0) return least;
    target -= shared.result[1];
    prefix = prefix << DIGIT_BITS | static_cast<uint64_t>(digit);
  }
  return max(least, prefix);
}

// numpy's Philox(key=seed, counter=index).random_raw() (Random123, SC 2011).
DEVICE uint64_t philox(uint64_t seed, uint64_t index) {
  uint64_t x0 = index + 1, x1 = 0, x2 = 0, x3 = 0, key0 = seed, key1 = 0;
#pragma unroll
  for (int round = 0; round < 10; round++) {
    const uint64_t high0 = __umul64hi(0xD2E7470EE14C6C93ull, x0), low0 = 0xD2E7470EE14C6C93ull * x0;
    const uint64_t high1 = __umul64hi(0xCA5A826395121157ull, x2), low1 = 0xCA5A826395121157ull * x2;
    x0 = high1 ^ x1 ^ key0;
    x2 = high0 ^ x3 ^ key1;
    x1 = low1;
    x3 = low0;
    key0 += 0x9E3779B97F4A7C15ull;
    key1 += 0xBB67AE8584CAA73Bull;
  }
  return x0;
}

// The token at which the sum of kept weights exceeds `target`: the range that has it, cut into a piece for each warp, again
// and again.
DEVICE int find_token(Shared& shared, const WeighedRow& row, int vocab_size, uint64_t least, uint64_t target) {
  int begin = 0, end = vocab_size;
  while (end - begin > 1) {
    const int piece = (end - begin + NUM_WARPS - 1) / NUM_WARPS, first = begin + warp_index() * piece;
    uint64_t sum = 0;
    row.for_each(first, min(first + piece, end), lane_index(), 32, [&](int, float logit) {
      const uint64_t weight = row.weight(logit);
      if (weight >= least) sum += weight;
    });
    sum = warp_total(sum);
    __syncthreads();
    if (lane_index() == 0) shared.scratch[warp_index()] = sum;
    __syncthreads();
    int warp = 0;
    while (warp < NUM_WARPS - 1 && target >= shared.scratch[warp]) target -= shared.scratch[warp++];
    begin += warp * piece;
    end = min(begin + piece, end);
  }
  return begin;
}

DEVICE int draw(Shared& shared, const Arguments& arguments, const WeighedRow& row, int index) {
  const int vocab_size = arguments.vocab_size, top_k = arguments.top_k[index];
  const float top_p = arguments.top_p[index], min_p = arguments.min_p[index];
  uint64_t least = max(static_cast<uint64_t>(1), static_cast<uint64_t>(min_p * static_cast<float>(1ull << WEIGHT_BITS)));
  if (top_k > 0 && top_k < vocab_size) least = find_threshold<false>(shared, row, vocab_size, least, top_k);
  for (bool by_mass = top_p < 1.f;; by_mass = false) {
    uint64_t mass = 0;
    row.for_each(vocab_size, [&](int, float logit) {
      const uint64_t weight = row.weight(logit);
      if (weight >= least) mass += weight;
    });
    mass = block_total(mass, shared.scratch);
    if (!by_mass) {
      const uint64_t random = philox(arguments.seeds[index], arguments.indices[index]) >> 11 << 11;  // 53 bits
      return find_token(shared, row, vocab_size, least, __umul64hi(random, mass));
    }
    const uint64_t target = max(static_cast<uint64_t>(1), static_cast<uint64_t>(static_cast<double>(top_p) * static_cast<double>(mass)));
    least = find_threshold<true>(shared, row, vocab_size, least, target);
  }
}

KERNEL(sample) {
  SHARED(Shared, shared);
  const int index = blockIdx.x, vocab_size = arguments.vocab_size;
  const int adjusted_row = arguments.adjusted ? arguments.adjusted_row[index] : -1;
  const float* adjusted = adjusted_row < 0 ? nullptr : arguments.adjusted + static_cast<int64_t>(adjusted_row) * vocab_size;
  WeighedRow row{{arguments.logits + static_cast<int64_t>(index) * vocab_size, adjusted}, 0.f, 0.f};
  uint64_t best = 0;
  row.for_each(vocab_size, [&](int token, float logit) { best = max(best, logit_key(logit, token)); });
  best = block_max(best, shared.scratch);
  row.maximum = key_logit(best);
  const bool finite = (__float_as_uint(row.maximum) & 0x7f800000u) != 0x7f800000u;
  int token = finite ? key_token(best) : -1;
  const float temperature = arguments.temperature[index];
  if (finite && temperature >= MIN_TEMPERATURE) {
    row.scale = LOG2_E / temperature;
    token = draw(shared, arguments, row, index);
  }
  if (threadIdx.x == 0) {
    arguments.token_ids[index] = token;
    if (finite && arguments.token_counts && arguments.seats[index] >= 0)
      arguments.token_counts[static_cast<int64_t>(arguments.seats[index]) * vocab_size + token]++;
  }
}
