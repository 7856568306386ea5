"""Statistics of a score matrix whose rows and columns lie with several processes.

Each process owns its rows and sees all columns once: row states are complete, column states are joined by their monoid
(each process joins an equal part of the columns, and all collect the result). In backward each makes the G of its rows;
dX is complete, dY is summed and goes to its owners. 8 n N D operations for n of N rows, nothing computed twice.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..scores.function import once
from ..scores.problem import FIELDS, Problem
from ..scores.selection import NOBODY, join
from ..scores.shard import Shard
from ..scores.statistics import decode
from . import ops, ring
from .autograd import BIAS, COL_FACTOR, ROW_FACTOR, SCALE, X, Y, gradients, of_total
from .weights import SUMS

__all__ = ["Sharded", "ShardedTotal", "joined", "joined_candidates", "joined_columns", "localised", "of_own"]


def localised(problem: tuple[Tensor | None, ...], shard: Shard) -> tuple[Tensor | None, ...]:
    """The own rows of a problem, with the columns of all processes."""
    found = ring.own_rows(problem, shard)
    for k in (Y, ring.TEACHER_Y):
        found[k] = None if found[k] is None else shard.gather_cols(found[k].detach())
    return tuple(found)


def joined(state: Tensor, statistic: Any, shard: Shard) -> Tensor:
    """The states `[fields, L]` of the group, from those `[fields, own rows + N]` that the own rows give."""
    own, (rows, cols) = shard.own_rows, statistic.lengths(sum(shard.rows), sum(shard.cols))
    if not rows + cols:
        return state
    mine, parts = own.stop - own.start if rows else 0, []
    if rows:
        parts.append(shard.gather_rows(state[:, :mine].T.contiguous()).T)
    if cols:
        of_cols = state[:, mine:].clone()
        if statistic.hardest:  # whose index counts from the own rows
            of_cols[-3] += own.start
        parts.append(joined_columns(of_cols, statistic, shard))
    return torch.cat(parts, 1)


def joined_columns(state: Tensor, statistic: Any, shard: Shard) -> Tensor:
    """The states `[fields, N]` of all columns, from those that each process has of its own rows."""
    fields, n = state.shape
    each = -(-n // shard.world)  # columns that a process joins, whoever owns them
    padded = state.new_zeros((fields, each * shard.world))
    padded[:, :n] = state
    parts = shard.collectives.exchange(padded.reshape(fields, shard.world, each).transpose(0, 1))
    whole = parts[0]
    for part in parts[1:]:
        whole = torch.stack(statistic.merge(whole, part))
    every = shard.collectives.gather(whole.T.contiguous(), (each,) * shard.world)
    return every.T[:, :n].contiguous()


def joined_candidates(order: Tensor, best: Tensor, k: int, cols: bool, shard: Shard) -> tuple[Tensor, Tensor]:
    """State `[own, k]` of the own rows and columns, from that of the own rows and what these give to all columns."""
    if not cols:
        return order, best
    mine = order.shape[0] - sum(shard.cols)
    most, found = max(shard.cols), []
    for t, none in ((order, NOBODY), (best, 0)):
        padded = t.new_full((shard.world, most, k), none)
        for rank, part in enumerate(t[mine:].split(shard.cols)):
            padded[rank, : part.shape[0]] = part
        found.append(shard.collectives.exchange(padded)[:, : shard.cols[shard.rank]].transpose(0, 1).flatten(1))
    of_cols = join((found[0], found[1]), None, k)
    return torch.cat([order[:mine], of_cols[0]]), torch.cat([best[:mine], of_cols[1]])


class Sharded(torch.autograd.Function):
    """`(shard, *problem, targets [L], backend, epilogue, flags) -> (*vectors [L], state [fields, L])`, of the group.

    The features are this process's, everything else is the group's.
    """

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> tuple[Tensor, ...]:
        """Own rows against all columns, and the exchange of states."""
        shard, problem = arguments[0], arguments[1 : FIELDS + 1]
        targets, backend, epilogue, flags = arguments[FIELDS + 1 :]
        statistic = decode(epilogue, flags)
        own, m = shard.own_rows, sum(shard.rows)
        rows, cols = statistic.lengths(m, sum(shard.cols))
        local: tuple[Tensor | None, ...] = ()
        if shard.ring:
            state = ring.states(problem, shard, backend, statistic)
            products = state.new_empty(0)
        else:
            local = localised(problem, shard)
            small = local[X].shape[0] * local[Y].shape[0] <= ops.KEPT_PRODUCTS[backend]  # type: ignore[union-attr]
            keep = small and any(ctx.needs_input_grad[1:4])
            here = of_own(targets, own, rows)
            _, _, state, products = ops.STATISTICS[backend](*local, here, epilogue, flags, keep)
        whole = joined(state, statistic, shard)
        factors = ops.factors(Problem.from_tensors(problem), (rows, cols)) if statistic.factor else None
        vectors = statistic.finish(whole, targets, factors)
        ctx.save_for_backward(*problem, *local, targets, whole, products)
        ctx.mark_non_differentiable(whole)
        ctx.set_materialize_grads(False)
        ctx.statistic = shard, backend, epilogue, flags
        return (*vectors, whole)

    @staticmethod
    def backward(ctx: Any, d_nll: Tensor | None, *more: Tensor | None) -> tuple[Tensor | None, ...]:
        """Own gradients of the own rows, and of the columns their sum; times the number of processes, as of `Group`."""
        saved, (shard, backend, epilogue, flags) = ctx.saved_tensors, ctx.statistic
        problem, local, (targets, state, products) = saved[:FIELDS], saved[FIELDS:-3], saved[-3:]
        statistic, needs, own = decode(epilogue, flags), ctx.needs_input_grad[1 : FIELDS + 1], shard.own_rows
        rows = statistic.lengths(sum(shard.rows), sum(shard.cols))[0]
        wanted = [d_nll, more[0]] if statistic.gap else [d_nll]
        given = [state.new_zeros(state.shape[1:]) if c is None else c.contiguous() for c in wanted]
        here = [of_own(c, own, rows) for c in given]
        counts, states = of_own(targets, own, rows), of_own(state, own, rows)
        if shard.ring:
            found = ring.gradients_of(problem, shard, counts, states, here, backend, statistic, needs)
        else:
            found = gradients(local, counts, states, products, here, backend, statistic, needs)
        for k in (X, SCALE, BIAS, ring.TEACHER_X, ring.TEACHER_SCALE):
            found[k] = found[k] * shard.world if needs[k] else None
        for k in (Y, ring.TEACHER_Y):  # nothing is sent for a frozen tower
            whole = None if not needs[k] else found[k] * shard.world
            found[k] = whole if whole is None or shard.ring else shard.collectives.scatter(whole, shard.cols)
        if statistic.factor and (needs[ROW_FACTOR] or needs[COL_FACTOR]):
            factors = statistic.factor_gradient(state, targets, tuple(given))
            found[ROW_FACTOR] = factors[:rows] if rows else torch.zeros_like(problem[ROW_FACTOR])
            found[COL_FACTOR] = factors[rows:] if statistic.cols else torch.zeros_like(problem[COL_FACTOR])
        return (None, *once(found, problem, needs), *(None,) * 4)


class ShardedTotal(torch.autograd.Function):
    """`(shard, *problem, backend) -> total []` of the group: every process sweeps its own rows."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Tensor:
        """Value and gradients of the own rows; the sum over the processes."""
        shard, problem, backend = arguments[0], arguments[1 : FIELDS + 1], arguments[FIELDS + 1]
        needs = ctx.needs_input_grad[1 : FIELDS + 1]
        learned = needs[ROW_FACTOR], needs[COL_FACTOR]
        sums: Sequence[Tensor | None] = (None, None)
        if shard.ring:
            total, *found = ring.sweep(problem, shard, backend, needs)
            sums = ring.sums(problem, shard, learned) if any(learned) else sums
        else:
            local = localised(problem, shard)
            total, *found = ops.SWEEP[backend](*local, *needs[:2], any(needs[2:4]))
            if needs[Y]:
                found[Y] = shard.collectives.scatter(found[Y], shard.cols)
            sums = SUMS(*local, *learned) if any(learned) else sums
        # the own rows are whole, the columns what the own rows give them
        joins = shard.gather_rows, shard.collectives.total
        whole = [join(t) if need else None for join, t, need in zip(joins, sums, learned, strict=True)]
        ctx.save_for_backward(*problem, *found, *whole)
        ctx.world = shard.world
        summed: Tensor = shard.collectives.total(total)
        return summed

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> tuple[Tensor | None, ...]:
        """The gradients times the cotangent and the number of processes."""
        saved, needs = ctx.saved_tensors, ctx.needs_input_grad[1 : FIELDS + 1]
        found = of_total(saved[:FIELDS], saved[FIELDS:], cotangent, ctx.world)
        return (None, *once(found, saved[:FIELDS], needs), None)


def of_own(vector: Any, own: slice, rows: int) -> Any:
    """Of a vector, or state, `[.., L]` the own rows and all columns."""
    if vector is None:
        return None
    return torch.cat([vector[..., :rows][..., own], vector[..., rows:]], -1)
