// log_probabilities: of the token that was sampled and of the most probable ones, by the model's own distribution: before
// temperature, masks and penalties. A block is one row; reads it two times and once more for each of the most probable.
#include "vocabulary.cuh"

struct Arguments {
  const Logit* logits;         // [num_rows, vocab_size]
  const int32_t* token_ids;    // [num_rows]
  float* sampled;              // [num_rows]
  int32_t* top_ids;            // [num_rows, num_top], most probable first; of equals, the lower token
  float* top;                  // [num_rows, num_top]
  int32_t num_top;             // at most vocab_size
  int32_t vocab_size;
};

struct Shared {
  uint64_t scratch[NUM_WARPS];
};

KERNEL(log_probabilities) {
  SHARED(Shared, shared);
  const int index = blockIdx.x, vocab_size = arguments.vocab_size;
  const Row row(arguments.logits + static_cast<int64_t>(index) * vocab_size, nullptr);
  uint64_t best = 0;
  row.for_each(vocab_size, [&](int token, float logit) { best = max(best, logit_key(logit, token)); });
  best = block_max(best, shared.scratch);
  const float maximum = key_logit(best);
  uint64_t mass = 0;
  row.for_each(vocab_size, [&](int, float logit) { mass += weight_of((logit - maximum) * LOG2_E); });
  mass = block_total(mass, shared.scratch);
  const float log_sum = maximum + logf(static_cast<float>(mass)) - WEIGHT_BITS * LN_2;
  if (threadIdx.x == 0) arguments.sampled[index] = row.logit(arguments.token_ids[index]) - log_sum;
  for (int rank = 0; rank < arguments.num_top; rank++) {
    if (rank > 0) {
      const uint64_t bound = best;
      best = 0;
      row.for_each(vocab_size, [&](int token, float logit) {
        const uint64_t key = logit_key(logit, token);
        if (key < bound) best = max(best, key);
      });
      best = block_max(best, shared.scratch);
    }
    if (threadIdx.x == 0) {
      arguments.top_ids[index * arguments.num_top + rank] = key_token(best);
      arguments.top[index * arguments.num_top + rank] = key_logit(best) - log_sum;
    }
  }
}
