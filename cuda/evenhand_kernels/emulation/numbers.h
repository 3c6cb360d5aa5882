// The 16-bit formats, rounded to nearest even as the device rounds.
#pragma once
#include <cstdint>
#include <cstring>

namespace emu {

inline float from_bf16(uint16_t bits) {
  uint32_t word = uint32_t{bits} << 16;
  float value;
  memcpy(&value, &word, 4);
  return value;
}

inline uint16_t to_bf16(float value) {
  uint32_t word;
  memcpy(&word, &value, 4);
  if ((word & 0x7fffffff) > 0x7f800000) return 0x7fff;
  return static_cast<uint16_t>((word + 0x7fff + (word >> 16 & 1)) >> 16);
}

inline float from_fp16(uint16_t bits) {
  _Float16 value;
  memcpy(&value, &bits, 2);
  return static_cast<float>(value);
}

inline uint16_t to_fp16(float value) {
  auto half = static_cast<_Float16>(value);
  uint16_t bits;
  memcpy(&bits, &half, 2);
  return bits;
}

}  // namespace emu
