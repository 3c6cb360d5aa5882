// An item of at most 16 rows: a decode, or a chunk of a few tokens.
//
// The warps share the rows and deal out the slices of 16 tokens: warp w takes slices w, w + 4, w + 8, ... and copies them
// itself, so no warp ever waits for another until all meet to merge. Bound by the reading of the cache; each byte is read
// once for all query heads of the group.
#pragma once
#include "slices.cuh"
#ifdef BULK_COPY
#include "slices_bulk.cuh"
#else
#include "slices_async.cuh"
#endif

struct DecodeShared : SliceBarriers {
  Element query[DECODE_ROWS * HEAD_DIM];
  union {
    SliceBuffers slices;
    struct {
      float output[NUM_WARPS][DECODE_ROWS][HEAD_DIM + 4];
      float state[NUM_WARPS][DECODE_ROWS][2];
    } parts;
  };
};

// Merges what the warps have found, and writes it.
DEVICE void merge_warps(DecodeShared& shared, const Accumulator<1>& a, const Arguments& arguments, const Item& item,
                        const Rows& rows) {
  const int warp = warp_index(), lane = lane_index();
  __syncthreads();  // the parts lie where the slices were
  for_each_pair(a, 0, [&](int row, int dimension, float low, float high) {
    store_8B(&shared.parts.output[warp][row][dimension], {__float_as_uint(low), __float_as_uint(high)});
  });
  if (lane % 4 == 0) {
#pragma unroll
    for (int half = 0; half < 2; half++) {
      shared.parts.state[warp][lane / 4 + half * 8][0] = a.maximum[0][half];
      shared.parts.state[warp][lane / 4 + half * 8][1] = a.sum[0][half];
    }
  }
  __syncthreads();
  for (int i = threadIdx.x; i < item.num_rows * (HEAD_DIM / 2); i += NUM_THREADS) {
    const int row = i / (HEAD_DIM / 2), dimension = i % (HEAD_DIM / 2) * 2;
    float maximum = NEGATIVE_INFINITY;
#pragma unroll
    for (int w = 0; w < NUM_WARPS; w++) maximum = max(maximum, shared.parts.state[w][row][0]);
    const float base = maximum == NEGATIVE_INFINITY ? 0.f : maximum;
    float sum = 0.f, low = 0.f, high = 0.f;
#pragma unroll
    for (int w = 0; w < NUM_WARPS; w++) {
      const float factor = exp2_approx(shared.parts.state[w][row][0] - base);
      const uint2 pair = load_8B(&shared.parts.output[w][row][dimension]);
      sum += factor * shared.parts.state[w][row][1];
      low += factor * __uint_as_float(pair.x);
      high += factor * __uint_as_float(pair.y);
    }
    write_pair(arguments, item, rows, row, dimension, low, high, sum);
    if (item.partial_row >= 0 && dimension == 0) write_state(arguments, item, row, maximum, sum);
  }
}

DEVICE void attend_decode(DecodeShared& shared, const Arguments& arguments, const Item& item) {
  const Rows rows = load_rows(arguments, item);
  const int warp = warp_index(), num_slices = (item.kv_end - item.kv_begin + SLICE - 1) / SLICE;
  const Slices slices(arguments, item, shared.slices, shared);
  copy_queries<DECODE_ROWS>(shared.query, arguments, item, rows);
  cp_async_commit();

  // Copies run DECODE_STAGES - 1 slices ahead, and their block numbers, which are loads of their own, one more.
  int block = slices.block(warp);
#pragma unroll
  for (int stage = 0; stage < DECODE_STAGES - 1; stage++) {
    const int slice = warp + stage * NUM_WARPS, next = slices.block(slice + NUM_WARPS);
    slices.start(stage, slice, block);
    block = next;
  }
  slices.await_queries();
  __syncthreads();  // the queries are there
  const Visible<1> visible = visible_tokens<1>(arguments, item, rows, 0);
  const int first_position = rows.position + item.first_row / arguments.group;
  const int last_position = rows.position + (item.first_row + item.num_rows - 1) / arguments.group;
  const float scale = score_scale(arguments, item);
#if HEAD_DIM <= 128
  uint4 query[HEAD_DIM / 16];  // stays in registers
#pragma unroll
  for (int k = 0; k < HEAD_DIM / 16; k++) query[k] = query_fragment(shared.query, k);
  auto fragment = [&](int, int k) { return query[k]; };
#else
  auto fragment = [&](int, int k) { return query_fragment(shared.query, k); };
#endif

  Accumulator<1> a;
  clear(a);
  int stage = 0, free_stage = DECODE_STAGES - 1;
  for (int slice = warp; slice < num_slices; slice += NUM_WARPS) {
    __syncwarp();  // all lanes are done with the stage that is filled now
    const int ahead = slice + (DECODE_STAGES - 1) * NUM_WARPS, next = slices.block(ahead + NUM_WARPS);
    slices.start(free_stage, ahead, block);
    block = next;
    const uint8_t* keys = slices.await_keys(stage, slice);
    float scores[1][SLICE / 8][4];
    multiply_keys<1, SLICE>(scores, fragment, keys);
    const int first = slices.first_token(slice);
    const bool masked = first + SLICE - 1 > first_position || first <= last_position - arguments.window;
    const auto shift = raise_maxima<1, SLICE>(scores, a, scale, arguments.soft_cap, [&] {
      if (masked) mask<1, SLICE>(scores, visible, first);
    });
    rescale(a, shift);
    weigh<1, SLICE>(scores, a, shift);
    const uint8_t* values = slices.await_values(stage, slice);
    multiply_values<1, SLICE>(a, scores, values);
    stage = stage + 1 == DECODE_STAGES ? 0 : stage + 1;
    free_stage = free_stage + 1 == DECODE_STAGES ? 0 : free_stage + 1;
  }
  cp_async_wait<0>();
  finish(a);
  merge_warps(shared, a, arguments, item, rows);
}
