"""The oracle: materialises s and leaves the gradient to autograd. For tests and comparison, O(M N) memory."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ..scores.problem import Problem
from ..scores.selection import Selection
from ..scores.statistic import Statistic
from ..scores.statistics import LN2, Hinge, Sigmoid, Softmax

__all__ = ["finished", "selected", "total"]


def finished(problem: Problem, statistic: Softmax | Hinge, everyone: bool = False) -> tuple[Tensor, ...]:
    """What `finish` of the statistic returns for the whole problem, differentiable, and at the end its state.

    With `everyone` a sample without target has the log-sum-exp of its candidates.
    """
    s, hit, live = _scores(problem, statistic)
    t = _second(problem) if isinstance(statistic, Softmax) and statistic.teacher else None
    row, col = (problem.row_factor, problem.col_factor) if statistic.factor else (None, None)
    sides = []
    if statistic.rows:
        sides.append(_Side(s, hit, live & ~_beyond(problem, statistic, hit, 0), t, row))
    if statistic.cols:
        out = _beyond(problem, statistic, hit, 1)
        sides.append(_Side(s.T, hit.T, (live & ~out).T, None if t is None else t.T, col))
    parts = [
        side.hinges() if isinstance(statistic, Hinge) else side.softmax(problem, statistic, everyone) for side in sides
    ]
    states = [side.state(statistic) for side in sides]
    return tuple(torch.cat(list(vectors), -1) for vectors in [*zip(*parts, strict=True), states])


def selected(problem: Problem, statistic: Statistic, selection: Selection) -> tuple[Tensor, Tensor]:
    """State `[L, k]` of a selection among all candidates that are no targets."""
    _, hit, live = _scores(problem, statistic)
    products = problem.x.to(problem.scale.dtype) @ problem.y.to(problem.scale.dtype).T
    noise = selection.noise_of(slice(0, hit.shape[0]), slice(0, hit.shape[1]))
    rows = statistic.lengths(*hit.shape)[0]
    sides = [(1, slice(0, rows))] if statistic.rows else []
    sides += [(0, slice(rows, None))] if statistic.cols else []
    found = []
    for axis, here in sides:
        candidates = live & ~hit & ~_beyond(problem, statistic, hit, 1 - axis)
        totals = None if selection.totals is None else selection.totals[here]
        found.append(selection.of_tile(products, candidates, noise[1 - axis], 0, axis, totals))
    orders, best = zip(*found, strict=True)
    return torch.cat(orders), torch.cat(best)


def total(problem: Problem, statistic: Sigmoid) -> Tensor:
    """The weighted sum of the sigmoid loss over all candidates."""
    s, hit, live = _scores(problem, statistic)
    loss = -F.logsigmoid(torch.where(hit, s, -s))  # not softplus, which is linear beyond 20
    if problem.row_factor is not None and problem.col_factor is not None:
        loss = loss * problem.row_factor[:, None] * problem.col_factor[None, :]
    return torch.where(live, loss, 0.0).sum()


def _scores(problem: Problem, statistic: Statistic | Sigmoid) -> tuple[Tensor, Tensor, Tensor]:
    """Scores, which of them are targets, and which are candidates."""
    dtype = problem.scale.dtype
    c = problem.x.to(dtype) @ problem.y.to(dtype).T
    row = torch.arange(c.shape[0], device=c.device) if problem.target is None else problem.target
    hit = row[:, None] == torch.arange(c.shape[1], device=c.device)[None, :]
    live = torch.ones_like(hit)
    if problem.row_id is not None and problem.col_id is not None:
        same = problem.row_id[:, None] == problem.col_id[None, :]
        live = (problem.row_id != -1)[:, None] & (problem.col_id != -1)[None, :]
        if statistic.positive_ids:
            hit = (hit | same) & live
        else:
            live = live & (hit | ~same)
    if statistic.margin:
        assert problem.numbers is not None
        c = c + torch.where(hit, 0.0, torch.minimum(problem.numbers[0], problem.numbers[1] - _second(problem)))
    s = problem.scale * c
    for bias in (problem.bias, problem.col_bias):
        s = s if bias is None else s + bias
    return s, hit, live


def _second(problem: Problem) -> Tensor:
    assert problem.teacher_x is not None and problem.teacher_y is not None and problem.teacher_scale is not None
    dtype = problem.scale.dtype
    products = problem.teacher_x.to(dtype) @ problem.teacher_y.to(dtype).T
    if problem.layers > 1:
        products = products.unflatten(0, (problem.layers, -1)).amax(0)
    return problem.teacher_scale * products


def _beyond(problem: Problem, statistic: Statistic, hit: Tensor, axis: int) -> Tensor:
    """Negatives above the limits of their row (axis 0) or column (axis 1)."""
    limit = problem.col_limit if axis else problem.row_limit
    out = torch.zeros_like(hit)
    if limit is not None:
        dtype, other = problem.scale.dtype, 1 - axis
        if statistic.limit:
            out = out | (problem.x.to(dtype) @ problem.y.to(dtype).T > limit[0].unsqueeze(other))
        if statistic.guide:
            out = out | (_second(problem) > limit[1].unsqueeze(other))
    return out & ~hit


@dataclass(frozen=True)
class _Side:
    """One direction: scores, targets, candidates, teacher's scores `[L, others]`, and a factor `[L]`."""

    s: Tensor
    hit: Tensor
    live: Tensor
    teacher: Tensor | None
    factor: Tensor | None

    def softmax(self, problem: Problem, statistic: Softmax, everyone: bool) -> tuple[Tensor, ...]:
        s, hit, live = self.s, self.hit, self.live
        targets, negative = hit.sum(1), live & ~hit
        known = ((targets > 0) | everyone) & (negative.any(1) if statistic.hardness else True)
        s = torch.where(known[:, None], s, 0.0)  # a row without target has no loss: keep its -inf out of autograd
        if self.factor is not None:
            s = s * self.factor[:, None]
        live, negative = live | ~known[:, None], negative | ~known[:, None]
        positive = torch.where(hit, s, 0.0).sum(1) / targets.clamp(min=1)
        # the target is subtracted before the exponentials, so that a loss near 0 keeps its digits
        z = s - positive[:, None]
        if statistic.hardness:
            assert problem.numbers is not None
            weights = (problem.numbers[0] * z).masked_fill(~negative, -torch.inf).log_softmax(1)
            weights = weights + negative.sum(1, keepdim=True).to(s.dtype).log()
            weights = weights.detach() if statistic.detached else weights
            nll = (weights + z).masked_fill(~negative, -torch.inf).logsumexp(1)
        else:
            nll = z.masked_fill(~live, -torch.inf).logsumexp(1) if s.shape[1] else positive
        if statistic.positives == "in" and s.shape[1]:
            nll = nll - z.masked_fill(~(hit | ~known[:, None]), -torch.inf).logsumexp(1)
        out = [nll]
        if statistic.gap and self.teacher is not None:
            weight = torch.where(known[:, None], self.teacher, 0.0).masked_fill(~live, -torch.inf).softmax(1)
            out.append(positive - (weight * torch.where(live, s, 0.0)).sum(1))
        elif statistic.gap:
            out.append(positive - torch.where(live, s, 0.0).sum(1) / live.sum(1).clamp(min=1))
        return tuple(torch.where(known, v, 0.0) for v in out)

    def hinges(self) -> tuple[Tensor, ...]:
        assert self.factor is not None
        over = torch.where(self.live & ~self.hit, (self.s - self.factor[:, None]).clamp(min=0), 0.0).sum(1)
        return (torch.where(self.hit.any(1), over, 0.0),)

    @torch.no_grad()
    def state(self, statistic: Softmax | Hinge) -> Tensor:
        """What `summary` and `known` read of a state, in its own places; nothing else."""
        own, none = statistic.fields - 4 * statistic.hardest, self.s.new_full((1,), -torch.inf)
        state = self.s.new_zeros((statistic.fields, self.s.shape[0]))
        negative, s = self.live & ~self.hit, self.s / LN2
        if isinstance(statistic, Hinge) and self.factor is not None:
            state[1] = (negative & (self.s > self.factor[:, None])).sum(1)
        else:
            z = self.s if self.factor is None else self.s * self.factor[:, None]
            state[0] = torch.where(self.live, z, none).logsumexp(1) / LN2 if s.shape[1] else none
            state[1], state[2] = 1.0, torch.where(self.hit, s, 0.0).sum(1)
            if isinstance(statistic, Softmax) and statistic.hardness:
                state[5] = negative.sum(1)
        if statistic.hardest and s.shape[1]:
            state[own], state[own + 1] = torch.where(negative, s, none).max(1)
            state[own + 2], state[own + 3] = torch.where(self.hit, s, none).amax(1), negative.sum(1)
        return state
