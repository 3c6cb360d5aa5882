// The two products of attention of many queries to a span of tokens, by tiles of AMX. Queries and weights are sums of two numbers in bfloat16, of 16
// bits together; keys and values are multiplied as they are: in bfloat16, or as the sum of two, which any number in float16 is.
#pragma once

#include "tiles.h"

#if defined(EVENHAND_TILES)

// Numbers below 2^-126 are zero while an object of this lives.
class TinyAsZero {
 public:
  TinyAsZero() { _mm_setcsr(before_ | _MM_FLUSH_ZERO_ON | _MM_DENORMALS_ZERO_ON); }
  ~TinyAsZero() { _mm_setcsr(before_); }
  TinyAsZero(const TinyAsZero&) = delete;
  TinyAsZero& operator=(const TinyAsZero&) = delete;

 private:
  const unsigned before_ = _mm_getcsr();
};

// For at most MOST_ROWS rows of at most MOST_DIM numbers, and SPAN tokens, all whole tiles: two tiles of rows at a time, whose scores and weights stay
// in the first-level cache beside the keys and values. Pairs are of what lies LANES numbers apart, since no sum depends on the order of
// what is added: two vectors become a vector of pairs without a shuffle.
template <typename T, int MOST_ROWS, int MOST_DIM, int SPAN>
class TiledSpan {
 public:
  static constexpr bool HAS_LOWER = std::is_same_v<T, Float16>;
  static_assert(HAS_LOWER || std::is_same_v<T, BFloat16>);
  static constexpr int ROWS = 2 * TILE_ROWS;

  // queries[rows][dim].
  void set_queries(const float* queries, int rows, int dim) {
    dim_ = dim;
    split(queries, rows, dim, dim, queries_);
  }

  // keys(group): of LANES tokens, [dim] rows `stride` numbers apart; value(token): [dim].
  template <typename Keys, typename Value>
  void set_tokens(int num_tokens, const Keys& keys, long stride, const Value& value) {
    num_tokens_ = num_tokens;
    for (int token = 0; token < num_tokens; token += LANES) {
      const T* from = keys(token / LANES);
      long to = token / PANEL * dim_ / 2 * PANEL + token % PANEL;
      for (int i = 0; i < dim_; i += TILE_INPUTS)
        for (int k = i; k < i + LANES; k++, to += PANEL) put(keys_, to, from + k * stride, from + (k + LANES) * stride);
    }
    const auto numbers = [&](int token, int column) { return token < num_tokens ? value(token) + column : nullptr; };
    long to = 0;
    for (int first = 0; first < num_tokens; first += TILE_INPUTS)
      for (int token = first; token < first + LANES; token++, to += PANEL)
        for (int column = 0; column < dim_; column += LANES)
          put(values_, to + column / PANEL * SPAN / 2 * PANEL + column % PANEL, numbers(token, column), numbers(token + LANES, column));
  }

  // scores[ROWS][SPAN] of the queries from this one on.
  void compute_scores(int first, int rows, float* scores) {
    const int steps = dim_ / TILE_INPUTS;
    for (int token = 0; token < num_tokens_; token += PANEL)
      multiply<true>(rows, queries_ + first / TILE_ROWS * steps * 2, steps, steps, keys_, token * dim_ / 2, scores + token, SPAN);
  }

  // weights[rows][SPAN].
  void set_weights(const float* weights, int rows) {
    const TinyAsZero tiny;  // lower parts of what hardly counts, which would take a hundred times as long
    split(weights, rows, SPAN, (num_tokens_ + LANES - 1) / LANES * LANES, weights_);
  }

  // output[ROWS][dim] += weights * values.
  void accumulate(int rows, float* output) {
    const int steps = (num_tokens_ + TILE_INPUTS - 1) / TILE_INPUTS;
    for (int column = 0; column < dim_; column += PANEL)
      multiply<false>(rows, weights_, SPAN / TILE_INPUTS, steps, values_, column * SPAN / 2, output + column, dim_);
  }

 private:
  // Keys or values of a span as pairs, [half of what is summed over][what is not]: panels of PANEL columns.
  struct Tokens {
    alignas(64) BFloat16Pair upper[SPAN * MOST_DIM / 2], lower[HAS_LOWER ? SPAN * MOST_DIM / 2 : 1];
  };

  // LANES numbers of two rows as pairs; null: zeros.
  static void put(Tokens& tokens, long to, const T* first, const T* second) {
    if constexpr (HAS_LOWER) {
      const Vec low = first ? load(first) : Vec{}, high = second ? load(second) : Vec{};
      store_as_sums(low, high, tokens.upper + to, tokens.lower + to);
    } else {
      store(tokens.upper + to, (Vec)((first ? halves(first) : IntVec{}) | (second ? halves(second) << 16 : IntVec{})));
    }
  }

  // x[tiles of rows][ld / TILE_INPUTS][2] becomes the first `size` numbers of rows `ld` apart, and zeros behind them.
  static void split(const float* from, int rows, int ld, int size, PairTile* x) {
    for (int row = 0; row < rows; row++, from += ld)
      for (int i = 0; i < size; i += TILE_INPUTS) {
        const Vec first = load(from + i), second = i + LANES < size ? load(from + i + LANES) : Vec{};
        PairTile* tile = x + (row / TILE_ROWS * (ld / TILE_INPUTS) + i / TILE_INPUTS) * 2;
        store_as_sums(first, second, tile[0].row(row % TILE_ROWS), tile[1].row(row % TILE_ROWS));
      }
  }

  // c[rows][PANEL] += x[2][most_steps][2] * a panel of `tokens`, of which so many steps.
  template <bool FRESH>
  static void multiply(int rows, const PairTile* x, int most_steps, int steps, const Tokens& tokens, long panel, float* c, long ldc) {
    const BFloat16Pair *upper = tokens.upper + panel, *lower = HAS_LOWER ? tokens.lower + panel : upper;
    if (rows > TILE_ROWS)
      multiply_tiles<2, 2, HAS_LOWER, FRESH>(x, x + 2 * most_steps, upper, lower, steps, c, ldc);
    else
      multiply_tiles<1, 2, HAS_LOWER, FRESH>(x, x, upper, lower, steps, c, ldc);
  }

  const TileShapes shapes_;
  int num_tokens_ = 0, dim_ = 0;
  PairTile queries_[MOST_ROWS / TILE_ROWS * MOST_DIM / TILE_INPUTS * 2];
  PairTile weights_[2 * SPAN / TILE_INPUTS * 2];
  Tokens keys_, values_;
};

#endif
