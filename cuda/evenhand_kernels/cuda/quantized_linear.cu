// quantized_linear: x weight^T + bias for a weight of codes and few rows of x, as in decodes: the codes are read once and become
// elements in registers, just before they are multiplied.
//
// A block makes ROWS rows of x (blockIdx.y says which) at 32 outputs. Its warps deal out the columns, 128 at a time, and at
// the end add up what they have. A product of tensor cores does not care in which order its 16 columns come, so lane 4 g + t
// takes the 32 neighbouring columns of run t of output g, in eight products of four columns a lane: no code changes lanes.
//
//   columns    0 .. 31   32 .. 63   64 .. 95   96 .. 127       product s of the eight has columns 4 s .. 4 s + 3 of each
//   lane t        0          1          2           3          of the four runs, in x as in the weight
//
// Bound by reading the codes while rows are few, by making elements of them else.
#include "quantized.cuh"

struct Arguments {
  const Element* x;        // [num_rows, columns]
  const uint8_t* codes;    // of a weight [outputs, columns]: quantized.cuh
  const float* factors;
  const Element* bias;     // [outputs], or null
  Element* output;         // [num_rows, outputs]
  int32_t num_rows;
  int32_t outputs;
  int32_t columns;         // a multiple of 32
  int32_t group;           // columns that share factors, a multiple of 32
};

constexpr int NUM_WARPS = NUM_THREADS / 32;
constexpr int TILES = 4, OUTPUTS = TILES * 8;   // eight outputs a tile
constexpr int M = ROWS / 16;
constexpr int CHUNK = 4 * RUN;                  // columns that a warp takes at a time

struct Shared {
  float sums[NUM_WARPS][ROWS][OUTPUTS + 2];
};

KERNEL(quantized_linear) {
  SHARED(Shared, shared);
  const int lane = lane_index(), g = lane / 4, t = lane % 4, columns = arguments.columns;
  const int first_output = blockIdx.x * OUTPUTS, first_row = blockIdx.y * ROWS;
  float sums[M][TILES][4];
#pragma unroll
  for (int m = 0; m < M; m++)
#pragma unroll
    for (int n = 0; n < TILES; n++) sums[m][n][0] = sums[m][n][1] = sums[m][n][2] = sums[m][n][3] = 0.f;

  for (int first = warp_index() * CHUNK; first < columns; first += NUM_WARPS * CHUNK) {
    const int column = first + t * RUN;
    Run runs[TILES];
#pragma unroll
    for (int n = 0; n < TILES; n++) {
      const int output = first_output + n * 8 + g;
      const bool exists = column < columns && output < arguments.outputs;
      if (exists)
        runs[n] = load_run(arguments.codes, arguments.factors, output, column, columns, arguments.group);
      else
        runs[n] = {};
    }
#pragma unroll
    for (int step = 0; step < RUN / 8; step++) {  // two products each, by loads of eight columns
      uint4 x[M][2];
#pragma unroll
      for (int m = 0; m < M; m++)
#pragma unroll
        for (int half = 0; half < 2; half++) {
          const int row = first_row + m * 16 + half * 8 + g;
          const bool exists = column < columns && row < arguments.num_rows;
          x[m][half] = exists ? load_16B(arguments.x + static_cast<int64_t>(row) * columns + column + step * 8) : uint4{0, 0, 0, 0};
        }
#pragma unroll
      for (int n = 0; n < TILES; n++) {
        const uint32_t w0 = runs[n].pair(step * 4), w1 = runs[n].pair(step * 4 + 1);
        const uint32_t w2 = runs[n].pair(step * 4 + 2), w3 = runs[n].pair(step * 4 + 3);
#pragma unroll
        for (int m = 0; m < M; m++) {
          mma_m16n8k16(sums[m][n], {x[m][0].x, x[m][1].x, x[m][0].y, x[m][1].y}, w0, w1);
          mma_m16n8k16(sums[m][n], {x[m][0].z, x[m][1].z, x[m][0].w, x[m][1].w}, w2, w3);
        }
      }
    }
  }

#pragma unroll
  for (int m = 0; m < M; m++)
#pragma unroll
    for (int n = 0; n < TILES; n++)
#pragma unroll
      for (int half = 0; half < 2; half++)
        store_8B(&shared.sums[warp_index()][m * 16 + half * 8 + g][n * 8 + t * 2],
                 {__float_as_uint(sums[m][n][half * 2]), __float_as_uint(sums[m][n][half * 2 + 1])});
  __syncthreads();
  for (int i = threadIdx.x; i < ROWS * OUTPUTS / 2; i += NUM_THREADS) {
    const int row = i / (OUTPUTS / 2), place = i % (OUTPUTS / 2) * 2, output = first_output + place;
    if (first_row + row >= arguments.num_rows || output >= arguments.outputs) continue;
    float low = 0.f, high = 0.f;
#pragma unroll
    for (int warp = 0; warp < NUM_WARPS; warp++) {
      low += shared.sums[warp][row][place];
      high += shared.sums[warp][row][place + 1];
    }
    if (arguments.bias) {
      low += from_element(arguments.bias[output]);
      high += from_element(arguments.bias[output + 1]);
    }
    Element* to = arguments.output + static_cast<int64_t>(first_row + row) * arguments.outputs + output;
    *reinterpret_cast<uint32_t*>(to) = pack(low, high);
  }
}
