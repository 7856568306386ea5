"""Chunked PyTorch: any device and dtype, O(chunk^2) memory, the kernels' own tile functions.

The fallback everywhere, and in fp64 the way the kernels' maths meet gradcheck.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ..scores.problem import Problem
from ..scores.selection import Selection, join
from ..scores.statistic import Statistic
from ..scores.statistics import LN2, Sigmoid, gradient_dtype

__all__ = ["gradient", "statistics", "sums", "sweep", "unit"]

# rows and columns of a tile: large enough for the library product, small enough for a few copies of it in cache
TILE = {"cpu": 1024, "cuda": 4096}


def statistics(
    problem: Problem, statistic: Statistic, keep: bool = False, selection: Selection | None = None
) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor] | None]:
    """State `[fields, L]` of all rows, then all columns; the products `[M, N]` of a small batch, if to be kept.

    With a selection also its state, from the same products.
    """
    m, n = problem.x.shape[0], problem.y.shape[0]
    rows, cols = statistic.lengths(m, n)
    state = statistic.identity(problem.x, problem.scale.dtype, rows + cols)
    kept = problem.scale.new_empty((m, n) if keep else (0,))
    best = None if selection is None else selection.empty(problem.x, rows + cols)
    for r, c in _tiles(problem):
        products = _products(problem, r, c)
        if keep:
            kept[r, c] = products
        tile = _Tile.of(problem, statistic, products, r, c)
        noise = (None, None) if selection is None else selection.noise_of(r, c)
        sides = [(r, r, c, 1, tile.to_row, problem.row_factor, noise[0])] if rows else []
        here = slice(rows + c.start, rows + c.stop)
        sides += [(here, c, r, 0, tile.to_col, problem.col_factor, noise[1])] if cols else []
        for here, own, others, axis, s, factor, gumbel in sides:
            if statistic.fields:
                index = torch.arange(others.start, others.stop, device=s.device, dtype=s.dtype)
                factors = None if factor is None else factor[own]
                part = statistic.partial(s, tile.hit, tile.second, factors, index, _beta(problem), axis)
                state[:, here] = torch.stack(statistic.merge(state[:, here], part))
            if selection is not None and best is not None:
                live = s > -torch.inf if tile.hit is None else (s > -torch.inf) & ~tile.hit
                totals = None if selection.totals is None else selection.totals[here]
                more = selection.of_tile(products, live, gumbel, others.start, axis, totals)
                best[0][here], best[1][here] = join((best[0][here], best[1][here]), more, selection.k)
    return state, kept, best


def unit(problem: Problem, statistic: Statistic, cotangents: tuple[Tensor, ...]) -> float:
    """What a G of size 1 stands for: itself, as G is never rounded below the statistics' dtype."""
    return 1.0


def gradient(
    problem: Problem, statistic: Statistic, products: Tensor, operands: Tensor, unit: float, of_x: int | None,
    of_y: int | None, need_scale: bool, need_col: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """`dx`, `dy`, `sum G c` with c = <x, y>, `sum G`, and its column sums.

    Of x and y the gradients of the first `of_x` and `of_y` rows; empty what is None or not needed.
    """
    rows, _ = statistic.lengths(problem.x.shape[0], problem.y.shape[0])
    sums = _Sums(problem, of_x, of_y, need_col)
    for r, c in _tiles(problem):
        raw = products[r, c] if products.numel() else _products(problem, r, c)
        tile = _Tile.of(problem, statistic, raw, r, c)
        row, col = operands[:, r], operands[:, rows + c.start : rows + c.stop]
        g = statistic.gradient(tile.to_row, tile.to_col, tile.hit, tile.second, row, col, _beta(problem))
        sums.add(g, tile.products, r, c)
    return sums.finished(problem.x.dtype)


def sweep(
    problem: Problem, statistic: Sigmoid, of_x: int | None, of_y: int | None, need_scale: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The total in nats, and the first four of what `gradient` returns, from one pass over the scores."""
    none = problem.scale.new_empty((0, 0))
    weights = [none if f is None else f[None] for f in (problem.row_factor, problem.col_factor)]
    total = problem.scale.new_zeros(())
    sums = _Sums(problem, of_x, of_y, False)
    for r, c in _tiles(problem):
        tile = _Tile.of(problem, statistic, _products(problem, r, c), r, c)
        row, col = weights[0][:, r], weights[1][:, c]
        total += statistic.value(tile.to_row, tile.hit, row, col).sum()
        sums.add(statistic.gradient(tile.to_row, tile.hit, row, col), tile.products, r, c)
    return (total * LN2, *sums.finished(gradient_dtype(problem.x.dtype))[:4])


def sums(problem: Problem, statistic: Sigmoid, need_rows: bool, need_cols: bool) -> tuple[Tensor, Tensor]:
    """Sums of the losses in nats along rows `[M]` and columns `[N]`, each times the other side's weight; or empty."""
    assert problem.row_factor is not None and problem.col_factor is not None
    rows, cols = (problem.x.shape[0] if need_rows else 0), (problem.y.shape[0] if need_cols else 0)
    of_rows, of_cols = problem.scale.new_zeros(rows), problem.scale.new_zeros(cols)
    none = problem.scale.new_empty((0, 0))
    for r, c in _tiles(problem):
        tile = _Tile.of(problem, statistic, _products(problem, r, c), r, c)
        loss = statistic.value(tile.to_row, tile.hit, none, none)
        if need_rows:
            of_rows[r] += (loss * problem.col_factor[c]).sum(1)
        if need_cols:
            of_cols[c] += (loss * problem.row_factor[r, None]).sum(0)
    return of_rows * LN2, of_cols * LN2


class _Sums:
    """What gradient tiles add up to."""

    def __init__(self, problem: Problem, of_x: int | None, of_y: int | None, need_col: bool) -> None:
        self.problem, self.need_col = problem, need_col
        d, dtype = problem.x.shape[1], problem.scale.dtype
        self.dx, self.dy = (problem.scale.new_zeros((0,) if k is None else (k, d), dtype=dtype) for k in (of_x, of_y))
        self.d_scale, self.d_bias = problem.scale.new_zeros(()), problem.scale.new_zeros(())
        self.d_col = problem.scale.new_zeros(problem.y.shape[0] if need_col else 0)

    def add(self, g: Tensor, products: Tensor, r: slice, c: slice) -> None:
        """The tile `g` at rows `r` and columns `c`."""
        self.d_scale += (g * products).sum()
        self.d_bias += g.sum()
        dx, dy = self.dx[r], self.dy[c]  # of which only first rows may be wanted
        if len(dx):
            dx.addmm_(g[: len(dx)], self.problem.y[c].to(g.dtype))
        if len(dy):
            dy.addmm_(g[:, : len(dy)].T, self.problem.x[r].to(g.dtype))
        if self.need_col:
            self.d_col[c] += g.sum(0)

    def finished(self, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """`dx` and `dy` in `dtype`, `sum G c`, `sum G`, its column sums."""
        scale = self.problem.scale
        dx, dy = (d.mul_(scale).to(dtype) for d in (self.dx, self.dy))
        return dx, dy, self.d_scale, self.d_bias, self.d_col


def _tiles(problem: Problem) -> Iterator[tuple[slice, slice]]:
    m, n, step = problem.x.shape[0], problem.y.shape[0], TILE.get(problem.x.device.type, 4096)
    for c in range(0, n, step):
        for r in range(0, m, step):
            yield slice(r, min(r + step, m)), slice(c, min(c + step, n))


def _products(problem: Problem, r: slice, c: slice) -> Tensor:
    dtype = problem.scale.dtype
    return problem.x[r].to(dtype) @ problem.y[c].to(dtype).T


def _beta(problem: Problem) -> Tensor | float:
    return 0.0 if problem.numbers is None else problem.numbers[0]


@dataclass(frozen=True)
class _Tile:
    """One tile: products (with the margin), scores in bits as rows and as columns see them, targets, second scores.

    A score of -inf is no candidate. `hit` is None where there is no target; `second` is in bits.
    """

    products: Tensor
    to_row: Tensor
    to_col: Tensor
    hit: Tensor | None
    second: Tensor | None

    @classmethod
    def of(cls, p: Problem, statistic: Statistic | Sigmoid, products: Tensor, r: slice, c: slice) -> _Tile:
        """From the raw products at rows `r` and columns `c`."""
        hit, out = _entries(p, statistic, products, r, c)
        second = beside = None
        if statistic.second:
            assert p.teacher_x is not None and p.teacher_y is not None and p.teacher_scale is not None
            dtype = p.scale.dtype
            others, m = p.teacher_y[c].to(dtype).T, p.x.shape[0]
            beside = p.teacher_x[r].to(dtype) @ others
            for k in range(1, p.layers):
                beside = torch.maximum(beside, p.teacher_x[k * m + r.start : k * m + r.stop].to(dtype) @ others)
            second = beside * p.teacher_scale
        shifted = products
        if statistic.margin and second is not None:
            assert p.numbers is not None
            margin = torch.minimum(p.numbers[0], p.numbers[1] - second)
            shifted = products + (margin if hit is None else margin.masked_fill(hit, 0.0))
        s = shifted * (p.scale / LN2)
        if p.bias is not None:
            s = s + p.bias / LN2
        if p.col_bias is not None:
            s = s + p.col_bias[c] / LN2
        if out is not None:
            s = s.masked_fill(out, -torch.inf)
        to_row = to_col = s
        for limited, position in ((statistic.limit, 0), (statistic.guide, 1)):
            if limited and p.row_limit is not None and p.col_limit is not None:
                measured = beside if position else products
                assert measured is not None
                row, col = p.row_limit[position, r, None], p.col_limit[position, None, c]
                to_row, to_col = (_without(s, measured > limit, hit) for s, limit in ((to_row, row), (to_col, col)))
        return cls(shifted, to_row, to_col, hit, None if second is None else second / LN2)


def _without(s: Tensor, out: Tensor, hit: Tensor | None) -> Tensor:
    return s.masked_fill(out if hit is None else out & ~hit, -torch.inf)


def _entries(
    problem: Problem, statistic: Statistic | Sigmoid, products: Tensor, r: slice, c: slice
) -> tuple[Tensor | None, Tensor | None]:
    """Which entries of one tile are targets, and which are no candidates; None for none."""
    has_ids = problem.row_id is not None and problem.col_id is not None
    off_diagonal = problem.target is None and (r.stop <= c.start or c.stop <= r.start)
    if off_diagonal and not has_ids:
        return None, None
    cols = torch.arange(c.start, c.stop, device=products.device)
    rows = torch.arange(r.start, r.stop, device=products.device) if problem.target is None else problem.target[r]
    hit = rows[:, None] == cols[None, :]
    if problem.row_id is None or problem.col_id is None:
        return hit, None
    row, col = problem.row_id[r][:, None], problem.col_id[c][None, :]
    out = (row == -1) | (col == -1)
    if statistic.positive_ids:
        return (hit | (row == col)) & ~out, out
    return hit, out | ((row == col) & ~hit)
