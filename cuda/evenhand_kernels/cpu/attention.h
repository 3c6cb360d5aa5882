// Attention over a paged KV cache: norms and rotates queries and keys, stores keys and values, attends.
//
// keys   [num_blocks][num_kv_heads][head_dim][block_size]: 16 tokens' worth of one dimension are one or two vectors, so
//        a block, or two of them, is a ready operand of the register tile that computes scores.
// values [num_blocks][num_kv_heads][block_size][padded_head_dim], rows padded to a multiple of 16.
//
// A work item is up to MAX_QUERIES (query token, query head) pairs of one request that share a KV head: a tile of a
// prompt chunk, or the group of a decode. It reads keys and values once, SPAN tokens at a time, with an online softmax
// (arXiv 2205.14135). Threads take items as they get free, long prompts first. Where items are fewer than keep the threads busy, long
// contexts are split, and whoever ends the last part merges them by their maxima (arXiv 2311.01282). Many queries are multiplied by tiles
// of AMX where there are some and the cache has 16 bits (tiled_span.h).
#pragma once

#include <algorithm>
#include <atomic>
#include <memory>
#include <vector>

#include "attender.h"
#include "norm.h"
#include "pool.h"

static inline void rotate(float* head, const float* cos_sin, int head_dim) {
  const int half = head_dim / 2;
  for (int i = 0; i < half; i++) {
    const float first = head[i], second = head[i + half], cos = cos_sin[i], sin = cos_sin[i + half];
    head[i] = first * cos - second * sin;
    head[i + half] = second * cos + first * sin;
  }
}

template <typename T>
static void store_token(float* qkv, int32_t position, int32_t slot, const AttentionLayer& layer) {
  const int dim = layer.head_dim, rotated = layer.num_heads + layer.num_kv_heads;
  for (int h = 0; h < rotated; h++) {
    const float* norm = h < layer.num_heads ? layer.q_norm : layer.k_norm;
    if (norm) rms_norm_row(qkv + h * dim, norm, qkv + h * dim, dim, layer.eps);
    if (layer.cos_sin) rotate(qkv + h * dim, layer.cos_sin + static_cast<long>(position) * dim, dim);
  }
  const long block = slot / layer.block_size, offset = slot % layer.block_size;
  for (int h = 0; h < layer.num_kv_heads; h++) {
    const long head = block * layer.num_kv_heads + h;
    T* key = static_cast<T*>(layer.keys) + head * dim * layer.block_size + offset;
    T* value = static_cast<T*>(layer.values) + (head * layer.block_size + offset) * padded(dim);
    T narrowed[MAX_HEAD_DIM];  // vectors at a time, where a key's numbers lie far apart
    narrow(qkv + (layer.num_heads + h) * dim, dim, narrowed);
    for (int i = 0; i < dim; i++) key[i * layer.block_size] = narrowed[i];
    narrow(qkv + (rotated + h) * dim, dim, value);
  }
}

constexpr int PART = 448;  // tokens of a context that are worth a piece of their own

static std::vector<WorkItem> work_items(const AttentionLayer& layer, const AttentionBatch& batch, int num_threads) {
  const int group_size = layer.num_heads / layer.num_kv_heads;
  int tile = std::max(1, MAX_QUERIES / group_size);
  // Each time half as large read keys and values twice as often, which costs less than a thread that waits for the last item.
  for (int halvings = 0; halvings < 2 && batch.num_tokens * layer.num_kv_heads < tile * num_threads * PIECES_PER_THREAD; halvings++)
    tile = (tile + 1) / 2;
  std::vector<WorkItem> items;
  for (int32_t request = static_cast<int32_t>(batch.num_requests) - 1; request >= 0; request--) {  // decodes last
    const int32_t num_queries = batch.cu_seqlens_q[request + 1] - batch.cu_seqlens_q[request];
    for (int32_t end = num_queries; end > 0; end -= tile)
      for (int32_t head = 0; head < layer.num_kv_heads; head++)
        items.push_back({request, head, std::max(0, end - tile), end, 0, 1});
  }
  return items;
}

// Splits the contexts of the items where those are fewer than keep the threads busy, into pieces of PART tokens or more.
static std::vector<WorkItem> split(const std::vector<WorkItem>& items, const AttentionLayer& layer, const AttentionBatch& batch,
                                   int num_threads) {
  const int wanted = num_threads * 2, num_items = static_cast<int>(items.size());
  if (num_items >= wanted || num_threads == 1 || layer.num_heads / layer.num_kv_heads > MAX_QUERIES) return items;
  std::vector<WorkItem> result;
  for (WorkItem item : items) {
    const int32_t last = batch.positions[batch.cu_seqlens_q[item.request] + item.end - 1];
    const int32_t context = layer.window > 0 ? std::min(last, layer.window) : last;
    item.num_parts = std::max(1, std::min((wanted + num_items - 1) / num_items, context / PART));
    for (item.part = 0; item.part < item.num_parts; item.part++) result.push_back(item);
  }
  return result;
}

template <typename T>
static void attention_in(Pool& pool, const AttentionLayer& layer, const AttentionBatch& batch, float* qkv, float* out, const Readings& after) {
  const long width = static_cast<long>(layer.num_heads + 2 * layer.num_kv_heads) * layer.head_dim;
  pool.run((batch.num_tokens + GROUP - 1) / GROUP, [&](long group) {  // so that seldom two threads write keys that lie together
    for (long token = group * GROUP; token < std::min<long>((group + 1) * GROUP, batch.num_tokens); token++)
      store_token<T>(qkv + token * width, batch.positions[token], batch.slots[token], layer);
  });
  const std::vector<WorkItem> items = split(work_items(layer, batch, pool.num_threads()), layer, batch, pool.num_threads());
  const bool is_split = std::any_of(items.begin(), items.end(), [](const WorkItem& item) { return item.num_parts > 1; });
  std::vector<Partial> partials(is_split ? items.size() : 0);
  const std::unique_ptr<std::atomic<int>[]> num_done(is_split ? new std::atomic<int>[items.size()]() : nullptr);
  pool.run(static_cast<long>(items.size()), [&](long i) {
    const WorkItem& item = items[i];
    Attender<T> attender(layer, batch, qkv, out);
    if (item.num_parts == 1) return attender.run(item);
    const long first = i - item.part;  // whoever does the last part merges all of them
    attender.run(item, partials[i]);
    if (num_done[first].fetch_add(1, std::memory_order_acq_rel) == item.num_parts - 1) attender.merge(item, &partials[first]);
  }, after);
}

// `after`: what is read next.
static void attention(Pool& pool, const AttentionLayer& layer, const AttentionBatch& batch, float* qkv, float* out, const Readings& after = {}) {
  switch (layer.cache_dtype) {
    case 0: return attention_in<float>(pool, layer, batch, qkv, out, after);
    case 1: return attention_in<BFloat16>(pool, layer, batch, qkv, out, after);
    case 2: return attention_in<Float16>(pool, layer, batch, qkv, out, after);
  }
}
