"""Chunked PyTorch: any device and dtype, O(chunk^2) memory, the kernels' own tile functions.

The fallback everywhere, and in fp64 the way the kernels' maths meet gradcheck.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ..scores.problem import Problem
from ..scores.statistics import LN2, Sigmoid, Softmax, gradient_dtype

__all__ = ["gradient", "statistics", "sweep", "unit"]

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
        s, hit = _scores(problem, statistic, products, r, c)
        teacher = _teacher(problem, r, c)
        sides = [(r, 1, problem.row_factor, r)] if rows else []
        sides += [(slice(rows + c.start, rows + c.stop), 0, problem.col_factor, c)] if cols else []
        for here, axis, factor, own in sides:
            part = statistic.partial(s, hit, teacher, None if factor is None else factor[own], axis)
            state[:, here] = torch.stack(statistic.merge(state[:, here], part))
    return state, kept


def unit(problem: Problem, cotangents: tuple[Tensor, ...]) -> float:
    """What a G of size 1 stands for: itself, as G is never rounded below the statistics' dtype."""
    return 1.0


def gradient(
    problem: Problem, statistic: Softmax, products: Tensor, operands: Tensor, unit: float, need_x: bool, need_y: bool,
    need_scale: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """`dx`, `dy` (empty if not needed), `sum G c` with c = <x, y>, and `sum G`."""
    rows, _ = statistic.lengths(problem.x.shape[0], problem.y.shape[0])
    sums = _Sums(problem, need_x, need_y)
    for r, c in _tiles(problem):
        raw = products[r, c] if products.numel() else _products(problem, r, c)
        s, hit = _scores(problem, statistic, raw, r, c)
        row, col = operands[:, r], operands[:, rows + c.start : rows + c.stop]
        sums.add(statistic.gradient(s, hit, _teacher(problem, r, c), row, col), raw, r, c)
    return sums.finished(problem.x.dtype)


def sweep(
    problem: Problem, statistic: Sigmoid, need_x: bool, need_y: bool, need_scale: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The total in nats, and what `gradient` returns, from one pass over the scores."""
    none = problem.scale.new_empty((0, 0))
    weights = [none if f is None else f[None] for f in (problem.row_factor, problem.col_factor)]
    total = problem.scale.new_zeros(())
    sums = _Sums(problem, need_x, need_y)
    for r, c in _tiles(problem):
        raw = _products(problem, r, c)
        s, hit = _scores(problem, statistic, raw, r, c)
        row, col = weights[0][:, r], weights[1][:, c]
        total += statistic.value(s, hit, row, col).sum()
        sums.add(statistic.gradient(s, hit, row, col), raw, r, c)
    return (total * LN2, *sums.finished(gradient_dtype(problem.x.dtype)))


class _Sums:
    """What gradient tiles add up to."""

    def __init__(self, problem: Problem, need_x: bool, need_y: bool) -> None:
        self.problem, self.need_x, self.need_y = problem, need_x, need_y
        x, y, dtype = problem.x, problem.y, problem.scale.dtype
        self.dx = x.new_zeros(x.shape if need_x else (0,), dtype=dtype)
        self.dy = y.new_zeros(y.shape if need_y else (0,), dtype=dtype)
        self.d_scale, self.d_bias = problem.scale.new_zeros(()), problem.scale.new_zeros(())

    def add(self, g: Tensor, products: Tensor, r: slice, c: slice) -> None:
        """The tile `g` at rows `r` and columns `c`."""
        self.d_scale += (g * products).sum()
        self.d_bias += g.sum()
        if self.need_x:
            self.dx[r].addmm_(g, self.problem.y[c].to(g.dtype))
        if self.need_y:
            self.dy[c].addmm_(g.T, self.problem.x[r].to(g.dtype))

    def finished(self, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """`dx` and `dy` in `dtype`, `sum G c`, `sum G`."""
        scale = self.problem.scale
        return self.dx.mul_(scale).to(dtype), self.dy.mul_(scale).to(dtype), self.d_scale, self.d_bias


def _tiles(problem: Problem) -> Iterator[tuple[slice, slice]]:
    m, n, step = problem.x.shape[0], problem.y.shape[0], TILE.get(problem.x.device.type, 4096)
    for c in range(0, n, step):
        for r in range(0, m, step):
            yield slice(r, min(r + step, m)), slice(c, min(c + step, n))


def _products(problem: Problem, r: slice, c: slice) -> Tensor:
    dtype = problem.scale.dtype
    return problem.x[r].to(dtype) @ problem.y[c].to(dtype).T


def _teacher(problem: Problem, r: slice, c: slice) -> Tensor | None:
    """The teacher's scores of one tile, in bits."""
    if problem.teacher_x is None or problem.teacher_y is None:
        return None
    assert problem.teacher_scale is not None
    dtype = problem.scale.dtype
    return (problem.teacher_x[r].to(dtype) @ problem.teacher_y[c].to(dtype).T).mul_(problem.teacher_scale / LN2)


def _scores(
    problem: Problem, statistic: Softmax | Sigmoid, products: Tensor, r: slice, c: slice
) -> tuple[Tensor, Tensor | None]:
    """Scores in bits (-inf where an entry is no candidate) and the target mask of one tile."""
    s = products * (problem.scale / LN2)
    if problem.bias is not None:
        s = s + problem.bias / LN2
    has_ids = problem.row_id is not None and problem.col_id is not None
    diagonal = problem.target is None and (r.stop <= c.start or c.stop <= r.start)
    if diagonal and not has_ids:
        return s, None  # off the diagonal
    cols = torch.arange(c.start, c.stop, device=s.device)
    target = torch.arange(r.start, r.stop, device=s.device) if problem.target is None else problem.target[r]
    hit = target[:, None] == cols[None, :]
    if problem.row_id is not None and problem.col_id is not None:
        row, col = problem.row_id[r][:, None], problem.col_id[c][None, :]
        out = (row == -1) | (col == -1)
        if statistic.positive_ids:
            hit = (hit | (row == col)) & ~out
        else:
            out = out | ((row == col) & ~hit)
        s = s.masked_fill(out, -torch.inf)
    return s, hit
