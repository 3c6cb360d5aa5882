// C entry points, called through ctypes.
#if defined(__AVX512BF16__)
#include <cpuid.h>
#endif
#include <sys/mman.h>

#include "attention.h"
#include "decoder.h"
#include "linear.h"
#include "log_probabilities.h"
#include "norm.h"
#include "pool.h"
#include "sample.h"

extern "C" {

Pool* evenhand_new_pool(int num_threads) { return new Pool(num_threads); }
void evenhand_delete_pool(Pool* pool) { delete pool; }

// Ask for huge pages, before the memory is touched: weights and KV cache span more pages than the processor remembers.
void evenhand_prefer_huge_pages(void* memory, long bytes) {
#if defined(MADV_HUGEPAGE)
  constexpr uintptr_t PAGE = 4096;
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(memory) + PAGE - 1) / PAGE * PAGE;
  const uintptr_t end = (reinterpret_cast<uintptr_t>(memory) + bytes) / PAGE * PAGE;
  if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#endif
}

// Whether the processor that this was compiled for multiplies such activations itself.
int evenhand_has_products(ActivationDtype dtype) {
  switch (dtype) {
    case FLOAT32: return true;
    case BFLOAT16: return HAS_PAIR_PRODUCTS;
    case INT8: return HAS_CODE_PRODUCTS || HAS_SHORT_PRODUCTS;
    case INT16: return HAS_SHORT_PRODUCTS;
  }
  return false;
}

// Whether many rows can be multiplied by tiles: the processor has them, and the system lets this process use them.
int evenhand_has_tiles() {
#if defined(EVENHAND_TILES)
  return has_tiles();
#else
  return false;
#endif
}

// Whether rows of 16 bits are multiplied faster than pairs of bfloat16: Intel's processors take four times as long for vdpbf16ps as for
// vpdpwssd, AMD's as long.
int evenhand_prefers_integers() {
#if defined(__AVX512BF16__)
  unsigned largest_leaf, vendor = 0, c, d;
  return HAS_SHORT_PRODUCTS && __get_cpuid(0, &largest_leaf, &vendor, &c, &d) && vendor == signature_INTEL_ebx;
#else
  return HAS_SHORT_PRODUCTS;
#endif
}

long evenhand_packed_bytes(const Weight* weight) {
  long result = 0;
  dispatch_format(weight->format, [&](auto format) {
    result = num_panels(*weight) * decltype(format)::panel_bytes(weight->inputs, weight->group);
  });
  return result;
}

// Fill weight.packed.
void evenhand_pack(Pool* pool, const Weight* weight, const Parts* parts) {
  dispatch_format(weight->format, [&](auto format) {
    for_each_panel(*pool, num_panels(*weight), [&](long p) {
      int64_t rows[PANEL];
      for (int lane = 0; lane < PANEL; lane++) rows[lane] = source_row(*weight, p, lane);
      decltype(format)::pack(weight->packed + p * decltype(format)::panel_bytes(weight->inputs, weight->group), rows,
                             weight->inputs, weight->group, *parts);
    });
  });
}

void evenhand_linear(Pool* pool, const Weight* weight, const float* x, float* y, long rows) {
  linear(*pool, *weight, {.x = x}, y, rows);
}

void evenhand_embedding(Pool* pool, const Weight* weight, const int32_t* ids, float* y, long rows) {
  embedding(*pool, *weight, ids, y, rows);
}

// residual += x, unless x is null; y = norm(residual) * weight.
void evenhand_add_rms_norm(Pool* pool, const float* x, float* residual, const float* weight, float* y, long rows,
                           long size, float eps) {
  add_rms_norm(*pool, x ? x : residual, x ? residual : nullptr, residual, weight, y, rows, size, eps);
}

void evenhand_attention(Pool* pool, const AttentionLayer* layer, const AttentionBatch* batch, float* qkv, float* out) {
  attention(*pool, *layer, *batch, qkv, out);
}

long evenhand_activation_floats(const Decoder* decoder) { return Activations::floats_per_token(*decoder); }

void evenhand_forward(Pool* pool, const Decoder* decoder, const AttentionBatch* batch, const int32_t* input_ids,
                      const int32_t* logits_indices, long num_samples, float* memory, float* logits) {
  forward(*pool, *decoder, *batch, input_ids, logits_indices, num_samples, memory, logits);
}

void evenhand_draw(Pool* pool, const float* logits, long rows, long size, const Draw* draws, int32_t* token_ids) {
  draw_rows(*pool, logits, rows, size, draws, token_ids);
}

void evenhand_log_probabilities(Pool* pool, const float* logits, long rows, long size, const int32_t* token_ids,
                                long num_top, float* own, int32_t* ranks, int32_t* top_token_ids, float* top) {
  log_probabilities(*pool, logits, rows, size, token_ids, num_top, own, ranks, top_token_ids, top);
}
}
