// The k best candidates of every row and column: fastvlm_loss/scores/selection.py in a stream.
//
// The order of candidates is total, so the result is the same whoever looks first. A candidate takes its exact key only
// if a bound of it reaches the last place of its row (column); few do after the first tiles.
#pragma once
#include <cmath>
#include <limits>
#include <memory>
#include <mutex>

#include "walk.h"

namespace fastvlm {

class Selector {
 public:
  Selector(const Problem& p, const Selection& how, const Plan& plan)
      : p_(p), how_(how), plan_(plan),
        row_locks_(new std::mutex[divide_up(plan.rows_macro, std::max<int64_t>(1, plan.tile_rows))]),
        col_locks_(new std::mutex[divide_up(plan.cols_macro, plan.tile_cols)]) {
    std::fill_n(how.order, p.length() * how.k, kNobody);
    std::fill_n(how.best, p.length() * how.k, 0.f);
  }

  // The tile at r, c of its macro-tile, before its products change.
  void look(const Tile& t, int64_t r, int64_t c) {
    static thread_local Picked picked;
    float least[kTileCols], totals[kTileCols];
    Picking pick{};
    pick.noise = how_.noise, pick.sharpness = how_.sharpness, pick.log_floor = std::log(how_.floor);
    pick.seed[0] = static_cast<uint32_t>(how_.seed), pick.seed[1] = static_cast<uint32_t>(how_.seed >> 32);
    pick.step[0] = static_cast<uint32_t>(how_.step), pick.step[1] = static_cast<uint32_t>(how_.step >> 32);
    pick.first_row = how_.first_row, pick.first_col = how_.first_col;
    const int64_t first = p_.rows() + t.first_col;  // of the columns in the state
    if (how_.totals) {
      pick.row_total = how_.totals + t.first_row;
      std::fill(totals + t.cols, totals + t.padded, 0.f);
      if (t.flags & kCols) std::memcpy(totals, how_.totals + first, t.cols * sizeof(float));
      pick.col_total = totals;
    }
    pick.col_least = least;
    std::mutex &row_lock = row_locks_[r / plan_.tile_rows], &col_lock = col_locks_[c / plan_.tile_cols];
    if (t.flags & kCols) {
      std::lock_guard<std::mutex> hold(col_lock);
      for (int64_t j = 0; j < t.cols; ++j) least[j] = last(first + j);
    } else {
      std::fill_n(least, t.cols, std::numeric_limits<float>::infinity());
    }
    std::fill(least + t.cols, least + t.padded, std::numeric_limits<float>::infinity());
    picked.pair = -1;
    for (int64_t i = 0; i < t.rows; ++i) {
      const int64_t row = t.first_row + i;
      if (t.flags & kRows) {
        std::lock_guard<std::mutex> hold(row_lock);
        pick.row_least = last(row);
      }
      core().pick(t, i, pick, &picked);
      const uint32_t(*words)[kTileCols] = picked.words + 2 * ((how_.first_row + row) & 1);
      const float* products = t.products + i * t.ld;
      if (picked.rows) {
        std::lock_guard<std::mutex> hold(row_lock);
        const float total = pick.row_total ? pick.row_total[i] : 0.f;
        for (int n = 0; n < picked.rows; ++n) {
          const int j = picked.row_at[n];
          if (picked.to_row[j] < pick.row_least) continue;
          add(row, how_.first_col + t.first_col + j, products[j], total, words[0][j]);
          pick.row_least = last(row);
        }
      }
      if (picked.cols) {
        std::lock_guard<std::mutex> hold(col_lock);
        for (int n = 0; n < picked.cols; ++n) {
          const int j = picked.col_at[n];
          add(first + j, how_.first_row + row, products[j], how_.totals ? totals[j] : 0.f, words[1][j]);
          least[j] = last(first + j);
        }
      }
    }
  }

 private:
  static constexpr int64_t kNobody = std::numeric_limits<int64_t>::min();

  // The key in last place of a row or column, -inf while there is room.
  float last(int64_t at) const {
    const int64_t order = how_.order[(at + 1) * how_.k - 1];
    if (order == kNobody) return -std::numeric_limits<float>::infinity();
    const int32_t monotonic = static_cast<int32_t>(order >> 32), bits = monotonic ^ (monotonic >> 31 & 0x7fffffff);
    float key;
    std::memcpy(&key, &bits, sizeof key);
    return key;
  }

  void add(int64_t at, int64_t index, float product, float total, uint32_t word) {
    float key = product * how_.sharpness;
    if (how_.totals) {  // log(e^a + floor), which neither overflows nor loses the smaller
      const float a = key - total, b = std::log(how_.floor);
      key = std::max(a, b) + std::log1p(std::exp(-std::abs(a - b)));
    }
    if (how_.noise) {
      const float v = std::min(static_cast<float>(word) * 0x1p-32f + 0x1p-33f, 1.f - 0x1p-24f);
      key -= std::log(-std::log1p(-v));
    }
    if (!std::isfinite(key) || !std::isfinite(product)) return;
    key += 0.f;  // there is one zero
    int32_t bits;
    std::memcpy(&bits, &key, sizeof bits);
    const int64_t monotonic = bits ^ (bits >> 31 & 0x7fffffff);
    const int64_t order = static_cast<int64_t>(static_cast<uint64_t>(monotonic) << 32) | (0xffffffffll - index);
    int64_t* orders = how_.order + at * how_.k;
    float* best = how_.best + at * how_.k;
    int64_t place = how_.k - 1;
    if (order <= orders[place]) return;
    for (; place > 0 && orders[place - 1] < order; --place)
      orders[place] = orders[place - 1], best[place] = best[place - 1];
    orders[place] = order, best[place] = product;
  }

  const Problem& p_;
  const Selection& how_;
  const Plan& plan_;
  std::unique_ptr<std::mutex[]> row_locks_, col_locks_;
};

}  // namespace fastvlm
