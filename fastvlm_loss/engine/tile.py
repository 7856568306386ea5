"""The engine's verbs: from a `Problem` to differentiable statistics of its score matrix."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..backends import dense
from ..scores.problem import Problem
from ..scores.statistics import Sigmoid, Softmax
from .autograd import Statistics, Total
from .dispatch import resolve
from .ops import no_autocast

__all__ = ["SoftmaxTile", "sigmoid", "softmax"]


@dataclass(frozen=True)
class SoftmaxTile:
    """Softmax statistics, fp32 (fp64 for fp64 features): vectors `[L]` of the rows (images), then the columns (texts).

    Attributes:
        nll: log-sum-exp of the candidates minus the mean score of the targets, 0 where there is no target.
        gap: mean score of the targets minus the mean score under the uniform distribution over the candidates, or
            under the teacher's softmax where the problem has one (None unless asked).
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

    Differentiable in the features, scale, bias and factors of `problem`. A problem with a teacher always has a `gap`.
    """
    teacher, factor = problem.teacher_x is not None, problem.row_factor is not None
    statistic = Softmax(rows, cols, gap or teacher, teacher, factor)
    p = problem
    present = [t for t, wanted in zip(p.targets(), (rows, cols), strict=True) if wanted and t is not None]
    targets = torch.cat(present) if present else None
    backend = resolve(p, statistic)
    if backend == "dense":
        with no_autocast(p.x.device.type):
            vectors = dense.finished(p, statistic)
    else:
        vectors = Statistics.apply(*p.tensors(), targets, backend, statistic.name, statistic.flags)
    lengths = statistic.lengths(p.x.shape[0], p.y.shape[0])
    return SoftmaxTile(vectors[0], vectors[1] if statistic.gap else None, targets, lengths)


def sigmoid(problem: Problem) -> Tensor:
    """Sum of the sigmoid loss over all candidates, fp32 (fp64 for fp64 features), weighted by the problem's factors.

    Differentiable in the features, scale and bias; equal ids are targets.
    """
    backend = resolve(problem, Sigmoid())
    if backend == "dense":
        with no_autocast(problem.x.device.type):
            return dense.total(problem, Sigmoid())
    total: Tensor = Total.apply(*problem.tensors(), backend)
    return total
