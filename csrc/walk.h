// The walk over a score matrix: macro-tiles, their packed features, and the tiles of scores that tasks make of them.
#pragma once
#include <algorithm>
#include <cstring>
#include <deque>

#include "parallel.h"
#include "plan.h"

namespace fastvlm {

constexpr int64_t kMacro = 1536;  // side of a macro-tile: its packs and gradients stay in a shared cache
constexpr int64_t kTileRows = 96;  // rows of a task's tile; with kTileCols columns 144 KiB of scores
constexpr int64_t kStepK = 512;   // steps of the inner dimension per pass over the accumulators

struct Range {
  int64_t begin, size;
};

inline int64_t macro_side(int64_t n) {  // equal macro-tiles, no thin last one
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

inline const Products* products_for(Type type) { return type == Type::bf16 ? core().bf16 : core().f32; }

inline const void* at_row(const void* base, Type type, int64_t row, int64_t d) {
  return static_cast<const char*>(base) + row * d * Pack::bytes(type);
}

// Features packed for the products of one macro-tile.
struct Packed {
  const Features& of;
  Type type;
  const Products* q;
  const int64_t m;  // rows of a layer
  std::deque<Pack> left;
  Pack right{q, q->nr};

  Packed(const Features& features, Type t, const Products* p, int64_t rows) : of(features), type(t), q(p), m(rows) {
    for (int64_t k = 0; k < of.layers; ++k) left.emplace_back(q, q->mr);
  }
  void rows(Range r) {
    for (int64_t k = 0; k < of.layers; ++k)
      left[k].fill(at_row(of.x, type, k * m + r.begin, of.d), type, of.d, 1, r.size, of.d);
  }
  void columns(Range c) { right.fill(at_row(of.y, type, c.begin, of.d), type, of.d, 1, c.size, of.d); }
  // Products of a tile at r, c of the macro-tile.
  void multiply(int64_t r, int64_t c, const Tile& t, float* out) {
    static thread_local Buffer other;
    const int64_t size = round_up(t.rows, q->mr) * t.ld;
    for (int64_t k = 0; k < of.layers; ++k) {
      float* here = k ? other.at<float>(size) : out;
      multiply(left[k], r, c, t, here);
      for (int64_t i = 0; k && i < size; ++i)  // NaN of either stays
        out[i] = out[i] >= here[i] || out[i] != out[i] ? out[i] : here[i];
    }
  }

 private:
  void multiply(Pack& rows, int64_t r, int64_t c, const Tile& t, float* out) {
    for (int64_t k = 0; k < of.d; k += kStepK)
      q->multiply(rows.from(r, k), rows.panel, right.from(c, k), right.panel, std::min(kStepK, of.d - k), out, t.ld,
                  round_up(t.rows, q->mr), t.padded, k > 0);
  }
};

struct Plan {
  const Problem& p;
  const bool recall;  // the products are already in p.products
  const float unit;   // of the scores
  const Products* q = products_for(p.type);
  const int64_t rows_macro = macro_side(p.m), cols_macro = macro_side(p.n);
  // small batches get smaller tiles, so that every thread has one
  const int64_t tile_rows = std::min(kTileRows, round_up(divide_up(p.m, 4), q->mr));
  const int64_t tile_cols = kTileCols;
  Packed first{p.first, p.type, q, p.m}, second{p.second, p.type, q, p.m};

  // Calls f(rows, cols) for every macro-tile, the features packed for its products.
  template <class F>
  void macros(const F& f) {
    for (int64_t c = 0; c < p.n; c += cols_macro) {
      const Range cols{c, std::min(cols_macro, p.n - c)};
      if (!recall) first.columns(cols);
      if (p.second.x) second.columns(cols);
      for (int64_t r = 0; r < p.m; r += rows_macro) {
        const Range rows{r, std::min(rows_macro, p.m - r)};
        const bool others = c == 0 || rows.size < p.m;
        if (!recall && others) first.rows(rows);
        if (p.second.x && others) second.rows(rows);
        f(rows, cols);
      }
    }
  }

  void make_products(const Tile& t, int64_t r, int64_t c) {
    float* kept = p.products ? p.products + t.first_row * p.n + t.first_col : nullptr;
    if (!recall) first.multiply(r, c, t, t.products);
    for (int64_t i = 0; kept && i < t.rows; ++i) {
      float* here = t.products + i * t.ld;
      std::memcpy(recall ? here : kept + i * p.n, recall ? kept + i * p.n : here, t.cols * sizeof(float));
      if (recall) std::fill(here + t.cols, here + t.ld, 0.f);
    }
  }

  // What the columns of a tile bring along, `padded` long.
  void describe(Tile& t) const {
    static thread_local Buffer numbers, codes, targets;
    float* next = numbers.at<float>(4 * kTileCols);
    int32_t* dead = codes.at<int32_t>(3 * kTileCols);
    const auto padded = [&](const float* values) {
      float* out = next;
      next += kTileCols;
      std::memcpy(out, values + t.first_col, t.cols * sizeof(float));
      std::fill(out + t.cols, out + t.padded, 0.f);
      return out;
    };
    float* shift = next;
    next += kTileCols;
    for (int64_t j = 0; j < t.padded; ++j) {
      const bool live = j < t.cols;
      shift[j] = ((live && p.col_bias ? p.col_bias[t.first_col + j] : 0.f) + p.bias) * unit;
      dead[j] = live && !(p.col_id && p.col_id[t.first_col + j] == -1) ? 0 : -1;
    }
    t.shift = shift, t.dead = dead;
    if (p.col_id) {
      int32_t *low = dead + kTileCols, *high = low + kTileCols;
      for (int64_t j = 0; j < t.padded; ++j) {
        const int64_t id = j < t.cols ? p.col_id[t.first_col + j] : -1;
        low[j] = static_cast<int32_t>(id), high[j] = static_cast<int32_t>(id >> 32);
      }
      t.row_id = p.row_id + t.first_row, t.col_id_low = low, t.col_id_high = high;
    }
    if (p.row_factor) t.row_factor = p.row_factor + t.first_row;
    if (p.col_factor) t.col_factor = padded(p.col_factor);
    for (int k = 0; k < 2 && p.row_limit; ++k) {
      t.row_limit[k] = p.row_limit + k * p.m + t.first_row;
      t.col_limit[k] = padded(p.col_limit + k * p.n);
    }
    int64_t* target = targets.at<int64_t>(t.rows);
    for (int64_t i = 0; i < t.rows; ++i) {
      const int64_t row = t.first_row + i, hit = p.target ? p.target[row] : row;
      target[i] = hit < 0 ? -1 : hit - t.first_col;
    }
    t.target = target;
  }

  // Calls f(task, tile, row, col) for every tile of a macro-tile, in parallel; row and col are its place in it.
  template <class F>
  void tiles(Range rows, Range cols, const F& f) {
    const int64_t wide = divide_up(cols.size, tile_cols);
    parallel(divide_up(rows.size, tile_rows) * wide, [&](int64_t task) {
      const int64_t r = task / wide * tile_rows, c = task % wide * tile_cols;
      static thread_local Buffer scores, beside;
      Tile t{};
      t.rows = std::min(tile_rows, rows.size - r);
      t.cols = std::min(tile_cols, cols.size - c);
      t.padded = t.ld = round_up(t.cols, q->nr);
      t.first_row = rows.begin + r, t.first_col = cols.begin + c;
      t.products = scores.at<float>(round_up(t.rows, q->mr) * t.ld);
      t.flags = p.flags;
      t.scale = p.first.scale * unit, t.second_scale = p.second.scale;
      t.numbers[0] = p.numbers[0], t.numbers[1] = p.numbers[1];
      make_products(t, r, c);
      if (p.second.x) {
        float* out = beside.at<float>(round_up(t.rows, q->mr) * t.ld);
        second.multiply(r, c, t, out);
        t.second = out;
      }
      describe(t);
      f(task, t, r, c);
    });
  }

  // C [rows, d] (+)= A B over k: A packed by each task from the gradient workspace, B packed before. How the work is
  // cut does not change the order of any sum, so it may follow the number of threads.
  void accumulate(const void* g, int64_t row_stride, int64_t k_stride, int64_t rows, int64_t k, Pack& b, float* c,
                  bool onto) {
    const int64_t wanted = divide_up(2 * torch::stable::get_num_threads(), divide_up(rows, tile_rows));
    const int64_t wide = std::max<int64_t>(1, std::min(p.first.d / 128, wanted));
    const int64_t cols = round_up(divide_up(p.first.d, wide), q->nr), across = divide_up(p.first.d, cols);
    parallel(divide_up(rows, tile_rows) * across, [&](int64_t task) {
      const int64_t r = task / across * tile_rows, d = task % across * cols;
      const int64_t live = std::min(tile_rows, rows - r), size = Pack::bytes(q->compute);
      static thread_local Buffer panels;
      for (int64_t s = 0; s < k; s += kStepK) {
        const int64_t step = std::min(kStepK, k - s), panel = Pack::steps(q->compute, step) * q->mr;
        char* a = panels.at<char>(divide_up(live, q->mr) * panel * size);
        q->pack(static_cast<const char*>(g) + (r * row_stride + s * k_stride) * size, q->compute, row_stride, k_stride,
                live, step, q->mr, a);
        q->multiply(a, panel, b.from(d, s), b.panel, step, c + r * p.first.d + d, p.first.d, live,
                    std::min(cols, p.first.d - d), onto || s > 0);
      }
    });
  }
};

}  // namespace fastvlm
