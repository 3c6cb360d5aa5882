// C entry points, called through ctypes. `dtype` of weights and KV cache: 0 float32, 1 bfloat16, 2 float16.
#include "attention.h"
#include "linear.h"
#include "norm.h"

template <typename F>
static void dispatch(int dtype, F f) {
  switch (dtype) {
    case 0: return f(static_cast<float*>(nullptr));
    case 1: return f(static_cast<BFloat16*>(nullptr));
    case 2: return f(static_cast<Float16*>(nullptr));
  }
}

extern "C" {

// Elements of a packed weight: its outputs padded to whole panels.
long evenhand_packed_size(long outputs, long inputs, int gated) { return num_panels(outputs, gated) * PANEL * inputs; }

void evenhand_pack(const void* weight, void* packed, int dtype, long outputs, long inputs, int gated, int num_threads) {
  dispatch(dtype, [&](auto* t) {
    using T = std::remove_pointer_t<decltype(t)>;
    pack(static_cast<const T*>(weight), static_cast<T*>(packed), outputs, inputs, gated, num_threads);
  });
}

void evenhand_linear(const float* x, const void* packed, const float* bias, float* y, int dtype, long rows, long outputs,
                     long inputs, int gated, int num_threads) {
  dispatch(dtype, [&](auto* t) {
    using T = std::remove_pointer_t<decltype(t)>;
    linear(x, static_cast<const T*>(packed), bias, y, rows, outputs, inputs, gated, num_threads);
  });
}

void evenhand_add_rms_norm(const float* x, float* residual, const float* weight, float* y, long rows, long size, float eps,
                           int num_threads) {
  add_rms_norm(x, residual, weight, y, rows, size, eps, num_threads);
}

void evenhand_attention(const AttentionLayer* layer, const AttentionBatch* batch, float* qkv, float* out, int dtype,
                        int num_threads) {
  dispatch(dtype, [&](auto* t) {
    using T = std::remove_pointer_t<decltype(t)>;
    attention<T>(*layer, *batch, qkv, out, num_threads);
  });
}
}
