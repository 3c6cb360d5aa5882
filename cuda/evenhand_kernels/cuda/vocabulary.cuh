// One block works on one row of logits: loads, reductions over the block, weights as whole numbers.
//
// A weight is exp(logit - max), in units of 2^-40 as a 64-bit integer. Sums of integers do not depend on their order, so every
// result is the same however many threads there are; and what is below 2^-40 of the best token's probability never counts.
#pragma once
#include "device.cuh"

#ifdef LOGITS_FP32
typedef float Logit;
DEVICE float to_float(float logit) { return logit; }
#else
typedef Element Logit;
DEVICE float to_float(Element logit) { return from_element(logit); }
#endif

constexpr float LOG2_E = 1.4426950408889634f, LN_2 = 0.6931471805599453f;
constexpr int WEIGHT_BITS = 40;
constexpr int NUM_WARPS = NUM_THREADS / 32;

// Orders like the numbers, and breaks ties for the lower token; what is not a number is above all of them.
DEVICE uint64_t logit_key(float logit, int token) {
  const uint32_t bits = logit == logit ? __float_as_uint(logit) : 0x7fffffffu;
  const uint32_t ordered = bits >> 31 ? ~bits : bits | 0x80000000u;
  return static_cast<uint64_t>(ordered) << 32 | ~static_cast<uint32_t>(token);
}
DEVICE int key_token(uint64_t key) { return static_cast<int>(~static_cast<uint32_t>(key)); }
DEVICE float key_logit(uint64_t key) {
  const uint32_t ordered = static_cast<uint32_t>(key >> 32);
  return __uint_as_float(ordered >> 31 ? ordered & 0x7fffffff : ~ordered);
}

// `scaled` is log2 of the weight, 0 for the best token.
DEVICE uint64_t weight_of(float scaled) {
  return static_cast<uint64_t>(exp2_approx(scaled) * static_cast<float>(1ull << WEIGHT_BITS));
}

// A row of logits, or of what adjust.cu has made of it.
struct Row {
  const Logit* logits;
  const float* adjusted;  // null: the logits themselves
  int before;             // numbers between the row and the 16 bytes in memory that it begins in

  DEVICE Row(const Logit* plain, const float* other)
      : logits(plain), adjusted(other),
        before(other ? static_cast<int>(reinterpret_cast<uint64_t>(other) % 16 / sizeof(float))
                     : static_cast<int>(reinterpret_cast<uint64_t>(plain) % 16 / sizeof(Logit))) {}

  DEVICE float logit(int token) const { return adjusted ? adjusted[token] : to_float(logits[token]); }

  // Calls `use(token, logit)` for the tokens of [begin, end) that are the thread's part, in no order: eight neighbours at a time.
  template <class Use>
  DEVICE void for_each(int begin, int end, int thread, int num_threads, Use use) const {
    for (int group = (begin + before) / 8 + thread; group * 8 - before < end; group += num_threads) {
      const int first = group * 8 - before;
      if (first >= begin && first + 8 <= end) {
        const Eight eight = load_eight(first);
#pragma unroll
        for (int i = 0; i < 8; i++) use(first + i, eight.x[i]);
      } else {
#pragma unroll 1
        for (int token = max(first, begin); token < min(first + 8, end); token++) use(token, logit(token));
      }
    }
  }
  // For all of them by the whole block.
  template <class Use>
  DEVICE void for_each(int vocab_size, Use use) const {
    for_each(0, vocab_size, threadIdx.x, NUM_THREADS, use);
  }

  // Eight neighbours of which the first lies at a multiple of 16 bytes.
  DEVICE Eight load_eight(int token) const {
    if (adjusted) return floats(adjusted + token);
#ifdef LOGITS_FP32
    return floats(logits + token);
#else
    return unpack_eight(load_16B(logits + token));
#endif
  }

 private:
  DEVICE static Eight floats(const float* from) {
    const uint4 low = load_16B(from), high = load_16B(from + 4);
    return {{__uint_as_float(low.x), __uint_as_float(low.y), __uint_as_float(low.z), __uint_as_float(low.w),
             __uint_as_float(high.x), __uint_as_float(high.y), __uint_as_float(high.z), __uint_as_float(high.w)}};
  }
};

DEVICE uint64_t block_max(uint64_t value, uint64_t (&scratch)[NUM_WARPS]) {
#pragma unroll
  for (int distance = 16; distance; distance /= 2) value = max(value, __shfl_xor_sync(ALL_LANES, value, distance));
  __syncthreads();  // whoever reads an earlier result has done so
  if (lane_index() == 0) scratch[warp_index()] = value;
  __syncthreads();
  uint64_t result = scratch[0];
#pragma unroll
  for (int warp = 1; warp < NUM_WARPS; warp++) result = max(result, scratch[warp]);
  return result;
}

DEVICE uint64_t warp_total(uint64_t value) {
#pragma unroll
  for (int distance = 16; distance; distance /= 2) value += __shfl_xor_sync(ALL_LANES, value, distance);
  return value;
}

DEVICE uint64_t block_total(uint64_t value, uint64_t (&scratch)[NUM_WARPS]) {
  value = warp_total(value);
  __syncthreads();
  if (lane_index() == 0) scratch[warp_index()] = value;
  __syncthreads();
  uint64_t result = 0;
#pragma unroll
  for (int warp = 0; warp < NUM_WARPS; warp++) result += scratch[warp];
  return result;
}
