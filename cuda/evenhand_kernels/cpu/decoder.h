// A whole step of a decoder in one call: what decoder.py's `forward` says, over an array of layers.
//
// At one row an operation takes some microseconds, less than to call it from Python and to make a tensor for its result.
#pragma once

#include <algorithm>
#include <utility>

#include "attention.h"
#include "linear.h"
#include "norm.h"

struct DecoderLayer {
  const float* input_norm;
  const Weight* qkv;
  const AttentionLayer* attention;
  const Weight* output;
  const float* post_attention_norm;
  const Weight *gate_up, *down;
};

struct Decoder {
  int64_t num_layers;
  const DecoderLayer* layers;
  const Weight* embedding;
  const float* norm;
  const Weight* lm_head;
  float eps;
};

static inline long num_features(const Weight& weight) { return weight.gated ? weight.outputs / 2 : weight.outputs; }

// Activations of one step, each [num_tokens, its width].
struct Activations {
  float *residual, *normed, *qkv, *attended, *inner, *added;

  Activations(const Decoder& decoder, float* memory, long num_tokens) {
    const auto take = [&](long width) { return std::exchange(memory, memory + num_tokens * width); };
    const long hidden = decoder.embedding->inputs;
    const DecoderLayer& layer = decoder.layers[0];
    residual = take(hidden), normed = take(hidden), added = take(hidden);
    qkv = take(layer.qkv->outputs), attended = take(layer.output->inputs), inner = take(layer.down->inputs);
  }

  static long floats_per_token(const Decoder& decoder) {
    const DecoderLayer& layer = decoder.layers[0];
    return 3 * decoder.embedding->inputs + layer.qkv->outputs + layer.output->inputs + layer.down->inputs;
  }
};

// Keep the rows at `indices`, which ascend.
static inline void keep_rows(float* x, const int32_t* indices, long num_rows, long width) {
  for (long i = 0; i < num_rows; i++) std::copy_n(x + indices[i] * width, width, x + i * width);
}

// logits[num_samples, vocab_size] of the rows at `logits_indices`; memory: Activations::floats_per_token for each token.
static void forward(Pool& pool, const Decoder& decoder, const AttentionBatch& batch, const int32_t* input_ids,
                    const int32_t* logits_indices, long num_samples, float* memory, float* logits) {
  long rows = batch.num_tokens;
  const long hidden = decoder.embedding->inputs;
  const Activations a(decoder, memory, rows);
  embedding(pool, *decoder.embedding, input_ids, a.residual, rows);
  add_rms_norm(pool, nullptr, a.residual, decoder.layers[0].input_norm, a.normed, rows, hidden, decoder.eps);
  for (long i = 0; i < decoder.num_layers; i++) {
    const DecoderLayer& layer = decoder.layers[i];
    const bool last = i + 1 == decoder.num_layers;
    linear(pool, *layer.qkv, a.normed, a.qkv, rows);
    attention(pool, *layer.attention, batch, a.qkv, a.attended);
    if (last) {  // no row reads another from here on: go on with those whose next token is wanted
      keep_rows(a.attended, logits_indices, num_samples, layer.output->inputs);
      keep_rows(a.residual, logits_indices, num_samples, hidden);
      rows = num_samples;
    }
    linear(pool, *layer.output, a.attended, a.added, rows);
    add_rms_norm(pool, a.added, a.residual, layer.post_attention_norm, a.normed, rows, hidden, decoder.eps);
    linear(pool, *layer.gate_up, a.normed, a.inner, rows);
    linear(pool, *layer.down, a.inner, a.added, rows);
    const float* next_norm = last ? decoder.norm : decoder.layers[i + 1].input_norm;
    add_rms_norm(pool, a.added, a.residual, next_norm, a.normed, rows, hidden, decoder.eps);
  }
  linear(pool, *decoder.lm_head, a.normed, logits, rows);
}
