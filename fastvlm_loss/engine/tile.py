"""The engine's verbs: from public arguments to differentiable statistics of the score matrix."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..backends import dense
from ..scores.problem import Problem
from ..scores.statistics import Softmax
from .autograd import Statistics
from .dispatch import resolve

__all__ = ["SoftmaxTile", "softmax"]


class SoftmaxTile(NamedTuple):
    """Softmax statistics, each `[M]` for rows (images) or `[N]` for columns (texts), fp32 (fp64 for fp64 features).

    Attributes:
        row_nll, col_nll: log-sum-exp minus the mean score of the targets, 0 where there is no target.
        row_gap, col_gap: mean score of the targets minus the mean score of the candidates (None unless asked).
        row_targets, col_targets: how many targets, or None where each has exactly one.
    """

    row_nll: Tensor | None
    col_nll: Tensor | None
    row_gap: Tensor | None
    col_gap: Tensor | None
    row_targets: Tensor | None
    col_targets: Tensor | None


def softmax(problem: Problem, *, rows: bool = True, cols: bool = True, gap: bool = False) -> SoftmaxTile:
    """Negative log-likelihood of the targets along rows and columns, without the score matrix.

    Differentiable in the features, scale and bias of `problem`.
    """
    statistic = Softmax(rows, cols, gap)
    p = problem
    row_targets, col_targets = p.targets()
    backend = resolve(p.x.device, p.x.dtype)
    if backend == "dense":
        vectors = dense.finished(p, statistic)
    else:
        present = [t for t, here in ((row_targets, rows), (col_targets, cols)) if here and t is not None]
        targets = torch.cat(present) if present else None
        vectors = Statistics.apply(
            p.x, p.y, p.scale, p.bias, p.target, p.row_id, p.col_id, targets, backend, statistic.name, statistic.flags
        )
    lengths = statistic.lengths(p.x.shape[0], p.y.shape[0])
    row_nll, col_nll = vectors[0].split(lengths)
    row_gap, col_gap = vectors[1].split(lengths) if gap else (None, None)
    return SoftmaxTile(
        row_nll if rows else None, col_nll if cols else None,
        row_gap if rows else None, col_gap if cols else None,
        row_targets, col_targets,
    )  # fmt: skip
