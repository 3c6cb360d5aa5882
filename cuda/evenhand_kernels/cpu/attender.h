// Attention of one request's queries, as many as share a tile of registers, to keys and values of one head. See attention.h.
#pragma once

#include <algorithm>
#include <array>
#include <cmath>
#include <vector>

#include "attention_batch.h"
#include "multiply.h"
#include "tiled_span.h"

constexpr int GROUP = 16;  // tokens whose keys lie together; block_size is a multiple
constexpr int GROUPS_AT_ONCE = 2 * LANES / GROUP;  // that two vectors hold
constexpr int SPAN = 64;         // tokens between two updates of the running maximum
constexpr int MAX_QUERIES = 96;  // rows of an item: 8 register tiles or more share each load of keys and values
constexpr int MAX_HEAD_DIM = 256;
constexpr float HIDDEN = -1e30f;  // score of what a query must not see; finite, so that its exp never is NaN

static inline int padded(int head_dim) { return (head_dim + GROUP - 1) / GROUP * GROUP; }

// Queries [first, end) of a request, counted from the start of this step's part of it, for one KV head, and one of `num_parts`
// parts of the context, which are merged where there are several.
struct WorkItem {
  int32_t request, kv_head, first, end, part, num_parts;
};

// What a part of the context gave for MAX_QUERIES queries: sums of weighted values, of weights, and the maximum they are relative to.
struct Partial {
  std::vector<float> output;
  std::array<float, MAX_QUERIES> totals, maxima;
};

template <typename T>
class Attender {
 public:
  Attender(const AttentionLayer& layer, const AttentionBatch& batch, const float* qkv, float* out)
      : layer_(layer), batch_(batch), qkv_(qkv), out_(out), dim_(layer.head_dim), width_(padded(layer.head_dim)) {}

  void run(const WorkItem& item) {
    const int group_size = layer_.num_heads / layer_.num_kv_heads;
    for (int h = 0; h < group_size; h += MAX_QUERIES) {  // more than one pass only for absurdly large groups
      const int first_head = item.kv_head * group_size + h, num_heads = std::min(group_size - h, MAX_QUERIES);
      attend(item, first_head, num_heads);
      write_output(batch_.cu_seqlens_q[item.request] + item.first, (item.end - item.first) * num_heads, first_head, num_heads);
    }
  }

  // Of an item that is a part: group_size is at most MAX_QUERIES.
  void run(const WorkItem& item, Partial& result) {
    const int group_size = layer_.num_heads / layer_.num_kv_heads, rows = (item.end - item.first) * group_size;
    attend(item, item.kv_head * group_size, group_size);
    result.output.assign(output_, output_ + rows * width_);
    for (int row = 0; row < rows; row++) result.totals[row] = sum(load(totals_ + row * LANES)), result.maxima[row] = maximum_[row];
  }

  // Writes what the parts of an item give together: each is weighed by how far its maximum lies below the largest.
  void merge(const WorkItem& item, const Partial* parts) {
    const int group_size = layer_.num_heads / layer_.num_kv_heads, rows = (item.end - item.first) * group_size;
    for (int row = 0; row < rows; row++) {
      maximum_[row] = HIDDEN;
      for (int part = 0; part < item.num_parts; part++) maximum_[row] = std::max(maximum_[row], parts[part].maxima[row]);
      std::fill_n(output_ + row * width_, width_, 0.0f);
      float total = 0;
      for (int part = 0; part < item.num_parts; part++) {
        const float factor = std::exp(parts[part].maxima[row] - maximum_[row]);
        total += parts[part].totals[row] * factor;
        for (int i = 0; i < width_; i++) output_[row * width_ + i] += parts[part].output[row * width_ + i] * factor;
      }
      store(totals_ + row * LANES, Vec{total});
    }
    write_output(batch_.cu_seqlens_q[item.request] + item.first, rows, item.kv_head * group_size, group_size);
  }

 private:
  void attend(const WorkItem& item, int first_head, int num_heads) {
    const int rows = (item.end - item.first) * num_heads;
    load_queries(batch_.cu_seqlens_q[item.request] + item.first, rows, first_head, num_heads);
#if defined(EVENHAND_TILES)
    if constexpr (sizeof(T) == 2)
      if (layer_.tiled && rows >= TILE_ROWS && dim_ % PANEL == 0) return attend_by_tiles(item, rows, num_heads);
#endif
    for_each_span(item, [&](int32_t token, int num_tokens, int32_t end) {
      compute_scores(item, rows, token, num_tokens, end);
      weigh({0, rows, scores_}, num_heads, first_position(item), token, num_tokens);
      accumulate_values(item, rows, token, num_tokens, end);
    });
  }

#if defined(EVENHAND_TILES)
  void attend_by_tiles(const WorkItem& item, int rows, int num_heads) {
    using Tiles = TiledSpan<T, MAX_QUERIES, MAX_HEAD_DIM, SPAN>;
    Tiles tiles;
    tiles.set_queries(queries_, rows, dim_);
    for_each_span(item, [&](int32_t token, int num_tokens, int32_t) {
      tiles.set_tokens(num_tokens, [&](int group) { return places_[group].keys; }, layer_.block_size,
                       [&](int i) { return places_[i / GROUP].values + i % GROUP * width_; });
      const auto scored = [&](int first) {
        return Scored{first, std::min(first + Tiles::ROWS, rows), scores_ + first / Tiles::ROWS % 2 * Tiles::ROWS * SPAN};
      };
      tiles.compute_scores(0, scored(0).end, scored(0).scores);
      for (int first = 0; first < rows; first += Tiles::ROWS) {
        const Scored here = scored(first), next = scored(here.end);
        weigh(here, num_heads, first_position(item), token, num_tokens);
        tiles.set_weights(here.scores, here.end - first);
        if (next.first < rows) tiles.compute_scores(next.first, next.end - next.first, next.scores);  // while the weights reach the cache
        tiles.accumulate(here.end - first, output_ + first * width_);
      }
    });
  }
#endif

  int32_t first_position(const WorkItem& item) const { return batch_.positions[batch_.cu_seqlens_q[item.request] + item.first]; }

  // Calls visit(its first token, tokens, end of all) for each span that the item sees, whose keys and values lie at places_.
  template <typename Visit>
  void for_each_span(const WorkItem& item, const Visit& visit) {
    int32_t end = first_position(item) + (item.end - item.first);
    int32_t begin = layer_.window > 0 ? std::max(0, first_position(item) - layer_.window + 1) : 0;
    begin -= begin % SPAN;
    const int32_t spans = (end - begin + SPAN - 1) / SPAN, part_begin = begin + spans * item.part / item.num_parts * SPAN;
    end = std::min(end, begin + spans * (item.part + 1) / item.num_parts * SPAN);
    for (int32_t token = part_begin; token < end; token += SPAN) {
      const int num_tokens = std::min(SPAN, end - token);
      for (int group = 0; group * GROUP < num_tokens; group++) places_[group] = place_of(item, token + group * GROUP);
      visit(token, num_tokens, end);
    }
  }

  void load_queries(int32_t token, int rows, int first_head, int num_heads) {
    const long stride = static_cast<long>(layer_.num_heads + 2 * layer_.num_kv_heads) * dim_;
    for (int row = 0; row < rows; row++) {
      const float* query = qkv_ + (token + row / num_heads) * stride + (first_head + row % num_heads) * dim_;
      for (int i = 0; i < dim_; i++) queries_[row * dim_ + i] = query[i] * layer_.scale;
      std::fill_n(output_ + row * width_, width_, 0.0f);
      store(totals_ + row * LANES, Vec{});
      maximum_[row] = HIDDEN;
    }
  }

  // Where the keys and values of GROUP tokens from this position on lie.
  struct Place {
    const T *keys, *values;
  };

  Place place_of(const WorkItem& item, int32_t position) const {
    const long block = batch_.block_table[item.request * batch_.table_stride + position / layer_.block_size];
    const long head = block * layer_.num_kv_heads + item.kv_head, offset = position % layer_.block_size;
    return {static_cast<const T*>(layer_.keys) + head * dim_ * layer_.block_size + offset,
            static_cast<const T*>(layer_.values) + (head * layer_.block_size + offset) * width_};
  }

  // Of these rows several tiles share what is widened once; a single one widens what it reads itself.
  static bool widens(int rows) { return sizeof(T) < 4 && num_row_tiles(rows) > 1; }

  // For each step of a product of these rows `stride` numbers from `first` on, shared out among its tiles, and as many from `second` on, which
  // only a product of two groups asks for. Null: none.
  static Prefetch asking_for(const T* first, const T* second, long stride, int rows) {
    if (!first) return {};
    const auto bytes = [](const T* at) { return reinterpret_cast<const char*>(at); };
    return {bytes(first), stride * static_cast<long>(sizeof(T)) / num_row_tiles(rows), second ? bytes(second) - bytes(first) : 0};
  }

  // Two vectors at a time, of two groups where one vector holds a group. Meanwhile asks for the keys of the same groups of the next span.
  void compute_scores(const WorkItem& item, int rows, int32_t token, int num_tokens, int32_t end) {
    const long block_size = layer_.block_size;
    const auto compute = [&](auto vectors, int group, long second) {
      constexpr int NV = decltype(vectors)::value;
      const T* keys = places_[group].keys;
      float* to = scores_ + group * GROUP;
      const auto next_keys = [&](int of_group) -> const T* {
        const int32_t next = token + SPAN + of_group * GROUP;
        return next < end ? place_of(item, next).keys : nullptr;
      };
      const Prefetch prefetch = asking_for(next_keys(group), next_keys(group + 1), block_size, rows);
      if (!widens(rows)) return multiply<NV, true>(rows, queries_, dim_, RightSide<T>{&keys, dim_, block_size, second}, dim_, to, SPAN, prefetch);
      for (int i = 0; i < dim_; i++)
        for (int v = 0; v < NV; v++) store(wide_ + (i * NV + v) * LANES, load(keys + i * block_size + v * second));
      const float* wide = wide_;
      multiply<NV, true>(rows, queries_, dim_, RightSide<float>{&wide, dim_, NV * LANES}, dim_, to, SPAN, prefetch);
    };
    for (int group = 0; group * GROUP < num_tokens; group += GROUPS_AT_ONCE) {
      if constexpr (GROUPS_AT_ONCE == 1)
        compute(std::integral_constant<int, 2>{}, group, LANES);
      else if ((group + 1) * GROUP < num_tokens)
        compute(std::integral_constant<int, 2>{}, group, places_[group + 1].keys - places_[group].keys);
      else
        compute(std::integral_constant<int, 1>{}, group, 0);
    }
  }

  // Rows, whose scores lie SPAN apart.
  struct Scored {
    int first, end;
    float* scores;
  };

  // Turns scores into weights relative to the running maximum.
  void weigh(Scored rows, int num_heads, int32_t first_position, int32_t token, int num_tokens) {
    mask(rows, num_heads, first_position, token, num_tokens);
    float* scores = rows.scores;
    for (int row = rows.first; row < rows.end; row++, scores += SPAN) {
      raise_maximum(row, scores, num_tokens);
      const Vec maximum = splat(maximum_[row]);
      Vec total = load(totals_ + row * LANES);
      for (int i = 0; i < num_tokens; i += LANES) {
        const Vec weight = exp(load(scores + i) - maximum);
        store(scores + i, weight);
        total += weight;
      }
      store(totals_ + row * LANES, total);
    }
  }

  void mask(Scored rows, int num_heads, int32_t first_position, int32_t token, int num_tokens) {
    const int padded_tokens = (num_tokens + LANES - 1) / LANES * LANES;
    const int32_t last_position = first_position + (rows.end - 1) / num_heads;
    const bool causal = token + padded_tokens - 1 > first_position + rows.first / num_heads;
    const bool windowed = layer_.window > 0 && token <= last_position - layer_.window;
    if (!causal && !windowed) return;
    float* scores = rows.scores;
    for (int row = rows.first; row < rows.end; row++, scores += SPAN) {
      const int32_t position = first_position + row / num_heads;
      const int visible_end = std::clamp(position + 1 - token, 0, padded_tokens);
      const int visible_begin = layer_.window > 0 ? std::clamp(position + 1 - layer_.window - token, 0, visible_end) : 0;
      std::fill_n(scores, visible_begin, HIDDEN);
      std::fill_n(scores + visible_end, padded_tokens - visible_end, HIDDEN);
    }
  }

  // Rescales what was accumulated under a lower maximum. A row that saw nothing yet has the maximum HIDDEN and meaningless
  // weights, which its first token rescales to e^-87.
  void raise_maximum(int row, const float* scores, int num_tokens) {
    Vec high = load(scores);
    for (int i = LANES; i < num_tokens; i += LANES) high = max(high, load(scores + i));
    if (const float maximum = largest(high); maximum > maximum_[row]) rescale(row, maximum);
  }

  void rescale(int row, float maximum) {
    const Vec factor = exp(splat(maximum_[row] - maximum));
    for (int i = 0; i < width_; i += LANES) store(output_ + row * width_ + i, load(output_ + row * width_ + i) * factor);
    store(totals_ + row * LANES, load(totals_ + row * LANES) * factor);
    maximum_[row] = maximum;
  }

  // Two vectors of columns at a time. Meanwhile asks for the values of the next span, each for as many as it reads itself.
  void accumulate_values(const WorkItem& item, int rows, int32_t token, int num_tokens, int32_t end) {
    const auto accumulate = [&](auto vectors, int column) {
      constexpr int NV = decltype(vectors)::value;
      const T* columns[SPAN / GROUP];
      for (int group = 0; group * GROUP < num_tokens; group++) columns[group] = places_[group].values + column;
      float* to = output_ + column;
      const auto next_values = [&](int of_column) -> const T* {
        const int first = of_column * SPAN, group = first / (GROUP * width_);  // its part of the values, were they in one piece
        const int32_t next = token + SPAN + group * GROUP;
        return next < end ? place_of(item, next).values + first % (GROUP * width_) : nullptr;
      };
      const Prefetch prefetch = asking_for(next_values(column), next_values(column + LANES), GROUP, rows);
      if (!widens(rows)) return multiply<NV>(rows, scores_, SPAN, RightSide<T>{columns, GROUP, width_}, num_tokens, to, width_, prefetch);
      for (int i = 0; i < num_tokens; i++)
        for (int v = 0; v < NV; v++) store(wide_ + (i * NV + v) * LANES, load(columns[i / GROUP] + i % GROUP * width_ + v * LANES));
      const float* wide = wide_;
      multiply<NV>(rows, scores_, SPAN, RightSide<float>{&wide, SPAN, NV * LANES}, num_tokens, to, width_, prefetch);
    };
    int column = 0;
    for (; column + 2 * LANES <= width_; column += 2 * LANES) accumulate(std::integral_constant<int, 2>{}, column);
    if constexpr (GROUPS_AT_ONCE > 1)
      if (column < width_) accumulate(std::integral_constant<int, 1>{}, column);
  }

  void write_output(int32_t token, int rows, int first_head, int num_heads) {
    for (int row = 0; row < rows; row++) {
      float* out = out_ + ((token + row / num_heads) * static_cast<long>(layer_.num_heads) + first_head + row % num_heads) * dim_;
      const float scale = 1.0f / sum(load(totals_ + row * LANES));
      for (int i = 0; i < dim_; i++) out[i] = output_[row * width_ + i] * scale;
    }
  }

  const AttentionLayer& layer_;
  const AttentionBatch& batch_;
  const float* qkv_;
  float* out_;
  const int dim_, width_;
  Place places_[SPAN / GROUP] = {};  // of the span's keys and values
  alignas(64) float queries_[MAX_QUERIES * MAX_HEAD_DIM];
  alignas(64) float output_[MAX_QUERIES * MAX_HEAD_DIM];
  alignas(64) float scores_[MAX_QUERIES * SPAN];
  alignas(64) float wide_[sizeof(T) == 4 ? 1 : 2 * LANES * MAX_HEAD_DIM];  // keys or values of two vectors: they stay in the first-level cache
  alignas(64) float totals_[MAX_QUERIES * LANES];  // sums of weights, lane by lane
  float maximum_[MAX_QUERIES];
};
