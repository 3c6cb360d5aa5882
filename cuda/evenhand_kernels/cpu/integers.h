// Products of rows in whole numbers of 16 or 8 bits with the codes of a panel, by AVX2: vpmaddwd multiplies two inputs of each output
// at a time, vpmaddubsw four. Sums of products are exact; of a weight nothing is rounded:
//
//     sum(x * weight) = scale of x * scale * sum(code of x * (code + offset)) + (minimum - offset * scale) * sum(x), for each group
//
// A row lies in chunks of CHUNK inputs, and those of BLOCK rows together, chunk by chunk, so that all that a tile reads of rows is at a constant
// distance from one pointer.
#pragma once

#include <memory>

#include "activations.h"
#include "coded.h"
#include "multiply.h"
#include "weight.h"

#if defined(__AVX2__) && !defined(__AVX512F__)
constexpr bool HAS_SHORT_PRODUCTS = true;
#else
constexpr bool HAS_SHORT_PRODUCTS = false;
#endif

template <typename P, int CHUNK>
struct Chunk {
  Word words[CHUNK / P::INPUTS];
  float scale, sum;  // the latter of the rounded inputs
};

#if defined(__AVX2__) && !defined(__AVX512F__)

// Rows and codes in 16 bits, two of them in a word.
template <typename F>
struct ShortProducts {
  using Code = int16_t;
  using Codes = ShortVec;
  static constexpr int INPUTS = 2, MOST_ROWS = 5, OFFSET = F::SHORT_OFFSET;

  static constexpr int input(int i) { return F::pair_input(i); }

  template <typename Visit>
  static inline __attribute__((always_inline)) void words(const char* at, const Visit& visit) { F::short_pairs(at, visit); }
  static inline IntVec product(IntVec codes, IntVec row) { return (IntVec)_mm256_madd_epi16((__m256i)codes, (__m256i)row); }
  static inline IntVec sum(IntVec a, IntVec b) { return a + b; }
  static inline Vec total(IntVec sums) { return __builtin_convertvector(sums, Vec); }
};

// Rows in 8 bits and codes in 4. The sums of a chunk fit 16 bits: 16 products of at most 15 * 127.
template <typename F>
struct ByteCodeProducts {
  using Code = int8_t;
  using Codes = ByteVec;
  static constexpr int INPUTS = 4, MOST_ROWS = 6, OFFSET = F::BYTE_OFFSET;

  static constexpr int input(int i) { return F::byte_input(i); }

  template <typename Visit>
  static inline __attribute__((always_inline)) void words(const char* at, const Visit& visit) { F::unsigned_codes(at, visit); }
  static inline IntVec product(IntVec codes, IntVec row) { return (IntVec)_mm256_maddubs_epi16((__m256i)codes, (__m256i)row); }
  static inline IntVec sum(IntVec a, IntVec b) { return (IntVec)_mm256_add_epi16((__m256i)a, (__m256i)b); }
  static inline Vec total(IntVec sums) {
    return __builtin_convertvector((IntVec)_mm256_madd_epi16((__m256i)sums, _mm256_set1_epi16(1)), Vec);
  }
};

// All chunks of rows [number * BLOCK, ...) lie together: [inputs / CHUNK][rows of the block].
template <typename P, int CHUNK>
class IntegerRows {
 public:
  static constexpr int BLOCK = 4 * P::MOST_ROWS;

  // Rounds to whole numbers up to `most`, which the largest of each `group` inputs becomes.
  IntegerRows(Pool& pool, Rows from, int group, float most)
      : chunks_per_row_(from.inputs / CHUNK), rows_(from.rows), chunks_(new Chunk<P, CHUNK>[from.rows * chunks_per_row_]) {
    for_each_row(pool, from.rows, from.inputs, [&](long row) {
      for (long first = 0; first < from.inputs; first += group) {
        const float* x = from.x + row * from.inputs + first;
        const float scale = scale_of(x, group, most), inverse = inverse_of(scale);
        for (int i = 0; i < group; i += CHUNK) fill(at(row, (first + i) / CHUNK), x + i, scale, inverse);
      }
    });
  }

  // The chunk of a row; that of the next row stands behind it, as far as the block goes.
  Chunk<P, CHUNK>& at(long row, long chunk) const {
    const long block = row / BLOCK * BLOCK;
    return chunks_[block * chunks_per_row_ + chunk * rows_in_block(row) + row % BLOCK];
  }

  int rows_in_block(long row) const { return static_cast<int>(std::min<long>(BLOCK, rows_ - row / BLOCK * BLOCK)); }

 private:
  static void fill(Chunk<P, CHUNK>& chunk, const float* x, float scale, float inverse) {
    typename P::Code* to = reinterpret_cast<typename P::Code*>(chunk.words);
    IntVec order;
    for (int i = 0; i < LANES; i++) order[i] = P::input(i);
    Vec total = {};
    for (int i = 0; i < CHUNK; i += LANES) {
      const Vec codes = nearest(load(x + i) * inverse);
      total += codes;
      const IntVec ordered = __builtin_shuffle(__builtin_convertvector(codes, IntVec), order);
      *reinterpret_cast<typename P::Codes*>(to + i) = __builtin_convertvector(__builtin_convertvector(ordered, ShortVec), typename P::Codes);
    }
    chunk.scale = scale;
    chunk.sum = sum(total) * scale;
  }

  long chunks_per_row_, rows_;
  std::unique_ptr<Chunk<P, CHUNK>[]> chunks_;
};

template <typename P>
static inline void add(IntVec& sums, IntVec codes, IntVec row) {
  sums = P::sum(sums, P::product(codes, row));
  asm("" : "+x"(sums));  // else GCC makes all products of a chunk before it adds them, many more than there are registers for
}

// c[ROWS][PANEL] += x[ROWS][inputs] * panel; x: the first chunk of the first row, `stride`: chunks to the next one of the same row.
template <typename F, typename P, int CHUNK, int ROWS>
static void multiply_integers(const Chunk<P, CHUNK>* x, long stride, const char* panel, long inputs, int group, float* c) {
  static_assert(LANES == 8 && CHUNK % F::UNIT == 0);
  for (long g = 0; g < inputs / group; g++) {
    const Place at = F::place(panel, g, group);
    const char* unit = at.codes;
    for (int first = 0; first < group; first += CHUNK, x += stride) {
      IntVec sums[ROWS][2] = {};
#pragma GCC unroll 4
      for (int i = 0; i < CHUNK; i += F::UNIT, unit += F::unit_bytes()) {
        for (int line = 0; line < F::unit_bytes(); line += 64) __builtin_prefetch(unit + PREFETCH_BYTES + line, 0, 3);
        P::words(unit, [&](int word, IntVec low, IntVec high) __attribute__((always_inline)) {
#pragma GCC unroll 6
          for (int m = 0; m < ROWS; m++) {
            const IntVec left = IntVec{} + x[m].words[i / P::INPUTS + word];
            add<P>(sums[m][0], low, left), add<P>(sums[m][1], high, left);
          }
        });
      }
      const Pair scale = F::code_scales(at), minimum = F::minima_beside(at, P::OFFSET);  // here, where registers are free
#pragma GCC unroll 6
      for (int m = 0; m < ROWS; m++)
        for (int half = 0; half < 2; half++) {
          float* to = c + m * PANEL + half * LANES;
          Vec result = load(to) + P::total(sums[m][half]) * ((half ? scale.high : scale.low) * x[m].scale);
          if constexpr (F::HAS_MINIMA || P::OFFSET) result += (half ? minimum.high : minimum.low) * x[m].sum;
          store(to, result);
        }
    }
  }
}

// The same for rows [row, row + rows), of which the first begins a block.
template <typename F, typename P, int CHUNK>
static void multiply_integers(const IntegerRows<P, CHUNK>& x, long row, int rows, const char* panel, long inputs, int group, float* c) {
  for (const long end = row + rows; row < end; row += x.BLOCK, c += x.BLOCK * PANEL)
    for_each_row_tile<P::MOST_ROWS>(x.rows_in_block(row), [&](auto tile, int first) {
      multiply_integers<F, P, CHUNK, decltype(tile)::value>(&x.at(row + first, 0), x.rows_in_block(row), panel, inputs, group, c + first * PANEL);
    });
}

#endif
