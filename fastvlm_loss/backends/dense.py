"""The oracle: materialises s and leaves the gradient to autograd. For tests and comparison, O(M N) memory."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..scores.problem import Problem
from ..scores.statistics import Sigmoid, Softmax

__all__ = ["finished", "total"]


def finished(problem: Problem, statistic: Softmax) -> tuple[Tensor, ...]:
    """What `Softmax.finish` returns for the whole problem, differentiable by plain autograd."""
    s, hit, live = _scores(problem, statistic)
    v = None
    if statistic.teacher:
        assert problem.teacher_x is not None and problem.teacher_y is not None and problem.teacher_scale is not None
        dtype = problem.scale.dtype
        v = problem.teacher_scale * (problem.teacher_x.to(dtype) @ problem.teacher_y.to(dtype).T)
    row, col = (problem.row_factor, problem.col_factor) if statistic.factor else (None, None)
    gap = statistic.gap or statistic.teacher
    parts = [_direction(s, hit, live, gap, v, row)] if statistic.rows else []
    parts += [_direction(s.T, hit.T, live.T, gap, None if v is None else v.T, col)] if statistic.cols else []
    return tuple(torch.cat(vectors) for vectors in zip(*parts, strict=True))


def total(problem: Problem, statistic: Sigmoid) -> Tensor:
    """The weighted sum of the sigmoid loss over all candidates."""
    s, hit, live = _scores(problem, statistic)
    loss = -F.logsigmoid(torch.where(hit, s, -s))  # not softplus, which is linear beyond 20
    if problem.row_factor is not None and problem.col_factor is not None:
        loss = loss * problem.row_factor[:, None] * problem.col_factor[None, :]
    return torch.where(live, loss, 0.0).sum()


def _scores(problem: Problem, statistic: Softmax | Sigmoid) -> tuple[Tensor, Tensor, Tensor]:
    """Scores, which of them are targets, and which are candidates."""
    dtype = problem.scale.dtype
    s = problem.scale * (problem.x.to(dtype) @ problem.y.to(dtype).T)
    if problem.bias is not None:
        s = s + problem.bias
    row = torch.arange(s.shape[0], device=s.device) if problem.target is None else problem.target
    hit = row[:, None] == torch.arange(s.shape[1], device=s.device)[None, :]
    live = torch.ones_like(hit)
    if problem.row_id is not None and problem.col_id is not None:
        same = problem.row_id[:, None] == problem.col_id[None, :]
        live = (problem.row_id != -1)[:, None] & (problem.col_id != -1)[None, :]
        if statistic.positive_ids:
            hit = (hit | same) & live
        else:
            live = live & (hit | ~same)
    return s, hit, live


def _direction(
    s: Tensor, hit: Tensor, live: Tensor, gap: bool, teacher: Tensor | None, factor: Tensor | None
) -> tuple[Tensor, ...]:
    targets = hit.sum(1)
    known = (targets > 0)[:, None]
    s = torch.where(known, s, 0.0)  # a row without target has no loss: keep its -inf out of autograd
    if factor is not None:
        s = s * factor[:, None]
    live = live | ~known
    positive = torch.where(hit, s, 0.0).sum(1) / targets.clamp(min=1)
    # the target is subtracted before the exponentials, so that a loss near 0 keeps its digits
    nll = (s - positive[:, None]).masked_fill(~live, -torch.inf).logsumexp(1) if s.shape[1] else positive
    out = [nll]
    if gap and teacher is not None:
        weight = torch.softmax(torch.where(known, teacher, 0.0).masked_fill(~live, -torch.inf), 1)
        out.append(positive - (weight * torch.where(live, s, 0.0)).sum(1))
    elif gap:
        out.append(positive - torch.where(live, s, 0.0).sum(1) / live.sum(1).clamp(min=1))
    return tuple(torch.where(known[:, 0], v, 0.0) for v in out)
