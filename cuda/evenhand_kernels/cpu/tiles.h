// Products of many rows by tiles of AMX: 16 rows with 16 columns, 32 inputs of both in pairs of bfloat16 at a time (tdpbf16ps).
//
// The code is compiled wherever there are pair products, and runs where processor and system have tiles.
#pragma once

#include <algorithm>

#include "weight.h"

#if defined(__AVX512BF16__) && defined(__linux__) && __has_include(<amxbf16intrin.h>)
#define EVENHAND_TILES
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>

// Whether this process may use tiles: it asks the system for the memory to keep them in, once.
static inline bool has_tiles() {
  static const bool result = [] {
    constexpr unsigned AMX_BF16 = 1u << 22, AMX_TILE = 1u << 24;
    constexpr long ARCH_REQ_XCOMP_PERM = 0x1023, XFEATURE_XTILEDATA = 18;
    unsigned a, b, c, d = 0;
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || (d & (AMX_BF16 | AMX_TILE)) != (AMX_BF16 | AMX_TILE)) return false;
    return syscall(SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA) == 0;
  }();
  return result;
}

constexpr int TILE_ROWS = 16, TILE_INPUTS = 32, TILE_LINE = 64;

struct alignas(64) PairTile {
  BFloat16Pair pairs[TILE_ROWS * TILE_INPUTS / 2];

  BFloat16Pair* row(long number) { return pairs + number * TILE_INPUTS / 2; }
};

// The rows of a linear layer in tiles; only the last may have fewer than TILE_ROWS.
struct TileRows {
  static constexpr int most = TILE_ROWS;
  long rows;

  long number() const { return (rows + most - 1) / most; }
  long first(long tile) const { return std::min(tile * most, rows); }
};

// The upper half of each lane, and that rounded to nearest: the instruction for it takes longer on the processors that have tiles.
static inline IntVec upper_half(Vec v) { return (IntVec)v & static_cast<int>(0xffff0000); }
static inline IntVec nearest_upper_half(Vec v) { return upper_half((Vec)((IntVec)v + 0x8000)); }

// Two vectors as pairs of bfloat16: of these upper halves, and of what is left, rounded to nearest. Both together have 16 bits.
static inline void store_as_sums(Vec first, Vec second, IntVec upper_first, IntVec upper_second, BFloat16Pair* upper, BFloat16Pair* lower) {
  const auto pairs = [](IntVec a, IntVec b) { return (Vec)_mm512_mask_blend_epi16(0xaaaaaaaa, (__m512i)((UnsignedVec)a >> 16), (__m512i)b); };
  store(upper, pairs(upper_first, upper_second));
  store(lower, pairs((IntVec)(first - (Vec)upper_first) + 0x8000, (IntVec)(second - (Vec)upper_second) + 0x8000));
}
static inline void store_as_sums(Vec first, Vec second, BFloat16Pair* upper, BFloat16Pair* lower) {
  store_as_sums(first, second, nearest_upper_half(first), nearest_upper_half(second), upper, lower);
}

// Keeps the compiler from moving stores behind loads of tiles, or leaving them out: it does not know that these read memory.
static inline __attribute__((always_inline)) void before_tiles_are_loaded(const void* from) { asm volatile("" : : "r"(from) : "memory"); }

// All tiles have 16 rows of 64 bytes while an object of this lives.
class TileShapes {
 public:
  __attribute__((target("amx-tile"))) TileShapes() {
    struct alignas(64) {
      uint8_t palette = 1, start_row = 0, reserved[14] = {};
      uint16_t row_bytes[16] = {};
      uint8_t rows[16] = {};
    } shapes;
    for (int tile = 0; tile < 8; tile++) shapes.row_bytes[tile] = TILE_LINE, shapes.rows[tile] = TILE_ROWS;
    before_tiles_are_loaded(&shapes);
    _tile_loadconfig(&shapes);
  }
  __attribute__((target("amx-tile"))) ~TileShapes() { _tile_release(); }
  TileShapes(const TileShapes&) = delete;
  TileShapes& operator=(const TileShapes&) = delete;
};

// c[ROW_TILES * TILE_ROWS][PANEL], `ldc` numbers apart, += x * pairs[steps * TILE_INPUTS / 2][PANEL]. Rows are sums of PARTS numbers in bfloat16:
// x[steps][PARTS]; `below`: those of the second tile. So may the right side be, whose second parts are `lower`: they are multiplied with the
// first parts of rows alone, since the other product is less than what 16 bits are rounded by. FRESH: c counts as zero.
template <int ROW_TILES, int PARTS = 1, bool HAS_LOWER = false, bool FRESH = false>
__attribute__((target("amx-tile,amx-bf16"), noinline)) static void multiply_tiles(const PairTile* x, const PairTile* below, const BFloat16Pair* pairs,
                                                                                 const BFloat16Pair* lower, long steps, float* c, long ldc) {
  constexpr long PANEL_LINE = PANEL * 4;
  const long c_line = ldc * 4;
  float* c_below = c + TILE_ROWS * ldc;
  before_tiles_are_loaded(x);
  if constexpr (FRESH) {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
  } else {
    _tile_loadd(0, c, c_line);
    _tile_loadd(1, c + LANES, c_line);
    if constexpr (ROW_TILES == 2) {
      _tile_loadd(2, c_below, c_line);
      _tile_loadd(3, c_below + LANES, c_line);
    }
  }
  for (; steps > 0; steps--, pairs += TILE_INPUTS / 2 * PANEL, lower += TILE_INPUTS / 2 * PANEL, x += PARTS, below += PARTS) {
    _tile_loadd(6, pairs, PANEL_LINE);
    _tile_loadd(7, pairs + LANES, PANEL_LINE);
    for (int product = 0; product < PARTS + HAS_LOWER; product++) {
      const int part = product % PARTS;
      if (product == PARTS) {
        _tile_loadd(6, lower, PANEL_LINE);
        _tile_loadd(7, lower + LANES, PANEL_LINE);
      }
      _tile_loadd(4, x[part].pairs, TILE_LINE);
      _tile_dpbf16ps(0, 4, 6);
      _tile_dpbf16ps(1, 4, 7);
      if constexpr (ROW_TILES == 2) {
        _tile_loadd(5, below[part].pairs, TILE_LINE);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
      }
    }
  }
  _tile_stored(0, c, c_line);
  _tile_stored(1, c + LANES, c_line);
  if constexpr (ROW_TILES == 2) {
    _tile_stored(2, c_below, c_line);
    _tile_stored(3, c_below + LANES, c_line);
  }
}

#endif
