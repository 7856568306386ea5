// The O(M + N) ends of the statistics: same names and formulas as `finish` and `gradient_operands` in
// fastvlm_loss/scores/{softmax,hinge}.py. States are in bits, what leaves is in nats.
#pragma once
#include <cmath>

#include "plan.h"

namespace fastvlm {

// What both ends read: a state [fields, L], and targets [L] (null: one each).
struct Ends {
  const Problem& p;
  const float* state;
  const float* targets;
  const int64_t flags = p.flags, n = p.length(), rows = p.rows();
  const int candidates = flags & kFactor ? 4 : 3;  // the field of the second distribution

  float field(int f, int64_t i) const { return state[f * n + i]; }
  float having(int64_t i) const { return targets ? targets[i] : 1.f; }
  // whether there is a target, and where those are needed a negative
  bool known(int64_t i) const { return having(i) > 0 && (!(flags & kHardness) || field(5, i) > 0); }
  float factor(int64_t i) const { return i < rows ? p.row_factor[i] : p.col_factor[i - rows]; }
  float own_factor(int64_t i) const { return flags & kFactor ? factor(i) : 1.f; }
  float mean(int64_t i) const { return field(candidates, i) / field(candidates + 1, i); }
};

// nll [L] and, with kGap, gap [L]; 0 where there is no target.
inline void softmax_finish(const Ends& e, float* nll, float* gap) {
  for (int64_t i = 0; i < e.n; ++i) {
    const bool known = e.known(i);
    const float factor = e.own_factor(i), positive = e.field(2, i) / e.having(i), m = e.field(0, i);
    float scaled = factor * positive, l = e.field(1, i);
    if (e.flags & kInside) scaled = e.field(3, i), l /= e.field(4, i);
    if (e.flags & kHardness) scaled += e.field(3, i), l *= e.field(5, i) / e.field(4, i);
    nll[i] = known ? ((m - scaled) + std::log2(l)) * kNats : 0.f;  // m - p first: a loss near 0 keeps its digits
    if (e.flags & kGap) gap[i] = known ? factor * (positive - e.mean(i)) * kNats : 0.f;
  }
}

// Operands of the gradient tile for the cotangents of nll and, where not null, of gap.
inline void softmax_operands(const Ends& e, const float* d_nll, const float* d_gap, float* operands) {
  const auto finite = [](float m) { return m == -INFINITY ? 0.f : m; };  // there is no candidate
  for (int64_t i = 0; i < e.n; ++i) {
    const bool known = e.known(i);
    const float factor = e.own_factor(i), nll = factor * d_nll[i], gap = d_gap ? factor * d_gap[i] : 0.f;
    const float beta = e.p.numbers[0];
    float* next = operands + i;
    const auto put = [&](float value) { *next = value, next += e.n; };
    const auto put_known = [&](float value) { put(known ? value : 0.f); };
    if (e.flags & kSwapped) {
      put(finite(e.field(e.candidates + 2, i)));
      put_known(gap / e.field(e.candidates + 1, i) * kNats);
      put_known(e.mean(i));
      continue;
    }
    const bool attached = e.flags & kHardness && !(e.flags & kDetached);
    put(finite(e.field(0, i)));
    put_known((attached ? 1.f + beta : 1.f) * (nll / e.field(1, i)));
    put_known((nll - gap) / e.having(i));
    if (e.flags & kHardness) {
      put(finite(e.field(3, i)));
      put_known(attached ? beta * nll / e.field(4, i) : 0.f);
      continue;
    }
    if (e.flags & kFactor) put(factor);
    if (e.flags & kGap) put_known(gap / e.field(e.candidates + 1, i));
    if (e.flags & kTeacher) put(finite(e.field(e.candidates + 2, i)));
    if (e.flags & kInside) {
      put(finite(e.field(3, i)));
      put_known(nll / e.field(4, i));
    }
  }
}

inline void hinge_finish(const Ends& e, float* total) {
  for (int64_t i = 0; i < e.n; ++i) total[i] = e.known(i) ? e.field(0, i) * kNats : 0.f;
}

// Threshold and cotangent; whether any of those is not 0.
inline bool hinge_operands(const Ends& e, const float* given, float* operands) {
  bool any = false;
  for (int64_t i = 0; i < e.n; ++i) {
    const float cotangent = e.known(i) ? given[i] : 0.f;
    operands[i] = e.factor(i), operands[e.n + i] = cotangent;
    any |= cotangent != 0.f;
  }
  return any;
}

}  // namespace fastvlm
