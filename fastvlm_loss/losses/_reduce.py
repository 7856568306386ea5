"""From per-sample losses of one or both directions to what the caller asked for."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["DIRECTIONS", "REDUCTIONS", "combine"]

DIRECTIONS = ("both", "image", "text")
REDUCTIONS = ("mean", "sum", "none")

Direction = tuple[Tensor, Tensor | None, Tensor | None]  # losses [K], weights [K] or None, targets [K] or None


def combine(directions: list[Direction], reduction: str) -> Tensor:
    """Weighted mean, sum or per-sample losses, averaged over the directions.

    A sample without target has no loss and no weight; a direction without any weight contributes 0.
    """
    parts = [_reduce(*direction, reduction) for direction in directions]
    return parts[0] if len(parts) == 1 else (parts[0] + parts[1]) / 2


def _reduce(losses: Tensor, weights: Tensor | None, targets: Tensor | None, reduction: str) -> Tensor:
    if weights is None and targets is None:
        if reduction == "mean":
            return losses.mean() if losses.shape[0] else losses.sum()
        return losses.sum() if reduction == "sum" else losses
    if targets is not None:
        known = (targets > 0).to(losses.dtype)
        weights = known if weights is None else weights * known
    assert weights is not None
    weighted = losses * weights
    if reduction == "none":
        return weighted
    if reduction == "sum":
        return weighted.sum()
    total = weights.sum()
    return weighted.sum() / torch.where(total == 0, 1.0, total)
