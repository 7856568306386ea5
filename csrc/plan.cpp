// Every pass walks square macro-tiles of the score matrix. Within one: pack the features, then independent tasks make
// tiles of scores in their own cache and fold them; `pull` writes the gradient tiles to one bounded workspace and
// multiplies it from both sides. No task depends on the number of threads, so results do not either.
#include "plan.h"

#include <algorithm>
#include <cstring>
#include <vector>

#include "parallel.h"

namespace fastvlm {
namespace {

constexpr int64_t kMacro = 1536;   // side of a macro-tile: its packs and gradients stay in a shared cache
constexpr int64_t kTileCols = 384;  // columns of a task's tile
constexpr int64_t kTileRows = 96;   // and rows: 144 KiB of scores
constexpr int64_t kStepK = 512;    // steps of the inner dimension per pass over the accumulators

struct Range {
  int64_t begin, size;
};

int64_t macro_side(int64_t n) {  // equal macro-tiles, no thin last one
  return n <= kMacro ? n : round_up(divide_up(n, divide_up(n, kMacro)), kTileRows);
}

// A packed operand of `rows` x `k`.
struct Pack {
  const Products* products;
  int width;
  int64_t panel;  // elements a panel
  Buffer data;

  Pack(const Products* p, int w) : products(p), width(w), panel(0) {}

  void fill(const void* src, Type type, int64_t row_stride, int64_t k_stride, int64_t rows, int64_t k) {
    panel = steps(products->compute, k) * width;
    char* out = data.at<char>(divide_up(rows, width) * panel * bytes(products->compute));
    parallel(divide_up(rows, width), [&](int64_t i) {
      const int64_t r = i * width;
      products->pack(static_cast<const char*>(src) + r * row_stride * bytes(type), type, row_stride, k_stride,
                     std::min<int64_t>(width, rows - r), k, width, out + i * panel * bytes(products->compute));
    });
  }
  // Panels from `row` (a multiple of width), at step `k`.
  const void* from(int64_t row, int64_t k = 0) {
    return data.at<char>(0) + (row / width * panel + k * width) * bytes(products->compute);
  }
  static int64_t bytes(Type t) { return t == Type::f32 ? 4 : 2; }
  static int64_t steps(Type t, int64_t k) { return t == Type::f32 ? k : round_up(k, 2); }  // bf16 holds pairs
};

const Products* products_for(Type type) { return type == Type::bf16 ? core().bf16 : core().f32; }

struct Plan {
  const Problem& p;
  const bool recall;  // the products are already in p.products
  const Products* q = products_for(p.type);
  const int64_t rows_macro = macro_side(p.m), cols_macro = macro_side(p.n);
  // small batches get smaller tiles, so that every thread has one
  const int64_t tile_rows = std::min(kTileRows, round_up(divide_up(p.m, 4), q->mr));
  const int64_t tile_cols = kTileCols;
  Pack left{q, q->mr}, right{q, q->nr};

  const void* features(const void* base, int64_t row) const {
    return static_cast<const char*>(base) + row * p.d * Pack::bytes(p.type);
  }

  // Calls f(rows, cols, first) for every macro-tile, the features packed for its scores; `first` of a column.
  template <class F>
  void macros(const F& f) {
    for (int64_t c = 0; c < p.n; c += cols_macro) {
      const Range cols{c, std::min(cols_macro, p.n - c)};
      if (!recall) right.fill(features(p.y, c), p.type, p.d, 1, cols.size, p.d);
      for (int64_t r = 0; r < p.m; r += rows_macro) {
        const Range rows{r, std::min(rows_macro, p.m - r)};
        if (!recall && (c == 0 || rows.size < p.m)) left.fill(features(p.x, r), p.type, p.d, 1, rows.size, p.d);
        f(rows, cols);
      }
    }
  }

  void make_products(const Tile& t, int64_t r, int64_t c, float* kept) {
    if (recall) {
      for (int64_t i = 0; i < t.rows; ++i) {
        std::memcpy(t.products + i * t.ld, kept + i * p.n, t.cols * sizeof(float));
        std::fill(t.products + i * t.ld + t.cols, t.products + (i + 1) * t.ld, 0.f);
      }
      return;
    }
    for (int64_t k = 0; k < p.d; k += kStepK)
      q->multiply(left.from(r, k), left.panel, right.from(c, k), right.panel, std::min(kStepK, p.d - k), t.products,
                  t.ld, round_up(t.rows, q->mr), t.padded, k > 0);
    for (int64_t i = 0; kept && i < t.rows; ++i)
      std::memcpy(kept + i * p.n, t.products + i * t.ld, t.cols * sizeof(float));
  }

  // Calls f(task, tile, row, col) for every tile of a macro-tile, in parallel; row and col are its place in it.
  template <class F>
  void tiles(Range rows, Range cols, const F& f) {
    const int64_t wide = divide_up(cols.size, tile_cols);
    parallel(divide_up(rows.size, tile_rows) * wide, [&](int64_t task) {
      const int64_t r = task / wide * tile_rows, c = task % wide * tile_cols;
      static thread_local Buffer scores, targets;
      Tile t{};
      t.rows = std::min(tile_rows, rows.size - r);
      t.cols = std::min(tile_cols, cols.size - c);
      t.padded = round_up(t.cols, q->nr);
      t.ld = t.padded;
      t.products = scores.at<float>(round_up(t.rows, q->mr) * t.ld);
      t.scale = p.scale, t.bias = p.bias;
      make_products(t, r, c, p.products ? p.products + (rows.begin + r) * p.n + cols.begin + c : nullptr);
      int64_t* target = targets.at<int64_t>(t.rows);
      for (int64_t i = 0; i < t.rows; ++i) {
        const int64_t row = rows.begin + r + i, hit = p.target ? p.target[row] : row;
        target[i] = hit < 0 ? -1 : hit - (cols.begin + c);
      }
      t.target = target;
      t.row_id = p.row_id ? p.row_id + rows.begin + r : nullptr;
      t.col_id = p.col_id ? p.col_id + cols.begin + c : nullptr;
      f(task, t, r, c);
    });
  }

  // C [rows, d] (+)= A B over k: A packed by each task from the gradient workspace, B packed before. How the work is
  // cut does not change the order of any sum, so it may follow the number of threads.
  void accumulate(const void* g, int64_t row_stride, int64_t k_stride, int64_t rows, int64_t k, Pack& b, float* c,
                  bool onto) {
    const int64_t wanted = divide_up(2 * torch::stable::get_num_threads(), divide_up(rows, tile_rows));
    const int64_t wide = std::max<int64_t>(1, std::min(p.d / 128, wanted));
    const int64_t cols = round_up(divide_up(p.d, wide), q->nr), across = divide_up(p.d, cols);
    parallel(divide_up(rows, tile_rows) * across, [&](int64_t task) {
      const int64_t r = task / across * tile_rows, d = task % across * cols;
      const int64_t live = std::min(tile_rows, rows - r), size = Pack::bytes(q->compute);
      static thread_local Buffer panels;
      for (int64_t s = 0; s < k; s += kStepK) {
        const int64_t step = std::min(kStepK, k - s), panel = Pack::steps(q->compute, step) * q->mr;
        char* a = panels.at<char>(divide_up(live, q->mr) * panel * size);
        q->pack(static_cast<const char*>(g) + (r * row_stride + s * k_stride) * size, q->compute, row_stride, k_stride,
                live, step, q->mr, a);
        q->multiply(a, panel, b.from(d, s), b.panel, step, c + r * p.d + d, p.d, live, std::min(cols, p.d - d), onto || s > 0);
      }
    });
  }
};

// dx = factor * sums, in the features' type; may run in place.
void deliver(const float* sums, Type type, int64_t count, float factor, void* out) {
  constexpr int64_t kChunk = 1 << 15;
  parallel(divide_up(count, kChunk), [&](int64_t chunk) {
    const int64_t from = chunk * kChunk, size = std::min(kChunk, count - from);
    core().deliver(sums + from, type, size, factor, static_cast<char*>(out) + from * Pack::bytes(type));
  });
}

// make(tile, row, col, g, g_ld, sums) turns the products at row, col into a tile of G, consumed at once as dX += G Y and
// dY += Gt X. Without dx and dy no G is kept, and g is null.
template <class F>
Sums pull(Plan& plan, void* dx, void* dy, const F& make) {
  const Problem& p = plan.p;
  if (!p.m || !p.n) {
    if (dx) std::memset(dx, 0, p.m * p.d * Pack::bytes(p.type));
    if (dy) std::memset(dy, 0, p.n * p.d * Pack::bytes(p.type));
    return {};
  }
  const bool half = p.type == Type::bf16;
  const int64_t size = Pack::bytes(plan.q->compute), g_ld = round_up(plan.cols_macro, 32);
  Buffer workspace, x_sums, y_sums;
  char* g = dx || dy ? workspace.at<char>(plan.rows_macro * g_ld * size) : nullptr;
  // fp32 accumulators: the outputs themselves where those are fp32; of y one macro-tile's columns at a time
  float* dx_sums = nullptr;
  if (dx) dx_sums = half ? x_sums.at<float>(p.m * p.d) : static_cast<float*>(dx);
  Pack x_right{plan.q, plan.q->nr}, y_right{plan.q, plan.q->nr};
  Sums total;
  std::vector<Sums> parts;
  plan.macros([&](Range rows, Range cols) {
    parts.assign(divide_up(rows.size, plan.tile_rows) * divide_up(cols.size, plan.tile_cols), Sums{});
    plan.tiles(rows, cols, [&](int64_t task, const Tile& t, int64_t r, int64_t c) {
      make(t, rows.begin + r, cols.begin + c, g ? g + (r * g_ld + c) * size : nullptr, g_ld, &parts[task]);
    });
    for (const Sums& part : parts) total.gc += part.gc, total.g += part.g, total.loss += part.loss;
    if (dx) {
      if (rows.begin == 0) y_right.fill(plan.features(p.y, cols.begin), p.type, 1, p.d, p.d, cols.size);
      plan.accumulate(g, g_ld, 1, rows.size, cols.size, y_right, dx_sums + rows.begin * p.d, cols.begin > 0);
    }
    if (dy) {
      float* dy_sums = half ? y_sums.at<float>(cols.size * p.d) : static_cast<float*>(dy) + cols.begin * p.d;
      x_right.fill(plan.features(p.x, rows.begin), p.type, 1, p.d, p.d, rows.size);
      plan.accumulate(g, 1, g_ld, cols.size, rows.size, x_right, dy_sums, rows.begin > 0);
      if (rows.begin + rows.size == p.m)
        deliver(dy_sums, p.type, cols.size * p.d, p.scale, static_cast<char*>(dy) + cols.begin * p.d * (half ? 2 : 4));
    }
  });
  if (dx) deliver(dx_sums, p.type, p.m * p.d, p.scale, dx);
  return total;
}

}  // namespace

void softmax_statistics(const Problem& p, int64_t flags, float* state) {
  Plan plan{p, false};
  const Softmax& epilogue = *core().softmax;
  const bool gap = flags & kGap;
  const int fields = gap ? 5 : 3;
  const int64_t rows_kept = flags & kRows ? p.m : 0, length = rows_kept + (flags & kCols ? p.n : 0);
  // running states, padded so that a merge may touch whole vectors; macro-tiles start on multiples of kTileRows
  const int64_t pad_m = round_up(p.m, 64) + 64, pad_n = round_up(p.n, 64) + 64;
  std::vector<float> row_state(fields * pad_m), col_state(fields * pad_n);
  std::fill_n(row_state.begin(), pad_m, -__builtin_inff());
  std::fill_n(col_state.begin(), pad_n, -__builtin_inff());
  const int64_t high = divide_up(plan.rows_macro, std::max<int64_t>(1, plan.tile_rows));
  const int64_t wide = divide_up(plan.cols_macro, plan.tile_cols);
  const int64_t part_m = round_up(plan.rows_macro, 64) + 64, part_n = round_up(plan.cols_macro, 64) + kTileCols;
  std::vector<float> row_part(wide * fields * part_m), col_part(high * fields * part_n);
  plan.macros([&](Range rows, Range cols) {
    plan.tiles(rows, cols, [&](int64_t, const Tile& t, int64_t r, int64_t c) {
      float *row[kMaxFields], *col[kMaxFields];
      for (int f = 0; f < fields; ++f) {
        row[f] = row_part.data() + (c / plan.tile_cols * fields + f) * part_m + r;
        col[f] = col_part.data() + (r / plan.tile_rows * fields + f) * part_n + c;
      }
      epilogue.partial(t, flags, row, col);
    });
    const auto merge = [&](std::vector<float>& into, int64_t pad, Range at, std::vector<float>& parts, int64_t part,
                           int64_t count) {
      constexpr int64_t kChunk = 384;  // a multiple of every vector, so that chunks never share one
      parallel(divide_up(at.size, kChunk), [&](int64_t chunk) {
        const int64_t from = chunk * kChunk, size = std::min(kChunk, at.size - from);
        for (int64_t k = 0; k < count; ++k) {
          float *a[kMaxFields], *b[kMaxFields], whole[kMaxFields][kChunk];
          for (int f = 0; f < fields; ++f) {
            a[f] = whole[f];
            std::memcpy(whole[f], into.data() + f * pad + at.begin + from, size * sizeof(float));
            b[f] = parts.data() + (k * fields + f) * part + from;
          }
          epilogue.merge(a, b, size, gap);
          for (int f = 0; f < fields; ++f)
            std::memcpy(into.data() + f * pad + at.begin + from, whole[f], size * sizeof(float));
        }
      });
    };
    if (flags & kRows) merge(row_state, pad_m, rows, row_part, part_m, divide_up(cols.size, plan.tile_cols));
    if (flags & kCols) merge(col_state, pad_n, cols, col_part, part_n, divide_up(rows.size, plan.tile_rows));
  });
  for (int f = 0; f < fields; ++f) {
    if (flags & kRows) std::copy_n(row_state.data() + f * pad_m, p.m, state + f * length);
    if (flags & kCols) std::copy_n(col_state.data() + f * pad_n, p.n, state + f * length + rows_kept);
  }
}

Sums softmax_gradient(const Problem& p, int64_t flags, const float* operands, void* dx, void* dy) {
  Plan plan{p, p.products != nullptr};
  const Softmax& epilogue = *core().softmax;
  const int vectors = flags & kGap ? 4 : 3;
  const int64_t rows_kept = flags & kRows ? p.m : 0, length = rows_kept + (flags & kCols ? p.n : 0);
  return pull(plan, dx, dy, [&](const Tile& t, int64_t r, int64_t c, void* g, int64_t g_ld, Sums* sums) {
    float padded[4][kTileCols] = {};
    const float *row[4], *col[4];
    for (int v = 0; v < vectors; ++v) {
      row[v] = operands + v * length + r;
      col[v] = padded[v];
      if (flags & kCols) std::memcpy(padded[v], operands + v * length + rows_kept + c, t.cols * sizeof(float));
    }
    epilogue.gradient(t, flags, row, col, plan.q->compute, g, g_ld, sums);
  });
}

Sums sigmoid_sweep(const Problem& p, const float* row_factor, const float* col_factor, bool gradient, void* dx, void* dy) {
  Plan plan{p, false};
  const Sigmoid& epilogue = *core().sigmoid;
  return pull(plan, dx, dy, [&](const Tile& t, int64_t r, int64_t c, void* g, int64_t g_ld, Sums* sums) {
    float row[kTileRows], col[kTileCols] = {};
    for (int64_t i = 0; i < t.rows; ++i) row[i] = row_factor ? row_factor[r + i] : 1.f;
    for (int64_t j = 0; j < t.cols; ++j) col[j] = col_factor ? col_factor[c + j] : 1.f;
    epilogue.sweep(t, row, col, gradient, plan.q->compute, g, g_ld, sums);
  });
}

}  // namespace fastvlm
