"""The engine's verbs: from a `Problem` to differentiable statistics of its score matrix."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..backends import dense
from ..scores.function import apply
from ..scores.pairs import pair_products
from ..scores.problem import Problem
from ..scores.selection import Selection
from ..scores.shard import Shard
from ..scores.statistics import Candidates, Hinge, Sigmoid, Softmax
from . import ring
from .autograd import Statistics, Total, Weighted
from .dispatch import resolve
from .ops import KEPT_PRODUCTS, SELECT, no_autocast
from .sharded import Sharded, ShardedTotal, joined_candidates, localised

__all__ = ["SoftmaxTile", "hinge", "paired", "positives", "select", "sigmoid", "softmax", "weighted_rows"]

# products held at a time where a sum of rows makes its gradients along with it: 64 MB
STRIP = {"cpp": 16 * 2**20, "torch": 16 * 2**20}
MOST_INDICES = 2**24  # that fp32 tells apart


@dataclass(frozen=True)
class SoftmaxTile:
    """Statistics, fp32 (fp64 for fp64 features): vectors `[L]` of the rows (images), then the columns (texts).

    Attributes:
        nll: log-sum-exp of the candidates minus the mean score of the targets (positives "in": minus their
            log-sum-exp; `hard`: of the reweighted negatives alone), 0 where there is no target. Of `hinge` the sums.
        gap: mean score of the targets minus the mean score under the uniform distribution over the candidates, or
            under the teacher's softmax where the problem has one (None unless asked).
        targets: how many targets each has, or None where each has exactly one; 0 takes it out of a mean.
        lengths: how many of the L are rows and how many columns; 0 for a direction not asked.
        selected: state of the selection asked for (`scores/selection.py`), or None.
    """

    nll: Tensor
    gap: Tensor | None
    targets: Tensor | None
    lengths: tuple[int, int]
    statistic: Softmax | Hinge
    counts: Tensor | None
    state: Tensor
    selected: tuple[Tensor, Tensor] | None = None

    @property
    def summary(self) -> dict[str, Tensor]:
        """By-products without gradient, each `[L]`: "lse" and "positive" in nats, or of `hinge` "active".

        If asked also "hardest" (the best score of a negative), "index" (whose, int64, -1 for none), "best_target" and
        "negatives" (their number).
        """
        return self.statistic.summary(self.state, self.counts)

    @property
    def row_nll(self) -> Tensor:
        """`nll` of the rows."""
        return self.nll[: self.lengths[0]]

    @property
    def col_nll(self) -> Tensor:
        """`nll` of the columns."""
        return self.nll[self.lengths[0] :]


def softmax(
    problem: Problem, *, rows: bool = True, cols: bool = True, gap: bool = False, positives: str = "mask",
    hard: bool = False, detached: bool = False, hardest: bool = False, selection: Selection | None = None,
    everyone: bool = False,
) -> SoftmaxTile:  # fmt: skip
    """Negative log-likelihood of the targets along rows and columns, without the score matrix.

    Differentiable in the features, scale, biases, factors and teacher of `problem`. A problem with a teacher always
    has a `gap`.

    Args:
        rows, cols: the directions.
        gap: whether to compute it.
        positives: what an equal id is: "mask" no candidate, "out" and "in" a target.
        hard: only negatives are candidates, weighted in proportion to exp(problem.numbers[0] * score).
        detached: those weights have no gradient.
        hardest: whether the summary has the hardest negative.
        selection: of negatives of the same rows and columns, made from the same products.
        everyone: without a target the `nll` is the log-sum-exp alone, instead of 0.
    """
    limited = problem.row_limit is not None
    learning = (problem.teacher_x, problem.teacher_y, problem.teacher_scale)
    if problem.col_bias is not None and any(t is not None and t.requires_grad for t in learning):
        raise ValueError("teacher: got tensors that require grad beside a bias of the columns, wanted detached ones")
    # without ids only a text with several images has more than one target, whose mean is as of "mask"
    several = problem.row_id is not None or (positives == "in" and problem.target is not None)
    statistic = Softmax(
        rows=rows, cols=cols, hardest=hardest, positives=positives if several else "mask",
        limit=limited, guide=limited and problem.second == "guide", margin=problem.second == "margin", gap=gap,
        teacher=problem.second == "teacher", factor=problem.row_factor is not None, hardness=hard, detached=detached,
    )  # fmt: skip
    return _statistics(problem, statistic, selection, everyone)


def weighted_rows(problem: Problem, weights: Tensor, share: float = 0.0) -> Tensor:
    """Sum over the rows of weights_i * (nll_i + share * gap_i) `[]`, the gap as of `softmax`; for labels without ids.

    Differentiable in features, column bias and weights, not in the scale. On a CPU its gradients are made along with
    it, from the same products, and wait for the cotangent.
    """
    taught = problem.second == "teacher"
    statistic = Softmax(cols=False, gap=share > 0 or taught, teacher=taught)
    backend, (m, n) = resolve(problem, statistic), (problem.x.shape[0], problem.y.shape[0])
    learned = any(t is not None and t.requires_grad for t in (problem.x, problem.y, problem.col_bias))
    strip = STRIP.get(backend, 0) // max(n, 1)
    if not (strip and learned and torch.is_grad_enabled()) or m * n <= KEPT_PRODUCTS[backend]:
        t = softmax(problem, cols=False, gap=share > 0)
        return ((t.nll if t.gap is None else t.nll + share * t.gap) * weights).sum()
    targets, how = problem.targets()[0], (backend, statistic.name, statistic.flags)
    total: Tensor = apply(Weighted, *problem.tensors(), targets, weights, *how, share, max(strip // 96 * 96, 96))
    return total


def hinge(
    problem: Problem, *, rows: bool = True, cols: bool = True, hardest: bool = False, selection: Selection | None = None
) -> SoftmaxTile:
    """Sum over the negatives of max(score - threshold, 0), with the factors of `problem` as the thresholds.

    Differentiable in the features, scale, bias and thresholds.
    """
    limited = problem.row_limit is not None
    guide = limited and problem.second == "guide"
    return _statistics(problem, Hinge(rows=rows, cols=cols, hardest=hardest, limit=limited, guide=guide), selection)


def select(problem: Problem, selection: Selection, *, rows: bool = True, cols: bool = True) -> tuple[Tensor, Tensor]:
    """State `[L, k]` of a selection among the candidates that are no targets, no gradient.

    In a group L are this process's own rows and columns, and the indices the group's.
    """
    limited, shard = problem.row_limit is not None, problem.shard
    statistic = Candidates(rows=rows, cols=cols, limit=limited, guide=limited and problem.second == "guide")
    backend = resolve(problem, statistic)
    with torch.no_grad(), no_autocast(problem.x.device.type):
        if shard is not None:
            own, m = shard.own_rows, problem.m
            totals = selection.totals
            if totals is not None:
                selection = replace(selection, totals=torch.cat([totals[own], totals[m:]] if rows else [totals]))
            if shard.ring:
                found = ring.select(problem.tensors(), shard, backend, statistic, selection)
                return joined_candidates(*found, selection.k, cols, shard)
            problem = replace(Problem.from_tensors(localised(problem.tensors(), shard)), second=problem.second)
        if backend == "dense":
            order, best = dense.selected(problem, statistic, selection)
        else:
            how = statistic.name, statistic.flags, False
            order, best = SELECT[backend](*problem.tensors(), None, *how, *_told(selection))[4:]
        return (order, best) if shard is None else joined_candidates(order, best, selection.k, cols, shard)


def _told(selection: Selection) -> tuple[object, ...]:
    return selection.k, selection.noise, selection.law, selection.totals, selection.place


def _statistics(
    p: Problem, statistic: Softmax | Hinge, selection: Selection | None = None, everyone: bool = False
) -> SoftmaxTile:
    m, n = p.m, p.n
    if statistic.hardest and max(m, n) > MOST_INDICES:
        raise ValueError(f"image_features: got a batch of {m} x {n}, wanted at most {MOST_INDICES} for indices")
    counts = p.positives() if statistic.positive_ids else p.targets()
    present = [
        t for t, wanted in zip(counts, (statistic.rows, statistic.cols), strict=True) if wanted and t is not None
    ]
    targets = torch.cat(present) if present else None
    if everyone and targets is not None:  # whose sum is 0 where there is none
        targets = targets.clamp(min=1)
    backend = resolve(p, statistic)
    if p.shard is not None:
        found = _sharded(p, p.shard, targets, backend, statistic, selection)
    elif backend == "dense":
        with no_autocast(p.x.device.type):
            picked = dense.selected(p, statistic, selection) if selection else ()
            found = (*dense.finished(p, statistic, everyone), *picked)
    else:
        told = () if selection is None else _told(selection)
        found = apply(Statistics, *p.tensors(), targets, backend, statistic.name, statistic.flags, p.learned, *told)
    vectors, state = found[: 1 + statistic.gap], found[1 + statistic.gap]
    return SoftmaxTile(
        vectors[0], vectors[1] if statistic.gap else None, statistic.known(state, targets), statistic.lengths(m, n),
        statistic, targets, state, (found[-2], found[-1]) if selection else None,
    )  # fmt: skip


def _sharded(
    p: Problem, shard: Shard, targets: Tensor | None, backend: str, statistic: Softmax | Hinge,
    selection: Selection | None,
) -> tuple[Tensor, ...]:  # fmt: skip
    if backend == "dense":
        raise ValueError("backend: got 'dense' beside group=, wanted one that works in tiles")
    if p.col_bias is not None:
        raise ValueError("group: got one beside a bias of the columns, wanted None")
    found: tuple[Tensor, ...] = apply(Sharded, shard, *p.tensors(), targets, backend, statistic.name, statistic.flags)
    return found if selection is None else (*found, *select(p, selection))


def sigmoid(problem: Problem) -> Tensor:
    """Sum of the sigmoid loss over all candidates, fp32 (fp64 for fp64 features), weighted by the problem's factors.

    Differentiable in the features, scale, bias and factors; equal ids are targets. Factors that are learned cost a
    product of their own.
    """
    backend, given = resolve(problem, Sigmoid()), problem.tensors()
    if not torch.is_grad_enabled():  # of which a Function, asked what its inputs need, knows nothing
        given = tuple(None if t is None else t.detach() for t in given)
    if problem.shard is not None:
        if backend == "dense":
            raise ValueError("backend: got 'dense' beside group=, wanted one that works in tiles")
        sum_of_all: Tensor = apply(ShardedTotal, problem.shard, *given, backend)
        return sum_of_all
    if backend == "dense":
        with no_autocast(problem.x.device.type):
            return dense.total(problem, Sigmoid())
    total: Tensor = apply(Total, *given, backend, problem.learned)
    return total


def paired(problem: Problem, index: Tensor | None, columns: bool = False) -> Tensor:
    """Scores of the pairs (row i, column index_i) `[M]`, or with `columns` (row index_j, column j) `[N]`; O(N D).

    Differentiable in features, scale and bias; None pairs i with i, a negative index gives the bias alone.
    """
    with no_autocast(problem.x.device.type):
        products = pair_products(problem.x, problem.y, index, problem.scale.dtype, problem.shard, columns)
        scores = problem.scale * products
    return scores if problem.bias is None else scores + problem.bias


def positives(problem: Problem) -> tuple[Tensor, Tensor]:
    """Score of the target of every row `[M]` and column `[N]`, differentiable: the mean of several, 0 of none."""
    rows, target = paired(problem, problem.target), problem.target
    if target is None:
        return rows, rows
    known, zero = (target >= 0).to(rows.dtype), rows.new_zeros(problem.n)
    if not zero.shape[0]:
        return rows, zero
    at = target.clamp(min=0)
    return rows, zero.index_add(0, at, rows * known) / zero.index_add(0, at, known).clamp(min=1)
