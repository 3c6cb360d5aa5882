// The device as kernels see it: PTX behind names, and nothing of CUDA's headers (NVRTC compiles without any).
//
// Compiled with EMULATION, the same names come from emulation/device.h and run on a CPU.
#pragma once
#ifdef EMULATION
#include "device.h"
#else

typedef unsigned char uint8_t;
typedef unsigned short uint16_t;
typedef unsigned int uint32_t;
typedef unsigned long long uint64_t;
typedef int int32_t;
typedef long long int64_t;

// One kernel a file; all it is given is one structure.
#define KERNEL(name) \
  extern "C" __global__ void __launch_bounds__(NUM_THREADS, BLOCKS_PER_SM) name(const __grid_constant__ Arguments arguments)

// The shared memory of the block. SHARED_BYTES is what it is launched with.
extern __shared__ __align__(1024) unsigned char dynamic_shared_memory[];
#define SHARED(Type, name)                                                             \
  static_assert(sizeof(Type) <= SHARED_BYTES, "more shared memory than is launched"); \
  Type& name = *reinterpret_cast<Type*>(dynamic_shared_memory)

#define DEVICE __device__ __forceinline__

DEVICE uint32_t shared_address(const void* p) { return static_cast<uint32_t>(__cvta_generic_to_shared(p)); }

DEVICE uint4 load_16B(const void* from) { return *static_cast<const uint4*>(from); }
DEVICE uint2 load_8B(const void* from) { return *static_cast<const uint2*>(from); }
DEVICE void store_16B(void* to, uint4 words) { *static_cast<uint4*>(to) = words; }
DEVICE void store_8B(void* to, uint2 words) { *static_cast<uint2*>(to) = words; }

// Sixteen bytes of global memory to shared memory, past L1; zeros if not wanted (then `from` is not read).
DEVICE void cp_async_16B(void* to, const void* from, bool wanted = true) {
  asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;"
               ::"r"(shared_address(to)), "l"(from), "r"(wanted ? 16 : 0) : "memory");
}
DEVICE void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int IN_FLIGHT> DEVICE void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(IN_FLIGHT) : "memory");
}

// Four 8 x 8 matrices of 16-bit numbers; lane 8 m + r gives the address of row r of matrix m.
DEVICE uint4 ldmatrix_x4(const void* row) {
  uint4 r;
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r.x), "=r"(r.y), "=r"(r.z), "=r"(r.w) : "r"(shared_address(row)) : "memory");
  return r;
}
DEVICE uint4 ldmatrix_x4_trans(const void* row) {
  uint4 r;
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r.x), "=r"(r.y), "=r"(r.z), "=r"(r.w) : "r"(shared_address(row)) : "memory");
  return r;
}

// The same number, but the compiler does not know: what is derived from it is computed here, not kept in registers from
// some loop further out.
DEVICE int fresh(int x) {
  asm volatile("" : "+r"(x));
  return x;
}

DEVICE float exp2_approx(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
DEVICE float tanh_approx(float x) {
  float y;
  asm("tanh.approx.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

#if __CUDA_ARCH__ >= 900
DEVICE void mbarrier_init(uint64_t* barrier, unsigned count) {
  asm volatile("mbarrier.init.shared.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(count) : "memory");
}
// After the inits, before a __syncthreads: makes them visible to bulk copies.
DEVICE void mbarrier_init_fence() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }
DEVICE void mbarrier_arrive(uint64_t* barrier) {
  asm volatile("{ .reg .b64 state; mbarrier.arrive.shared.b64 state, [%0]; }" ::"r"(shared_address(barrier)) : "memory");
}
DEVICE void mbarrier_arrive_expect(uint64_t* barrier, unsigned bytes) {
  asm volatile("{ .reg .b64 state; mbarrier.arrive.expect_tx.shared.b64 state, [%0], %1; }"
               ::"r"(shared_address(barrier)), "r"(bytes) : "memory");
}
// Until the phase of this parity has completed.
DEVICE void mbarrier_wait(uint64_t* barrier, unsigned parity) {
  asm volatile("{ .reg .pred done; again: mbarrier.try_wait.parity.shared.b64 done, [%0], %1; @!done bra again; }"
               ::"r"(shared_address(barrier)), "r"(parity) : "memory");
}
// `bytes` of global memory, a multiple of 16, to shared memory; counted at the barrier when they have arrived.
DEVICE void bulk_copy(void* to, const void* from, unsigned bytes, uint64_t* barrier) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];"
               ::"r"(shared_address(to)), "l"(from), "r"(bytes), "r"(shared_address(barrier)) : "memory");
}
// What this thread wrote to shared memory before is visible to bulk copies and wgmma after.
DEVICE void fence_async() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }
#endif

#ifdef BF16
DEVICE float from_element(uint16_t bits) { return __uint_as_float(static_cast<uint32_t>(bits) << 16); }
DEVICE uint32_t pack(float low, float high) {
  uint32_t pair;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  return pair;
}
DEVICE uint32_t multiply_pair(uint32_t a, uint32_t b) {
  uint32_t pair;
  asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(pair) : "r"(a), "r"(b), "r"(0x80008000));
  return pair;
}
#define ELEMENT_TYPES "bf16.bf16"
#else
DEVICE float from_element(uint16_t bits) {
  float value;
  asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(bits));
  return value;
}
DEVICE uint32_t pack(float low, float high) {
  uint32_t pair;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  return pair;
}
DEVICE uint32_t multiply_pair(uint32_t a, uint32_t b) {
  uint32_t pair;
  asm("mul.rn.f16x2 %0, %1, %2;" : "=r"(pair) : "r"(a), "r"(b));
  return pair;
}
#define ELEMENT_TYPES "f16.f16"
#endif

// d += a b, with a 16 x 16 by rows, b 16 x 8 by columns, d 16 x 8 in float32.
DEVICE void mma_m16n8k16(float (&d)[4], uint4 a, uint32_t b0, uint32_t b1) {
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32." ELEMENT_TYPES ".f32 {%0,%1,%2,%3},{%4,%5,%6,%7},{%8,%9},{%0,%1,%2,%3};"
               : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
               : "r"(a.x), "r"(a.y), "r"(a.z), "r"(a.w), "r"(b0), "r"(b1));
}

#endif  // EMULATION

#ifndef DEVICE
#define DEVICE __device__ __forceinline__
#endif

typedef uint16_t Element;  // bfloat16 or float16, by BF16

constexpr unsigned ALL_LANES = 0xffffffffu;

DEVICE float low_half(uint32_t pair) { return from_element(static_cast<uint16_t>(pair)); }
DEVICE float high_half(uint32_t pair) { return from_element(static_cast<uint16_t>(pair >> 16)); }
DEVICE int warp_index() { return threadIdx.x / 32; }
DEVICE int lane_index() { return threadIdx.x % 32; }
constexpr DEVICE int round_up(int value, int multiple) { return (value + multiple - 1) / multiple * multiple; }

// Sums of eight numbers at a time: 16 bytes of elements as float32.
struct Eight {
  float x[8];
};
DEVICE Eight unpack_eight(uint4 words) {
  return {{low_half(words.x), high_half(words.x), low_half(words.y), high_half(words.y), low_half(words.z),
           high_half(words.z), low_half(words.w), high_half(words.w)}};
}
DEVICE uint4 pack_eight(const Eight& v) {
  return {pack(v.x[0], v.x[1]), pack(v.x[2], v.x[3]), pack(v.x[4], v.x[5]), pack(v.x[6], v.x[7])};
}
DEVICE float warp_sum(float value) {
#pragma unroll
  for (int distance = 16; distance; distance /= 2) value += __shfl_xor_sync(ALL_LANES, value, distance);
  return value;
}
