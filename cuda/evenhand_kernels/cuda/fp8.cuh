// fp8 e4m3: sign, 4 bits of exponent (bias 7), 3 of mantissa; the largest is 448, there is no infinity.
#pragma once
#include "device.cuh"

// Rounded to nearest even; what is larger becomes 448, NaN stays NaN (0x7f).
DEVICE uint32_t to_e4m3(float value) {
  uint32_t bits = __float_as_uint(value), sign = bits >> 24 & 0x80, magnitude = bits & 0x7fffffff;
  if (magnitude > 0x7f800000) return 0x7f;
  if (magnitude >= 0x43e80000) return sign | 0x7e;  // from 464 on: half way between 448 and what 480 would be
  if (magnitude < 0x3c800000)                       // below 2^-6 in steps of 2^-9: let an addition round
    return sign | (__float_as_uint(__uint_as_float(magnitude) + 16384.f) - 0x46800000);
  magnitude += 0x7ffff + (magnitude >> 20 & 1);
  return sign | ((magnitude >> 20) - (120 << 3));
}

// Two numbers, in the low bytes of `pair`, as two elements. Exact; NaN comes out as 480.
DEVICE uint32_t from_e4m3(uint32_t pair) {
  uint32_t spread = __byte_perm(pair, 0, 0x1404);  // each byte at the top of a half
#ifdef BF16
  return multiply_pair((spread & 0x80008000) | (spread >> 4 & 0x07f007f0), 0x7b807b80);  // 2^(127 - 7)
#else
  return multiply_pair((spread & 0x80008000) | (spread >> 1 & 0x3f803f80), 0x5c005c00);  // 2^(15 - 7)
#endif
}
