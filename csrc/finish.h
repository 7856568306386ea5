// The O(M + N) ends of the softmax statistics: same names and formulas as fastvlm_loss/scores/statistics.py.
#pragma once
#include <cmath>
#include <cstdint>

namespace fastvlm {

constexpr float kNats = 0.69314718055994531f;  // a bit: what leaves as a state is in bits

inline void softmax_settle(float* state, int64_t n, bool gap) {
  for (int f : {0, 2, 3})
    for (int64_t i = 0; i < n && (f < 3 || gap); ++i) state[f * n + i] /= kNats;
}

// state [3 or 5, n] to nll [n] and, where gap is not null, gap [n]; 0 where there is no target. targets null: one each.
inline void softmax_finish(const float* state, const float* targets, int64_t n, float* nll, float* gap) {
  const float *m = state, *l = state + n, *p = state + 2 * n, *t = state + 3 * n, *count = state + 4 * n;
  for (int64_t i = 0; i < n; ++i) {
    const float having = targets ? targets[i] : 1.f, positive = p[i] / having;
    const bool known = having > 0;
    nll[i] = known ? (m[i] - positive) + std::log(l[i]) : 0.f;  // m - p first: a loss near 0 keeps its digits
    if (gap) gap[i] = known ? positive - t[i] / count[i] : 0.f;
  }
}

// Operands [3 or 4, n] of the gradient tile for the cotangents of nll and, where not null, of gap.
inline void softmax_operands(const float* state, const float* targets, const float* nll, const float* gap, int64_t n,
                             float* operands) {
  const float *m = state, *l = state + n, *count = state + 4 * n;
  for (int64_t i = 0; i < n; ++i) {
    const float having = targets ? targets[i] : 1.f;
    const bool known = having > 0;
    operands[i] = m[i] == -INFINITY ? 0.f : m[i] * kNats;
    operands[n + i] = known ? nll[i] / l[i] : 0.f;
    operands[2 * n + i] = known ? (gap ? nll[i] - gap[i] : nll[i]) / having : 0.f;
    if (gap) operands[3 * n + i] = known ? gap[i] / count[i] : 0.f;
  }
}

}  // namespace fastvlm
