// The macro-tile plan: which products and epilogues run over which part of the score matrix, in parallel.
#pragma once
#include "core.h"

namespace fastvlm {

struct Problem {
  const void* x;  // [m, d]
  const void* y;  // [n, d]
  Type type;
  int64_t m, n, d;
  float scale, bias;
  const int64_t* target;  // null: row i has column i
  const int64_t* row_id;  // null: no ids
  const int64_t* col_id;
  float* products;  // [m, n] of a batch small enough to keep them from forward for backward, or null
};

// state [fields, L]: rows first if kRows, then columns if kCols.
void softmax_statistics(const Problem& p, int64_t flags, float* state);

// operands [3 or 4, L] as the state. dx, dy in the features' type, null where not needed. The sums of G times the raw
// products, and of G, are the gradients of scale and bias.
Sums softmax_gradient(const Problem& p, int64_t flags, const float* operands, void* dx, void* dy);

// The sigmoid loss of all entries, weighted by row_factor [m] and col_factor [n] (null: ones), and with `gradient` the
// rest as above: one pass over the scores.
Sums sigmoid_sweep(const Problem& p, const float* row_factor, const float* col_factor, bool gradient, void* dx, void* dy);

}  // namespace fastvlm
