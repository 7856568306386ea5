"""The autograd Functions: statistics of a score matrix, and its total, as differentiable outputs.

PyTorch's autograd supplies the cotangents of the O(M + N) vectors; the gradient tile G turns them into gradients of
features, scale and bias. A loss therefore needs no formula for its gradient.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..scores.function import once
from ..scores.problem import FIELDS, Problem
from ..scores.statistics import decode
from . import ops
from .weights import SUMS

__all__ = [
    "BIAS", "COL_FACTOR", "ROW_FACTOR", "SCALE", "Statistics", "Total", "Weighted", "X", "Y", "gradients", "of_total",
]  # fmt: skip

X, Y, SCALE, BIAS, ROW_FACTOR, COL_FACTOR, COL_BIAS = 0, 1, 2, 3, 7, 8, 12
TEACHER = slice(9, 12)
OF_ROWS = (X, 4, 9)  # fields that a strip of rows takes a part of: features, targets, the teacher's features


class Statistics(torch.autograd.Function):
    """`(*problem, targets, backend, epilogue, flags, learned, *selection) -> (*vectors [L], state, *selected)`.

    The state `[fields, L]` has no gradient; it is there for what it tells besides. Nor has what a selection picks in
    the same pass.
    """

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> tuple[Tensor, ...]:
        """Run the statistics op; its state and small products are for backward."""
        problem, (targets, backend, epilogue, flags, learned, *selection) = arguments[:FIELDS], arguments[FIELDS:]
        # a batch whose products are one small tile keeps it for backward: 6 N^2 D operations instead of 8
        small = problem[X].shape[0] * problem[Y].shape[0] <= ops.KEPT_PRODUCTS[backend]
        keep = small and any(ctx.needs_input_grad[:3])
        how = ops.SELECT if selection else ops.STATISTICS
        nll, gap, state, products, *picked = how[backend](*problem, targets, epilogue, flags, keep, *selection)
        ctx.save_for_backward(*problem, targets, state, products)
        ctx.mark_non_differentiable(state, *picked)
        ctx.set_materialize_grads(False)
        ctx.statistic = backend, epilogue, flags, learned
        return (nll, gap, state, *picked) if decode(epilogue, flags).gap else (nll, state, *picked)

    @staticmethod
    def backward(ctx: Any, d_nll: Tensor | None, *more: Tensor | None) -> tuple[Tensor | None, ...]:
        """Gradients of features, scale, biases, factors and the teacher; what needs none costs none."""
        saved = ctx.saved_tensors  # once: checkpointing unpacks on access
        problem, (targets, state, products) = saved[:FIELDS], saved[FIELDS:]
        needs = ctx.needs_input_grad
        backend, epilogue, flags, learned = ctx.statistic
        statistic = decode(epilogue, flags)
        wanted = [d_nll, more[0]] if statistic.gap else [d_nll]
        given = [state.new_zeros(state.shape[1:]) if c is None else c.contiguous() for c in wanted]
        found = gradients(problem, targets, state, products, given, backend, statistic, needs, learned)
        if statistic.factor and (needs[ROW_FACTOR] or needs[COL_FACTOR]):
            rows, cols = statistic.lengths(problem[X].shape[0], problem[Y].shape[0])
            factors = statistic.factor_gradient(state, targets, tuple(given))
            found[ROW_FACTOR] = factors[:rows] if rows else torch.zeros_like(problem[ROW_FACTOR])
            found[COL_FACTOR] = factors[rows:] if cols else torch.zeros_like(problem[COL_FACTOR])
        return (*once(found, problem, needs), *(None,) * (len(needs) - FIELDS))


def gradients(
    problem: tuple[Tensor, ...], targets: Tensor | None, state: Tensor, products: Tensor, given: list[Tensor],
    backend: str, statistic: Any, needs: tuple[bool, ...], learned: tuple[int, int] | None = None,
) -> list[Tensor | None]:  # fmt: skip
    """What the tiles of G give, a gradient a field: of features, scale, biases and the teacher, where needed.

    Of the features that of the first rows that are `learned` (None: all), and 0 behind.
    """
    cotangents = given + [None] * (2 - len(given))
    found: list[Tensor | None] = [None] * FIELDS
    if any(needs[:3]) or needs[COL_BIAS] or (needs[BIAS] and not statistic.shift_invariant):
        how = statistic.name, statistic.flags
        *found[:4], found[COL_BIAS] = ops.GRADIENT[backend](
            *problem, targets, state, products, *cotangents, *how, *needs[:3], needs[COL_BIAS], *(learned or ())
        )
        _complete(found, problem, needs)
    if needs[BIAS] and statistic.shift_invariant:
        found[BIAS] = torch.zeros_like(problem[SCALE])
    if any(needs[TEACHER]):
        found[TEACHER] = _teacher(problem, targets, state, cotangents, backend, statistic, needs[TEACHER])
    return found


def _complete(found: list[Any], problem: tuple[Tensor, ...], needs: tuple[bool, ...]) -> None:
    """Zeros behind the gradients of the first rows of the features."""
    for k in (X, Y):
        if needs[k] and len(found[k]) < len(problem[k]):
            found[k] = F.pad(found[k], (0, 0, 0, len(problem[k]) - len(found[k])))


def _teacher(
    problem: tuple[Tensor, ...], targets: Tensor | None, state: Tensor, cotangents: list[Tensor | None], backend: str,
    statistic: Any, needs: tuple[bool, ...],
) -> tuple[Tensor, ...]:  # fmt: skip
    """Gradients of the teacher's features and scale: those of the problem in which the two have changed places."""
    swapped, how = Problem.from_tensors(problem).swapped(), statistic.swap()
    gradient: tuple[Tensor, ...] = ops.GRADIENT[backend](
        *swapped.tensors(), targets, how.unbiased(state, problem[BIAS]), state.new_empty(0), *cotangents, how.name,
        how.flags, *needs, False,
    )  # fmt: skip
    return gradient[:3]


class Weighted(torch.autograd.Function):
    """`(*problem, targets [M], weights [M], backend, epilogue, flags, share, rows) -> total []`.

    The sum over the rows of weight * (nll + share * gap), with the weights known before backward: `rows` rows at a time
    are scored once, and their products become gradients while they are still there. 6 M N D operations instead of 8.
    """

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Tensor:
        """Losses and gradients of every strip; only a number is missing from them."""
        problem, (targets, weights, backend, epilogue, flags, share, rows) = arguments[:FIELDS], arguments[FIELDS:]
        needs, gap = ctx.needs_input_grad, decode(epilogue, flags).gap
        x, y, scale = problem[X], problem[Y], problem[SCALE]
        dx = x.new_empty(x.shape if needs[X] else (0,))
        dy = scale.new_zeros(y.shape if needs[Y] else (0,))
        d_col = scale.new_zeros(y.shape[0] if needs[COL_BIAS] else 0)
        losses = scale.new_empty(x.shape[0])
        for first in range(0, x.shape[0], rows):
            part = slice(first, first + rows)
            strip = tuple(t if t is None or k not in OF_ROWS else t[part] for k, t in enumerate(problem))
            own, w = None if targets is None else targets[part], weights[part].detach()
            nll, gaps, state, products = ops.STATISTICS[backend](*strip, own, epilogue, flags, True)
            losses[part] = nll + share * gaps if gap else nll
            found = ops.GRADIENT[backend](
                *strip, own, state, products, w, share * w if gap else None, epilogue, flags, needs[X], needs[Y], False,
                needs[COL_BIAS],
            )  # fmt: skip
            if needs[X]:
                dx[part] = found[0]
            if needs[Y]:
                dy += found[1]
            if needs[COL_BIAS]:
                d_col += found[4]
            del products, found  # or the next strip's would lie beside them
        ctx.save_for_backward(*problem, losses, dx, dy.to(y.dtype), d_col)
        total: Tensor = (losses * weights).sum()
        return total

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> tuple[Tensor | None, ...]:
        """The gradients times the cotangent."""
        saved = ctx.saved_tensors
        problem, (losses, dx, dy, d_col) = saved[:FIELDS], saved[FIELDS:]
        needs = ctx.needs_input_grad
        found: list[Tensor | None] = [None] * FIELDS
        found[X], found[Y], found[COL_BIAS] = (g * cotangent.to(g.dtype) for g in (dx, dy, d_col))
        made = once([*found, losses * cotangent], (*problem, losses), (*needs[:FIELDS], needs[FIELDS + 1]))
        return (*made[:FIELDS], None, made[FIELDS], *(None,) * 5)


class Total(torch.autograd.Function):
    """`(*problem, backend, learned) -> total []`: value and gradients of a sum over all entries, made in one sweep.

    Those of the weights, the problem's factors, take another one, where they are needed.
    """

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Tensor:
        """Run the sweep; only a number is missing from the gradients."""
        problem, (backend, learned) = arguments[:FIELDS], arguments[FIELDS:]
        needs = ctx.needs_input_grad
        total, *gradients = ops.SWEEP[backend](*problem, *needs[:2], any(needs[2:4]), *(learned or ()))
        weighs = needs[ROW_FACTOR], needs[COL_FACTOR]
        ctx.save_for_backward(*problem, *gradients, *(SUMS(*problem, *weighs) if any(weighs) else (None, None)))
        return total  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> tuple[Tensor | None, ...]:
        """The gradients times the cotangent."""
        saved, needs = ctx.saved_tensors, ctx.needs_input_grad
        found = of_total(saved[:FIELDS], saved[FIELDS:], cotangent)
        _complete(found, saved[:FIELDS], needs)
        return (*once(found, saved[:FIELDS], needs), None, None)


def of_total(problem: tuple[Tensor, ...], made: tuple[Tensor, ...], cotangent: Tensor, world: int = 1) -> list[Any]:
    """Gradients of a total, a field each, from those of features, scale, bias and weights for a cotangent of 1."""
    found: list[Any] = [None] * FIELDS
    times = cotangent if world == 1 else cotangent * world
    like = (problem[X].dtype, problem[Y].dtype, cotangent.dtype, cotangent.dtype)
    found[:4] = [(g * times).to(dtype) for g, dtype in zip(made[:4], like, strict=True)]
    for k, g in zip((ROW_FACTOR, COL_FACTOR), made[4:], strict=True):
        found[k] = None if g is None else g * cotangent
    return found
