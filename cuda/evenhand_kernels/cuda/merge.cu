// merge: puts the parts of split attention items together.
//
// A block takes one KV head (blockIdx.x) of merges, which the blocks of blockIdx.z deal out; its warps, and those of blockIdx.y, deal out
// the rows. Reads the parts once: bound by that.
#include "device.cuh"
#include "kv_layout.cuh"

struct Arguments {
  const float* partial_output;  // [partial rows, HEAD_DIM]
  const float* partial_state;   // [partial rows, 2]: maximum, sum
  const int32_t* merges;        // [capacity, 8]: Merge
  const int32_t* counts;        // [2]: how many items there are, and merges
  const int32_t* cu_seqlens_q;  // [num_requests + 1]
  const float* value_scales;    // [num_kv_heads], with KV_FP8
  Element* output;              // [num_tokens, num_kv_heads * group, HEAD_DIM]
  int32_t num_kv_heads;
  int32_t group;
};

// Row r of part p of KV head h is at partial row partial_row + h * head_rows + p * num_rows + r.
struct Merge {
  int32_t request;
  int32_t head_rows;
  int32_t first_row;
  int32_t num_rows;
  int32_t num_parts;
  int32_t unused;
  int32_t partial_row;
};

#define NEGATIVE_INFINITY __uint_as_float(0xff800000u)
constexpr int LANE_FOURS = (HEAD_DIM / 4 + 31) / 32;  // of neighbouring dimensions

DEVICE void put_together(const Arguments& arguments, int number) {
  const uint4 one = load_16B(arguments.merges + number * 8), two = load_16B(arguments.merges + number * 8 + 4);
  const Merge merge{static_cast<int32_t>(one.x), static_cast<int32_t>(one.y), static_cast<int32_t>(one.z),
                    static_cast<int32_t>(one.w), static_cast<int32_t>(two.x), 0, static_cast<int32_t>(two.z)};
  const int kv_head = blockIdx.x;
  const int first_token = arguments.cu_seqlens_q[merge.request];
  for (int row = blockIdx.y * (NUM_THREADS / 32) + warp_index(); row < merge.num_rows; row += gridDim.y * (NUM_THREADS / 32)) {
    const int64_t first = merge.partial_row + kv_head * merge.head_rows + row;
    float maximum = NEGATIVE_INFINITY;
    for (int part = 0; part < merge.num_parts; part++)
      maximum = max(maximum, arguments.partial_state[(first + part * merge.num_rows) * 2]);
    const float base = maximum == NEGATIVE_INFINITY ? 0.f : maximum;
    float sum = 0.f, output[LANE_FOURS][4] = {};
    for (int part = 0; part < merge.num_parts; part++) {
      const int64_t from = first + part * merge.num_rows;
      const uint2 state = load_8B(arguments.partial_state + from * 2);
      const float factor = exp2_approx(__uint_as_float(state.x) - base);
      sum += factor * __uint_as_float(state.y);
#pragma unroll
      for (int i = 0; i < LANE_FOURS; i++) {
        const int dimension = (i * 32 + lane_index()) * 4;
        if (dimension >= HEAD_DIM) continue;
        const uint4 four = load_16B(arguments.partial_output + from * HEAD_DIM + dimension);
        output[i][0] += factor * __uint_as_float(four.x);
        output[i][1] += factor * __uint_as_float(four.y);
        output[i][2] += factor * __uint_as_float(four.z);
        output[i][3] += factor * __uint_as_float(four.w);
      }
    }
    float factor = sum > 0.f ? 1.f / sum : 0.f;
#ifdef KV_FP8
    factor *= arguments.value_scales[kv_head];
#endif
    const int packed = merge.first_row + row, group = arguments.group;
    Element* to = arguments.output +
                  (static_cast<int64_t>(first_token + packed / group) * (arguments.num_kv_heads * group) +
                   kv_head * group + packed % group) * HEAD_DIM;
#pragma unroll
    for (int i = 0; i < LANE_FOURS; i++) {
      const int dimension = (i * 32 + lane_index()) * 4;
      if (dimension < HEAD_DIM)
        store_8B(to + dimension, {pack(output[i][0] * factor, output[i][1] * factor), pack(output[i][2] * factor, output[i][3] * factor)});
    }
  }
}

KERNEL(merge) {
  for (int number = blockIdx.z; number < arguments.counts[1]; number += gridDim.z) put_together(arguments, number);
}
