"""What losses share before and after the engine: unit features, and the reduction of per-sample losses."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..scores import check
from ..scores.appended import with_rows_of
from ..scores.problem import Problem

__all__ = ["DIRECTIONS", "REDUCTIONS", "combine", "sample_weights", "unit", "unit_features"]

DIRECTIONS = ("both", "image", "text")
REDUCTIONS = ("mean", "sum", "none")


def combine(
    losses: Tensor,
    targets: Tensor | None,
    lengths: tuple[int, int],
    weights: tuple[Tensor | None, Tensor | None],
    reduction: str,
) -> Tensor:
    """Weighted mean, sum or per-sample losses, averaged over the directions.

    `losses` and `targets` are `[L]`, rows then columns, `lengths` of each (0 for a direction that does not count);
    `weights` of the rows `[M]` and of the columns `[N]`, None for ones. A sample without target has no weight, and a
    direction without any weight contributes 0.
    """
    both = all(lengths)
    weighed = any(w is not None and n for w, n in zip(weights, lengths, strict=True))
    if (
        not weighed
        and targets is None
        and reduction == "mean"
        and losses.shape[0]
        and (not both or lengths[0] == lengths[1])
    ):
        return losses.mean()  # equal directions: the mean of their means is one mean
    if weighed or targets is not None:
        parts = [losses.new_ones(n) if w is None else w for w, n in zip(weights, lengths, strict=True) if n]
        known = 1.0 if targets is None else (targets > 0).to(losses.dtype)
        weight = (torch.cat(parts) if parts else losses) * known
        losses = losses * weight
    else:
        weight = None
    if not both:
        return _reduce(losses, weight, reduction)
    rows = _reduce(losses[: lengths[0]], None if weight is None else weight[: lengths[0]], reduction)
    cols = _reduce(losses[lengths[0] :], None if weight is None else weight[lengths[0] :], reduction)
    return (rows + cols) / 2


def _reduce(losses: Tensor, weight: Tensor | None, reduction: str) -> Tensor:
    if reduction == "none":
        return losses
    if reduction == "sum":
        return losses.sum()
    if weight is None:
        return losses.sum() / max(losses.shape[0], 1)
    total = weight.sum()
    return losses.sum() / torch.where(total == 0, 1.0, total)


def sample_weights(
    problem: Problem, image_weights: Tensor | None, text_weights: Tensor | None, check_finite: bool
) -> tuple[Tensor | None, Tensor | None]:
    """The weights of the images `[M]` and of the texts `[N]`, None for ones."""
    x, dtype, found = problem.x, problem.scale.dtype, []
    named = ("image_weights", image_weights, x.shape[0]), ("text_weights", text_weights, problem.y.shape[0])
    for name, given, length in named:
        weights = None if given is None else check.vector(name, given, length, x, dtype)
        if weights is not None and check_finite:
            check.finite(name, weights)
        found.append(weights)
    rows, cols = found
    return (None if rows is None else problem.of_rows(rows)), (None if cols is None else problem.of_cols(cols))


def unit_features(
    image_features: Tensor, text_features: Tensor, names: tuple[str, str] = ("image_features", "text_features")
) -> tuple[Tensor, Tensor]:
    """Both L2-normalised, differentiably."""
    given = (check.features(name, t) for name, t in zip(names, (image_features, text_features), strict=True))
    image, text = (with_rows_of(unit(t), t) for t in given)
    return image, text


def unit(features: Tensor) -> Tensor:
    """Each vector along the last axis with length 1."""
    # in fp32, rounded once: the norm of a bf16 vector computed in bf16 is off by up to 1 %
    dtype = features.dtype
    return F.normalize(features.to(torch.promote_types(dtype, torch.float32)), dim=-1).to(dtype)
