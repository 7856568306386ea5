"""Scores of listed pairs, beside those that a loss streams over."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

__all__ = ["dots", "operand", "pair_dots"]


def operand(features: Tensor) -> Tensor:
    """Features in the dtype that a loss would cast them to, so that scores of pairs are those of the same numbers."""
    kind = features.device.type
    if torch.is_autocast_enabled(kind) and features.dtype != torch.float64:
        return features.to(torch.get_autocast_dtype(kind))
    return features


def dots(a: Tensor, b: Tensor) -> Tensor:
    """<a_i, b_i> `[n]` of features `[n, D]`, at least in fp32."""
    dtype = torch.promote_types(a.dtype, torch.float32)
    return (a.to(dtype) * b.to(dtype)).sum(1)


def pair_dots(x: Tensor, y: Tensor, rows: Tensor, cols: Tensor) -> Tensor:
    """<x_r, y_c> `[P]` of the pairs; forward and backward hold the features of some M + N pairs at a time."""

    def some(x: Tensor, y: Tensor, rows: Tensor, cols: Tensor) -> Tensor:
        return dots(x[rows], y[cols])

    size = len(x) + len(y)
    if len(rows) <= size:
        return some(x, y, rows, cols)
    parts = zip(rows.split(size), cols.split(size), strict=True)
    return torch.cat([checkpoint(some, x, y, r, c, use_reentrant=False, preserve_rng_state=False) for r, c in parts])
