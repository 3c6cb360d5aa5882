// block_copy: copies whole blocks of the paged cache. Bound by memory; grid.y blocks of threads share one copy.
#include "device.cuh"

struct Arguments {
  const int32_t* pairs;  // [num_pairs, 2]: source and destination; no block is the destination of two, nor source of any
  uint8_t* cache;        // [num_blocks, block_bytes]
  int64_t block_bytes;   // a multiple of 16
};

KERNEL(block_copy) {
  const int64_t source = arguments.pairs[blockIdx.x * 2], destination = arguments.pairs[blockIdx.x * 2 + 1];
  const int64_t first = (static_cast<int64_t>(blockIdx.y) * NUM_THREADS + threadIdx.x) * 16;
  for (int64_t offset = first; offset < arguments.block_bytes; offset += static_cast<int64_t>(gridDim.y) * NUM_THREADS * 16)
    store_16B(arguments.cache + destination * arguments.block_bytes + offset,
              load_16B(arguments.cache + source * arguments.block_bytes + offset));
}
