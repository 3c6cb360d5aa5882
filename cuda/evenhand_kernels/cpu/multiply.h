// Products of matrices, in tiles of registers.
#pragma once

#include <algorithm>
#include <type_traits>

#include "vec.h"

// Rows of a tile: of 32 registers two accumulators for each, of 16 those of six rows, 2 operands and 1 broadcast.
constexpr int MAX_ROWS = LANES == 16 ? 12 : 6;

// Memory that a later product reads, asked for along the way so that it is in the cache by then: one line at `next` with
// every step in depth, `stride` bytes on each time, and one `second` bytes behind it where a vector holds a group of an Attender.
// An address that is not mapped would cost a walk of the page tables.
struct Prefetch {
  const char* next = "";
  long stride = 0, second = 0;
};

// The right side of a product: rows of NV vectors in groups of `group` rows, `stride` numbers apart, at groups[0], groups[1], ...
// A row's second vector lies `second` numbers behind its first. Numbers of 16 bits are widened by each row tile anew. Of pairs a
// row is two rows, and so it is with the left side.
template <typename T>
struct RightSide {
  using Left = std::conditional_t<std::is_same_v<T, BFloat16Pair>, BFloat16Pair, float>;
  const T* const* groups;
  int group;
  long stride, second = LANES;
};

// The register tile of all matrix products here: c[m][...] += sum over k < depth of a[m * lda + k] * b[k][...].
// FRESH: c counts as zero.
template <int ROWS, int NV, bool FRESH, typename T>
static inline void multiply_tile(const typename RightSide<T>::Left* __restrict a, long lda, RightSide<T> b, int depth, float* __restrict c, long ldc,
                                 Prefetch& prefetch) {
  // A third of the rows each, so that three pointers and one stride address all of them without further arithmetic.
  constexpr int THIRD = (ROWS + 2) / 3;
  const auto *__restrict a1 = a + THIRD * lda, *__restrict a2 = a + 2 * THIRD * lda;
  const char* next = prefetch.next;
  Vec acc[ROWS][NV];
#pragma GCC unroll 12
  for (int m = 0; m < ROWS; m++)
#pragma GCC unroll 2
    for (int j = 0; j < NV; j++) acc[m][j] = FRESH ? Vec{} : load(c + m * ldc + j * LANES);
  for (; depth > 0; depth -= b.group, b.groups++) {
    const T* __restrict row_of_b = *b.groups;
    for (int k = depth < b.group ? depth : b.group; k > 0; k--, a++, a1++, a2++, row_of_b += b.stride) {
      __builtin_prefetch(next, 0, 2);
      if constexpr (LANES == 16 && NV == 2) __builtin_prefetch(next + prefetch.second, 0, 2);
      next += prefetch.stride;
      Vec right0 = load(row_of_b), right1 = NV == 2 ? load(row_of_b + b.second) : right0;
#if defined(__AVX__)
      asm("" : "+v"(right0), "+v"(right1));  // keep them in registers: GCC would load them again for every row
#endif
#pragma GCC unroll 12
      for (int m = 0; m < ROWS; m++) {
        const auto* row = m < THIRD ? a : m < 2 * THIRD ? a1 : a2;
        const Vec left = splat(row[m % THIRD * lda]);
        acc[m][0] = multiply_add(acc[m][0], left, right0, row_of_b);
        if constexpr (NV == 2) acc[m][1] = multiply_add(acc[m][1], left, right1, row_of_b);
      }
    }
  }
#pragma GCC unroll 12
  for (int m = 0; m < ROWS; m++)
#pragma GCC unroll 2
    for (int j = 0; j < NV; j++) store(c + m * ldc + j * LANES, acc[m][j]);
  prefetch.next = next;
}

static inline int num_row_tiles(int rows, int most = MAX_ROWS) { return (rows + most - 1) / most; }

// Rows in tiles of at most `most`, as even as they can be: the first have one more than the last.
struct Tiles {
  long rows;
  int most;

  long number() const { return (rows + most - 1) / most; }
  // The first row of a tile; that of the one behind the last: `rows`.
  long first(long tile) const { return tile * (rows / number()) + std::min(tile, rows % number()); }
  // The tile of a row.
  long of(long row) const {
    const long smaller = rows / number(), larger = rows % number(), in_larger = larger * (smaller + 1);
    return row < in_larger ? row / (smaller + 1) : larger + (row - in_larger) / smaller;
  }
};

// Calls visit(tile, first row) for tiles of at most MOST rows, as even as they can be; decltype(tile)::value: their rows. None has fewer
// than FEWEST: the caller knows, and code for such is not made.
template <int MOST = MAX_ROWS, int FEWEST = 1, typename Visit>
static inline void for_each_row_tile(int rows, const Visit& visit) {
  const int tiles = num_row_tiles(rows, MOST), smaller = rows / tiles, num_larger = rows % tiles;
  int first = 0;
  const auto run = [&](int size, int num_tiles) {
    for (; num_tiles > 0; num_tiles--, first += size) switch (size) {
#define CASE(n)                                                                             \
  case n:                                                                                   \
    if constexpr (FEWEST <= n && n <= MOST) visit(std::integral_constant<int, n>{}, first); \
    break;
        CASE(1) CASE(2) CASE(3) CASE(4) CASE(5) CASE(6) CASE(7) CASE(8) CASE(9) CASE(10) CASE(11) CASE(12)
#undef CASE
      }
  };
  run(smaller + 1, num_larger);
  run(smaller, tiles - num_larger);
}

// The product for any number of rows, in tiles each of which prefetches.
template <int NV, bool FRESH = false, typename T>
static void multiply(int rows, const typename RightSide<T>::Left* a, long lda, RightSide<T> b, int depth, float* c, long ldc, Prefetch prefetch = {}) {
  for_each_row_tile(rows, [&](auto tile, int first) {
    multiply_tile<decltype(tile)::value, NV, FRESH>(a + first * lda, lda, b, depth, c + first * ldc, ldc, prefetch);
  });
}
