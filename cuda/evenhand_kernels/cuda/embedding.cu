// embedding: gathers the rows of the embedding table. Bound by memory; a thread is 16 bytes.
#include "device.cuh"

struct Arguments {
  const int32_t* token_ids;  // [num_tokens]
  const Element* table;      // [vocab_size, size]
  Element* output;           // [num_tokens, size]
  int32_t num_tokens;
  int32_t size;              // a multiple of 8
};

KERNEL(embedding) {
  const int chunks = arguments.size / 8;
  const int64_t index = static_cast<int64_t>(blockIdx.x) * NUM_THREADS + threadIdx.x, token = index / chunks;
  if (token >= arguments.num_tokens) return;
  const int64_t from = static_cast<int64_t>(arguments.token_ids[token]) * arguments.size + index % chunks * 8;
  store_16B(arguments.output + index * 8, load_16B(arguments.table + from));
}
