// An item of up to PROMPT_ROWS rows: a chunk of a prompt.
//
// Each warp has 16 M rows of its own; all share a tile of tokens. One buffer for keys and one for values: the values of
// a tile are copied while its scores are computed, the keys of the next one during softmax and the product with the values
// (the order of FlashAttention-2, arXiv 2307.08691). Bound by the tensor cores.
#pragma once
#include "attention.cuh"

constexpr int WARP_ROWS = 16 * PROMPT_M;
constexpr int PROMPT_ROWS = WARP_ROWS * NUM_WARPS;
constexpr int TILE = HEAD_DIM <= 96 ? 64 : 32;  // tokens, by the registers that their scores take
constexpr int COPY_ROWS = TILE / NUM_WARPS;

struct PromptShared {
  Element query[PROMPT_ROWS * HEAD_DIM];
  uint8_t keys[TILE * ROW_BYTES];
  uint8_t values[TILE * ROW_BYTES];
};

DEVICE void copy_tile(uint8_t* to, const uint8_t* cache, const Arguments& arguments, const Item& item, int first_token) {
  static_assert(SLICE % COPY_ROWS == 0, "what a warp copies lies in one block");
  const int first = first_token + warp_index() * COPY_ROWS;
  const int32_t* table = arguments.block_table + static_cast<int64_t>(item.request) * arguments.table_stride;
  const int block = first < item.kv_end ? table[first / BLOCK_SIZE] : 0;
  const uint8_t* from = cache + row_offset(block, item.kv_head, arguments.num_kv_heads, first % BLOCK_SIZE);
  copy_rows<COPY_ROWS>(to + warp_index() * COPY_ROWS * ROW_BYTES, from, item.kv_end - first);
  cp_async_commit();
}

DEVICE void attend_prompt(PromptShared& shared, const Arguments& arguments, const Item& item) {
  const Rows rows = load_rows(arguments, item);
  const int first_row = warp_index() * WARP_ROWS;
  copy_queries<PROMPT_ROWS>(shared.query, arguments, item, rows);
  copy_tile(shared.keys, arguments.keys, arguments, item, item.kv_begin);

  const Visible<PROMPT_M> visible = visible_tokens<PROMPT_M>(arguments, item, rows, first_row);
  const int last_row = min(first_row + WARP_ROWS, item.num_rows) - 1;
  const bool has_rows = first_row < item.num_rows;
  const int first_position = rows.position + (item.first_row + first_row) / arguments.group;
  const int last_position = rows.position + (item.first_row + last_row) / arguments.group;
  const float scale = score_scale(arguments, item);
  const Element* query = shared.query + first_row * HEAD_DIM;
  auto fragment = [&](int m, int k) { return query_fragment(query + m * 16 * HEAD_DIM, k); };

  Accumulator<PROMPT_M> a;
  clear(a);
  float scores[PROMPT_M][TILE / 8][4];
  for (int first = item.kv_begin; first < item.kv_end; first += TILE) {
    // Tiles that none of this warp's rows sees are left to the others, but for the copies and barriers.
    const bool seen = has_rows && first <= last_position && first + TILE > first_position - arguments.window + 1;
    cp_async_wait<0>();
    __syncthreads();  // the keys are there, and nobody needs the values of the tile before
    copy_tile(shared.values, arguments.values, arguments, item, first);
    if (seen) multiply_keys<PROMPT_M, TILE>(scores, fragment, shared.keys);
    cp_async_wait<0>();
    __syncthreads();  // the values are there, and nobody needs the keys
    if (first + TILE < item.kv_end) copy_tile(shared.keys, arguments.keys, arguments, item, first + TILE);
    if (!seen) continue;
    const bool masked = first + TILE - 1 > first_position || first <= last_position - arguments.window;
    const auto shift = raise_maxima<PROMPT_M, TILE>(scores, a, scale, arguments.soft_cap, [&] {
      if (masked) mask<PROMPT_M, TILE>(scores, visible, first);
    });
    rescale(a, shift);
    weigh<PROMPT_M, TILE>(scores, a, shift);
    multiply_values<PROMPT_M, TILE>(a, scores, shared.values);
  }
  finish(a);
  write_rows(a, arguments, item, rows, first_row);
}
