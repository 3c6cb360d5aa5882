// Weights in super-blocks of 256 inputs, as GGUF's K-quants: codes of 4, 5 or 6 bits in groups, whose scales and minima are integers
// that a float16 of the super-block multiplies. They take as much memory as in the file but for scales of 8 instead of 6 bits.
//
// A panel holds super-blocks: factors of scales [PANEL] and, of codes of 4 and 5 bits, of minima [PANEL], in float16; then groups:
//
//     scales [PANEL] bytes    minima [PANEL] bytes, of codes of 4 and 5 bits    words of codes: [WORDS][PANEL] for each UNIT inputs
//
// A weight is code * scale + minimum, where codes of 6 bits are less by 32, and have no minima. All lie as signed numbers.
#pragma once

#include "weight.h"

// How the codes of UNIT inputs lie in the words of a lane. Inputs 2 i and 2 i + 1 are pair i, the fields at one place of both halves of a word.
// Each half has as many whole fields as it can; its other bits are, together with those of other words, the fields of the last pairs.
template <int BITS>
struct Fields {
  static constexpr int UNIT = BITS == 4 ? 8 : BITS == 5 ? 32 : 16, WORDS = UNIT * BITS / 32;
  static constexpr int OF_HALF = 16 / BITS, WHOLE = WORDS * OF_HALF;  // pairs

  struct At {
    int word, bit;  // in the lower half
  };
  // Of a whole pair. The first two pairs of 4 bits have a byte between them, so that a word has four inputs in its bytes.
  static constexpr At at(int pair) { return {pair / OF_HALF, (BITS == 4 ? pair % 2 * 2 + pair / 2 : pair % OF_HALF) * BITS}; }

  // The words of one lane.
  static void put(uint32_t (&words)[WORDS], int input, uint32_t code) {
    const int pair = input / 2, half = input % 2 * 16;
    if (pair < WHOLE)
      words[at(pair).word] |= code << (at(pair).bit + half);
    else if (BITS == 5)
      for (int i = 0; i < 5; i++) words[i] |= (code >> i & 1) << (15 + half);
    else
      words[(pair - WHOLE) * 2] |= (code & 15) << (12 + half), words[1] |= code >> 4 << ((pair == WHOLE ? 12 : 14) + half);
  }

  // Pair i as the lowest bits of both halves, with others above them if it is whole.
  template <typename Load>
  static inline __attribute__((always_inline)) IntVec pair(int i, const Load& word) {
    if (i < WHOLE) return word(at(i).word) >> at(i).bit;
    if constexpr (BITS == 5) {
      IntVec result = {};
#pragma GCC unroll 5
      for (int bit = 0; bit < 5; bit++) result |= word(bit) >> (15 - bit) & 0x00010001 << bit;
      return result;
    } else {
      return (word((i - WHOLE) * 2) >> 12 & 0x000f000f) | (word(1) >> (i == WHOLE ? 8 : 10) & 0x00300030);
    }
  }
};

template <int BITS>
struct KQuant : Fields<BITS> {
  using Fields<BITS>::UNIT, Fields<BITS>::WORDS, Fields<BITS>::WHOLE;
  static constexpr bool GROUPED = true, PAIRED = false, HAS_MINIMA = BITS < 6;
  template <typename T>
  static constexpr bool LIES_AS = false;
  static constexpr int CODE_BITS = BITS, SUPER = 256, GROUP = BITS == 6 ? 16 : 32, CHUNK = GROUP, SMALL_CHUNK = CHUNK, RANGE = 1 << BITS;
  static constexpr int ZERO = HAS_MINIMA ? 0 : RANGE / 2;  // the field of code 0, were it not signed
  static constexpr int LANE_PARTS = HAS_MINIMA ? 2 : 1;

  static constexpr long unit_bytes() { return WORDS * PANEL * 4; }
  static constexpr long factors_bytes() { return LANE_PARTS * PANEL * 2; }
  static constexpr long group_bytes() { return LANE_PARTS * PANEL + GROUP / UNIT * unit_bytes(); }
  static constexpr long super_bytes() { return factors_bytes() + SUPER / GROUP * group_bytes(); }
  static long panel_bytes(long inputs, int) { return inputs / SUPER * super_bytes() + inputs % SUPER / GROUP * group_bytes(); }

  static Place place(const char* panel, long number, int) {
    const char* factors = panel + number / (SUPER / GROUP) * super_bytes();
    const char* header = factors + factors_bytes() + number % (SUPER / GROUP) * group_bytes();
    return {header, header + LANE_PARTS * PANEL, factors};
  }

  // Rows into a panel; -1: none.
  static void pack(char* panel, const int64_t (&rows)[PANEL], long inputs, int, const Parts& parts) {
    const long supers = inputs / SUPER, groups = inputs / GROUP;
    for (long g = 0; g < groups; g++) {
      const Place at = place(panel, g, GROUP);
      char *factors = panel + (at.factors - panel), *header = panel + (at.header - panel), *to = panel + (at.codes - panel);
      for (int lane = 0; lane < PANEL; lane++) {
        const int64_t row = rows[lane];
        for (int part = 0; part < LANE_PARTS; part++) {
          const long place = row * supers + g * GROUP / SUPER;
          const char* values = static_cast<const char*>(part ? parts.minima : parts.scales);
          header[part * PANEL + lane] = row < 0 ? 0 : values[row * groups + g];
          reinterpret_cast<Float16*>(factors)[part * PANEL + lane] =
              row < 0 ? Float16{} : static_cast<const Float16*>(parts.factors)[place * LANE_PARTS + part];
        }
        for (int unit = 0; unit < GROUP / UNIT; unit++) {
          uint32_t words[WORDS] = {};
          for (int j = 0; j < UNIT && row >= 0; j++)
            Fields<BITS>::put(words, j, code(parts.codes, row * inputs + g * GROUP + unit * UNIT + j) ^ RANGE / 2);
          for (int word = 0; word < WORDS; word++) reinterpret_cast<uint32_t*>(to)[(unit * WORDS + word) * PANEL + lane] = words[word];
        }
      }
    }
  }

  // Of quantized.py, where eight columns are four bytes of lower halves and one of each bit above.
  static uint32_t code(const void* codes, long at) {
    const uint8_t* eight = static_cast<const uint8_t*>(codes) + at / 8 * BITS;
    const int j = static_cast<int>(at % 8);
    uint32_t result = eight[j / 2] >> j % 2 * 4 & 15;
    for (int bit = 4; bit < BITS; bit++) result |= (eight[bit] >> j & 1) << bit;
    return result;
  }

  static Pair code_scales(Place at) { return lane_part(at, 0); }
  // Beside what `codes` gives, whose codes are signed.
  static Pair minima(Place at) { return minima_beside(at, static_cast<float>(ZERO - RANGE / 2)); }
  // Beside codes that are larger by `offset`.
  static Pair minima_beside(Place at, float offset) {
    Pair result = {Vec{}, Vec{}};
    if constexpr (HAS_MINIMA) result = lane_part(at, 1);
    if (offset == 0.0f) return result;
    const Pair scale = code_scales(at);
    return {result.low - offset * scale.low, result.high - offset * scale.high};
  }
  // Of what `codes` gives: it leaves them in the topmost bits of a word.
  static Pair scales(Place at) {
    constexpr float UNIT_SCALE = static_cast<float>(RANGE) * 0x1p-32f;
    const Pair scale = code_scales(at);
    return {scale.low * UNIT_SCALE, scale.high * UNIT_SCALE};
  }

  // Calls visit(j, codes in float32) for the UNIT inputs whose codes begin at `at`.
  template <typename Visit>
  static inline __attribute__((always_inline)) void codes(const char* at, const Visit& visit) {
    constexpr int TOP = static_cast<int>(~0u << (32 - BITS));
#pragma GCC unroll 16
    for (int i = 0; i < UNIT / 2; i++) {
      const bool whole = i < WHOLE;
      if (i == WHOLE) asm("" : "+r"(at));  // reads the words anew: there are not enough registers to keep all of them
      const int bit = whole ? Fields<BITS>::at(i).bit : 0;
      const IntVec low = whole ? word(at, Fields<BITS>::at(i).word, 0) : pair(at, i, 0);
      const IntVec high = whole ? word(at, Fields<BITS>::at(i).word, 1) : pair(at, i, 1);
#pragma GCC unroll 2
      for (int half = 0; half < 2; half++) {
        const int left = 32 - BITS - bit - 16 * half;
        visit(2 * i + half, Pair{__builtin_convertvector(low << left & TOP, Vec), __builtin_convertvector(high << left & TOP, Vec)});
      }
    }
  }

  // Calls visit(quad, low, high): in the bytes of each lane codes + BYTE_OFFSET of four inputs, which are not negative.
  static constexpr int BYTE_OFFSET = ZERO;
  template <typename Visit>
  static inline __attribute__((always_inline)) void unsigned_codes(const char* at, const Visit& visit) {
#pragma GCC unroll 8
    for (int quad = 0; quad < UNIT / 4; quad++) visit(quad, four_codes(at, quad, 0), four_codes(at, quad, 1));
  }
  // The input whose code is in byte i of these.
  static constexpr int byte_input(int i) { return i / 4 * 4 + i % 2 * 2 + i % 4 / 2; }

  // Calls visit(pair, low, high): in each lane codes + PAIR_OFFSET of two inputs in bfloat16. They are the upper bits of the
  // fraction of RANGE.
  static constexpr int PAIR_OFFSET = RANGE + ZERO;
  template <typename Visit>
  static inline __attribute__((always_inline)) void code_pairs(const char* at, const Visit& visit) {
    constexpr int LEFT = 7 - BITS, ONE = ((127 + BITS) << 7 ^ RANGE / 2 << LEFT) * 0x00010001;
#pragma GCC unroll 16
    for (int i = 0; i < UNIT / 2; i++)
      visit(i, ((pair(at, i, 0) & PAIR_MASK) << LEFT) ^ ONE, ((pair(at, i, 1) & PAIR_MASK) << LEFT) ^ ONE);
  }
  static constexpr int pair_input(int i) { return i; }

  // Calls visit(pair, low, high): in each lane codes + SHORT_OFFSET of these two inputs in 16 bits.
  static constexpr int SHORT_OFFSET = ZERO;
  template <typename Visit>
  static inline __attribute__((always_inline)) void short_pairs(const char* at, const Visit& visit) {
    const IntVec flip = IntVec{} + RANGE / 2 * 0x00010001;
#pragma GCC unroll 16
    for (int i = 0; i < UNIT / 2; i++) visit(i, (pair(at, i, 0) & PAIR_MASK) ^ flip, (pair(at, i, 1) & PAIR_MASK) ^ flip);
  }

  template <typename To>
  static void widen(const char* panel, long k, int depth, int, Block<To> block) { widen_groups<KQuant>(panel, k, depth, GROUP, block); }

 private:
  static constexpr int PAIR_MASK = (RANGE - 1) * 0x00010001;

  // Of a half of the panel.
  static inline __attribute__((always_inline)) IntVec word(const char* at, int number, int half) {
    return *reinterpret_cast<const IntVec*>(at + (number * PANEL + half * LANES) * 4);
  }
  static inline __attribute__((always_inline)) IntVec pair(const char* at, int i, int half) {
    return Fields<BITS>::pair(i, [&](int number) __attribute__((always_inline)) { return word(at, number, half); });
  }
  static inline __attribute__((always_inline)) IntVec four_codes(const char* at, int quad, int half) {
    const IntVec flip = IntVec{} + RANGE / 2 * 0x01010101;
    if constexpr (BITS == 4) return (word(at, 0, half) >> 4 * quad & 0x0f0f0f0f) ^ flip;
    return ((pair(at, 2 * quad, half) & PAIR_MASK) | (pair(at, 2 * quad + 1, half) & PAIR_MASK) << 8) ^ flip;
  }
  // Scales or minima in float32.
  static inline Pair lane_part(Place at, int part) {
    const ByteVec* bytes = reinterpret_cast<const ByteVec*>(at.header + part * PANEL);
    const Pair factor = load_pair(reinterpret_cast<const Float16*>(at.factors) + part * PANEL);
    return {widened(bytes[0]) * factor.low, widened(bytes[1]) * factor.high};
  }
};
