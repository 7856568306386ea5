// Every pass walks square macro-tiles of the score matrix. Within one: pack the features, then independent tasks make
// tiles of scores in their own cache and fold them; `pull` writes the gradient tiles to one bounded workspace and
// multiplies it from both sides. No task depends on the number of threads, so results do not either.
#include "plan.h"

#include <optional>
#include <vector>

#include "select.h"
#include "walk.h"

namespace fastvlm {
namespace {

// dx = factor * sums, in the features' type; may run in place.
void deliver(const float* sums, Type type, int64_t count, float factor, void* out) {
  constexpr int64_t kChunk = 1 << 15;
  parallel(divide_up(count, kChunk), [&](int64_t chunk) {
    const int64_t from = chunk * kChunk, size = std::min(kChunk, count - from);
    core().deliver(sums + from, type, size, factor, static_cast<char*>(out) + from * Pack::bytes(type));
  });
}

// make(tile, g, g_ld, sums, d_col) turns the products of a tile into its G, consumed at once as dX += G Y and
// dY += Gt X. Without dx and dy no G is kept, and g is null; likewise d_col.
template <class F>
Sums pull(Plan& plan, const Gradients& d, const F& make) {
  const Problem& p = plan.p;
  const int64_t dim = p.first.d, size = Pack::bytes(plan.q->compute), g_ld = round_up(plan.cols_macro, 32);
  if (d.col) std::fill_n(d.col, p.n, 0.f);
  if (!p.m || !p.n) {
    no_gradient(p, d);
    return {};
  }
  const bool half = p.type == Type::bf16;
  Buffer workspace, x_sums, y_sums, col_parts;
  char* g = d.x || d.y ? workspace.at<char>(plan.rows_macro * g_ld * size) : nullptr;
  // fp32 accumulators: the outputs themselves where those are fp32; of y one macro-tile's columns at a time
  float* dx_sums = nullptr;
  if (d.x) dx_sums = half ? x_sums.at<float>(d.rows * dim) : static_cast<float*>(d.x);
  Pack x_right{plan.q, plan.q->nr}, y_right{plan.q, plan.q->nr};
  const int64_t col_ld = round_up(plan.cols_macro, kTileCols);
  Sums total;
  std::vector<Sums> parts;
  plan.macros([&](Range rows, Range cols) {
    const int64_t high = divide_up(rows.size, plan.tile_rows);
    parts.assign(high * divide_up(cols.size, plan.tile_cols), Sums{});
    float* col = d.col ? col_parts.at<float>(high * col_ld) : nullptr;
    if (col) std::fill_n(col, high * col_ld, 0.f);
    plan.tiles(rows, cols, [&](int64_t task, const Tile& t, int64_t r, int64_t c) {
      make(t, g ? g + (r * g_ld + c) * size : nullptr, g_ld, &parts[task],
           col ? col + r / plan.tile_rows * col_ld + c : nullptr);
    });
    for (const Sums& part : parts) total.gc += part.gc, total.g += part.g, total.loss += part.loss;
    for (int64_t k = 0; col && k < high; ++k)
      for (int64_t j = 0; j < cols.size; ++j) d.col[cols.begin + j] += col[k * col_ld + j];
    const int64_t to_x = d.x ? std::min(rows.size, d.rows - rows.begin) : 0;
    const int64_t to_y = d.y ? std::min(cols.size, d.cols - cols.begin) : 0;
    if (to_x > 0) {
      if (rows.begin == 0) y_right.fill(at_row(p.first.y, p.type, cols.begin, dim), p.type, 1, dim, dim, cols.size);
      plan.accumulate(g, g_ld, 1, to_x, cols.size, y_right, dx_sums + rows.begin * dim, cols.begin > 0);
    }
    if (to_y > 0) {
      float* dy_sums = half ? y_sums.at<float>(to_y * dim) : static_cast<float*>(d.y) + cols.begin * dim;
      x_right.fill(at_row(p.first.x, p.type, rows.begin, dim), p.type, 1, dim, dim, rows.size);
      plan.accumulate(g, 1, g_ld, to_y, rows.size, x_right, dy_sums, rows.begin > 0);
      if (rows.begin + rows.size == p.m)
        deliver(dy_sums, p.type, to_y * dim, p.first.scale,
                static_cast<char*>(d.y) + cols.begin * dim * Pack::bytes(p.type));
    }
  });
  if (d.x) deliver(dx_sums, p.type, d.rows * dim, p.first.scale, d.x);
  return total;
}

// States [fields, n] of all rows, or columns, joined from those of a macro-tile's tiles.
class States {
 public:
  States(const Epilogue& epilogue, int64_t n, int64_t side, int64_t parts)
      : epilogue_(epilogue), pad_(round_up(n, 64) + 64), part_(round_up(side, 64) + kTileCols),
        whole_(epilogue.fields * pad_), parts_(parts * epilogue.fields * part_) {
    float none[kMaxFields];
    epilogue.identity(none);
    for (int f = 0; f < epilogue.fields; ++f) std::fill_n(whole_.data() + f * pad_, pad_, none[f]);
  }
  // Where the state of a macro-tile's k-th tile goes, at place `at` of the macro-tile.
  void part(int64_t k, int64_t at, float** fields) {
    for (int f = 0; f < epilogue_.fields; ++f) fields[f] = parts_.data() + (k * epilogue_.fields + f) * part_ + at;
  }
  // Joins the first `count` parts, in this order.
  void merge(Range at, int64_t count) {
    constexpr int64_t kChunk = 384;  // a multiple of every vector, so that chunks never share one
    parallel(divide_up(at.size, kChunk), [&](int64_t chunk) {
      const int64_t from = chunk * kChunk, size = std::min(kChunk, at.size - from);
      float *a[kMaxFields], *b[kMaxFields], whole[kMaxFields][kChunk];
      for (int f = 0; f < epilogue_.fields; ++f) {
        a[f] = whole[f];
        std::memcpy(whole[f], whole_.data() + f * pad_ + at.begin + from, size * sizeof(float));
      }
      for (int64_t k = 0; k < count; ++k) {
        part(k, from, b);
        epilogue_.merge(a, b, size);
      }
      for (int f = 0; f < epilogue_.fields; ++f)
        std::memcpy(whole_.data() + f * pad_ + at.begin + from, whole[f], size * sizeof(float));
    });
  }
  void copy(int64_t n, float* state, int64_t length) const {
    for (int f = 0; f < epilogue_.fields; ++f) std::copy_n(whole_.data() + f * pad_, n, state + f * length);
  }

 private:
  const Epilogue& epilogue_;
  const int64_t pad_, part_;  // padded, so that a merge may touch whole vectors; macro-tiles start on multiples of 96
  std::vector<float> whole_, parts_;
};

}  // namespace

void no_gradient(const Problem& p, const Gradients& d) {
  if (d.x) std::memset(d.x, 0, d.rows * p.first.d * Pack::bytes(p.type));
  if (d.y) std::memset(d.y, 0, d.cols * p.first.d * Pack::bytes(p.type));
  if (d.col) std::fill_n(d.col, p.n, 0.f);
}

void statistics(const Problem& p, const Epilogue* epilogue, float* state, const Selection* selection) {
  Plan plan{p, false, kBits};
  const bool by_row = epilogue && p.flags & kRows, by_col = epilogue && p.flags & kCols;
  const int64_t wide = divide_up(plan.cols_macro, plan.tile_cols);
  const int64_t high = divide_up(plan.rows_macro, std::max<int64_t>(1, plan.tile_rows));
  std::optional<States> row_states, col_states;
  if (by_row) row_states.emplace(*epilogue, p.m, plan.rows_macro, wide);
  if (by_col) col_states.emplace(*epilogue, p.n, plan.cols_macro, high);
  std::optional<Selector> selector;
  if (selection) selector.emplace(p, *selection, plan);
  plan.macros([&](Range rows, Range cols) {
    plan.tiles(rows, cols, [&](int64_t, const Tile& t, int64_t r, int64_t c) {
      float *row[kMaxFields], *col[kMaxFields];
      if (selector) selector->look(t, r, c);
      if (by_row) row_states->part(c / plan.tile_cols, r, row);
      if (by_col) col_states->part(r / plan.tile_rows, c, col);
      if (epilogue) epilogue->partial(t, row, col);
    });
    if (by_row) row_states->merge(rows, divide_up(cols.size, plan.tile_cols));
    if (by_col) col_states->merge(cols, divide_up(rows.size, plan.tile_rows));
  });
  if (by_row) row_states->copy(p.m, state, p.length());
  if (by_col) col_states->copy(p.n, state + p.rows(), p.length());
}

Sums gradient(const Problem& p, const Epilogue& epilogue, const float* operands, const Gradients& d) {
  Plan plan{p, p.products != nullptr, kBits};
  const int64_t length = p.length();
  return pull(plan, d, [&](const Tile& t, char* g, int64_t g_ld, Sums* sums, float* d_col) {
    float padded[kMaxOperands][kTileCols];
    const float *row[kMaxOperands], *col[kMaxOperands];
    for (int v = 0; v < epilogue.operands; ++v) {
      const float* of_rows = operands + v * length;
      row[v] = of_rows + t.first_row;
      col[v] = padded[v];
      std::fill(padded[v] + t.cols, padded[v] + t.padded, 0.f);
      if (p.flags & kCols) std::memcpy(padded[v], of_rows + p.rows() + t.first_col, t.cols * sizeof(float));
    }
    epilogue.gradient(t, row, col, plan.q->compute, g, g_ld, sums, d_col);
  });
}

Sums sigmoid_sweep(const Problem& p, bool gradient, const Gradients& d) {
  Plan plan{p, false, 1.f};
  const Sigmoid& epilogue = *core().sigmoid;
  return pull(plan, d, [&](const Tile& t, char* g, int64_t g_ld, Sums* sums, float*) {
    float row[kTileRows], col[kTileCols] = {};
    for (int64_t i = 0; i < t.rows; ++i) row[i] = t.row_factor ? t.row_factor[i] : 1.f;
    for (int64_t j = 0; j < t.cols; ++j) col[j] = t.col_factor ? t.col_factor[j] : 1.f;
    epilogue.sweep(t, row, col, gradient, plan.q->compute, g, g_ld, sums);
  });
}

}  // namespace fastvlm
