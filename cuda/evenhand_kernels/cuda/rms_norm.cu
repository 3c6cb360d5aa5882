// rms_norm: adds to the residual where there is something to add, and norms it (arXiv 1910.07467).
//
// A block is one row, held in registers between the sum of squares and the product: bound by reading and writing it once.
#include "device.cuh"

struct Arguments {
  const Element* x;       // [num_rows, SIZE]: added to the residual; null: the residual is normed as it is
  Element* residual;      // [num_rows, SIZE]
  const float* weight;    // [SIZE]
  Element* output;        // [num_rows, SIZE]
  float eps;
};

static_assert(SIZE % 8 == 0, "rows are multiples of 16 bytes");
constexpr int CHUNKS = SIZE / 8, CHUNKS_PER_THREAD = (CHUNKS + NUM_THREADS - 1) / NUM_THREADS;

struct Shared {
  float sums[NUM_THREADS / 32];
};

KERNEL(rms_norm) {
  SHARED(Shared, shared);
  const int64_t first = static_cast<int64_t>(blockIdx.x) * SIZE;
  Eight row[CHUNKS_PER_THREAD];
  float squares = 0.f;
#pragma unroll
  for (int i = 0; i < CHUNKS_PER_THREAD; i++) {
    const int chunk = threadIdx.x + i * NUM_THREADS;
    if (chunk >= CHUNKS) continue;
    row[i] = unpack_eight(load_16B(arguments.residual + first + chunk * 8));
    if (arguments.x) {
      const Eight added = unpack_eight(load_16B(arguments.x + first + chunk * 8));
#pragma unroll
      for (int j = 0; j < 8; j++) row[i].x[j] += added.x[j];
      store_16B(arguments.residual + first + chunk * 8, pack_eight(row[i]));
    }
#pragma unroll
    for (int j = 0; j < 8; j++) squares += row[i].x[j] * row[i].x[j];
  }
  squares = warp_sum(squares);
  if (lane_index() == 0) shared.sums[warp_index()] = squares;
  __syncthreads();
  float sum = 0.f;
#pragma unroll
  for (int warp = 0; warp < NUM_THREADS / 32; warp++) sum += shared.sums[warp];
  const float factor = rsqrtf(sum / SIZE + arguments.eps);
#pragma unroll
  for (int i = 0; i < CHUNKS_PER_THREAD; i++) {
    const int chunk = threadIdx.x + i * NUM_THREADS;
    if (chunk >= CHUNKS) continue;
    Eight result;
#pragma unroll
    for (int half = 0; half < 2; half++) {
      const uint4 words = load_16B(arguments.weight + chunk * 8 + half * 4);
      result.x[half * 4] = row[i].x[half * 4] * factor * __uint_as_float(words.x);
      result.x[half * 4 + 1] = row[i].x[half * 4 + 1] * factor * __uint_as_float(words.y);
      result.x[half * 4 + 2] = row[i].x[half * 4 + 2] * factor * __uint_as_float(words.z);
      result.x[half * 4 + 3] = row[i].x[half * 4 + 3] * factor * __uint_as_float(words.w);
    }
    store_16B(arguments.output + first + chunk * 8, pack_eight(result));
  }
}
