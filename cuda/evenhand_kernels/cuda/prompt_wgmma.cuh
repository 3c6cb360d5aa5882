// An item of up to PROMPT_ROWS rows on Hopper: a chunk of a prompt, by wgmma.
//
// The block is one warpgroup, and its rows are one or two parts of 64, of which a warp has 16 each. A part's scores come from queries
// and keys in shared memory; they become its weights, which stay in registers, and its output comes from these and the values. With two
// parts, which take turns, the tensor cores multiply weights by values for one while the warps take the softmax of the other:
//
//   warps          wait | softmax 1, t   | wait | softmax 0, t+1 | wait | softmax 1, t+1 | ...
//   tensor cores   S 1,t| O 0, t         |S 0,t+1| O 1, t        |S 1,t+1| O 0, t+1      | ...      S: scores, O: output; part, tile
//
// What they wait for, scores, is the time of the other block of the multiprocessor. (FlashAttention-3, arXiv 2407.08608, has two
// warpgroups take turns in one block, which needs all of the multiprocessor and a third warpgroup to copy; decodes could not share it.)
// There is one set of registers for scores and one for weights: two of each, and products of both kinds at any time, do not fit.
//
// Keys of tile t and values of tile t - 1 are copied together, STAGES - 1 tiles ahead. In the cache a slice is as wgmma reads it, so each
// warp has one lane copy one slice of a tile with cp.async.bulk, and nobody computes addresses of chunks. Tensor maps, which copy a
// whole tile at once, would need tiles that are regular in memory: blocks of the cache are not. The queries, whose rows a KV head has
// to gather, come by cp.async.
#pragma once
#include "attention.cuh"
#include "wgmma.cuh"

constexpr int PART_ROWS = 64;
constexpr int PROMPT_ROWS = PART_ROWS * PROMPT_M;
constexpr int TILE = HEAD_DIM <= 128 ? 64 : 32;   // tokens, by the registers that their scores take
constexpr int STAGES = HEAD_DIM <= 64 ? 4 : 2;    // by the memory that two blocks have
constexpr int TILE_SLICES = TILE / SLICE;
static_assert(NUM_WARPS == 4 && TILE_SLICES <= NUM_WARPS, "one warpgroup, whose warps copy a slice each");

struct PromptShared {
  Element query[PROMPT_ROWS * HEAD_DIM];
  uint8_t keys[STAGES][TILE * ROW_BYTES];
  uint8_t values[STAGES][TILE * ROW_BYTES];
  uint64_t copied[STAGES];
};
static_assert(PART_ROWS * HEAD_DIM * 2 % 1024 == 0 && TILE * ROW_BYTES % 1024 == 0, "matrices begin where the swizzle does");

// The tiles of an item, on their way to shared memory. It keeps what it needs of the item, and not all of it: registers are few.
struct Tiles {
  const Arguments& arguments;
  PromptShared& shared;
  int request, kv_begin, kv_end, num_tiles;
  int next_block;  // that this warp's slice of the next tile to be copied lies in

  DEVICE Tiles(const Arguments& all, const Item& item, PromptShared& memory)
      : arguments(all), shared(memory), request(item.request), kv_begin(item.kv_begin), kv_end(item.kv_end),
        num_tiles((item.kv_end - item.kv_begin + TILE - 1) / TILE) {
    if (threadIdx.x == 0) {
#pragma unroll
      for (int stage = 0; stage < STAGES; stage++) mbarrier_init(&shared.copied[stage], TILE_SLICES);
      mbarrier_init_fence();
    }
    next_block = block_of(0);
  }

  DEVICE int first_token(int tile) const { return kv_begin + tile * TILE; }

  // Copies what step `step` needs into its stage, which nobody reads any more. Steps are started in order.
  DEVICE void start(int step) {
    if (step > num_tiles) return;
    const int key_block = next_block;
    next_block = block_of(step + 1);  // a load of its own, so one step ahead
    if (warp_index() >= TILE_SLICES || lane_index() != 0) return;
    const bool has_keys = slice_token(step) < kv_end, has_values = step > 0 && slice_token(step - 1) < kv_end;
    const int stage = step % STAGES, to = warp_index() * SLICE_BYTES;
    uint64_t* copied = &shared.copied[stage];
    mbarrier_arrive_expect(copied, (has_keys + has_values) * SLICE_BYTES);
    if (has_keys) bulk_copy(shared.keys[stage] + to, arguments.keys + offset(step, key_block), SLICE_BYTES, copied);
    if (has_values)
      bulk_copy(shared.values[stage] + to, arguments.values + offset(step - 1, block_of(step - 1)), SLICE_BYTES, copied);
  }

  // Until what step `step` needs is there. What lies behind the end of the item becomes zeros.
  DEVICE void await(int step) const {
    const int stage = step % STAGES;
    mbarrier_wait(&shared.copied[stage], step / STAGES & 1);
    if (step < num_tiles - 1 || first_token(num_tiles) == kv_end) return;
    clear_rows(shared.keys[stage], kv_end - first_token(step));
    clear_rows(shared.values[stage], kv_end - first_token(step - 1));
    fence_async();
    __syncthreads();
  }

 private:
  DEVICE int slice_token(int tile) const { return first_token(tile) + fresh(warp_index()) * SLICE; }
  DEVICE int block_of(int tile) const {
    const int32_t* table = arguments.block_table + static_cast<int64_t>(fresh(request)) * arguments.table_stride;
    return slice_token(tile) < kv_end ? table[slice_token(tile) / BLOCK_SIZE] : 0;
  }
  DEVICE int64_t offset(int tile, int block) const {
    return row_offset(block, fresh(static_cast<int>(blockIdx.x)), arguments.num_kv_heads, slice_token(tile) % BLOCK_SIZE);
  }
  // From the first row on that does not exist: none of a tile before the last, nor of what is no tile any more.
  DEVICE static void clear_rows(uint8_t* rows, int num_rows) {
    if (num_rows <= 0) return;
    for (int i = num_rows * CHUNKS + threadIdx.x; i < TILE * CHUNKS; i += NUM_THREADS)
      store_16B(rows + KvRows::offset(i / CHUNKS, i % CHUNKS), {0, 0, 0, 0});
  }
};

// Queries by keys: the scores of a part against a tile.
DEVICE void start_scores(float (&scores)[TILE / 8][4], Matrix<QueryRows> query, Matrix<KvRows> keys) {
  wgmma_keys<false>(scores, query.descriptor(), keys.descriptor());
#pragma unroll
  for (int k = 1; k < HEAD_DIM / 16; k++) wgmma_keys<true>(scores, query.along(k).descriptor(), keys.along(k).descriptor());
}

// Adds weights by values.
DEVICE void start_output(float (&output)[HEAD_DIM / 8][4], const uint32_t (&weights)[TILE / 16][4], Matrix<KvRows> values) {
#pragma unroll
  for (int k = 0; k < TILE / 16; k++) wgmma_values(output, weights[k], values.across(k).descriptor());
}

DEVICE void pack_weights(uint32_t (&weights)[TILE / 16][4], const float (&scores)[TILE / 8][4]) {
#pragma unroll
  for (int n = 0; n < TILE / 8; n++) {
    weights[n / 2][n % 2 * 2] = pack(scores[n][0], scores[n][1]);
    weights[n / 2][n % 2 * 2 + 1] = pack(scores[n][2], scores[n][3]);
  }
}

// An item and its request are loaded again where they are needed, which is seldom: in registers they would wait in vain.
struct Place {
  Item item;
  Rows rows;
};

DEVICE Place load_place(const Arguments& arguments) {
  const Item item = load_item(arguments.items, blockIdx.y, blockIdx.x);
  return {item, load_rows(arguments, item)};
}

// With PARTS parts of 64 rows.
template <int PARTS>
DEVICE void attend_parts(PromptShared& shared, const Arguments& arguments, const Item& item, const Rows& rows, Tiles& tiles) {
  const float scale = score_scale(arguments, item);
  const int warp_row = warp_index() * 16;
  // Tiles before `first_whole` have tokens that some row's window leaves out, those from `end_whole` on tokens behind some row.
  const int first_position = rows.position + item.first_row / arguments.group;
  const int last_position = rows.position + (item.first_row + item.num_rows - 1) / arguments.group;
  const int first_whole = max(last_position - arguments.window - item.kv_begin + TILE, 0) / TILE;
  const int end_whole = max(first_position + 1 - item.kv_begin, 0) / TILE;

  const int origin = static_cast<int>(shared_address(&shared)) / 16;
  Accumulator<1> a[PARTS];
  float scores[1][TILE / 8][4];      // of one part at a time
  uint32_t weights[TILE / 16][4];
#pragma unroll
  for (int part = 0; part < PARTS; part++) clear(a[part]);

  auto start_part_scores = [&](int part, int tile) {
    const uint32_t start = fresh(origin);
    const auto query = Matrix<QueryRows>{start}.behind(part * PART_ROWS * QueryRows::BYTES);
    const auto keys = Matrix<KvRows>{start}.behind(sizeof(shared.query) + tile % STAGES * sizeof(shared.keys[0]));
    start_scores(scores[0], query, keys);
    wgmma_commit();
  };
  auto start_part_output = [&](int part, int tile) {
    const uint32_t start = fresh(origin);
    const int values = sizeof(shared.query) + sizeof(shared.keys) + (tile + 1) % STAGES * sizeof(shared.values[0]);
    start_output(a[part].output[0], weights, Matrix<KvRows>{start}.behind(values));
    wgmma_commit();
  };
  // From the scores of a part and tile to its output, and the scores that come next unless these are the last.
  auto step = [&](int part, int tile, bool is_last) {
    const int other = PARTS - 1 - part;
    const auto shift = raise_maxima<1, TILE>(scores, a[part], scale, arguments.soft_cap, [&] {
      if (tile >= first_whole && tile < end_whole) return;
      const Place place = load_place(arguments);
      const Visible<1> visible = visible_tokens<1>(arguments, place.item, place.rows, part * PART_ROWS + warp_row);
      mask<1, TILE>(scores, visible, tiles.first_token(tile));
    });
    weigh<1, TILE>(scores, a[part], shift);
    if (PARTS == 1) wgmma_wait<0>(a[0].output[0], weights);
    // Seldom, after the first tiles. The branch also keeps the compiler from waiting for the products of the other part before
    // all of the above, which nothing else forbids.
    const float* factor = shift.factor[0];
    if (__ballot_sync(ALL_LANES, factor[0] != 1.f || factor[1] != 1.f)) rescale(a[part], shift);
    if (PARTS > 1) wgmma_wait<0>(a[other].output[0], weights);
    pack_weights(weights, scores[0]);
    if (part == 0) tiles.await(tile + 1);
    wgmma_fence(a[part].output[0], weights);
    if (!is_last) start_part_scores(other, part == PARTS - 1 ? tile + 1 : tile);
    start_part_output(part, tile);
    if (!is_last) wgmma_wait<1>(scores[0]);
    if (part == 0) {
      __syncthreads();  // all warps are done with this tile's keys, and with the values of the one before
      tiles.start(tile + STAGES);
    }
  };

  tiles.await(0);
  wgmma_fence();
  start_part_scores(0, 0);
  wgmma_wait<0>(scores[0]);
  const int last = tiles.num_tiles - 1;
  for (int tile = 0; tile < last; tile++) {
#pragma unroll
    for (int part = 0; part < PARTS; part++) step(part, tile, false);
  }
#pragma unroll
  for (int part = 0; part < PARTS; part++) step(part, last, part == PARTS - 1);
  wgmma_wait<0>(a[PARTS - 1].output[0], weights);

  const Place place = load_place(arguments);
#pragma unroll
  for (int part = 0; part < PARTS; part++) {
    finish(a[part]);
    write_rows(a[part], arguments, place.item, place.rows, part * PART_ROWS + warp_row);
  }
}

DEVICE void attend_prompt(PromptShared& shared, const Arguments& arguments, const Item& item) {
  const Rows rows = load_rows(arguments, item);
  Tiles tiles(arguments, item, shared);
  copy_queries<PROMPT_ROWS>(shared.query, arguments, item, rows);
  cp_async_commit();
  __syncthreads();  // the barriers are made
#pragma unroll
  for (int step = 0; step < STAGES; step++) tiles.start(step);
  cp_async_wait<0>();
  fence_async();
  __syncthreads();  // the queries are there
  if (PROMPT_M == 1 || item.num_rows <= PART_ROWS)
    attend_parts<1>(shared, arguments, item, rows, tiles);
  else
    attend_parts<PROMPT_M>(shared, arguments, item, rows, tiles);
}
