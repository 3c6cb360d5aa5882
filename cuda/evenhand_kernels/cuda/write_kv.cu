// write_kv: norms and rotates the queries and keys of a step, and stores keys and values in the paged cache.
//
// One row of `qkv` is a token: query heads, key heads, value heads, each HEAD_DIM elements. A head is the work of a few
// neighbouring lanes; each has the chunk of 8 elements from 8 l on and the one from HEAD_DIM / 2 + 8 l on, so that the two
// elements that a rotation mixes are in one lane.
#include "device.cuh"
#include "fp8.cuh"
#include "kv_layout.cuh"

struct Arguments {
  Element* qkv;                 // [num_tokens, num_heads + 2 num_kv_heads, HEAD_DIM]; queries are changed in place
  uint8_t* keys;                // the paged cache: kv_layout.cuh
  uint8_t* values;
  const int32_t* positions;     // [num_tokens]
  const int32_t* slot_mapping;  // [num_tokens]: block * BLOCK_SIZE + offset, or -1: the row is padding
  const float* cos_sin;         // [max_model_len, HEAD_DIM], cosines then sines; null: no rotation
  const float* q_norm;          // [HEAD_DIM]; null: no norm
  const float* k_norm;
  const float* key_scales;      // [num_kv_heads], with KV_FP8: what a stored number is multiplied with
  const float* value_scales;
  int32_t num_tokens;
  int32_t num_heads;
  int32_t num_kv_heads;
  float eps;
};

constexpr int HALF_CHUNKS = HEAD_DIM / 16;
constexpr int LANES = HALF_CHUNKS <= 1 ? 1 : HALF_CHUNKS <= 2 ? 2 : HALF_CHUNKS <= 4 ? 4 : HALF_CHUNKS <= 8 ? 8 : 16;

DEVICE Eight load_floats(const float* from) {
  uint4 low = load_16B(from), high = load_16B(from + 4);
  return {{__uint_as_float(low.x), __uint_as_float(low.y), __uint_as_float(low.z), __uint_as_float(low.w),
           __uint_as_float(high.x), __uint_as_float(high.y), __uint_as_float(high.z), __uint_as_float(high.w)}};
}

DEVICE void norm(Eight (&x)[2], const float* weight, int lane, float eps, bool active) {
  float squares = 0.f;
#pragma unroll
  for (int i = 0; i < 8; i++) squares += x[0].x[i] * x[0].x[i] + x[1].x[i] * x[1].x[i];
  if (!active) squares = 0.f;
#pragma unroll
  for (int distance = LANES / 2; distance; distance /= 2) squares += __shfl_xor_sync(ALL_LANES, squares, distance);
  if (!weight || !active) return;
  float factor = rsqrtf(squares / HEAD_DIM + eps);
#pragma unroll
  for (int half = 0; half < 2; half++) {
    Eight w = load_floats(weight + half * HEAD_DIM / 2 + lane * 8);
#pragma unroll
    for (int i = 0; i < 8; i++) x[half].x[i] *= factor * w.x[i];
  }
}

DEVICE void rotate(Eight (&x)[2], const float* cos_sin, int lane) {
  Eight cos = load_floats(cos_sin + lane * 8), sin = load_floats(cos_sin + HEAD_DIM / 2 + lane * 8);
#pragma unroll
  for (int i = 0; i < 8; i++) {
    float first = x[0].x[i], second = x[1].x[i];
    x[0].x[i] = first * cos.x[i] - second * sin.x[i];
    x[1].x[i] = second * cos.x[i] + first * sin.x[i];
  }
}

// Eight elements from number `element` of a token's row on, in its block of one head.
DEVICE void store_kv(uint8_t* block, int token_in_block, int element, const Eight& x, float scale) {
#ifdef KV_FP8
  uint32_t words[2] = {0, 0};
#pragma unroll
  for (int i = 0; i < 8; i++) words[i / 4] |= to_e4m3(x.x[i] / scale) << i % 4 * 8;
  store_8B(block + KvRows::offset(token_in_block, element / 16) + element % 16, {words[0], words[1]});
#else
  store_16B(block + KvRows::offset(token_in_block, element / 8), pack_eight(x));
#endif
}

KERNEL(write_kv) {
  const int heads = arguments.num_heads + 2 * arguments.num_kv_heads;
  const int64_t index = (static_cast<int64_t>(blockIdx.x) * NUM_THREADS + threadIdx.x) / LANES;
  const int lane = threadIdx.x % LANES, token = static_cast<int>(index / heads), head = static_cast<int>(index % heads);
  const bool active = token < arguments.num_tokens && lane < HALF_CHUNKS;
  const bool is_query = head < arguments.num_heads;
  const bool is_value = head >= arguments.num_heads + arguments.num_kv_heads;

  Eight x[2] = {};
  Element* from = arguments.qkv + index * HEAD_DIM + lane * 8;
  if (active) {
    x[0] = unpack_eight(load_16B(from));
    x[1] = unpack_eight(load_16B(from + HEAD_DIM / 2));
  }
  const float* weight = is_query ? arguments.q_norm : is_value ? nullptr : arguments.k_norm;
  norm(x, weight, lane, arguments.eps, active);  // all lanes: it shuffles
  if (!active) return;
  if (arguments.cos_sin && !is_value)
    rotate(x, arguments.cos_sin + static_cast<int64_t>(arguments.positions[token]) * HEAD_DIM, lane);

  if (is_query) {
    store_16B(from, pack_eight(x[0]));
    store_16B(from + HEAD_DIM / 2, pack_eight(x[1]));
    return;
  }
  const int slot = arguments.slot_mapping[token];
  if (slot < 0) return;
  const int kv_head = (head - arguments.num_heads) % arguments.num_kv_heads, token_in_block = slot % BLOCK_SIZE;
  uint8_t* block = (is_value ? arguments.values : arguments.keys) +
                   row_offset(slot / BLOCK_SIZE, kv_head, arguments.num_kv_heads, 0);
  float scale = 1.f;
#ifdef KV_FP8
  scale = (is_value ? arguments.value_scales : arguments.key_scales)[kv_head];
#endif
#pragma unroll
  for (int half = 0; half < 2; half++)
    store_kv(block, token_in_block, half * HEAD_DIM / 2 + lane * 8, x[half], scale);
}
