"""Chunked PyTorch: any device and dtype, O(chunk^2) memory, the kernels' own tile functions.

The fallback everywhere, and in fp64 the way the kernels' maths meet gradcheck.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ..scores.problem import Problem
from ..scores.statistics import Softmax

__all__ = ["gradient", "statistics"]

# rows and columns of a tile: large enough for the library product, small enough for a few copies of it in cache
TILE = {"cpu": 1024, "cuda": 4096}


def statistics(problem: Problem, statistic: Softmax, keep: bool = False) -> tuple[Tensor, Tensor]:
    """State `[fields, L]` of all rows, then all columns; and the products `[M, N]` of a small batch, if to be kept."""
    m, n = problem.x.shape[0], problem.y.shape[0]
    rows, cols = statistic.lengths(m, n)
    state = statistic.identity(problem.x, problem.scale.dtype, rows + cols)
    kept = state.new_empty((m, n) if keep else (0,))
    for r, c in _tiles(problem):
        products = _products(problem, r, c)
        if keep:
            kept[r, c] = products
        s, hit = _scores(problem, products, r, c)
        for here, axis in ((r, 1),) * statistic.rows + ((slice(rows + c.start, rows + c.stop), 0),) * statistic.cols:
            merged = statistic.merge(state[:, here], statistic.partial(s, hit, axis))
            state[:, here] = torch.stack(merged)
    return state, kept


def gradient(
    problem: Problem, statistic: Softmax, products: Tensor, operands: Tensor, need_x: bool, need_y: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`dx`, `dy` (empty if not needed), `sum G c` with c = <x, y>, and `sum G`."""
    x, y, dtype = problem.x, problem.y, problem.scale.dtype
    dx = x.new_zeros(x.shape if need_x else (0,), dtype=dtype)
    dy = y.new_zeros(y.shape if need_y else (0,), dtype=dtype)
    d_scale, d_bias = operands.new_zeros(()), operands.new_zeros(())
    rows, _ = statistic.lengths(x.shape[0], y.shape[0])
    for r, c in _tiles(problem):
        raw = products[r, c] if products.numel() else _products(problem, r, c)
        s, hit = _scores(problem, raw, r, c)
        g = statistic.gradient(s, hit, operands[:, r], operands[:, rows + c.start : rows + c.stop])
        d_scale += (g * raw).sum()
        d_bias += g.sum()
        if need_x:
            dx[r].addmm_(g, y[c].to(dtype))
        if need_y:
            dy[c].addmm_(g.T, x[r].to(dtype))
    return dx.mul_(problem.scale).to(x.dtype), dy.mul_(problem.scale).to(y.dtype), d_scale, d_bias


def _tiles(problem: Problem) -> Iterator[tuple[slice, slice]]:
    m, n, step = problem.x.shape[0], problem.y.shape[0], TILE.get(problem.x.device.type, 4096)
    for c in range(0, n, step):
        for r in range(0, m, step):
            yield slice(r, min(r + step, m)), slice(c, min(c + step, n))


def _products(problem: Problem, r: slice, c: slice) -> Tensor:
    dtype = problem.scale.dtype
    return problem.x[r].to(dtype) @ problem.y[c].to(dtype).T


def _scores(problem: Problem, products: Tensor, r: slice, c: slice) -> tuple[Tensor, Tensor | None]:
    """Scores (-inf where an entry is no candidate) and the target mask of one tile."""
    s = products * problem.scale
    if problem.bias is not None:
        s = s + problem.bias
    if problem.target is None and (r.stop <= c.start or c.stop <= r.start):
        return s, None  # off the diagonal
    cols = torch.arange(c.start, c.stop, device=s.device)
    target = torch.arange(r.start, r.stop, device=s.device) if problem.target is None else problem.target[r]
    hit = target[:, None] == cols[None, :]
    if problem.row_id is not None and problem.col_id is not None:
        row, col = problem.row_id[r][:, None], problem.col_id[c][None, :]
        s = s.masked_fill(((row == col) & ~hit) | (row == -1) | (col == -1), -torch.inf)
    return s, hit
