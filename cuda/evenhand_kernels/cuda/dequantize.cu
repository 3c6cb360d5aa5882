// dequantize: a weight of codes as a matrix of elements, for products with so many rows that tensor cores bound them.
//
// A thread is a run of a row. Bound by reading the codes and writing the matrix.
#include "quantized.cuh"

struct Arguments {
  const uint8_t* codes;    // quantized.cuh
  const float* factors;
  Element* output;         // [rows, columns]
  int32_t rows;
  int32_t columns;         // a multiple of 32
  int32_t group;           // columns that share factors, a multiple of 32
};

KERNEL(dequantize) {
  const int64_t index = static_cast<int64_t>(blockIdx.x) * NUM_THREADS + threadIdx.x;
  const int runs = arguments.columns / RUN;
  const int64_t row = index / runs;
  if (row >= arguments.rows) return;
  const int column = static_cast<int>(index % runs) * RUN;
  const Run run = load_run(arguments.codes, arguments.factors, row, column, arguments.columns, arguments.group);
  Element* output = arguments.output + row * arguments.columns + column;
#pragma unroll
  for (int i = 0; i < RUN / 8; i++)
    store_16B(output + i * 8, {run.pair(i * 4), run.pair(i * 4 + 1), run.pair(i * 4 + 2), run.pair(i * 4 + 3)});
}
