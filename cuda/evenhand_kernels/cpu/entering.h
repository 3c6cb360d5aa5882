// What enters a linear layer, with the norm before it.
#pragma once

#include <algorithm>
#include <vector>

#include "norm.h"
#include "pool.h"

// Rows x, or where there is a norm, what that makes of residual + x, or of x where residual is null.
struct Entering {
  const float *x, *residual = nullptr;
  float* sum = nullptr;  // becomes residual + x
  const float* norm = nullptr;
  float eps = 0;
  float* normed = nullptr;  // memory of as many rows, for many
};

// What enters, made by one thread for itself.
class EnteringHere {
 public:
  EnteringHere(const Entering& entering, long rows, long inputs) : entering_(entering), size_(rows * inputs), x_(entering.x) {
    if (!entering.norm) return;
    thread_local std::vector<float> memory;  // stays in the core's cache from one layer to the next
    memory.resize(std::max<size_t>(memory.size(), 2 * size_));
    float *normed = memory.data(), *sum = normed + size_;
    add_rms_norm(Pool::alone(), entering.x, entering.residual, sum, entering.norm, normed, rows, inputs, entering.eps);
    x_ = normed, sum_ = sum;
  }

  const float* x() const { return x_; }

  // One thread does that.
  void store_sum() const {
    if (entering_.norm) std::copy_n(sum_, size_, entering_.sum);
  }

 private:
  const Entering& entering_;
  const long size_;
  const float *x_, *sum_ = nullptr;
};

static const float* normed_by_all(Pool& pool, const Entering& entering, long rows, long inputs) {
  if (!entering.norm) return entering.x;
  add_rms_norm(pool, entering.x, entering.residual, entering.sum, entering.norm, entering.normed, rows, inputs, entering.eps);
  return entering.normed;
}
