// wgmma: products that a warpgroup, four warps, starts together and that the tensor cores compute while its threads go on. sm_90a only.
//
//   wgmma_fence(registers...)             what was done to registers that the next products read is done
//   wgmma_keys, wgmma_values              start products; several into the same registers follow each other
//   wgmma_commit()                        what has been started is one group
//   wgmma_wait<IN_FLIGHT>(registers...)   no more groups than that are left, and these registers may be used
//
// Between fence and wait the registers belong to the tensor cores, the left operand's too; and so does the shared memory that the
// descriptors name, which must have been written by bulk copies, or before a fence_async of those who wrote it.
#pragma once
#include "tiled.cuh"
#ifdef EMULATION
#include "wgmma.h"
#else

#define REGISTERS_16 "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15"
#define REGISTERS_32 REGISTERS_16 ",%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31"
#define REGISTERS_48 REGISTERS_32 ",%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47"
#define REGISTERS_64 REGISTERS_48 ",%48,%49,%50,%51,%52,%53,%54,%55,%56,%57,%58,%59,%60,%61,%62,%63"
#define REGISTERS_128 \
  REGISTERS_64 ",%64,%65,%66,%67,%68,%69,%70,%71,%72,%73,%74,%75,%76,%77,%78,%79" \
  ",%80,%81,%82,%83,%84,%85,%86,%87,%88,%89,%90,%91,%92,%93,%94,%95" \
  ",%96,%97,%98,%99,%100,%101,%102,%103,%104,%105,%106,%107,%108,%109,%110,%111" \
  ",%112,%113,%114,%115,%116,%117,%118,%119,%120,%121,%122,%123,%124,%125,%126,%127"

#define FOUR(HOW, x, i) HOW(x[i][0]), HOW(x[i][1]), HOW(x[i][2]), HOW(x[i][3])
#define OPERANDS_16(HOW, x, i) FOUR(HOW, x, i), FOUR(HOW, x, i + 1), FOUR(HOW, x, i + 2), FOUR(HOW, x, i + 3)
#define OPERANDS_32(HOW, x, i) OPERANDS_16(HOW, x, i), OPERANDS_16(HOW, x, i + 4)
#define OPERANDS_48(HOW, x, i) OPERANDS_32(HOW, x, i), OPERANDS_16(HOW, x, i + 8)
#define OPERANDS_64(HOW, x, i) OPERANDS_32(HOW, x, i), OPERANDS_32(HOW, x, i + 8)
#define OPERANDS_128(HOW, x, i) OPERANDS_64(HOW, x, i), OPERANDS_64(HOW, x, i + 16)

// d (+)= a b for 64 rows and N columns: a thread has REGISTERS = N / 2 of d. ADD is 0 or 1, A and B the numbers of the operands
// after d. With ADD 0 d is an output only, and what was in it costs no registers.
#define PRODUCT(N, REGISTERS, A, B, ADD, MODIFIERS)                                      \
  "{ .reg .pred add; setp.ne.b32 add, " #ADD ", 0; wgmma.mma_async.sync.aligned.m64n" #N \
  "k16.f32." ELEMENT_TYPES " {" REGISTERS_##REGISTERS "}, " A ", %" #B ", add, " MODIFIERS "; }"
#define WGMMA_KEYS(N, REGISTERS, A, B)                                                                      \
  if (ADD)                                                                                                  \
    asm volatile(PRODUCT(N, REGISTERS, "%" #A, B, 1, "1, 1, 0, 0") : OPERANDS_##REGISTERS("+f", d, 0) : "l"(a), "l"(b)); \
  else                                                                                                      \
    asm volatile(PRODUCT(N, REGISTERS, "%" #A, B, 0, "1, 1, 0, 0") : OPERANDS_##REGISTERS("=f", d, 0) : "l"(a), "l"(b))
#define WGMMA_VALUES(N, REGISTERS, A0, A1, A2, A3, B)                                                       \
  asm volatile(PRODUCT(N, REGISTERS, "{%" #A0 ", %" #A1 ", %" #A2 ", %" #A3 "}", B, 1, "1, 1, 1")           \
               : OPERANDS_##REGISTERS("+f", d, 0) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b))

// Both operands in shared memory, sixteen neighbouring numbers of their rows. With ADD to d, else d is theirs alone.
template <bool ADD> DEVICE void wgmma_keys(float (&d)[8][4], uint64_t a, uint64_t b) { WGMMA_KEYS(64, 32, 32, 33); }
template <bool ADD> DEVICE void wgmma_keys(float (&d)[4][4], uint64_t a, uint64_t b) { WGMMA_KEYS(32, 16, 16, 17); }

// The left operand in registers, as for mma.m16n8k16; of the right one sixteen whole rows.
DEVICE void wgmma_values(float (&d)[8][4], const uint32_t (&a)[4], uint64_t b) {
  WGMMA_VALUES(64, 32, 32, 33, 34, 35, 36);
}
DEVICE void wgmma_values(float (&d)[12][4], const uint32_t (&a)[4], uint64_t b) {
  WGMMA_VALUES(96, 48, 48, 49, 50, 51, 52);
}
DEVICE void wgmma_values(float (&d)[16][4], const uint32_t (&a)[4], uint64_t b) {
  WGMMA_VALUES(128, 64, 64, 65, 66, 67, 68);
}
DEVICE void wgmma_values(float (&d)[32][4], const uint32_t (&a)[4], uint64_t b) {
  WGMMA_VALUES(256, 128, 128, 129, 130, 131, 132);
}

// The compiler knows nothing of what is going on: it must not move what is done to registers across a fence or a wait.
template <int N> DEVICE void pin(float (&registers)[N][4]) {
#pragma unroll
  for (int i = 0; i < N; i++) asm volatile("" : FOUR("+f", registers, i)::"memory");
}
template <int N> DEVICE void pin(uint32_t (&registers)[N][4]) {
#pragma unroll
  for (int i = 0; i < N; i++) asm volatile("" : FOUR("+r", registers, i)::"memory");
}
template <class... Registers> DEVICE void wgmma_fence(Registers&... registers) {
  (pin(registers), ...);
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}
DEVICE void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int IN_FLIGHT, class... Registers> DEVICE void wgmma_wait(Registers&... registers) {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(IN_FLIGHT) : "memory");
  (pin(registers), ...);
}

#endif  // EMULATION

// A matrix of rows in atoms, as a product's descriptor names it. A product reads along its rows (keys: stride is then from eight rows to
// the next, leading is not used) or across them (values: leading is from an atom to the one beside it, stride from eight rows to the next).
template <class Rows>
struct Matrix {
  uint32_t start;  // in units of 16 bytes, as all lengths in a descriptor

  DEVICE uint64_t descriptor() const {
    constexpr uint64_t SWIZZLE = Rows::WIDTH == 128 ? 1 : Rows::WIDTH == 64 ? 2 : 3;
    constexpr uint32_t STRIDE = Rows::EIGHT_BYTES / 16, LEADING = Rows::ATOM_BYTES / 16;
    return (SWIZZLE << 30 | STRIDE) << 32 | (start + (LEADING << 16));
  }
  DEVICE Matrix behind(int bytes) const { return {start + bytes / 16}; }
  // Numbers 16 k to 16 k + 15 of each row. A descriptor may begin within an atom's row: the swizzle is of addresses.
  DEVICE Matrix along(int k) const { return behind(k * 32 / Rows::WIDTH * Rows::ATOM_BYTES + k * 32 % Rows::WIDTH); }
  // Rows 16 k to 16 k + 15.
  DEVICE Matrix across(int k) const { return behind(k * 2 * Rows::EIGHT_BYTES); }
};
