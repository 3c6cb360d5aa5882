// Where the keys and values of a token lie in the paged cache, in global memory and, slice by slice, in shared memory.
//
//   keys, values   [num_blocks][num_kv_heads][BLOCK_SIZE tokens][HEAD_DIM]     of Element, or of fp8 (e4m3) with KV_FP8
//
// The row of a token is cut into chunks of 16 bytes, and chunk c of row r stands at place swizzled(r, c) of its row. So a
// slice, 16 tokens of one head, is one contiguous piece that may be copied to shared memory as it is, and there the eight
// rows that one ldmatrix reads at the same c lie in eight different groups of four banks:
//
//   HEAD_DIM 64, 16 bit     place 0   1   2   3   4   5   6   7
//   row 0                         c0  c1  c2  c3  c4  c5  c6  c7
//   row 1                         c1  c0  c3  c2  c5  c4  c7  c6
//   row 2                         c2  c3  c0  c1  c6  c7  c4  c5   ...
#pragma once
#include "device.cuh"

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

// The place of chunk `c` in row `r`, for rows of `NUM_CHUNKS` chunks.
template <int NUM_CHUNKS>
DEVICE int swizzled(int r, int c) {
  if (NUM_CHUNKS % 8 == 0) return c ^ (r & 7);
  if (NUM_CHUNKS % 4 == 0) return c ^ (r >> 1 & 3);
  if (NUM_CHUNKS % 2 == 0) return c ^ (r >> 2 & 1);
  return c;
}

// Byte offset of the row of a token in the cache.
DEVICE int64_t row_offset(int block, int kv_head, int num_kv_heads, int token_in_block) {
  return ((static_cast<int64_t>(block) * num_kv_heads + kv_head) * BLOCK_SIZE + token_in_block) * ROW_BYTES;
}
