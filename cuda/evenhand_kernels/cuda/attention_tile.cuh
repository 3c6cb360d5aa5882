// The arithmetic of attention for one warp: 16 M rows of queries against TOKENS tokens of keys and values in shared memory.
//
// Rows are packed: row r of a request's KV head is query token r / group at head kv_head * group + r % group. Softmax is
// taken online (arXiv 1805.02867) in powers of two. A lane 4 g + t holds the scores of rows g and g + 8 at two tokens
// 2 t, 2 t + 1 of every eight; the same registers, packed, are the left operand of the product with the values.
#pragma once
#include "device.cuh"
#include "fp8.cuh"
#include "kv_layout.cuh"

constexpr int QUERY_CHUNKS = HEAD_DIM / 8;
using QueryRows = Tiled<HEAD_DIM * 2>;
constexpr float LOG2_E = 1.4426950408889634f;
#define NEGATIVE_INFINITY __uint_as_float(0xff800000u)

template <int M>
struct Accumulator {
  float output[M][HEAD_DIM / 8][4];
  float maximum[M][2], sum[M][2];
};

template <int M>
DEVICE void clear(Accumulator<M>& a) {
#pragma unroll
  for (int m = 0; m < M; m++) {
#pragma unroll
    for (int n = 0; n < HEAD_DIM / 8; n++) a.output[m][n][0] = a.output[m][n][1] = a.output[m][n][2] = a.output[m][n][3] = 0.f;
    a.maximum[m][0] = a.maximum[m][1] = NEGATIVE_INFINITY;
    a.sum[m][0] = a.sum[m][1] = 0.f;
  }
}

// What each row of a lane may see: tokens in (last - window, last]; last is -1 for a row that does not exist.
template <int M>
struct Visible {
  int last[M][2];
  int window;
};

// The left operand of dimensions 16 k to 16 k + 15 of 16 rows. With fp8 keys the dimensions are permuted as those are.
DEVICE uint4 query_fragment(const Element* query, int k) {
  const int lane = fresh(lane_index());
#ifdef KV_FP8
  const int t = lane % 4;
  uint2 words[2];
#pragma unroll
  for (int half = 0; half < 2; half++) {
    const int row = lane / 4 + half * 8;
    words[half] = load_8B(reinterpret_cast<const uint8_t*>(query) + QueryRows::offset(row, 2 * k, t / 2) + t % 2 * 8);
  }
  return {words[0].x, words[1].x, words[0].y, words[1].y};
#else
  return ldmatrix_x4(reinterpret_cast<const uint8_t*>(query) + QueryRows::offset(lane % 16, 2 * k, lane / 16));
#endif
}

// scores = queries keys^T. `fragment(m, k)` gives the left operand.
template <int M, int TOKENS, class Fragment>
DEVICE void multiply_keys(float (&scores)[M][TOKENS / 8][4], Fragment fragment, const uint8_t* keys) {
  const int lane = fresh(lane_index());
#pragma unroll
  for (int m = 0; m < M; m++)
#pragma unroll
    for (int n = 0; n < TOKENS / 8; n++) scores[m][n][0] = scores[m][n][1] = scores[m][n][2] = scores[m][n][3] = 0.f;
#ifdef KV_FP8
#pragma unroll
  for (int k = 0; k < HEAD_DIM / 16; k += 2) {
    uint4 a[M][2];
#pragma unroll
    for (int m = 0; m < M; m++) a[m][0] = fragment(m, k), a[m][1] = fragment(m, k + 1);
#pragma unroll
    for (int n = 0; n < TOKENS / 8; n += 2) {
      const uint4 w = ldmatrix_x4(keys + n * KvRows::EIGHT_BYTES + KvRows::offset(lane % 16, k, lane / 16));
      const uint32_t words[2][2] = {{w.x, w.y}, {w.z, w.w}};
#pragma unroll
      for (int step = 0; step < 2; step++)
#pragma unroll
        for (int half = 0; half < 2; half++) {
          const uint32_t b0 = from_e4m3(words[step][half]), b1 = from_e4m3(words[step][half] >> 16);
#pragma unroll
          for (int m = 0; m < M; m++) mma_m16n8k16(scores[m][n + half], a[m][step], b0, b1);
        }
    }
  }
#else
#pragma unroll
  for (int k = 0; k < HEAD_DIM / 16; k++) {
    uint4 a[M];
#pragma unroll
    for (int m = 0; m < M; m++) a[m] = fragment(m, k);
#pragma unroll
    for (int n = 0; n < TOKENS / 8; n += 2) {
      const uint4 b = ldmatrix_x4(keys + n * KvRows::EIGHT_BYTES + KvRows::offset(lane % 8 + lane / 16 * 8, 2 * k, lane / 8 % 2));
#pragma unroll
      for (int m = 0; m < M; m++) {
        mma_m16n8k16(scores[m][n], a[m], b.x, b.y);
        mma_m16n8k16(scores[m][n + 1], a[m], b.z, b.w);
      }
    }
  }
#endif
}

// What the rows may not see gets no weight.
template <int M, int TOKENS>
DEVICE void mask(float (&scores)[M][TOKENS / 8][4], const Visible<M>& visible, int first_token) {
  const int column = lane_index() % 4 * 2;
#pragma unroll
  for (int m = 0; m < M; m++)
#pragma unroll
    for (int n = 0; n < TOKENS / 8; n++)
#pragma unroll
      for (int j = 0; j < 4; j++) {
        const int behind = visible.last[m][j / 2] - (first_token + n * 8 + column + j % 2);
        if (behind < 0 || behind >= visible.window) scores[m][n][j] = NEGATIVE_INFINITY;
      }
}

// What a tile's softmax does to what was before: the output is to be rescaled by `factor`.
template <int M>
struct Shift {
  float base[M][2], factor[M][2];
  float scale;  // of the scores, which are powers of two then
};

// The maxima with this tile's scores; `scale` includes log2(e) unless there is a soft cap. `hide()` masks the scores where that is needed.
template <int M, int TOKENS, class Hide>
DEVICE Shift<M> raise_maxima(float (&scores)[M][TOKENS / 8][4], Accumulator<M>& a, float scale, float soft_cap, Hide hide) {
#ifdef SOFT_CAP
#pragma unroll
  for (int m = 0; m < M; m++)
#pragma unroll
    for (int n = 0; n < TOKENS / 8; n++)
#pragma unroll
      for (int j = 0; j < 4; j++) scores[m][n][j] = tanh_approx(scores[m][n][j] * scale / soft_cap);
  scale = soft_cap * LOG2_E;
#endif
  hide();
  Shift<M> shift;
  shift.scale = scale;
#pragma unroll
  for (int m = 0; m < M; m++)
#pragma unroll
    for (int half = 0; half < 2; half++) {
      float maximum = NEGATIVE_INFINITY;
#pragma unroll
      for (int n = 0; n < TOKENS / 8; n++) maximum = max(maximum, max(scores[m][n][half * 2], scores[m][n][half * 2 + 1]));
      maximum = max(maximum, __shfl_xor_sync(ALL_LANES, maximum, 1));
      maximum = max(maximum, __shfl_xor_sync(ALL_LANES, maximum, 2));
      maximum = max(a.maximum[m][half], maximum * scale);
      const float base = maximum == NEGATIVE_INFINITY ? 0.f : maximum;  // a row that has seen nothing yet
      shift.base[m][half] = base;
      shift.factor[m][half] = exp2_approx(a.maximum[m][half] - base);
      a.maximum[m][half] = maximum;
      a.sum[m][half] *= shift.factor[m][half];
    }
  return shift;
}

template <int M>
DEVICE void rescale(Accumulator<M>& a, const Shift<M>& shift) {
#pragma unroll
  for (int m = 0; m < M; m++)
#pragma unroll
    for (int n = 0; n < HEAD_DIM / 8; n++)
#pragma unroll
      for (int j = 0; j < 4; j++) a.output[m][n][j] *= shift.factor[m][j / 2];
}

// Scores to weights, in place.
template <int M, int TOKENS>
DEVICE void weigh(float (&scores)[M][TOKENS / 8][4], Accumulator<M>& a, const Shift<M>& shift) {
#pragma unroll
  for (int m = 0; m < M; m++)
#pragma unroll
    for (int n = 0; n < TOKENS / 8; n++) {
#pragma unroll
      for (int j = 0; j < 4; j++) scores[m][n][j] = exp2_approx(scores[m][n][j] * shift.scale - shift.base[m][j / 2]);
      a.sum[m][0] += scores[m][n][0] + scores[m][n][1];
      a.sum[m][1] += scores[m][n][2] + scores[m][n][3];
    }
}

// output += weights values.
template <int M, int TOKENS>
DEVICE void multiply_values(Accumulator<M>& a, const float (&weights)[M][TOKENS / 8][4], const uint8_t* values) {
  const int lane = fresh(lane_index());
#pragma unroll
  for (int n = 0; n < TOKENS / 8; n += 2) {
    uint4 left[M];
#pragma unroll
    for (int m = 0; m < M; m++)
      left[m] = {pack(weights[m][n][0], weights[m][n][1]), pack(weights[m][n][2], weights[m][n][3]),
                 pack(weights[m][n + 1][0], weights[m][n + 1][1]), pack(weights[m][n + 1][2], weights[m][n + 1][3])};
#ifdef KV_FP8
#pragma unroll
    for (int chunk = 0; chunk < CHUNKS; chunk += 2) {
      const uint4 w = ldmatrix_x4_trans(values + n * KvRows::EIGHT_BYTES + KvRows::offset(lane % 16, chunk, lane / 16));
      const uint32_t words[2][2] = {{w.x, w.y}, {w.z, w.w}};
#pragma unroll
      for (int i = 0; i < 2; i++) {
        // A word has two dimensions of two tokens; the even dimensions make one tile of eight, the odd ones the next.
        const uint32_t low = __byte_perm(words[i][0], 0, 0x3120), high = __byte_perm(words[i][1], 0, 0x3120);
#pragma unroll
        for (int odd = 0; odd < 2; odd++) {
          const uint32_t b0 = from_e4m3(low >> 16 * odd), b1 = from_e4m3(high >> 16 * odd);
#pragma unroll
          for (int m = 0; m < M; m++) mma_m16n8k16(a.output[m][(chunk + i) * 2 + odd], left[m], b0, b1);
        }
      }
    }
#else
#pragma unroll
    for (int d = 0; d < HEAD_DIM / 16; d++) {
      const uint4 b = ldmatrix_x4_trans(values + n * KvRows::EIGHT_BYTES + KvRows::offset(lane % 16, d * 2, lane / 16));
#pragma unroll
      for (int m = 0; m < M; m++) {
        mma_m16n8k16(a.output[m][d * 2], left[m], b.x, b.y);
        mma_m16n8k16(a.output[m][d * 2 + 1], left[m], b.z, b.w);
      }
    }
#endif
  }
}

// The sums of a row's four lanes.
template <int M>
DEVICE void finish(Accumulator<M>& a) {
#pragma unroll
  for (int m = 0; m < M; m++)
#pragma unroll
    for (int half = 0; half < 2; half++) {
      a.sum[m][half] += __shfl_xor_sync(ALL_LANES, a.sum[m][half], 1);
      a.sum[m][half] += __shfl_xor_sync(ALL_LANES, a.sum[m][half], 2);
    }
}

// Calls `write(row, dimension, low, high)` for every pair of neighbouring dimensions of 16 rows that this lane holds.
template <int M, class Write>
DEVICE void for_each_pair(const Accumulator<M>& a, int m, Write write) {
  const int lane = lane_index(), t = lane % 4;
#pragma unroll
  for (int half = 0; half < 2; half++)
#pragma unroll
    for (int d = 0; d < HEAD_DIM / 16; d++)
#pragma unroll
      for (int pair = 0; pair < 2; pair++) {
#ifdef KV_FP8
        const float low = a.output[m][2 * d][half * 2 + pair], high = a.output[m][2 * d + 1][half * 2 + pair];
        write(lane / 4 + half * 8, d * 16 + t * 4 + pair * 2, low, high);
#else
        const float* values = a.output[m][2 * d + pair];
        write(lane / 4 + half * 8, d * 16 + pair * 8 + t * 2, values[half * 2], values[half * 2 + 1]);
#endif
      }
}
