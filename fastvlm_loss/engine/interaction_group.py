"""Late interaction of several processes: the own images with the texts of all, which are gathered or travel."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ..scores.function import once
from ..scores.interaction import FIELDS
from ..scores.shard import Shard
from ..scores.statistics import Softmax
from ..scores.travel import home, send_home, travel
from . import ring
from .interaction_ops import BIAS, COL_ID, OF_COLS, OF_ROWS, ROW_ID, SCALE, STATISTICS, TARGET, Y_PADDING, gradients
from .sharded import joined, of_own

__all__ = ["Sharded"]

TRAVELLING = (*OF_COLS, Y_PADDING)  # tokens, weights and padding of the texts


class Sharded(torch.autograd.Function):
    """`(shard, *interaction, targets [L], flags) -> (*vectors [L], state [fields, L])`, of the group.

    As `sharded.Sharded`: every process scores its images with the texts of all, whose tokens are gathered or travel.
    """

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> tuple[Tensor, ...]:
        """Own images with all texts, and the exchange of states."""
        shard, *tensors, targets, flags = arguments
        statistic, own = Softmax.of(flags), shard.own_rows
        rows = statistic.lengths(sum(shard.rows), 0)[0]
        local: list[Any] = []
        if shard.ring:
            state = ring.merged(_states(tensors, shard, flags), own.stop - own.start if rows else 0, statistic)
        else:
            local = _own_images(tensors, shard)
            for k in TRAVELLING:
                local[k] = None if local[k] is None else shard.gather_cols(local[k].detach())
            state = STATISTICS(*local, of_own(targets, own, rows), flags)[2]
        state = joined(state, statistic, shard)
        ctx.save_for_backward(*tensors, *local, targets, state)
        ctx.mark_non_differentiable(state)
        ctx.set_materialize_grads(False)
        ctx.place = shard, rows, flags
        return (*statistic.finish(state, targets, None), state)

    @staticmethod
    def backward(ctx: Any, d_nll: Tensor | None, *more: Tensor | None) -> tuple[Tensor | None, ...]:
        """Of the own images whole, of the texts the sum; times the number of processes."""
        saved, needs, (shard, rows, flags) = ctx.saved_tensors, ctx.needs_input_grad[1:], ctx.place
        tensors, local, (targets, state) = saved[:FIELDS], saved[FIELDS:-2], saved[-2:]
        wanted = [d_nll, more[0]] if Softmax.of(flags).gap else [d_nll]
        given = [state.new_zeros(state.shape[1:]) if c is None else c for c in wanted]
        targets, state, *given = (of_own(t, shard.own_rows, rows) for t in (targets, state, *given))
        if shard.ring:
            found = _in_a_ring(tensors, shard, targets, state, given, flags, needs)
        else:
            found = gradients(local, targets, state, given, flags, needs)
        for k in (*OF_ROWS, *OF_COLS, SCALE):
            found[k] = found[k] * shard.world if needs[k] else None
        for k in OF_COLS:  # nothing is sent for a frozen tower
            found[k] = found[k] if not needs[k] or shard.ring else shard.collectives.scatter(found[k], shard.cols)
        return (None, *once(found, tensors, needs), None, None)


def _own_images(tensors: list[Any], shard: Shard) -> list[Any]:
    """The fields with the own images' targets and ids, which are columns of all."""
    own = list(tensors)
    if own[TARGET] is None:
        own[TARGET] = torch.arange(sum(shard.rows), device=own[0].device)
    for k in (TARGET, ROW_ID):
        own[k] = None if own[k] is None else own[k][shard.own_rows]
    return own


def _turns(tensors: list[Any], shard: Shard) -> Iterator[tuple[slice, list[Any]]]:
    """For the texts of each process, the own first: their place, and the own images beside them."""
    own = _own_images(tensors, shard)
    travelling = [k for k in TRAVELLING if own[k] is not None]
    for cols, held in travel([own[k] for k in travelling], shard.cols, shard):
        here = list(own)
        for k, t in zip(travelling, held, strict=True):
            here[k] = t
        here[COL_ID] = None if own[COL_ID] is None else own[COL_ID][cols]
        here[TARGET] = ring.target_among(own[TARGET], cols)
        yield cols, here


def _states(tensors: list[Any], shard: Shard, flags: int) -> Iterator[tuple[slice, Tensor]]:
    for cols, here in _turns(tensors, shard):
        yield cols, STATISTICS(*here, None, flags)[2]


def _in_a_ring(
    tensors: Any, shard: Shard, targets: Tensor | None, state: Tensor, given: list[Tensor], flags: int,
    needs: tuple[bool, ...],
) -> list[Any]:  # fmt: skip
    """As `gradients`; those of the texts already at home."""
    statistic, total = Softmax.of(flags), [None] * FIELDS
    own = shard.rows[shard.rank] if statistic.rows else 0
    sent, of_cols = None, [k for k in OF_COLS if needs[k]]
    for cols, here in _turns(tensors, shard):
        counts, part, *cotangents = (ring.of_turn(t, own, cols, statistic) for t in (targets, state, *given))
        found = gradients(here, counts, part, cotangents, flags, needs)
        ring.add(total, found, [k for k in (*OF_ROWS, SCALE, BIAS) if needs[k]], state.dtype)
        if of_cols:
            sent = send_home([found[k].to(state.dtype) for k in of_cols], sent, shard.cols, shard)
    ring.add(total, dict(zip(of_cols, home(sent, shard.cols, shard), strict=True)), of_cols, state.dtype)
    return [None if t is None else t.to(tensors[k].dtype) for k, t in enumerate(total)]
