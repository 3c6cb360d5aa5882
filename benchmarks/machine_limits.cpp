// What one core can do at most: products in registers by each instruction that the kernels use, and a sum over memory.
#include "integers.h"
#include "tiles.h"

constexpr int CHAINS = LANES == 16 ? 24 : 12;  // sums under way: as many as a tile of the kernels has

template <typename Add>
static float run(long rounds, const Add& add) {
  Vec left = splat(1.0f), right = splat(0.5f), sums[CHAINS] = {};
  for (; rounds > 0; rounds--) {
#pragma GCC unroll 24
    for (int i = 0; i < CHAINS; i++) {
#if defined(__AVX__)
      asm volatile("" : "+v"(left), "+v"(sums[i]));  // else the compiler makes one product for all sums, and sees that these are the same
#endif
      sums[i] = add(sums[i], left, right);
    }
  }
  float total = 0;
#pragma GCC unroll 24  // else an index that varies keeps the sums in memory, and all that is measured is how fast they are stored
  for (int i = 0; i < CHAINS; i++) total += sum(sums[i]);
  return total;
}

#if defined(EVENHAND_SHORT_PRODUCTS)
template <template <typename> typename Products>
static float run_integers(long rounds) {
  using P = Products<Grouped<4, Float16, true>>;
  return run(rounds, [](Vec sums, Vec a, Vec b) { return (Vec)P::add((IntVec)sums, (IntVec)a, (IntVec)b); });
}
#endif

#if defined(EVENHAND_TILES)
// Rounds of four products of tiles, which wait for nothing.
__attribute__((target("amx-tile,amx-bf16"))) static double run_tiles(long rounds) {
  const TileShapes shapes;
  for (long round = 0; round < rounds; round++) {
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
  }
  return 2.0 * 4 * TILE_ROWS * LANES * TILE_INPUTS * static_cast<double>(rounds);
}
#endif

static volatile float sink;  // so that nothing is left out

extern "C" {

// Products and additions of this many rounds, of float32 (0), bfloat16 (1), or codes with rows in 8 (2) or 16 bits (3).
double limit_operations(int kind, long rounds) {
#if defined(EVENHAND_TILES)
  if (kind == 1 && has_tiles()) return run_tiles(rounds);
#endif
  static constexpr int PRODUCTS[] = {1, 2, 4, 2};
  if (kind == 0) sink = run(rounds, [](Vec sum, Vec a, Vec b) { return sum + a * b; });
  if (kind == 1)
    sink = run(rounds, [](Vec sum, Vec a, Vec b) { return multiply_add(sum, a, b, static_cast<const BFloat16Pair*>(nullptr)); });
#if defined(EVENHAND_SHORT_PRODUCTS)
  if (kind == 2 && !HAS_CODE_PRODUCTS) sink = run_integers<ByteCodeProducts>(rounds);
  if (kind == 3) sink = run_integers<ShortProducts>(rounds);
#endif
  if (kind == 2 && HAS_CODE_PRODUCTS) sink = run(rounds, [](Vec sum, Vec a, Vec b) { return (Vec)dot((IntVec)sum, (IntVec)a, (IntVec)b); });
  return 2.0 * PRODUCTS[kind] * CHAINS * LANES * static_cast<double>(rounds);
}

// Whether the processor has an instruction for that kind.
int limit_has(int kind) {
  return kind == 0 || (kind == 1 ? HAS_PAIR_PRODUCTS : HAS_SHORT_PRODUCTS || (kind == 2 && HAS_CODE_PRODUCTS));
}

// Reads `size` numbers, a multiple of 4 * LANES.
void limit_read(const float* x, long size) {
  Vec sums[4] = {};
  for (long i = 0; i < size; i += 4 * LANES) {
    for (int j = 0; j < 4; j++) {
      __builtin_prefetch(x + i + j * LANES + 512, 0, 3);
      sums[j] += load(x + i + j * LANES);
    }
  }
  sink = sum(sums[0] + sums[1] + sums[2] + sums[3]);
}
}
