"""Triplet ranking losses over in-batch negatives: VSE++ (sum and max of hinges) and SelHN.

h_ij = max(m + c_ij - c_ii, 0) over the negatives j of image i      h'_ij = max(m + c_ij - c_jj, 0) over those of text j
"sum"         sum_j h_ij          "max"  max_j h_ij          and likewise h' over i; the sum over all i and j
"selective"   mean_j h_ij where |c_ii - max_j c_ij| < epsilon, else max_j h_ij; half the mean over i, half that over j
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from typing_extensions import Unpack

from ..distributed import eager_in_group
from ..engine import tile
from ..engine.tile import SoftmaxTile
from ..scores import check
from ..scores.problem import Problem
from ._batch import Batch, SampleOptions
from ._oracle import entries, matrix, mean_of, sides_of, some_ids
from ._reduce import REDUCTIONS
from ._spec import LossSpec, register

__all__ = ["triplet_loss"]

MINING = ("sum", "max", "selective")


@eager_in_group
def triplet_loss(
    image_features: Tensor,
    text_features: Tensor,
    *,
    margin: float = 0.2,
    mining: Literal["sum", "max", "selective"] = "sum",
    epsilon: float = 0.01,
    reduction: Literal["mean", "sum", "none"] | None = None,
    **options: Unpack[SampleOptions],
) -> Tensor:
    """Hinges of a margin between each positive and its negatives, without the M x N matrix.

    Use it for retrieval when fine-tuning or in small batches: negatives beyond the margin have no gradient at all, and
    there is no temperature. "sum" counts every violation, "max" the worst alone, "selective" the worst, or all of them
    where the worst would have a vanishing gradient.

    The reference document blames the vanishing gradient on easy negatives; in the paper it is training on the hardest
    alone, where they score like the positive, and this is the paper's rule. Nor is the hardest negative the second of a
    top-k, as there: it is the first among the negatives, wherever the positive ranks.

    Args:
        image_features: `[M, D]`, `text_features`: `[N, D]`; L2-normalised by the caller, or `normalize=True`.
        margin: m, in units of the cosine.
        mining: "sum" (all negatives; VSE++'s SH), "max" (the hardest; VSE++'s MH), "selective" (SelHN: the mean over
            all where the hardest is within `epsilon` of the positive, which is where "max" has a vanishing gradient).
        epsilon: of "selective", in units of the cosine.
        reduction: None as published ("sum" over everything; "mean" for "selective"); "mean" averages each direction
            over its anchors, then both; "sum" adds everything; "none" gives the mean of both directions per pair.
        **options: labels, image_ids, text_ids, filters, image_weights, text_weights, directions, normalize, metrics,
            negatives, group, check_finite, strict as of `clip_loss`. Equal ids are no negatives, -1 takes a sample
            out; a text with several images compares with their mean; a sample without a negative has loss 0.

    Returns:
        fp32 scalar (fp64 for fp64 features), or per-sample losses. Differentiable in features and weights.

    Raises:
        TypeError, ValueError: an argument of the wrong kind, shape, dtype, device or range, named.

    Source: Faghri et al. 2018 (VSE++), equations 5 and 6; Zhang et al. 2023 (SelHN), equation 7 and code.
    """
    m = check.number("margin", margin)
    check.choice("mining", mining, MINING)
    near = check.number("epsilon", epsilon, low=0.0)
    if reduction is not None:
        check.choice("reduction", reduction, REDUCTIONS)
    published = "mean" if mining == "selective" else "sum"
    batch = Batch.of(image_features, text_features, 1.0, None, reduction=reduction or published, **options)
    p, (rows, cols) = batch.problem, (batch.directions != "text", batch.directions != "image")
    positive = tile.positives(p)
    problem = p.weighted(*(side - m for side in positive))
    own = torch.cat([side for side, wanted in zip(positive, (rows, cols), strict=True) if wanted])
    selection = None if batch.negatives is None else batch.negatives.selection(p)
    hardest = batch.metrics is not None or mining != "sum"
    t = tile.hinge(problem, rows=rows, cols=cols, hardest=hardest, selection=selection)
    if batch.negatives is not None:
        batch.negatives.fill(t, p)
    if batch.metrics is not None:
        batch.metrics.fill(t, p.m, p.n, batch.filters, own)
    losses = t.nll
    if mining != "sum":
        losses = _hardest(p, t, own, m)
        if mining == "selective":
            found = t.summary
            average = t.nll / found["negatives"].clamp(min=1)
            losses = torch.where((own.detach() - found["hardest"]).abs() < near, average, losses)
    loss = batch.reduce(losses, t)
    return 2 * loss if rows and cols and batch.reduction == "sum" else loss  # their sum, not their mean


def _hardest(p: Problem, t: SoftmaxTile, own: Tensor, margin: float) -> Tensor:
    """Hinge of the hardest negative of each row and column `[L]`, 0 where there is none: a gather, no second sweep."""
    index, (rows, _) = t.summary["index"], t.lengths
    scores = [tile.paired(p, index[:rows])] if t.statistic.rows else []
    scores += [tile.paired(p, index[rows:], columns=True)] if t.statistic.cols else []
    hinge = (margin + torch.cat(scores) - own).clamp(min=0)
    known = index >= 0 if t.targets is None else (index >= 0) & (t.targets > 0)
    hardest = t.summary["hardest"]
    return torch.where(known, hinge, torch.where(hardest.isnan(), hardest, 0.0))


def _oracle(
    image_features: Tensor, text_features: Tensor, *, margin: float = 0.2, mining: str = "sum", epsilon: float = 0.01,
    reduction: str | None = None, labels: Tensor | None = None, image_ids: Tensor | None = None,
    text_ids: Tensor | None = None, directions: str = "both",
) -> Tensor:  # fmt: skip
    """The equation on the dense matrix."""
    c, s = matrix(image_features, text_features, 1.0)
    y, present, same = entries(c, labels, image_ids, text_ids)

    def losses(z: Tensor, y: Tensor, negative: Tensor) -> Tensor:
        positive = torch.where(y, z, 0.0).sum(1) / y.sum(1).clamp(min=1)
        h = torch.where(negative, (margin + z - positive[:, None]).clamp(min=0), 0.0)
        if mining == "sum":
            return h.sum(1)
        hardest = torch.where(negative, z, -torch.inf).amax(1)
        average = h.sum(1) / negative.sum(1).clamp(min=1)
        near = (positive - hardest).abs() < epsilon
        return torch.where(near, average, h.amax(1)) if mining == "selective" else h.amax(1)

    how = reduction or ("mean" if mining == "selective" else "sum")
    loss = mean_of(losses, sides_of(s, y, present & ~y & ~same), (None, None), directions, how)
    return 2 * loss if how == "sum" and directions == "both" else loss


SPEC = register(
    LossSpec(
        function=triplet_loss,
        oracle=_oracle,
        equation="Σ_ij [m + c_ij − c_ii]₊ + [m + c_ij − c_jj]₊, or the maxima over j and over i",
        paper="Faghri et al. 2018 (VSE++), equations 5 and 6",
        variants=(
            {},
            {"mining": "max", "image_ids": some_ids},
            {"mining": "selective", "epsilon": 0.05},
            {"reduction": "mean", "directions": "image", "image_ids": some_ids},
            {"mining": "max", "reduction": "none"},
        ),
        reduction="sum",
    )
)
