// C entry points, called through ctypes. `dtype` of weights and KV cache: 0 float32, 1 bfloat16, 2 float16.
#include "attention.h"
#include "linear.h"
#include "norm.h"
#include "pool.h"

template <typename F>
static void dispatch(int dtype, F f) {
  switch (dtype) {
    case 0: return f(static_cast<float*>(nullptr));
    case 1: return f(static_cast<BFloat16*>(nullptr));
    case 2: return f(static_cast<Float16*>(nullptr));
  }
}

template <typename T>
using Pointee = std::remove_pointer_t<T>;

extern "C" {

Pool* evenhand_new_pool(int num_threads) { return new Pool(num_threads); }
void evenhand_delete_pool(Pool* pool) { delete pool; }

// Elements of a packed weight: its outputs padded to whole panels.
long evenhand_packed_size(long outputs, long inputs, int gated) { return num_panels(outputs, gated) * PANEL * inputs; }

void evenhand_pack(Pool* pool, const void* weight, void* packed, int dtype, long outputs, long inputs, int gated) {
  dispatch(dtype, [&](auto* t) {
    using T = Pointee<decltype(t)>;
    pack(*pool, static_cast<const T*>(weight), static_cast<T*>(packed), outputs, inputs, gated);
  });
}

void evenhand_linear(Pool* pool, const float* x, const void* packed, const float* bias, float* y, int dtype, long rows,
                     long outputs, long inputs, int gated) {
  dispatch(dtype, [&](auto* t) {
    using T = Pointee<decltype(t)>;
    linear(*pool, x, static_cast<const T*>(packed), bias, y, rows, outputs, inputs, gated);
  });
}

void evenhand_add_rms_norm(Pool* pool, const float* x, float* residual, const float* weight, float* y, long rows,
                           long size, float eps) {
  add_rms_norm(*pool, x, residual, weight, y, rows, size, eps);
}

void evenhand_attention(Pool* pool, const AttentionLayer* layer, const AttentionBatch* batch, float* qkv, float* out,
                        int dtype) {
  dispatch(dtype, [&](auto* t) { attention<Pointee<decltype(t)>>(*pool, *layer, *batch, qkv, out); });
}
}
