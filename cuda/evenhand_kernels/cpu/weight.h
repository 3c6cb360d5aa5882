// Weights of a linear layer in memory: plain numbers of 16 or 32 bits, or groups of 4- or 8-bit codes.
//
// A panel is PANEL outputs. Of plain numbers it holds element (k, n) at [k][n], of bfloat16 at [k / 2][n][k % 2]. Codes lie in groups of `group` inputs, each
//
//     scales [PANEL]    minima [PANEL], in some formats    codes: [group][PANEL] bytes, or [group / 8][PANEL] words
//
// whose 4-bit codes are those of eight inputs, the first in the lowest bits. A weight is code * scale + minimum, so that
// the sum of a group can be taken over bare codes: sum(x * weight) = scale * sum(x * code) + minimum * sum(x). So that
// little cancels between the two terms, codes of 4 bits lie and count as signed ones: code - 8, and minimum + 8 * scale.
#pragma once

#include <algorithm>
#include <type_traits>

#include "vec.h"

constexpr int PANEL = 2 * LANES;
constexpr int MAX_GROUP = 256;

struct Pair { Vec low, high; };  // of the first and second half of a panel

// A weight as it is packed: plain numbers, or codes with scales and minima, row-major as in quantized.py; null: none.
struct Parts {
  const void *codes, *scales, *minima, *factors;
};

// Where a group of a panel has its scales and minima, its codes, and what multiplies the former; null: 1.
struct Place {
  const char *header, *codes, *factors;
};

template <typename T>
static inline Pair load_pair(const T* p) {
  return {load(p), load(p + LANES)};
}

// A block of inputs, widened from a panel to float32 [depth][PANEL] ...
template <typename T>
struct Block {
  T* to;

  void add(long k, Pair first, Pair second) const { add(k, first), add(k + 1, second); }
  void add(long k, Pair row) const { store(to + k * PANEL, row.low), store(to + k * PANEL + LANES, row.high); }
};

// ... or to pairs of bfloat16 [depth / 2, rounded up][PANEL].
template <>
struct Block<BFloat16Pair> {
  BFloat16Pair* to;

  void add(long k, Pair first, Pair second) const {
    store(to + k / 2 * PANEL, pairs(first.low, second.low));
    store(to + k / 2 * PANEL + LANES, pairs(first.high, second.high));
  }
  void add(long k, Pair last) const { add(k, last, {Vec{}, Vec{}}); }
};

// Plain numbers.
template <typename T>
struct Plain {
  using Element = T;
  static constexpr bool GROUPED = false, PAIRED = false;
  template <typename To>
  static constexpr bool LIES_AS = std::is_same_v<T, To>;  // of a right side of products

  static long panel_bytes(long inputs, int) { return inputs * PANEL * static_cast<long>(sizeof(T)); }

  // Rows of numbers, [outputs][inputs], into a panel; -1: none.
  static void pack(char* panel, const int64_t (&rows)[PANEL], long inputs, int, const Parts& parts) {
    T* to = reinterpret_cast<T*>(panel);
    for (int lane = 0; lane < PANEL; lane++)
      for (long k = 0; k < inputs; k++)
        to[k * PANEL + lane] = rows[lane] < 0 ? T{} : static_cast<const T*>(parts.codes)[rows[lane] * inputs + k];
  }

  // Widens inputs [k, k + depth) of a panel.
  template <typename To>
  static void widen(const char* panel, long k, int depth, int, Block<To> block) {
    const T* from = reinterpret_cast<const T*>(panel) + k * PANEL;
    long i = 0;
    for (; i + 2 <= depth; i += 2, from += 2 * PANEL) block.add(i, load_pair(from), load_pair(from + PANEL));
    if (i < depth) block.add(i, load_pair(from));
  }
};

// bfloat16 in pairs of inputs, which are what its own products take, and widen by a shift or a mask.
template <>
struct Plain<BFloat16> {
  static constexpr bool GROUPED = false, PAIRED = true;
  template <typename T>
  static constexpr bool LIES_AS = std::is_same_v<T, BFloat16Pair>;

  static long panel_bytes(long inputs, int) { return (inputs + 1) / 2 * PANEL * 4; }

  static void pack(char* panel, const int64_t (&rows)[PANEL], long inputs, int, const Parts& parts) {
    BFloat16* to = reinterpret_cast<BFloat16*>(panel);
    for (int lane = 0; lane < PANEL; lane++)
      for (long k = 0; k < (inputs + 1) / 2 * 2; k++)
        to[(k / 2 * PANEL + lane) * 2 + k % 2] =
            rows[lane] < 0 || k == inputs ? BFloat16{} : static_cast<const BFloat16*>(parts.codes)[rows[lane] * inputs + k];
  }

  // Calls visit(j, inputs k + j) for a pair whose words begin at `at`.
  template <typename Visit>
  static inline __attribute__((always_inline)) void widen_pair(const char* at, const Visit& visit) {
    const IntVec low = *reinterpret_cast<const IntVec*>(at), high = *reinterpret_cast<const IntVec*>(at + LANES * 4);
    const int upper = static_cast<int>(0xffff0000);
    visit(0, Pair{(Vec)(low << 16), (Vec)(high << 16)});
    visit(1, Pair{(Vec)(low & upper), (Vec)(high & upper)});
  }

  // k is even.
  template <typename To>
  static void widen(const char* panel, long k, int depth, int, Block<To> block) {
    const char* at = panel + panel_bytes(k, 1);
    for (int i = 0; i < depth; i += 2, at += PANEL * 4)
      widen_pair(at, [&](int j, Pair row) __attribute__((always_inline)) {
        if (i + j < depth) block.add(i + j, row);
      });
  }
};

// Widens inputs [k, k + depth) of a panel: whole groups.
template <typename F, typename To>
static void widen_groups(const char* panel, long k, int depth, int group, Block<To> block) {
  for (int first = 0; first < depth; first += group) {
    const Place at = F::place(panel, (k + first) / group, group);
    const Pair scale = F::scales(at), minimum = F::minima(at);
    const char* unit = at.codes;
    for (int i = first; i < first + group; i += F::UNIT, unit += F::unit_bytes()) {
      Pair even;
      F::codes(unit, [&](int j, Pair code) __attribute__((always_inline)) {
        const Pair row = {code.low * scale.low + minimum.low, code.high * scale.high + minimum.high};
        if (j % 2 == 0)
          even = row;
        else
          block.add(i + j - 1, even, row);
      });
    }
  }
}

// Codes of BITS bits; SCALE is the type of scales and minima.
template <int BITS, typename SCALE, bool MINIMA>
struct Grouped {
  static constexpr bool GROUPED = true, PAIRED = false, HAS_MINIMA = MINIMA;
  static_assert(MINIMA || BITS == 8);
  template <typename T>
  static constexpr bool LIES_AS = false;
  static constexpr int UNIT = 8;    // inputs that `codes` visits together
  static constexpr int CHUNK = 32;  // whose products with rows in whole numbers are added before a scale is applied
  // The same where groups are no multiple of that: K-quants of unlike kinds, stacked, are codes of 8 bits with a float scale for each 16.
  static constexpr int SMALL_CHUNK = BITS == 8 && std::is_same_v<SCALE, float> ? 16 : CHUNK;
  static constexpr int CODE_BITS = BITS;

  static long header_bytes() { return PANEL * (MINIMA ? 2 : 1) * static_cast<long>(sizeof(SCALE)); }
  static long group_bytes(int group) { return header_bytes() + PANEL * group * BITS / 8; }
  static long panel_bytes(long inputs, int group) { return inputs / group * group_bytes(group); }
  static Place place(const char* panel, long number, int group) {
    const char* header = panel + number * group_bytes(group);
    return {header, header + header_bytes(), nullptr};
  }

  // Rows into a panel; -1: none.
  static void pack(char* panel, const int64_t (&rows)[PANEL], long inputs, int group, const Parts& parts) {
    const long groups = inputs / group, row_bytes = inputs * BITS / 8;
    for (long g = 0; g < groups; g++, panel += group_bytes(group)) {
      SCALE* header = reinterpret_cast<SCALE*>(panel);
      uint8_t* to = reinterpret_cast<uint8_t*>(panel + header_bytes());
      for (int lane = 0; lane < PANEL; lane++) {
        const int64_t row = rows[lane];
        header[lane] = row < 0 ? SCALE{} : static_cast<const SCALE*>(parts.scales)[row * groups + g];
        if (MINIMA) header[PANEL + lane] = row < 0 ? SCALE{} : static_cast<const SCALE*>(parts.minima)[row * groups + g];
        const uint8_t* from = static_cast<const uint8_t*>(parts.codes) + row * row_bytes + g * group * BITS / 8;
        constexpr int RUN = BITS == 4 ? 4 : 1;  // bytes of a lane that stay together: a word, or a code
        for (int i = 0; i < group * BITS / 8; i++)
          to[(i / RUN * PANEL + lane) * RUN + i % RUN] = row < 0 ? 0 : from[i] ^ (BITS == 4 ? 0x88 : 0);
      }
    }
  }

  static Pair code_scales(Place at) { return load_pair(reinterpret_cast<const SCALE*>(at.header)); }
  // Beside what `codes` gives, whose codes of 4 bits are signed.
  static Pair minima(Place at) { return minima_beside(at, BITS == 4 ? -8.0f : 0.0f); }
  // Beside codes that are larger by `offset`.
  static Pair minima_beside(Place at, float offset) {
    Pair result = {Vec{}, Vec{}};
    if constexpr (MINIMA) result = load_pair(reinterpret_cast<const SCALE*>(at.header) + PANEL);
    if (offset == 0.0f) return result;
    const Pair scale = code_scales(at);
    return {result.low - offset * scale.low, result.high - offset * scale.high};
  }
  // Of what `codes` gives: it leaves codes of 4 bits where it finds them in the topmost bits of a word.
  static Pair scales(Place at) {
    constexpr float UNIT_SCALE = BITS == 4 ? 0x1p-28f : 1.0f;
    const Pair scale = code_scales(at);
    return {scale.low * UNIT_SCALE, scale.high * UNIT_SCALE};
  }

  // Calls visit(j, codes in float32) for the UNIT inputs whose codes begin at `at`.
  template <typename Visit>
  static inline __attribute__((always_inline)) void codes(const char* at, const Visit& visit) {
    if constexpr (BITS == 4) {
      const IntVec low = *reinterpret_cast<const IntVec*>(at), high = *reinterpret_cast<const IntVec*>(at + LANES * 4);
#pragma GCC unroll 8
      for (int j = 0; j < UNIT; j++) {
        const int left = 28 - 4 * j, top = static_cast<int>(0xf0000000);
        visit(j, Pair{__builtin_convertvector(low << left & top, Vec), __builtin_convertvector(high << left & top, Vec)});
      }
    } else {
#pragma GCC unroll 8
      for (int j = 0; j < UNIT; j++) {
        const ByteVec* bytes = reinterpret_cast<const ByteVec*>(at + j * PANEL);
        visit(j, Pair{widened(bytes[0]), widened(bytes[1])});
      }
    }
  }

  // Calls visit(quad, low, high) twice for the UNIT inputs whose codes begin at `at`: in the bytes of each lane codes + BYTE_OFFSET
  // of four inputs, which are not negative; of 4 bits those at even places first.
  static constexpr int byte_input(int i) { return BITS == 4 ? i / 8 * 8 + i % 4 * 2 + i % 8 / 4 : i; }  // whose code is in byte i
  static constexpr int BYTE_OFFSET = BITS == 4 ? 0 : 128;
  template <typename Visit>
  static inline __attribute__((always_inline)) void unsigned_codes(const char* at, const Visit& visit) {
    if constexpr (BITS == 4) {
      const IntVec flip = IntVec{} + static_cast<int>(0x88888888), mask = IntVec{} + 0x0f0f0f0f;
      const IntVec low = *reinterpret_cast<const IntVec*>(at) ^ flip, high = *reinterpret_cast<const IntVec*>(at + LANES * 4) ^ flip;
      visit(0, low & mask, high & mask);
      visit(1, low >> 4 & mask, high >> 4 & mask);
    } else {
      const IntVec flip = IntVec{} + static_cast<int>(0x80808080);
      for (int quad = 0; quad < 2; quad++, at += 4 * PANEL) {
        const auto half = [&](const char* from) __attribute__((always_inline)) {
#if defined(__AVX512VBMI__)
          __m512i places;
          for (int i = 0; i < 64; i++) reinterpret_cast<uint8_t*>(&places)[i] = static_cast<uint8_t>(i % 4 * PANEL + i / 4);
          return (IntVec)_mm512_permutex2var_epi8(_mm512_loadu_si512(from), places, _mm512_loadu_si512(from + 64)) ^ flip;
#else
          IntVec result = {};
          for (int i = 0; i < 4; i++)
            result |= __builtin_convertvector(*reinterpret_cast<const UnsignedByteVec*>(from + i * PANEL), IntVec) << 8 * i;
          return result ^ flip;
#endif
        };
        visit(quad, half(at), half(at + LANES));
      }
    }
  }

  // Calls visit(pair, low, high) four times: in each lane codes + PAIR_OFFSET of two inputs in bfloat16; of 4 bits the first pair
  // is the first of each half of the eight inputs, and so on. There they become the upper bits of the fraction of 16.
  static constexpr int pair_input(int i) { return BITS == 4 ? i / 8 * 8 + i % 2 * 4 + i % 8 / 2 : i; }

#if defined(EVENHAND_SHORT_PRODUCTS)
  // Calls visit(pair, low, high) four times: in each lane codes + SHORT_OFFSET of these two inputs in 16 bits.
  static constexpr int SHORT_OFFSET = 0;
  template <typename Visit>
  static inline __attribute__((always_inline)) void short_pairs(const char* at, const Visit& visit) {
    if constexpr (BITS == 4) {
      const IntVec flip = IntVec{} + static_cast<int>(0x88888888), mask = IntVec{} + 0x000f000f;
      const IntVec low = *reinterpret_cast<const IntVec*>(at) ^ flip, high = *reinterpret_cast<const IntVec*>(at + LANES * 4) ^ flip;
#pragma GCC unroll 4
      for (int pair = 0; pair < 4; pair++) visit(pair, low >> 4 * pair & mask, high >> 4 * pair & mask);
    } else {
#pragma GCC unroll 4
      for (int pair = 0; pair < 4; pair++) {
        IntVec low, high;
        interleave(at + 2 * pair * PANEL, low, high);
        visit(pair, low, high);
      }
    }
  }
#endif

  static constexpr int PAIR_OFFSET = BITS == 4 ? 16 : 0;
  template <typename Visit>
  static inline __attribute__((always_inline)) void code_pairs(const char* at, const Visit& visit) {
    if constexpr (BITS == 4) {
      const IntVec low = *reinterpret_cast<const IntVec*>(at), high = *reinterpret_cast<const IntVec*>(at + LANES * 4);
      visit(0, sixteen_and(low << 3), sixteen_and(high << 3));
      visit(1, sixteen_and(low >> 1), sixteen_and(high >> 1));
      visit(2, sixteen_and(low >> 5), sixteen_and(high >> 5));
      visit(3, sixteen_and(low >> 9), sixteen_and(high >> 9));
    } else {
#pragma GCC unroll 4
      for (int pair = 0; pair < 4; pair++) {
        const ByteVec* bytes = reinterpret_cast<const ByteVec*>(at + 2 * pair * PANEL);
        visit(pair, (IntVec)pairs(widened(bytes[0]), widened(bytes[2])), (IntVec)pairs(widened(bytes[1]), widened(bytes[3])));
      }
    }
  }

  // Two numbers 16 + code, of signed codes in bits 3 to 6 of each half.
  static inline IntVec sixteen_and(IntVec codes) { return (codes & 0x00780078) ^ 0x41c041c0; }

  static constexpr long unit_bytes() { return PANEL * UNIT * BITS / 8; }

  template <typename To>
  static void widen(const char* panel, long k, int depth, int group, Block<To> block) { widen_groups<Grouped>(panel, k, depth, group, block); }
};
