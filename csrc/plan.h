// The macro-tile plan: which products and epilogues run over which part of the score matrix, in parallel.
#pragma once
#include "core.h"

namespace fastvlm {

// Features x [layers m, d] and y [n, d] of a score matrix, whose products are the largest of a row's in all layers.
struct Features {
  const void *x, *y;
  int64_t d;
  float scale;
  int64_t layers;
};

// As of the Problem in scores/problem.py; null for what is not there.
struct Problem {
  Features first;
  Features second;  // x is null unless the statistic needs its products
  Type type;
  int64_t m, n;
  int64_t flags;
  float bias;
  const int64_t* target;  // null: row i has column i
  const int64_t* row_id;
  const int64_t* col_id;
  const float *row_factor, *col_factor, *col_bias;
  const float *row_limit, *col_limit;  // [2, m], [2, n]
  float numbers[2];
  float* products;  // [m, n] of a batch small enough to keep them from forward for backward

  int64_t rows() const { return flags & kRows ? m : 0; }  // of a state, which holds the rows and then the columns
  int64_t length() const { return rows() + (flags & kCols ? n : 0); }
};

// Gradients in the features' type, null where not needed, of the first rows and columns; col [n] in fp32.
struct Gradients {
  void *x, *y;
  int64_t rows, cols;
  float* col;
};

// Which candidates of each row and column are picked: order and best [L, k] as in scores/selection.py.
struct Selection {
  int64_t k;
  bool noise;
  float sharpness, floor;
  const float* totals;  // [L], null without a floor
  int64_t seed, step, first_row, first_col;
  int64_t* order;
  float* best;
};

// state [fields, L], and what is selected along the way; both may be null.
void statistics(const Problem& p, const Epilogue* epilogue, float* state, const Selection* selection);

// operands [epilogue.operands, L]. The sums of G times the (shifted) products, and of G, are the gradients of scale and
// bias.
Sums gradient(const Problem& p, const Epilogue& epilogue, const float* operands, const Gradients& d);

// Gradients of 0.
void no_gradient(const Problem& p, const Gradients& d);

// The sigmoid loss of all entries, weighted by the factors (null: ones), and with `gradient` the rest as above: one
// pass over the scores.
Sums sigmoid_sweep(const Problem& p, bool gradient, const Gradients& d);

}  // namespace fastvlm
