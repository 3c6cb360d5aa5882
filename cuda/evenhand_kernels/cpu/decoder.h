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
  float *residuals[2], *normed, *qkv, *attended, *inner, *added;

  Activations(const Decoder& decoder, float* memory, long num_tokens) {
    const auto take = [&](long width) { return std::exchange(memory, memory + num_tokens * width); };
    const long hidden = decoder.embedding->inputs;
    const DecoderLayer& layer = decoder.layers[0];
    residuals[0] = take(hidden), residuals[1] = take(hidden), normed = take(hidden), added = take(hidden);
    qkv = take(layer.qkv->outputs), attended = take(layer.output->inputs), inner = take(layer.down->inputs);
  }

  static long floats_per_token(const Decoder& decoder) {
    const DecoderLayer& layer = decoder.layers[0];
    return 4 * decoder.embedding->inputs + layer.qkv->outputs + layer.output->inputs + layer.down->inputs;
  }
};

// Keep the rows at `indices`, which ascend.
static inline void keep_rows(float* x, const int32_t* indices, long num_rows, long width) {
  for (long i = 0; i < num_rows; i++) std::copy_n(x + indices[i] * width, width, x + i * width);
}

// What the products of a step read, in order. Of few rows a step is as fast as memory is, which then must never rest.
class StepReadings {
 public:
  StepReadings(const Decoder& decoder, long rows) {
    if (rows > FEW_ROWS) return;
    for (const DecoderLayer* layer = decoder.layers; layer < decoder.layers + decoder.num_layers; layer++)
      for (const Weight* weight : {layer->qkv, layer->output, layer->gate_up, layer->down}) all_.push_back(reading(*weight));
    all_.push_back(reading(*decoder.lm_head));
  }

  // From this product of this layer on.
  Readings from(long layer, int product) const {
    Readings result;
    for (size_t i = layer * 4 + product; i < all_.size() && result.count() < Readings::MOST; i++) result.add(all_[i]);
    return result;
  }

 private:
  std::vector<Reading> all_;
};

// logits[num_samples, vocab_size] of the rows at `logits_indices`; memory: Activations::floats_per_token for each token.
static void forward(Pool& pool, const Decoder& decoder, const AttentionBatch& batch, const int32_t* input_ids,
                    const int32_t* logits_indices, long num_samples, float* memory, float* logits) {
  long rows = batch.num_tokens;
  const long hidden = decoder.embedding->inputs;
  const Activations a(decoder, memory, rows);
  float *residual = nullptr, *sum = a.residuals[0];
  const auto normed = [&](const float* norm) {
    const Entering result = {a.added, residual, sum, norm, decoder.eps, a.normed};
    residual = sum, sum = a.residuals[residual == a.residuals[0]];
    return result;
  };
  const StepReadings readings(decoder, rows);
  embedding(pool, *decoder.embedding, input_ids, a.added, rows);
  for (long i = 0; i < decoder.num_layers; i++) {
    const DecoderLayer& layer = decoder.layers[i];
    const bool last = i + 1 == decoder.num_layers;
    linear(pool, *layer.qkv, normed(layer.input_norm), a.qkv, rows, readings.from(i, 1));
    attention(pool, *layer.attention, batch, a.qkv, a.attended, readings.from(i, 1));
    if (last) {  // no row reads another from here on: go on with those whose next token is wanted
      keep_rows(a.attended, logits_indices, num_samples, layer.output->inputs);
      keep_rows(residual, logits_indices, num_samples, hidden);
      rows = num_samples;
    }
    linear(pool, *layer.output, {.x = a.attended}, a.added, rows, readings.from(i, 2));
    linear(pool, *layer.gate_up, normed(layer.post_attention_norm), a.inner, rows, readings.from(i, 3));
    linear(pool, *layer.down, {.x = a.inner}, a.added, rows, readings.from(i + 1, 0));
  }
  linear(pool, *decoder.lm_head, normed(decoder.norm), logits, rows, readings.from(0, 0));
}
