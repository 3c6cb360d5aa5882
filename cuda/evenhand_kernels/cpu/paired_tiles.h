// Products of many rows in bfloat16 with a panel of plain weights by tiles of AMX, 32 inputs at a time (tdpbf16ps).
#pragma once

#include "panel.h"
#include "tiles.h"

#if defined(EVENHAND_TILES)

constexpr long TILED_INPUTS = 12288 / PANEL;  // of a block: 24 KB, which the first-level cache keeps beside rows and sums

// Rows of whole tiles of inputs: [tiles of rows][inputs / TILE_INPUTS].
class PairedRows {
 public:
  PairedRows(Pool& pool, Rows from)
      : tiles_per_row_(from.inputs / TILE_INPUTS), tiles_(new PairTile[TileRows{from.rows}.number() * tiles_per_row_]) {
    for_each_row(pool, TileRows{from.rows}.number() * TILE_ROWS, from.inputs, [&](long row) {
      PairTile* tile = &tiles_[row / TILE_ROWS * tiles_per_row_];
      for (long k = 0; k < from.inputs; k += TILE_INPUTS, tile++) {
        BFloat16* to = reinterpret_cast<BFloat16*>(tile->row(row % TILE_ROWS));
        for (int i = 0; i < TILE_INPUTS; i += LANES) narrow(row < from.rows ? load(from.x + row * from.inputs + k + i) : Vec{}, to + i);
      }
    });
  }

  // Of the tile of rows with this number, from input k on.
  const PairTile* at(long number, long k) const { return &tiles_[number * tiles_per_row_ + k / TILE_INPUTS]; }

 private:
  const long tiles_per_row_;
  const std::unique_ptr<PairTile[]> tiles_;
};

// c[rows][PANEL] += x * panel, beginning with row `row`, that of a tile; c has room for whole tiles. Calls done(first row of c, rows) as soon
// as nothing is added to these any more. Each pair of tiles asks for some of the next block.
template <typename F, typename Done>
static void multiply_tiled(const PairedRows& x, long row, int rows, const char* panel, long inputs, float* c, const Done& done) {
  constexpr bool AS_IT_LIES = F::template LIES_AS<BFloat16Pair>;
  const TileShapes shapes;
  const long num_blocks = (inputs + TILED_INPUTS - 1) / TILED_INPUTS, tiles = inputs / TILE_INPUTS;
  alignas(64) BFloat16Pair block[AS_IT_LIES ? 1 : TILED_INPUTS / 2 * PANEL];
  for (long number = 0; number < num_blocks; number++) {
    const long k = tiles * number / num_blocks * TILE_INPUTS, end = tiles * (number + 1) / num_blocks * TILE_INPUTS;
    const BFloat16Pair* pairs = block;
    if constexpr (AS_IT_LIES)
      pairs = reinterpret_cast<const BFloat16Pair*>(panel) + k / 2 * PANEL;
    else
      F::widen(panel, k, static_cast<int>(end - k), 1, Block<BFloat16Pair>{block});
    const char* next = panel + F::panel_bytes(end, 1);
    const long next_bytes = F::panel_bytes(end - k, 1) / ((num_row_tiles(rows, TILE_ROWS) + 1) / 2);
    for (int first = 0; first < rows; first += 2 * TILE_ROWS) {
      for (const char* end_of_share = next + next_bytes; next < end_of_share; next += 64) __builtin_prefetch(next, 0, 2);
      const PairTile* left = x.at((row + first) / TILE_ROWS, k);
      if (first + TILE_ROWS < rows)
        multiply_tiles<2>(left, x.at((row + first) / TILE_ROWS + 1, k), pairs, pairs, (end - k) / TILE_INPUTS, c + first * PANEL, PANEL);
      else
        multiply_tiles<1>(left, left, pairs, pairs, (end - k) / TILE_INPUTS, c + first * PANEL, PANEL);
      if (end == inputs) done(first, std::min(2 * TILE_ROWS, rows - first));
    }
  }
}

#endif
