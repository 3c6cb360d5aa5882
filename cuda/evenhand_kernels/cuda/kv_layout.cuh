// Where the keys and values of a token lie in the paged cache, in global memory and, slice by slice, in shared memory.
//
//   keys, values   [num_blocks][num_kv_heads][BLOCK_SIZE / 8][atoms of 8 tokens]     of Element, or of fp8 (e4m3) with KV_FP8
//
// Rows lie in atoms (tiled.cuh), eight tokens after eight. So a slice, 16 tokens of one head, is one contiguous piece that may be
// copied to shared memory as it is, and so are all slices of a block; what has been copied is at once what ldmatrix reads without
// conflicts, and what wgmma reads.
#pragma once
#include "tiled.cuh"

static_assert(HEAD_DIM % 16 == 0 && HEAD_DIM <= 256, "head sizes are multiples of 16 up to 256");
static_assert(BLOCK_SIZE % 16 == 0, "a slice of 16 tokens lies in one block");

#ifdef KV_FP8
static_assert(HEAD_DIM % 32 == 0, "fp8 is read in pairs of chunks of 16");
constexpr int KV_BYTES = 1;
#else
constexpr int KV_BYTES = 2;
#endif

constexpr int ROW_BYTES = HEAD_DIM * KV_BYTES;
constexpr int CHUNKS = ROW_BYTES / 16;
constexpr int SLICE = 16;  // tokens
constexpr int SLICE_BYTES = SLICE * ROW_BYTES;
using KvRows = Tiled<ROW_BYTES>;

// Byte offset of a token in the cache that is the first of eight.
DEVICE int64_t row_offset(int block, int kv_head, int num_kv_heads, int token_in_block) {
  return ((static_cast<int64_t>(block) * num_kv_heads + kv_head) * BLOCK_SIZE + token_in_block) * ROW_BYTES;
}
