// What attention works on, as native.py passes it: a layer with its cache, and the requests of a step.
#pragma once

#include <cstdint>

struct AttentionLayer {
  int32_t num_heads, num_kv_heads, head_dim, block_size, window;  // window: 0 means all
  int32_t cache_dtype;  // 0 float32, 1 bfloat16, 2 float16
  int32_t tiled;        // whether many queries are multiplied by tiles of AMX
  float scale, eps;
  const float *cos_sin, *q_norm, *k_norm;  // null: none
  void *keys, *values;
};

struct AttentionBatch {
  int64_t num_tokens, num_requests, table_stride;
  const int32_t *positions, *slots, *block_table, *cu_seqlens_q;
};
