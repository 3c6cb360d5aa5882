// Weights as codes of 4 or 8 bits: 32 neighbouring columns of a row, a run, are what a thread takes at a time.
//
//   codes       [rows][columns] of BITS: two codes of 4 bits in a byte, the even column's low; or one signed code of 8 bits;
//               or, with FP8, a float of 8 bits (fp8.cuh)
//   factors     [rows][columns / group][2]: what brings a code, as the float below, to its weight: factor, then offset
//
// A code is turned into a float without a conversion, which would be slow: as the top bits of the mantissa of a number in
// [1, 2). With code c of b bits that is 1 + c / 2^b, so a weight c scale + minimum is that times 2^b scale, plus minimum -
// 2^b scale; signed codes have their sign bit flipped, which adds 128. Floats become elements, which hold all of them, two at a
// time, and then are multiplied by the factor.
#pragma once
#include "fp8.cuh"

constexpr int RUN = 32;
constexpr int RUN_BYTES = RUN * BITS / 8, RUN_LOADS = RUN_BYTES / 16;

struct Run {
  uint32_t words[RUN_BYTES / 4];
  float factor, offset;

  // Weights 2 i and 2 i + 1, as elements.
  DEVICE uint32_t pair(int i) const {
#ifdef FP8
    const uint32_t both = from_e4m3(words[i / 2] >> i % 2 * 16);
    return pack(low_half(both) * factor, high_half(both) * factor);
#else
#if BITS == 4
    const uint32_t word = words[i / 4];
    const int place = i % 4 * 8;
    const uint32_t low = place < 19 ? word << (19 - place) : word >> (place - 19);
    const uint32_t high = place + 4 < 19 ? word << (15 - place) : word >> (place - 15);
    constexpr uint32_t MASK = 0x780000;
#else
    const uint32_t word = words[i / 2] ^ 0x80808080u;
    const uint32_t low = i % 2 ? word >> 1 : word << 15, high = i % 2 ? word >> 9 : word << 7;
    constexpr uint32_t MASK = 0x7f8000;
#endif
    return pack(weight(low & MASK), weight(high & MASK));
#endif
  }
  DEVICE float weight(uint32_t mantissa) const { return __uint_as_float(mantissa | 0x3f800000u) * factor + offset; }
};

// The run of `columns` columns' row `row` that begins at `column`.
DEVICE Run load_run(const uint8_t* codes, const float* factors, int64_t row, int column, int columns, int group) {
  Run run;
  const uint8_t* from = codes + (row * columns + column) * BITS / 8;
#pragma unroll
  for (int i = 0; i < RUN_LOADS; i++) {
    const uint4 words = load_16B(from + i * 16);
    run.words[i * 4] = words.x;
    run.words[i * 4 + 1] = words.y;
    run.words[i * 4 + 2] = words.z;
    run.words[i * 4 + 3] = words.w;
  }
  const uint2 pair = load_8B(factors + (row * (columns / group) + column / group) * 2);
  run.factor = __uint_as_float(pair.x);
  run.offset = __uint_as_float(pair.y);
  return run;
}
