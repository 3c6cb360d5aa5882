// wgmma as a kernel sees it in the emulation: the counterpart of the first half of wgmma.cuh.
#pragma once
#include "device.h"

extern "C" {
void emu_wgmma(int is_bf16, unsigned columns, float* d, uint64_t a, const uint32_t* a_registers, uint64_t b, int b_across,
               int add);
void emu_wgmma_fence();
void emu_wgmma_pin(void* registers, unsigned bytes, int before_products);
void emu_wgmma_commit();
void emu_wgmma_wait(unsigned may_be_in_flight);
}

template <bool ADD, int N> inline void wgmma_keys(float (&d)[N][4], uint64_t a, uint64_t b) {
  emu_wgmma(IS_BF16, N * 8, &d[0][0], a, nullptr, b, 0, ADD);
}
template <int N> inline void wgmma_values(float (&d)[N][4], const uint32_t (&a)[4], uint64_t b) {
  emu_wgmma(IS_BF16, N * 8, &d[0][0], 0, a, b, 1, 1);
}
template <class... Registers> inline void wgmma_fence(Registers&... registers) {
  emu_wgmma_fence();
  (emu_wgmma_pin(&registers, sizeof(registers), 1), ...);
}
inline void wgmma_commit() { emu_wgmma_commit(); }
template <int IN_FLIGHT, class... Registers> inline void wgmma_wait(Registers&... registers) {
  emu_wgmma_wait(IN_FLIGHT);
  (emu_wgmma_pin(&registers, sizeof(registers), 0), ...);
}
