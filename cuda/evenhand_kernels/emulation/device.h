// What a kernel sees of CUDA when it is compiled for the emulation: the counterpart of the first half of device.cuh.
#pragma once
#include <stdint.h>  // and no more: a kernel's compilation takes as long as its headers

#define __device__
#define __global__
#define __forceinline__ inline __attribute__((always_inline))
#define __align__(n) __attribute__((aligned(n)))
#define __restrict__ __restrict

struct uint2 { uint32_t x, y; };
struct uint4 { uint32_t x, y, z, w; };
struct Index3 { unsigned x, y, z; };

extern "C" {
struct EmuWords { uint32_t x[4]; };
struct EmuFloats { float x[4]; };
unsigned emu_thread_index() __attribute__((const));
unsigned emu_block_index(int axis) __attribute__((const));
unsigned emu_grid_size(int axis) __attribute__((const));
void* emu_shared(unsigned bytes);
uint32_t emu_shared_address(const void* address);
void emu_trap();
void emu_access(const void* address, unsigned bytes, int kind);
void emu_syncthreads(int vote, int* results);
void emu_syncwarp(unsigned mask);
uint32_t emu_shuffle(unsigned mask, uint32_t value, unsigned lane);
unsigned emu_ballot(unsigned mask, int value);
uint32_t emu_atomic_add32(uint32_t* address, uint32_t value);
uint64_t emu_atomic_add64(uint64_t* address, uint64_t value);
uint32_t emu_atomic_or32(uint32_t* address, uint32_t value);
EmuFloats emu_mma(int is_bf16, EmuFloats d, EmuWords a, uint32_t b0, uint32_t b1);
EmuWords emu_ldmatrix(const void* row, int transposed);
void emu_cp_async(void* to, const void* from, unsigned bytes);
void emu_cp_async_commit();
void emu_cp_async_wait(unsigned may_be_in_flight);
void emu_mbarrier_init(void* address, unsigned count);
void emu_mbarrier_arrive(void* address, unsigned expected_bytes);
void emu_mbarrier_wait(void* address, unsigned parity);
void emu_bulk_copy(void* to, const void* from, unsigned bytes, void* address);
void emu_fence_async();
float emu_from_bf16(uint16_t bits);
float emu_from_fp16(uint16_t bits);
uint16_t emu_to_bf16(float value);
uint16_t emu_to_fp16(float value);
int emu_run(void* launch, void (*entry)(const void*), const void* arguments, unsigned bytes);
}

#define threadIdx (Index3{emu_thread_index(), 0, 0})
#define blockIdx (Index3{emu_block_index(0), emu_block_index(1), emu_block_index(2)})
#define gridDim (Index3{emu_grid_size(0), emu_grid_size(1), emu_grid_size(2)})

// One kernel a file. `emulate` is what Python calls.
#define KERNEL(name)                                                                                  \
  static void name(const Arguments& arguments);                                                       \
  extern "C" int emulate(void* launch, const void* values) {                                          \
    return emu_run(launch, [](const void* all) { name(*static_cast<const Arguments*>(all)); }, values, \
                   sizeof(Arguments));                                                                \
  }                                                                                                   \
  extern "C" unsigned arguments_bytes() { return sizeof(Arguments); }                                  \
  static void name(const Arguments& arguments)
#define SHARED(Type, name) Type& name = *static_cast<Type*>(emu_shared(sizeof(Type)))

inline void __syncthreads() { int votes[3]; emu_syncthreads(0, votes); }
inline int __syncthreads_count(int vote) { int votes[3]; emu_syncthreads(vote, votes); return votes[0]; }
inline int __syncthreads_or(int vote) { int votes[3]; emu_syncthreads(vote, votes); return votes[2]; }
inline void __syncwarp(unsigned mask = ~0u) { emu_syncwarp(mask); }
inline unsigned __ballot_sync(unsigned mask, int vote) { return emu_ballot(mask, vote); }
template <class T> inline T __shfl_sync(unsigned mask, T value, unsigned lane) {
  if constexpr (sizeof(T) == 8) {
    uint64_t word = __builtin_bit_cast(uint64_t, value);
    uint64_t low = emu_shuffle(mask, static_cast<uint32_t>(word), lane % 32);
    return __builtin_bit_cast(T, low | uint64_t{emu_shuffle(mask, static_cast<uint32_t>(word >> 32), lane % 32)} << 32);
  } else {
    return __builtin_bit_cast(T, emu_shuffle(mask, __builtin_bit_cast(uint32_t, value), lane % 32));
  }
}
template <class T> inline T __shfl_xor_sync(unsigned mask, T value, unsigned other) {
  return __shfl_sync(mask, value, emu_thread_index() % 32 ^ other);
}
template <class T> inline T __shfl_up_sync(unsigned mask, T value, unsigned distance) {
  unsigned lane = emu_thread_index() % 32;
  return __shfl_sync(mask, value, lane >= distance ? lane - distance : lane);
}
inline uint32_t atomicAdd(uint32_t* address, uint32_t value) { return emu_atomic_add32(address, value); }
inline uint64_t atomicAdd(uint64_t* address, uint64_t value) { return emu_atomic_add64(address, value); }
inline uint32_t atomicOr(uint32_t* address, uint32_t value) { return emu_atomic_or32(address, value); }
inline uint64_t __umul64hi(uint64_t a, uint64_t b) { return static_cast<uint64_t>((unsigned __int128)a * b >> 64); }
inline uint32_t __float_as_uint(float value) { return __builtin_bit_cast(uint32_t, value); }
inline float __uint_as_float(uint32_t word) { return __builtin_bit_cast(float, word); }
inline int __popc(unsigned word) { return __builtin_popcount(word); }
inline int __ffs(int word) { return __builtin_ffs(word); }
inline int __clz(int word) { return word ? __builtin_clz(word) : 32; }
inline uint32_t __byte_perm(uint32_t low, uint32_t high, uint32_t selector) {
  uint64_t both = low | uint64_t{high} << 32;
  uint32_t result = 0;
  for (int index = 0; index < 4; index++) result |= (both >> 8 * (selector >> 4 * index & 7) & 255) << 8 * index;
  return result;
}
inline float rsqrtf(float value) { return 1.f / __builtin_sqrtf(value); }
inline float logf(float x) { return __builtin_logf(x); }
template <class T> inline T max(T a, T b) { return a < b ? b : a; }
template <class T> inline T min(T a, T b) { return b < a ? b : a; }

// ---- wrappers of PTX
inline uint32_t shared_address(const void* p) { return emu_shared_address(p); }
inline uint4 load_16B(const void* from) { emu_access(from, 16, 0); uint4 words; __builtin_memcpy(&words, from, 16); return words; }
inline uint2 load_8B(const void* from) { emu_access(from, 8, 0); uint2 words; __builtin_memcpy(&words, from, 8); return words; }
inline void store_16B(void* to, uint4 words) { emu_access(to, 16, 1); __builtin_memcpy(to, &words, 16); }
inline void store_8B(void* to, uint2 words) { emu_access(to, 8, 1); __builtin_memcpy(to, &words, 8); }
inline void cp_async_16B(void* to, const void* from, bool wanted = true) { emu_cp_async(to, from, wanted ? 16 : 0); }
inline void cp_async_commit() { emu_cp_async_commit(); }
template <int IN_FLIGHT> inline void cp_async_wait() { emu_cp_async_wait(IN_FLIGHT); }
inline uint4 ldmatrix_x4(const void* row) { return __builtin_bit_cast(uint4, emu_ldmatrix(row, 0)); }
inline uint4 ldmatrix_x4_trans(const void* row) { return __builtin_bit_cast(uint4, emu_ldmatrix(row, 1)); }
inline int fresh(int x) { return x; }
inline float exp2_approx(float x) { return __builtin_exp2f(x); }
inline float tanh_approx(float x) { return __builtin_tanhf(x); }
inline void mbarrier_init(uint64_t* barrier, unsigned count) { emu_mbarrier_init(barrier, count); }
inline void mbarrier_init_fence() {}
inline void mbarrier_arrive(uint64_t* barrier) { emu_mbarrier_arrive(barrier, 0); }
inline void mbarrier_arrive_expect(uint64_t* barrier, unsigned bytes) { emu_mbarrier_arrive(barrier, bytes); }
inline void mbarrier_wait(uint64_t* barrier, unsigned parity) { emu_mbarrier_wait(barrier, parity); }
inline void bulk_copy(void* to, const void* from, unsigned bytes, uint64_t* barrier) { emu_bulk_copy(to, from, bytes, barrier); }
inline void fence_async() { emu_fence_async(); }
#ifdef BF16
inline float from_element(uint16_t bits) { return emu_from_bf16(bits); }
inline uint16_t to_element(float value) { return emu_to_bf16(value); }
#else
inline float from_element(uint16_t bits) { return emu_from_fp16(bits); }
inline uint16_t to_element(float value) { return emu_to_fp16(value); }
#endif
inline uint32_t pack(float low, float high) { return to_element(low) | uint32_t{to_element(high)} << 16; }
inline uint32_t multiply_pair(uint32_t a, uint32_t b) {
  return pack(from_element(a & 0xffff) * from_element(b & 0xffff), from_element(a >> 16) * from_element(b >> 16));
}
#ifdef BF16
constexpr int IS_BF16 = 1;
#else
constexpr int IS_BF16 = 0;
#endif
inline void mma_m16n8k16(float (&d)[4], uint4 a, uint32_t b0, uint32_t b1) {
  EmuFloats result = emu_mma(IS_BF16, {d[0], d[1], d[2], d[3]}, {a.x, a.y, a.z, a.w}, b0, b1);
  for (int index = 0; index < 4; index++) d[index] = result.x[index];
}
