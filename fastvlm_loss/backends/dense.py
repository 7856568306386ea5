"""The oracle: materialises s and leaves the gradient to autograd. For tests and comparison, O(M N) memory."""

from __future__ import annotations

import torch
from torch import Tensor

from ..scores.problem import Problem
from ..scores.statistics import Softmax

__all__ = ["finished"]


def finished(problem: Problem, statistic: Softmax) -> tuple[Tensor, ...]:
    """What `Softmax.finish` returns for the whole problem, differentiable by plain autograd."""
    dtype = problem.scale.dtype
    s = problem.scale * (problem.x.to(dtype) @ problem.y.to(dtype).T)
    if problem.bias is not None:
        s = s + problem.bias
    row = torch.arange(s.shape[0], device=s.device) if problem.target is None else problem.target
    hit = row[:, None] == torch.arange(s.shape[1], device=s.device)[None, :]
    live = torch.ones_like(hit)
    if problem.row_id is not None and problem.col_id is not None:
        same = problem.row_id[:, None] == problem.col_id[None, :]
        live = (hit | ~same) & (problem.row_id != -1)[:, None] & (problem.col_id != -1)[None, :]
    parts = [_direction(s, hit, live, statistic.gap)] if statistic.rows else []
    parts += [_direction(s.T, hit.T, live.T, statistic.gap)] if statistic.cols else []
    return tuple(torch.cat(vectors) for vectors in zip(*parts, strict=True))


def _direction(s: Tensor, hit: Tensor, live: Tensor, gap: bool) -> tuple[Tensor, ...]:
    targets = hit.sum(1)
    known = (targets > 0)[:, None]
    s = torch.where(known, s, 0.0)  # a row without target has no loss: keep its -inf out of autograd
    live = live | ~known
    positive = torch.where(hit, s, 0.0).sum(1) / targets.clamp(min=1)
    # the target is subtracted before the exponentials, so that a loss near 0 keeps its digits
    nll = (s - positive[:, None]).masked_fill(~live, -torch.inf).logsumexp(1) if s.shape[1] else positive
    out = [nll]
    if gap:
        out.append(positive - torch.where(live, s, 0.0).sum(1) / live.sum(1).clamp(min=1))
    return tuple(torch.where(known[:, 0], v, 0.0) for v in out)
