// count_tokens: what penalties need to know of a request, made anew from its tokens: which are in its prompt, and how often each
// is in its output. sample.cu keeps it up to date. A block is one seat.
#include "device.cuh"

struct Arguments {
  const int32_t* seats;        // [num_requests]: rows of token_counts
  const int32_t* token_ids;    // the tokens of all requests
  const int32_t* offsets;      // [num_requests + 1]: where those of each begin
  const int32_t* num_prompt;   // [num_requests]: how many of them are its prompt
  uint32_t* token_counts;      // [num_seats, vocab_size]: bit 31: in the prompt; below: times in the output
  int32_t vocab_size;
};

constexpr uint32_t IN_PROMPT = 1u << 31;

KERNEL(count_tokens) {
  const int request = blockIdx.x, first = arguments.offsets[request], end = arguments.offsets[request + 1];
  uint32_t* counts = arguments.token_counts + static_cast<int64_t>(arguments.seats[request]) * arguments.vocab_size;
  for (int token = threadIdx.x; token < arguments.vocab_size; token += NUM_THREADS) counts[token] = 0;
  __syncthreads();
  for (int i = first + threadIdx.x; i < end; i += NUM_THREADS) {
    uint32_t* count = counts + arguments.token_ids[i];
    if (i - first < arguments.num_prompt[request])
      atomicOr(count, IN_PROMPT);
    else
      atomicAdd(count, 1u);
  }
}
