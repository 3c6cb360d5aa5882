// Products of rows in whole numbers of 16 or 8 bits with the codes of a panel, by AVX2 or AVX-512: vpmaddwd multiplies two inputs of each
// output at a time, or with VNNI vpdpwssd, which adds them as well, and vpmaddubsw four. Sums of products are exact; of a weight nothing is rounded:
//
//     sum(x * weight) = scale of x * scale * sum(code of x * (code + offset)) + (minimum - offset * scale) * sum(x), for each group
//
// Rows lie in the tiles that are multiplied together, and there in chunks of CHUNK inputs: a chunk of each row, then the next of each. So a tile
// reads them from its first to its last byte, at constant distances from one pointer.
#pragma once

#include <memory>

#include "activations.h"
#include "coded.h"
#include "multiply.h"
#include "weight.h"

template <typename P, int CHUNK>
struct Chunk {
  Word words[CHUNK / P::INPUTS];
  float scale, sum;  // the latter of the rounded inputs
};

#if defined(EVENHAND_SHORT_PRODUCTS)

// Rows of a tile: 16 of 32 registers are sums. With 24 it is no faster, and takes longer to compile.
template <int OF_16_REGISTERS>
constexpr int MOST_INTEGER_ROWS = LANES == 16 ? 8 : OF_16_REGISTERS;

// Rows and codes in 16 bits, two of them in a word.
template <typename F>
struct ShortProducts {
  using Code = int16_t;
  using Codes = ShortVec;
  static constexpr int INPUTS = 2, MOST_ROWS = MOST_INTEGER_ROWS<5>, OFFSET = F::SHORT_OFFSET;

  static constexpr int input(int i) { return F::pair_input(i); }

  template <typename Visit>
  static inline __attribute__((always_inline)) void words(const char* at, const Visit& visit) { F::short_pairs(at, visit); }
  static inline IntVec add(IntVec sums, IntVec codes, IntVec row) { return add_products_of_shorts(sums, codes, row); }
  static inline Vec total(IntVec sums) { return __builtin_convertvector(sums, Vec); }
};

// Rows in 8 bits and codes in 4. The sums of a chunk fit 16 bits: 16 products of at most 15 * 127.
template <typename F>
struct ByteCodeProducts {
  using Code = int8_t;
  using Codes = ByteVec;
  static constexpr int INPUTS = 4, MOST_ROWS = MOST_INTEGER_ROWS<6>, OFFSET = F::BYTE_OFFSET;

  static constexpr int input(int i) { return F::byte_input(i); }

  template <typename Visit>
  static inline __attribute__((always_inline)) void words(const char* at, const Visit& visit) { F::unsigned_codes(at, visit); }
  static inline IntVec add(IntVec sums, IntVec codes, IntVec row) { return add_shorts(sums, add_products_of_bytes(codes, row)); }
  static inline Vec total(IntVec sums) {
    return __builtin_convertvector(add_products_of_shorts(sums, IntVec{} + 0x00010001), Vec);
  }
};

// Rows in tiles: [inputs / CHUNK][rows of the tile] chunks of each.
template <typename P, int CHUNK>
class IntegerRows {
 public:
  // Rounds to whole numbers up to `most_code`, which the largest of each `group` inputs becomes.
  IntegerRows(Pool& pool, Rows from, int group, float most_code, int rows_of_tile)
      : tiles{from.rows, rows_of_tile}, chunks_per_row_(from.inputs / CHUNK), chunks_(new Chunk<P, CHUNK>[from.rows * chunks_per_row_]) {
    for_each_row(pool, from.rows, from.inputs, [&](long row) {
      const long tile = tiles.of(row), first_row = tiles.first(tile), stride = tiles.first(tile + 1) - first_row;
      Chunk<P, CHUNK>* to = &chunks_[first_row * chunks_per_row_ + row - first_row];
      const float* x = from.x + row * from.inputs;
      for (long first = 0; first < from.inputs; first += group, x += group) {
        const float scale = scale_of(x, group, most_code), inverse = inverse_of(scale);
        for (int i = 0; i < group; i += CHUNK, to += stride) fill(*to, x + i, scale, inverse);
      }
    });
  }

  // The chunks of the tile that begins with this row.
  const Chunk<P, CHUNK>* tile_at(long row) const { return &chunks_[row * chunks_per_row_]; }

  const Tiles tiles;

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

  const long chunks_per_row_;
  const std::unique_ptr<Chunk<P, CHUNK>[]> chunks_;
};

template <typename P>
static inline void add(IntVec& sums, IntVec codes, IntVec row) {
  sums = P::add(sums, codes, row);
  asm("" : "+v"(sums));  // else GCC makes all products of a chunk before it adds them, many more than there are registers for
}

// c += what the sums of a chunk of a row come to, for one half of a panel.
template <typename P, bool HAS_MINIMA>
static inline __attribute__((always_inline)) void add_chunk(float* c, IntVec sums, Vec scale, Vec minimum, float row_scale, float row_sum) {
  Vec result = load(c) + P::total(sums) * (scale * row_scale);
  if constexpr (HAS_MINIMA) result += minimum * row_sum;
  store(c, result);
}

// c[ROWS][PANEL] += x[ROWS][inputs] * panel.
template <typename F, typename P, int CHUNK, int ROWS>
static void multiply_integers(const Chunk<P, CHUNK>* x, const char* panel, long inputs, int group, float* c) {
  static_assert(CHUNK % F::UNIT == 0);
  for (long g = 0; g < inputs / group; g++) {
    const Place at = F::place(panel, g, group);
    const char* unit = at.codes;
    for (int first = 0; first < group; first += CHUNK, x += ROWS) {
      IntVec sums[ROWS][2] = {};
#pragma GCC unroll 4
      for (int i = 0; i < CHUNK; i += F::UNIT, unit += F::unit_bytes()) {
        for (int line = 0; line < F::unit_bytes(); line += 64) __builtin_prefetch(unit + PREFETCH_BYTES + line, 0, 3);
        P::words(unit, [&](int word, IntVec low, IntVec high) __attribute__((always_inline)) {
#pragma GCC unroll 8
          for (int m = 0; m < ROWS; m++) {
            const IntVec left = IntVec{} + x[m].words[i / P::INPUTS + word];
            add<P>(sums[m][0], low, left), add<P>(sums[m][1], high, left);
          }
        });
      }
      const Pair scale = F::code_scales(at), minimum = F::minima_beside(at, P::OFFSET);  // here, where registers are free
#pragma GCC unroll 8
      for (int m = 0; m < ROWS; m++)
        for (int half = 0; half < 2; half++)
          add_chunk<P, F::HAS_MINIMA || P::OFFSET>(c + m * PANEL + half * LANES, sums[m][half], half ? scale.high : scale.low,
                                                   half ? minimum.high : minimum.low, x[m].scale, x[m].sum);
    }
  }
}

// The same for whole tiles of rows, the first of which is `row`.
template <typename F, typename P, int CHUNK>
static void multiply_integers(const IntegerRows<P, CHUNK>& x, long row, int rows, const char* panel, long inputs, int group, float* c) {
  for_each_row_tile<P::MOST_ROWS>(rows, [&](auto tile, int first) {
    multiply_integers<F, P, CHUNK, decltype(tile)::value>(x.tile_at(row + first), panel, inputs, group, c + first * PANEL);
  });
}

#endif
