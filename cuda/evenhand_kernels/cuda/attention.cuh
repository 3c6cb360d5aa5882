// What the attention kernels share: their arguments, the items of work, copies of queries and of slices of the cache.
#pragma once
#include "attention_tile.cuh"

struct Arguments {
  const Element* query;         // rows of query_stride elements, query heads first
  const uint8_t* keys;          // the paged cache: kv_layout.cuh
  const uint8_t* values;
  const int32_t* block_table;   // [num_requests, table_stride]
  const int32_t* cu_seqlens_q;  // [num_requests + 1]
  const int32_t* seq_lens;      // [num_requests]
  const int32_t* items;         // [capacity, 8]: Item
  const int32_t* counts;        // [2]: how many items there are, and merges
  const float* key_scales;      // [num_kv_heads], with KV_FP8
  const float* value_scales;
  Element* output;              // [num_tokens, num_kv_heads * group, HEAD_DIM]
  float* partial_output;        // [partial rows, HEAD_DIM]: not divided by the sum yet
  float* partial_state;         // [partial rows, 2]: maximum (as a power of two), sum
  int32_t query_stride;
  int32_t table_stride;
  int32_t num_kv_heads;
  int32_t group;                // query heads of a KV head
  int32_t window;               // tokens that a query sees, itself included
  float scale;                  // of the scores; times log2(e) unless there is a soft cap
  float soft_cap;
};

// Rows [first_row, first_row + num_rows) of one request against the tokens [kv_begin, kv_end), for each KV head.
struct Item {
  int32_t request;
  int32_t head_rows;    // partial rows of a KV head, if it is a part of a split
  int32_t first_row;
  int32_t num_rows;
  int32_t kv_begin;     // a multiple of 16
  int32_t kv_end;
  int32_t partial_row;  // where a part of a split goes, of KV head 0; -1: all of it is here, write the output
  int32_t is_prompt;    // up to PROMPT_ROWS rows, else up to DECODE_ROWS
  int32_t kv_head;      // of this block
};

constexpr int DECODE_ROWS = 16;
constexpr int NUM_WARPS = NUM_THREADS / 32;

DEVICE Item load_item(const int32_t* items, int index, int kv_head) {
  const uint4 low = load_16B(items + index * 8), high = load_16B(items + index * 8 + 4);
  Item item{static_cast<int32_t>(low.x), static_cast<int32_t>(low.y), static_cast<int32_t>(low.z),
            static_cast<int32_t>(low.w), static_cast<int32_t>(high.x), static_cast<int32_t>(high.y),
            static_cast<int32_t>(high.z), static_cast<int32_t>(high.w), kv_head};
  if (item.partial_row >= 0) item.partial_row += kv_head * item.head_rows;
  return item;
}

// The request of an item.
struct Rows {
  int first_token;  // row of the activations
  int position;     // of that token in its request
};

DEVICE Rows load_rows(const Arguments& arguments, const Item& item) {
  const int first = arguments.cu_seqlens_q[item.request], end = arguments.cu_seqlens_q[item.request + 1];
  return {first, arguments.seq_lens[item.request] - (end - first)};
}

// Copies NUM_ROWS rows of queries, asynchronously; rows that do not exist become zeros.
template <int NUM_ROWS>
DEVICE void copy_queries(Element* to, const Arguments& arguments, const Item& item, const Rows& rows) {
  for (int i = threadIdx.x; i < NUM_ROWS * QUERY_CHUNKS; i += NUM_THREADS) {
    const int row = i / QUERY_CHUNKS, chunk = i % QUERY_CHUNKS, packed = item.first_row + row;
    const bool exists = row < item.num_rows;
    const int token = exists ? packed / arguments.group : 0, head = exists ? packed % arguments.group : 0;
    const Element* from = arguments.query + static_cast<int64_t>(rows.first_token + token) * arguments.query_stride +
                          (item.kv_head * arguments.group + head) * HEAD_DIM + chunk * 8;
    cp_async_16B(reinterpret_cast<uint8_t*>(to) + QueryRows::offset(row, chunk), from, exists);
  }
}

// One warp copies the rows of neighbouring tokens, asynchronously; rows from `num_rows` on become zeros: what another request
// left in them may be NaN, which a weight of zero does not remove.
template <int ROWS>
DEVICE void copy_rows(uint8_t* to, const uint8_t* from, int num_rows) {
  static_assert(ROWS * CHUNKS % 32 == 0, "the lanes share the chunks");
#pragma unroll
  for (int i = 0; i < ROWS * CHUNKS / 32; i++) {
    const int chunk = i * 32 + lane_index();
    cp_async_16B(to + chunk * 16, from + chunk * 16, KvRows::row_of(chunk) < num_rows);
  }
}

template <int M>
DEVICE Visible<M> visible_tokens(const Arguments& arguments, const Item& item, const Rows& rows, int first_row) {
  Visible<M> visible;
  visible.window = arguments.window;
#pragma unroll
  for (int m = 0; m < M; m++)
#pragma unroll
    for (int half = 0; half < 2; half++) {
      const int row = first_row + m * 16 + half * 8 + lane_index() / 4;
      visible.last[m][half] = row < item.num_rows ? rows.position + (item.first_row + row) / arguments.group : -1;
    }
  return visible;
}

// Where the output of a row of the item goes.
DEVICE Element* output_row(const Arguments& arguments, const Item& item, const Rows& rows, int row) {
  const int packed = item.first_row + row, group = arguments.group;
  const int64_t head = static_cast<int64_t>(rows.first_token + packed / group) * (arguments.num_kv_heads * group) +
                       item.kv_head * group + packed % group;
  return arguments.output + head * HEAD_DIM;
}

DEVICE float value_scale(const Arguments& arguments, const Item& item) {
#ifdef KV_FP8
  return arguments.value_scales[item.kv_head];
#else
  return 1.f;
#endif
}

DEVICE float score_scale(const Arguments& arguments, const Item& item) {
#ifdef KV_FP8
  return arguments.scale * arguments.key_scales[item.kv_head];
#else
  return arguments.scale;
#endif
}

// Two neighbouring dimensions of a row, whole or as a part of a split.
DEVICE void write_pair(const Arguments& arguments, const Item& item, const Rows& rows, int row, int dimension, float low,
                       float high, float sum) {
  if (item.partial_row < 0) {
    const float factor = sum > 0.f ? value_scale(arguments, item) / sum : 0.f;
    *reinterpret_cast<uint32_t*>(output_row(arguments, item, rows, row) + dimension) = pack(low * factor, high * factor);
  } else {
    store_8B(arguments.partial_output + static_cast<int64_t>(item.partial_row + row) * HEAD_DIM + dimension,
             {__float_as_uint(low), __float_as_uint(high)});
  }
}

DEVICE void write_state(const Arguments& arguments, const Item& item, int row, float maximum, float sum) {
  store_8B(arguments.partial_state + static_cast<int64_t>(item.partial_row + row) * 2,
           {__float_as_uint(maximum), __float_as_uint(sum)});
}

// The warp's rows from `first_row` of the item on, finished.
template <int M>
DEVICE void write_rows(const Accumulator<M>& a, const Arguments& arguments, const Item& item, const Rows& rows, int first_row) {
#pragma unroll
  for (int m = 0; m < M; m++) {
    const int row0 = first_row + m * 16;
    for_each_pair(a, m, [&](int row, int dimension, float low, float high) {
      const float sum = row < 8 ? a.sum[m][0] : a.sum[m][1];
      if (row0 + row < item.num_rows) write_pair(arguments, item, rows, row0 + row, dimension, low, high, sum);
    });
    if (item.partial_row >= 0 && lane_index() % 4 == 0) {
#pragma unroll
      for (int half = 0; half < 2; half++) {
        const int row = row0 + half * 8 + lane_index() / 4;
        if (row < item.num_rows) write_state(arguments, item, row, a.maximum[m][half], a.sum[m][half]);
      }
    }
  }
}
