// The torch-free core: what one instruction set offers. Compiled once per instruction set, chosen at run time.
#pragma once
#include <cstdint>

#include "flags.h"

namespace fastvlm {

enum class Type : int { f32, bf16 };

constexpr int kTileCols = 384;  // the widest tile

// Products of packed panels. A packed operand of `rows` x `k` is ceil(rows / width) panels; a panel holds, for every
// step of k (for bf16: every pair of steps), `width` values side by side, zero-padded. Left operands have width mr,
// right operands nr.
struct Products {
  Type compute;  // what panels and gradient tiles are stored as
  int mr, nr;
  // Element (r, k) of the source is src[r * row_stride + k * k_stride] of `type`; one of the strides is 1.
  void (*pack)(const void* src, Type type, int64_t row_stride, int64_t k_stride, int64_t rows, int64_t k, int width,
               void* panels);
  // C [rows, cols], row stride ld, (+)= A B over k; a_panel and b_panel are the panels' strides in elements.
  void (*multiply)(const void* a, int64_t a_panel, const void* b, int64_t b_panel, int64_t k, float* c, int64_t ld,
                   int64_t rows, int64_t cols, bool accumulate);
};

// One tile of raw products, what turns it into scores, and which entries are targets or no candidates. What has one
// number a row is indexed by the tile's row; what has one a column is `padded` long.
struct Tile {
  float* products;      // [rows, ld]; columns up to `padded` (a multiple of nr) may be read and written
  const float* second;  // [rows, ld], products of the second pair of features, or null
  int64_t ld, rows, cols, padded;
  int64_t flags;
  int64_t first_row, first_col;  // the tile's place in the score matrix
  float scale;                   // of the unit of the scores: bits, or nats for the sigmoid
  const float* shift;            // likewise, of each column: the biases
  float second_scale;            // in nats
  float numbers[2];              // as of the Problem in scores/problem.py
  const int64_t* target;         // of each row, counted from the tile's first column; may lie outside
  const int32_t* dead;           // all ones where a column is nobody's candidate, or padding
  const int64_t* row_id;         // null: there are no ids
  const int32_t *col_id_low, *col_id_high;
  const float *row_limit[2], *col_limit[2];  // null without kLimit and kGuide
  const float *row_factor, *col_factor;      // null without kFactor
};

struct Sums {
  double gc = 0, g = 0, loss = 0;  // of G times the raw product, of G, and of a loss that is a sum over entries
};

constexpr int kMaxFields = 11, kMaxOperands = 6;

// A statistic of rows and columns: fields and operands as in kernels/epilogues. Vectors of the columns are `padded`
// long, and those of a direction that is not asked are not touched.
struct Epilogue {
  int fields, operands;
  // The state of no scores at all, a number a field.
  void (*identity)(float* state);
  // State of the tile along both axes: row[f][i], col[f][j]. Scores may replace products.
  void (*partial)(const Tile& t, float* const* row, float* const* col);
  // into[f][i] = merge(into, from) for n values; both may be read and written up to a multiple of 16.
  void (*merge)(float* const* into, float* const* from, int64_t n);
  // G replaces the products and goes to `g` (compute type, row stride g_ld), unless that is null; its sums along
  // columns go to `d_col`, unless null.
  void (*gradient)(const Tile& t, const float* const* row, const float* const* col, Type compute, void* g, int64_t g_ld,
                   Sums* sums, float* d_col);
};

// The sigmoid epilogue: the value and the gradient of kernels/epilogues/sigmoid.py, in nats.
struct Sigmoid {
  // The weighted loss of the tile, and with `gradient` its G as above. Weights row[i], col[j].
  void (*sweep)(const Tile& t, const float* row, const float* col, bool gradient, Type compute, void* g, int64_t g_ld,
                Sums* sums);
};

// By which law a row of a tile looks for candidates: fastvlm_loss/scores/selection.py.
struct Picking {
  bool noise;
  float sharpness, log_floor;
  const float *row_total, *col_total;  // of the tile; null without a floor
  uint32_t seed[2], step[2];
  int64_t first_row, first_col;  // global indices of the matrix's row 0 and column 0
  float row_least;               // keys below these do not count
  const float* col_least;        // [padded]
};

// Candidates of a row of a tile whose keys may count for the row, and for the columns.
struct Picked {
  int rows, cols;
  uint16_t row_at[kTileCols], col_at[kTileCols];
  float to_row[kTileCols], to_col[kTileCols];  // bounds of their keys
  int64_t pair;                                // of rows, whose random words these are
  uint32_t words[4][kTileCols];                // of the even row's two directions, of the odd row's
};

struct Core {
  const char* name;
  const Products* f32;
  const Products* bf16;  // for bf16 features; the fp32 ones, which widen while packing, where the CPU has none
  // The epilogue of a statistic's flags, or null where there is none.
  const Epilogue* (*softmax)(int64_t flags);
  const Epilogue* (*hinge)(int64_t flags);
  const Sigmoid* sigmoid;
  void (*pick)(const Tile& t, int64_t i, const Picking& how, Picked* out);
  // out[i] = factor * sums[i] in `type`, rounded to nearest even; may run in place.
  void (*deliver)(const float* sums, Type type, int64_t n, float factor, void* out);
};

const Core& core();  // the best one this CPU runs; FASTVLM_LOSS_CPU_ISA=base|avx2|avx512|avx512+bf16 may only lower it

}  // namespace fastvlm
