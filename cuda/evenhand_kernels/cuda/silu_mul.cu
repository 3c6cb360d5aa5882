// silu_mul: silu(gate) * up, with gate and up the halves of a row (arXiv 2002.05202). Bound by memory; a thread is 8 elements.
#include "device.cuh"

struct Arguments {
  const Element* gate_up;  // [num_rows, 2 size]
  Element* output;         // [num_rows, size]
  int32_t num_rows;
  int32_t size;            // a multiple of 8
};

KERNEL(silu_mul) {
  const int chunks = arguments.size / 8;
  const int64_t index = static_cast<int64_t>(blockIdx.x) * NUM_THREADS + threadIdx.x, row = index / chunks;
  if (row >= arguments.num_rows) return;
  const Element* gate = arguments.gate_up + row * 2 * arguments.size + index % chunks * 8;
  Eight x = unpack_eight(load_16B(gate));
  const Eight up = unpack_eight(load_16B(gate + arguments.size));
#pragma unroll
  for (int i = 0; i < 8; i++) x.x[i] = x.x[i] / (1.f + exp2_approx(-1.4426950408889634f * x.x[i])) * up.x[i];
  store_16B(arguments.output + index * 8, pack_eight(x));
}
