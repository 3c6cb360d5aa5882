// Threads; linear layers and attention against plain loops in double: ends with 0 if all are near. For processors that no Python runs on here.
#include <algorithm>
#include <atomic>
#include <cstdio>
#include <random>
#include <vector>

#include "attention.h"
#include "linear.h"

static std::mt19937 generator(7);

static std::vector<float> random_numbers(long count) {
  std::normal_distribution<float> normal;
  std::vector<float> result(count);
  for (float& each : result) each = normal(generator);
  return result;
}

static bool near(const char* what, const std::vector<float>& found, const std::vector<double>& expected, double tolerance) {
  double error = 0, size = 0;
  for (size_t i = 0; i < found.size(); i++) error = std::max(error, std::abs(found[i] - expected[i])), size += expected[i] * expected[i];
  const double relative = error / std::sqrt(size / static_cast<double>(found.size()));
  std::printf("%s: %.1e of at most %.1e\n", what, relative, tolerance);
  return relative < tolerance;
}

// Weights [outputs][inputs] of random codes, scales and minima, or plain numbers, packed; and the same widened by `embedding`.
struct Made {
  Weight weight;
  std::vector<char> memory;
  std::vector<float> widened;
};

template <typename F>
static Made made(Pool& pool, int format, long outputs, long inputs, int group, const Parts& parts) {
  Made result = {{outputs, inputs, format, group, 0, 0, FLOAT32, nullptr, nullptr}, {}, std::vector<float>(outputs * inputs)};
  result.memory.resize(num_panels(result.weight) * F::panel_bytes(inputs, group));
  result.weight.packed = result.memory.data();
  for (long p = 0; p < num_panels(result.weight); p++) {
    int64_t rows[PANEL];
    for (int lane = 0; lane < PANEL; lane++) rows[lane] = source_row(result.weight, p, lane);
    F::pack(result.weight.packed + p * F::panel_bytes(inputs, group), rows, inputs, group, parts);
  }
  std::vector<int32_t> ids(outputs);
  for (long i = 0; i < outputs; i++) ids[i] = static_cast<int32_t>(i);
  embedding(pool, result.weight, ids.data(), result.widened.data(), outputs);
  return result;
}

// What the kernels multiply of rows of inputs.
static std::vector<double> entering(const std::vector<float>& x, ActivationDtype dtype, long inputs, int group) {
  std::vector<double> result(x.begin(), x.end());
  for (size_t i = 0; dtype == BFLOAT16 && i < x.size(); i++) result[i] = through_bfloat16(x[i]);
  for (size_t first = 0; (dtype == INT8 || dtype == INT16) && first < x.size(); first += std::min<long>(group, inputs - first % inputs)) {
    const size_t end = first + std::min<long>(group, inputs - first % inputs);
    float most = 0;
    for (size_t i = first; i < end; i++) most = std::max(most, std::abs(x[i]));
    const float scale = most / largest_code(dtype), inverse = inverse_of(scale);
    for (size_t i = first; i < end; i++) result[i] = nearest(x[i] * inverse) * scale;
  }
  return result;
}

static bool check_linear(Pool& pool, const char* what, Made made) {
  const long outputs = made.weight.outputs, inputs = made.weight.inputs;
  bool all = true;
  for (const ActivationDtype dtype : {FLOAT32, BFLOAT16, INT8, INT16})
    for (const long rows : {1L, 3L, 13L}) {
      made.weight.activations = dtype;
      const std::vector<float> x = random_numbers(rows * inputs);
      std::vector<float> y(rows * outputs);
      std::vector<double> expected(rows * outputs);
      linear(pool, made.weight, {x.data()}, y.data(), rows);
      const bool is_plain = made.weight.format < QUANTIZED, rounds_weights = is_plain && dtype == BFLOAT16 && rows > FEW_ROWS;
      const std::vector<double> multiplied = entering(x, dtype, inputs, is_plain ? CODE_GROUP : made.weight.group);
      for (long m = 0; m < rows; m++)
        for (long n = 0; n < outputs; n++)
          for (long k = 0; k < inputs; k++) {
            const float w = made.widened[n * inputs + k];
            expected[m * outputs + n] += multiplied[m * inputs + k] * (rounds_weights ? through_bfloat16(w) : w);
          }
      all &= near(what, y, expected, 1e-5);
    }
  return all;
}

// Random bytes are codes, scales and minima.
template <int BITS>
static bool check_k_quant(Pool& pool, const char* what) {
  using Format = KQuant<BITS>;
  constexpr long OUTPUTS = 37, INPUTS = 2 * Format::SUPER;
  std::vector<uint8_t> codes(OUTPUTS * INPUTS * BITS / 8), scales(OUTPUTS * INPUTS / Format::GROUP), minima(scales.size());
  for (auto* bytes : {&codes, &scales, &minima})
    for (uint8_t& each : *bytes) each = static_cast<uint8_t>(generator());
  std::vector<Float16> factors(OUTPUTS * INPUTS / Format::SUPER * 2);
  for (Float16& each : factors) narrow(random_numbers(1)[0], &each);
  const Parts parts = {codes.data(), scales.data(), minima.data(), factors.data()};
  return check_linear(pool, what, made<Format>(pool, QUANTIZED + 2 + BITS, OUTPUTS, INPUTS, Format::GROUP, parts));
}

// The number as a cache of this type holds it.
template <typename T>
static double held(float x) {
  T number[LANES] = {};
  narrow(x, number);
  return load(number)[0];
}

// One request of `length` tokens, alone, in blocks that lie in order: the last token's attention after all others'.
template <typename T>
static bool check_attention(Pool& pool, const char* what, int cache_dtype, int length) {
  constexpr int HEADS = 6, KV_HEADS = 2, DIM = 40, BLOCK = 16, WIDTH = (HEADS + 2 * KV_HEADS) * DIM;
  const int blocks = (length + BLOCK - 1) / BLOCK;
  std::vector<T> keys(blocks * KV_HEADS * DIM * BLOCK), values(blocks * KV_HEADS * BLOCK * padded(DIM));
  const AttentionLayer layer = {HEADS, KV_HEADS, DIM, BLOCK, 0, cache_dtype, 0, 0.1f, 1e-6f, nullptr, nullptr, nullptr, keys.data(), values.data()};
  std::vector<int32_t> table(blocks), places(length);
  for (int i = 0; i < blocks; i++) table[i] = i;
  for (int i = 0; i < length; i++) places[i] = i;
  const std::vector<float> qkv = random_numbers(static_cast<long>(length) * WIDTH);
  std::vector<float> used = qkv, found(length * HEADS * DIM);
  for (const int first : {0, length - 1}) {  // as one chunk, and again the last token as a decode
    const int32_t ends[] = {0, length - first};
    const AttentionBatch batch = {length - first, 1, blocks, &places[first], &places[first], table.data(), ends};
    attention(pool, layer, batch, &used[first * WIDTH], &found[first * HEADS * DIM]);
  }
  std::vector<double> expected(found.size()), cached(qkv.size());
  std::transform(qkv.begin(), qkv.end(), cached.begin(), held<T>);
  for (int token = 0; token < length; token++)
    for (int head = 0; head < HEADS; head++) {
      const int kv = head / (HEADS / KV_HEADS);
      double total = 0;
      double* to = &expected[(token * HEADS + head) * DIM];
      for (int seen = 0; seen <= token; seen++) {
        double score = 0;
        for (int i = 0; i < DIM; i++) score += qkv[token * WIDTH + head * DIM + i] * cached[seen * WIDTH + (HEADS + kv) * DIM + i];
        const double weight = std::exp(score * 0.1);
        total += weight;
        for (int i = 0; i < DIM; i++) to[i] += weight * cached[seen * WIDTH + (HEADS + KV_HEADS + kv) * DIM + i];
      }
      for (int i = 0; i < DIM; i++) to[i] /= total;
    }
  return near(what, found, expected, 1e-5);
}

// Each item of a job is done once, by whatever thread, also of more items than a claim has bits for.
static bool check_pool(Pool& pool) {
  bool all = true;
  for (const long items : {0L, 1L, 2L, 7L, 1000L, 0xffffL, 0x10000L, 0x1ffffL}) {
    std::vector<std::atomic<int>> shared(items), in_order(items);
    pool.share(items, [&](Pool::Claims& claims) {
      do
        for (long i = claims.first; i < claims.end; i++) shared[i]++;
      while (claims.next());
    });
    pool.run(items, [&](long i) { in_order[i]++; });
    for (const auto* times : {&shared, &in_order}) all &= std::all_of(times->begin(), times->end(), [](int each) { return each == 1; });
  }
  std::printf("pool: %s\n", all ? "right" : "wrong");
  return all;
}

// Few rows are normed by each thread for itself, and their sum is kept by one, whichever claims the first panel; more of them by all.
static bool check_norm(Pool& pool, Made made) {
  const long outputs = made.weight.outputs, inputs = made.weight.inputs;
  const std::vector<float> weight = random_numbers(inputs);
  bool all = true;
  for (const long rows : {1L, 4L, 9L})
    for (int repeat = 0; repeat < 50; repeat++) {
      const std::vector<float> x = random_numbers(rows * inputs), residual = random_numbers(rows * inputs);
      std::vector<float> expected_sum = residual, sum(rows * inputs), memory(rows * inputs), normed(rows * inputs), y(rows * outputs), expected = y;
      add_rms_norm(pool, x.data(), residual.data(), expected_sum.data(), weight.data(), normed.data(), rows, inputs, 1e-5f);
      linear(pool, made.weight, {normed.data()}, expected.data(), rows);
      linear(pool, made.weight, {x.data(), residual.data(), sum.data(), weight.data(), 1e-5f, memory.data()}, y.data(), rows);
      all &= y == expected && sum == expected_sum;
    }
  std::printf("norm: %s\n", all ? "right" : "wrong");
  return all;
}

int main() {
  Pool pool(2), crowd(5);
  constexpr long OUTPUTS = 37, INPUTS = 96;
  const std::vector<float> plain = random_numbers(OUTPUTS * INPUTS);
  std::vector<Float16> halves(plain.size()), scales(OUTPUTS * 3), minima(OUTPUTS * 3);
  std::vector<BFloat16> upper(plain.size());
  std::vector<uint8_t> codes(OUTPUTS * INPUTS);
  for (size_t i = 0; i < plain.size(); i++) narrow(plain[i], &halves[i]), narrow(plain[i], &upper[i]), codes[i] = static_cast<uint8_t>(generator());
  for (size_t i = 0; i < scales.size(); i++) narrow(plain[i] / 50, &scales[i]), narrow(plain[i + 200], &minima[i]);
  bool all = check_linear(pool, "float32", made<Plain<float>>(pool, 0, OUTPUTS, INPUTS, 1, {plain.data(), nullptr, nullptr, nullptr}));
  all &= check_linear(pool, "bfloat16", made<Plain<BFloat16>>(pool, 1, OUTPUTS, INPUTS, 1, {upper.data(), nullptr, nullptr, nullptr}));
  all &= check_linear(pool, "float16", made<Plain<Float16>>(pool, 2, OUTPUTS, INPUTS, 1, {halves.data(), nullptr, nullptr, nullptr}));
  all &= check_linear(pool, "4 bits", made<Grouped<4, Float16, true>>(pool, QUANTIZED, OUTPUTS, INPUTS, 32, {codes.data(), scales.data(), minima.data(), nullptr}));
  all &= check_linear(pool, "8 bits", made<Grouped<8, Float16, false>>(pool, QUANTIZED + 1, OUTPUTS, INPUTS, 32, {codes.data(), scales.data(), nullptr, nullptr}));
  all &= check_k_quant<4>(pool, "K-quant of 4 bits") && check_k_quant<5>(pool, "of 5") && check_k_quant<6>(pool, "of 6");
  all &= check_norm(crowd, made<Plain<float>>(pool, 0, OUTPUTS, INPUTS, 1, {plain.data(), nullptr, nullptr, nullptr}));
  all &= check_pool(pool) && check_pool(crowd);
  all &= check_attention<float>(pool, "attention", 0, 67);
  all &= check_attention<Float16>(pool, "attention over float16", 2, 1000);
  return all ? 0 : 1;
}
