"""The engine's verbs: from a `Problem` to differentiable statistics of its score matrix."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..backends import dense
from ..scores.problem import Problem
from ..scores.statistics import Softmax
from .autograd import Statistics
from .dispatch import resolve
from .ops import no_autocast

__all__ = ["SoftmaxTile", "softmax"]


@dataclass(frozen=True)
class SoftmaxTile:
    """Softmax statistics, fp32 (fp64 for fp64 features): vectors `[L]` of the rows (images), then the columns (texts).

    Attributes:
        nll: log-sum-exp of the candidates minus the mean score of the targets, 0 where there is no target.
        gap: mean score of the targets minus the mean score of the candidates (None unless asked).
        targets: how many targets each has, or None where each has exactly one.
        lengths: how many of the L are rows and how many columns; 0 for a direction not asked.
    """

    nll: Tensor
    gap: Tensor | None
    targets: Tensor | None
    lengths: tuple[int, int]

    @property
    def row_nll(self) -> Tensor:
        """`nll` of the rows."""
        return self.nll[: self.lengths[0]]

    @property
    def col_nll(self) -> Tensor:
        """`nll` of the columns."""
        return self.nll[self.lengths[0] :]


def softmax(problem: Problem, *, rows: bool = True, cols: bool = True, gap: bool = False) -> SoftmaxTile:
    """Negative log-likelihood of the targets along rows and columns, without the score matrix.

    Differentiable in the features, scale and bias of `problem`.
    """
    statistic = Softmax(rows, cols, gap)
    p = problem
    present = [t for t, wanted in zip(p.targets(), (rows, cols), strict=True) if wanted and t is not None]
    targets = torch.cat(present) if present else None
    backend = resolve(p.x.device, p.x.dtype)
    if backend == "dense":
        with no_autocast(p.x.device.type):
            vectors = dense.finished(p, statistic)
    else:
        vectors = Statistics.apply(
            p.x, p.y, p.scale, p.bias, p.target, p.row_id, p.col_id, targets, backend, statistic.name, statistic.flags
        )
    lengths = statistic.lengths(p.x.shape[0], p.y.shape[0])
    return SoftmaxTile(vectors[0], vectors[1] if gap else None, targets, lengths)
