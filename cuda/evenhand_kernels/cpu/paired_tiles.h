// Products of many rows with a panel by tiles of AMX, 32 inputs at a time (tdpbf16ps): of rows in bfloat16 with plain weights; and of rows with
// codes, where both rows and what scale and minimum make of a code are the sum of two numbers in bfloat16, 16 bits together.
#pragma once

#include <memory>

#include "activations.h"
#include "multiply.h"
#include "tiles.h"

#if defined(EVENHAND_TILES)

constexpr long TILED_BYTES = 24576;  // of a block of a panel, which the first-level cache keeps beside rows and sums
constexpr int FEWEST_TILED_CODE_ROWS = 96;  // that are worth it, since a panel's codes are widened first

// A block of inputs of a panel as the sum of two numbers in bfloat16.
struct BFloat16Parts {};

template <>
struct Block<BFloat16Parts> {
  BFloat16Pair *upper, *lower;  // [depth / 2][PANEL]

  // Upper halves are cut off, not rounded: all weights of a panel go through here, and it is an instruction less for each.
  void add(long k, Pair first, Pair second) const {
    const long at = k / 2 * PANEL;
    const auto put = [&](long i, Vec a, Vec b) { store_as_sums(a, b, upper_half(a), upper_half(b), upper + i, lower + i); };
    put(at, first.low, second.low), put(at + LANES, first.high, second.high);
  }
};

// Rows of whole tiles of inputs, each the sum of PARTS numbers: [tiles of rows][inputs / TILE_INPUTS][PARTS].
template <int PARTS>
class PairedRows {
 public:
  PairedRows(Pool& pool, Rows from)
      : tiles_per_row_(from.inputs / TILE_INPUTS * PARTS), tiles_(new PairTile[TileRows{from.rows}.number() * tiles_per_row_]) {
    for_each_row(pool, TileRows{from.rows}.number() * TILE_ROWS, from.inputs, [&](long row) {
      PairTile* tile = &tiles_[row / TILE_ROWS * tiles_per_row_];
      for (long k = 0; k < from.inputs; k += TILE_INPUTS, tile += PARTS)
        for (int i = 0; i < TILE_INPUTS; i += LANES) {
          Vec rest = row < from.rows ? load(from.x + row * from.inputs + k + i) : Vec{};
          for (int part = 0; part < PARTS; part++) {
            BFloat16* to = reinterpret_cast<BFloat16*>(tile[part].row(row % TILE_ROWS)) + i;
            narrow(rest, to);
            if (part + 1 < PARTS) rest -= load(to);
          }
        }
    });
  }

  // Of the tile of rows with this number, from input k on.
  const PairTile* at(long number, long k) const { return &tiles_[number * tiles_per_row_ + k / TILE_INPUTS * PARTS]; }

 private:
  const long tiles_per_row_;
  const std::unique_ptr<PairTile[]> tiles_;
};

// c[rows][PANEL] += x * panel, beginning with row `row`, that of a tile; c has room for whole tiles. Calls done(first row of c, rows) as soon
// as nothing is added to these any more. Each pair of tiles asks for some of the next block.
template <typename F, int PARTS, typename Done>
static void multiply_tiled(const PairedRows<PARTS>& x, long row, int rows, const char* panel, long inputs, int group, float* c, const Done& done) {
  constexpr bool AS_IT_LIES = F::template LIES_AS<BFloat16Pair>, IS_SUM = F::GROUPED;
  constexpr long MOST = TILED_BYTES / (PANEL * 2 * (1 + IS_SUM));  // inputs of a block
  const TileShapes shapes;
  const long unit = std::max(TILE_INPUTS, group), units = (inputs + unit - 1) / unit, num_blocks = (inputs + MOST - 1) / MOST;
  alignas(64) BFloat16Pair block[AS_IT_LIES ? 1 : (1 + IS_SUM) * (MOST + MAX_GROUP) / 2 * PANEL];
  for (long number = 0; number < num_blocks; number++) {
    const long k = units * number / num_blocks * unit, end = std::min(units * (number + 1) / num_blocks * unit, inputs);
    const int depth = static_cast<int>(end - k);
    const BFloat16Pair *upper = block, *lower = block + (IS_SUM ? depth / 2 * PANEL : 0);
    if constexpr (AS_IT_LIES)
      upper = lower = reinterpret_cast<const BFloat16Pair*>(panel) + k / 2 * PANEL;
    else if constexpr (IS_SUM)
      F::widen(panel, k, depth, group, Block<BFloat16Parts>{block, block + depth / 2 * PANEL});
    else
      F::widen(panel, k, depth, group, Block<BFloat16Pair>{block});
    const char* next = panel + F::panel_bytes(end, group);
    const long next_bytes = (F::panel_bytes(end, group) - F::panel_bytes(k, group)) / ((num_row_tiles(rows, TILE_ROWS) + 1) / 2);
    for (int first = 0; first < rows; first += 2 * TILE_ROWS) {
      for (const char* end_of_share = next + next_bytes; next < end_of_share; next += 64) __builtin_prefetch(next, 0, 2);
      const PairTile* left = x.at((row + first) / TILE_ROWS, k);
      const auto multiply = [&](auto tiles, const PairTile* below) {
        multiply_tiles<decltype(tiles)::value, PARTS, IS_SUM>(left, below, upper, lower, depth / TILE_INPUTS, c + first * PANEL, PANEL);
      };
      if (first + TILE_ROWS < rows)
        multiply(std::integral_constant<int, 2>{}, x.at((row + first) / TILE_ROWS + 1, k));
      else
        multiply(std::integral_constant<int, 1>{}, left);
      if (end == inputs) done(first, std::min(2 * TILE_ROWS, rows - first));
    }
  }
}

#endif
