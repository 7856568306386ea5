"""Products of given pairs, O(N D): what the scores of targets and of picked negatives are made of."""

from __future__ import annotations

import torch
from torch import Tensor

from .shard import Shard
from .travel import entries

__all__ = ["best_of_columns", "pair_products", "paired_products"]


def paired_products(x: Tensor, y: Tensor, index: Tensor | None, dtype: torch.dtype) -> Tensor:
    """<x_i, y_index(i)> `[M]` in `dtype`, differentiable; `index` None pairs i with i, a negative one gives 0."""
    if index is None:
        return (x.to(dtype) * y.to(dtype)).sum(1)
    if not y.shape[0]:
        return x.to(dtype).sum(1) * 0
    # what stands in a row without a pair reaches nothing, NaN neither
    own = x.to(dtype).masked_fill((index < 0)[:, None], 0.0)
    # cast before the gather: a row picked many times must not add up its gradient in 16 bits
    products = (own * y.to(dtype)[index.clamp(min=0)]).sum(1)
    return torch.where(index >= 0, products, 0.0)


def best_of_columns(values: Tensor, target: Tensor | None, n: int, none: float) -> Tensor:
    """For each of `n` columns the largest of the values `[M]` of the rows whose target it is, else `none`."""
    if target is None:
        return values
    found = values.new_full((n,), none)
    known = torch.where(target >= 0, values, none)
    return found.scatter_reduce(0, target.clamp(min=0), known, "amax") if n else found


def pair_products(
    x: Tensor, y: Tensor, index: Tensor | None, dtype: torch.dtype, shard: Shard | None, columns: bool = False
) -> Tensor:
    """As `paired_products`, of all processes; with `columns` <x_index(j), y_j> `[N]`."""
    if columns:
        x, y = y, x
    if shard is None:
        return paired_products(x, y, index, dtype)
    gather, own = (shard.gather_cols, shard.own_cols) if columns else (shard.gather_rows, shard.own_rows)
    if index is None:  # own rows have own columns
        return gather(paired_products(x, y, None, dtype))
    sizes = shard.rows if columns else shard.cols
    if shard.ring:
        return gather(entries(x, y, index[own, None], sizes, shard, dtype)[:, 0])
    return gather(paired_products(x, shard.collectives.spread(y, sizes), index[own], dtype))
