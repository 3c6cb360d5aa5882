// adjust: logits with masks, biases and penalties, for the rows that have any; the others are sampled as they are.
//
// In this order, as in vLLM: allowed tokens, bias, then repetition, frequency and presence penalties. blockIdx.x is a row, and
// blockIdx.y a piece of the vocabulary. Bound by reading the logits once and writing them once.
#include "vocabulary.cuh"

struct Arguments {
  const Logit* logits;             // [num_rows, vocab_size]
  const int32_t* rows;             // [num_adjusted]: rows of `logits`
  const uint32_t* allowed;         // [num_masks, ceil(vocab_size / 32)], a bit for each token; null: no masks
  const int32_t* masks;            // [num_adjusted]: row of `allowed`, or -1
  const int32_t* bias_offsets;     // [num_adjusted + 1]: the biases of each row; null: none
  const int32_t* bias_tokens;      // no token twice in a row
  const float* bias_values;        // -infinity forbids
  const int32_t* seats;            // [num_adjusted]: row of token_counts, or -1
  const uint32_t* token_counts;    // [num_seats, vocab_size]: count_tokens.cu; null: no penalties
  const int32_t* draft_offsets;    // [num_adjusted + 1]: outputs before each row that are not counted yet; null: none
  const int32_t* draft_tokens;
  const float* repetition;         // [num_adjusted]; 1: off
  const float* frequency;          // [num_adjusted]; 0: off
  const float* presence;           // [num_adjusted]; 0: off
  float* adjusted;                 // [num_adjusted, vocab_size]
  int32_t vocab_size;
};

#define NEGATIVE_INFINITY __uint_as_float(0xff800000u)

struct Penalties {
  const uint32_t* counts;
  const int32_t* drafts;
  int num_drafts;
  float repetition, frequency, presence;

  DEVICE float apply(float logit, int token) const { return apply(logit, token, counts ? counts[token] : 0); }
  // `count`: the token's.
  DEVICE float apply(float logit, int token, uint32_t count) const {
    if (!counts) return logit;
    for (int i = 0; i < num_drafts; i++) count += drafts[i] == token;
    const uint32_t times = count & 0x7fffffff;
    if (count) logit = logit > 0.f ? logit / repetition : logit * repetition;
    return times ? logit - frequency * static_cast<float>(times) - presence : logit;
  }
};

KERNEL(adjust) {
  const int index = blockIdx.x, vocab_size = arguments.vocab_size;
  const Logit* logits = arguments.logits + static_cast<int64_t>(arguments.rows[index]) * vocab_size;
  float* adjusted = arguments.adjusted + static_cast<int64_t>(index) * vocab_size;
  const int mask_row = arguments.allowed ? arguments.masks[index] : -1;
  const uint32_t* mask =
      mask_row < 0 ? nullptr : arguments.allowed + static_cast<int64_t>(mask_row) * ((vocab_size + 31) / 32);
  Penalties penalties{nullptr, nullptr, 0, 1.f, 0.f, 0.f};
  if (arguments.token_counts && arguments.seats[index] >= 0)
    penalties = {arguments.token_counts + static_cast<int64_t>(arguments.seats[index]) * vocab_size, nullptr, 0,
                 arguments.repetition[index], arguments.frequency[index], arguments.presence[index]};
  if (arguments.draft_offsets) {
    penalties.drafts = arguments.draft_tokens + arguments.draft_offsets[index];
    penalties.num_drafts = arguments.draft_offsets[index + 1] - arguments.draft_offsets[index];
  }

  const int piece = round_up((vocab_size + gridDim.y - 1) / gridDim.y, 8);
  const int begin = min(static_cast<int>(blockIdx.y) * piece, vocab_size), end = min(begin + piece, vocab_size);
  const Row row(logits, nullptr);
  if (vocab_size % 8 == 0) {  // then all rows begin at multiples of 16 bytes
    for (int token = begin + threadIdx.x * 8; token < end; token += NUM_THREADS * 8) {
      Eight eight = row.load_eight(token);
      const uint32_t allowed = mask ? mask[token / 32] >> token % 32 : ~0u;
      const uint4 none = {0, 0, 0, 0};
      const uint4 low = penalties.counts ? load_16B(penalties.counts + token) : none;
      const uint4 high = penalties.counts ? load_16B(penalties.counts + token + 4) : none;
      const uint32_t counts[8] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
#pragma unroll
      for (int i = 0; i < 8; i++)
        eight.x[i] = allowed >> i & 1 ? penalties.apply(eight.x[i], token + i, counts[i]) : NEGATIVE_INFINITY;
      store_16B(adjusted + token, {__float_as_uint(eight.x[0]), __float_as_uint(eight.x[1]),
                                   __float_as_uint(eight.x[2]), __float_as_uint(eight.x[3])});
      store_16B(adjusted + token + 4, {__float_as_uint(eight.x[4]), __float_as_uint(eight.x[5]),
                                       __float_as_uint(eight.x[6]), __float_as_uint(eight.x[7])});
    }
  } else {
    for (int token = begin + threadIdx.x; token < end; token += NUM_THREADS) {
      const bool allowed = !mask || mask[token / 32] >> token % 32 & 1;
      adjusted[token] = allowed ? penalties.apply(to_float(logits[token]), token) : NEGATIVE_INFINITY;
    }
  }
  if (!arguments.bias_offsets) return;
  __syncthreads();
  for (int i = arguments.bias_offsets[index] + threadIdx.x; i < arguments.bias_offsets[index + 1]; i += NUM_THREADS) {
    const int token = arguments.bias_tokens[i];
    if (token < begin || token >= end || (mask && !(mask[token / 32] >> token % 32 & 1))) continue;
    adjusted[token] = penalties.apply(to_float(logits[token]) + arguments.bias_values[i], token);
  }
}
