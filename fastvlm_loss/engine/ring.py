"""The ring: column shards travel from process to process, with the sums of their gradients, instead of being gathered.

O(n D) memory a process. The next shard is on its way while one is used, and the sums of one while the next are made.
What a process makes of a shard is the problem of its own rows with that shard's columns; states join as ever.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..scores.problem import FIELDS
from ..scores.selection import Selection, join
from ..scores.shard import Shard
from . import ops
from .autograd import BIAS, COL_FACTOR, ROW_FACTOR, SCALE, X, Y, gradients
from .weights import SUMS

__all__ = ["TEACHER_SCALE", "TEACHER_X", "TEACHER_Y", "gradients_of", "own_rows", "select", "states", "sums", "sweep"]

TARGET, ROW_ID, COL_ID, TEACHER_X, TEACHER_Y, TEACHER_SCALE, ROW_LIMIT, COL_LIMIT = 4, 5, 6, 9, 10, 11, 13, 14
Fields = tuple[Any, ...]


def own_rows(problem: Fields, shard: Shard) -> list[Any]:
    """The fields with the own rows alone; their targets are columns of the whole matrix."""
    own, rows = shard.own_rows, list(problem)
    if rows[TARGET] is None:
        rows[TARGET] = torch.arange(sum(shard.rows), device=problem[X].device)
    for k in (TARGET, ROW_ID, ROW_FACTOR):
        rows[k] = None if rows[k] is None else rows[k][own]
    if rows[ROW_LIMIT] is not None:
        rows[ROW_LIMIT] = rows[ROW_LIMIT][:, own].contiguous()
    return rows


def turns(problem: Fields, shard: Shard) -> Iterator[tuple[slice, Fields]]:
    """For each shard of the columns, the own first: its place, and the problem of the own rows with it."""
    rows = own_rows(problem, shard)
    mine = rows[TARGET]
    travelling = [k for k in (Y, TEACHER_Y) if rows[k] is not None]
    held = [_padded(rows[k].detach(), max(shard.cols)) for k in travelling]
    for turn in range(shard.world):
        coming = shard.collectives.pass_on(held) if turn + 1 < shard.world else None
        rank = (shard.rank + turn) % shard.world
        cols, here = shard.cols_of(rank), list(rows)
        for k, t in zip(travelling, held, strict=True):
            here[k] = t[: shard.cols[rank]]
        for k in (COL_ID, COL_FACTOR):
            t = here[k]
            here[k] = None if t is None else t[cols]
        limit = here[COL_LIMIT]
        here[COL_LIMIT] = None if limit is None else limit[:, cols].contiguous()
        inside = (mine >= cols.start) & (mine < cols.stop)
        here[TARGET] = torch.where(inside, mine - cols.start, -1)
        yield cols, tuple(here)
        if coming is not None:
            held = coming()


def states(problem: Fields, shard: Shard, backend: str, statistic: Any) -> Tensor:
    """States `[fields, own rows + N]` of the own rows, and of all columns from the own rows."""
    own = shard.rows[shard.rank] if statistic.rows else 0
    of_rows: Any = None
    of_cols: dict[int, Tensor] = {}
    for cols, here in turns(problem, shard):
        state = ops.STATISTICS[backend](*here, None, statistic.name, statistic.flags, False)[2]
        part = state[:, :own].clone()
        if statistic.hardest:  # whose index counts from the shard's columns
            part[-3] += cols.start
        of_rows = part if of_rows is None else torch.stack(statistic.merge(of_rows, part))
        of_cols[cols.start if cols.stop > cols.start else -1 - len(of_cols)] = state[:, own:]
    assert of_rows is not None
    return torch.cat([of_rows, *(of_cols[at] for at in sorted(of_cols))], 1)


def gradients_of(
    problem: Fields, shard: Shard, targets: Tensor | None, state: Tensor, given: list[Tensor], backend: str,
    statistic: Any, needs: tuple[bool, ...],
) -> list[Tensor | None]:  # fmt: skip
    """As `autograd.gradients`, from states, targets and cotangents `[own rows + N]`; of the columns already at home."""
    own = shard.rows[shard.rank] if statistic.rows else 0
    total: list[Any] = [None] * FIELDS
    sent: Any = None
    home = [k for k in (Y, TEACHER_Y) if needs[k]]

    def part(vector: Tensor, cols: slice) -> Tensor:
        columns = vector[..., own:][..., cols] if statistic.cols else vector[..., own:]
        return torch.cat([vector[..., :own], columns], -1)

    for cols, here in turns(problem, shard):
        counts = None if targets is None else part(targets, cols)
        cotangents = [part(c, cols).contiguous() for c in given]
        own_state, nothing = part(state, cols).contiguous(), state.new_empty(0)
        found: list[Any] = gradients(here, counts, own_state, nothing, cotangents, backend, statistic, needs)
        for k in (X, SCALE, BIAS, TEACHER_X, TEACHER_SCALE):
            if needs[k]:
                wide = found[k].to(problem[SCALE].dtype)
                total[k] = wide if total[k] is None else total[k] + wide
        sums = [_padded(found[k].to(state.dtype), max(shard.cols)) for k in home]
        if home:
            sums = sums if sent is None else [a + b for a, b in zip(sums, sent(), strict=True)]
            sent = shard.collectives.pass_on(sums)
    for k, t in zip(home, sent() if home else [], strict=True):
        total[k] = t[: shard.cols[shard.rank]]
    return [None if t is None else t.to(problem[k].dtype) for k, t in enumerate(total)]


def sweep(problem: Fields, shard: Shard, backend: str, needs: tuple[bool, ...]) -> list[Tensor]:
    """As the operator `sweep`, of the own rows and all columns; the gradient of the own columns at home."""
    total: list[Any] = [None] * 5
    sent: Any = None
    for _, here in turns(problem, shard):
        made = list(ops.SWEEP[backend](*here, *needs[:2], any(needs[2:4])))
        if needs[Y]:
            sums = _padded(made[2], max(shard.cols))
            sent = shard.collectives.pass_on([sums if sent is None else sums + sent()[0]])
        for k in (0, 1, 3, 4):
            total[k] = made[k] if total[k] is None else total[k] + made[k]
        total[2] = made[2]
    if needs[Y]:
        total[2] = sent()[0][: shard.cols[shard.rank]]
    return total


def sums(problem: Fields, shard: Shard, needs: tuple[bool, bool]) -> list[Tensor]:
    """As the operator `sums`, of the own rows `[own rows]`, and of all columns from the own rows `[N]`."""
    of_rows: Any = None
    of_cols = problem[SCALE].new_zeros(sum(shard.cols) if needs[1] else 0)
    for cols, here in turns(problem, shard):
        rows, part = SUMS(*here, *needs)
        of_rows = rows if of_rows is None else of_rows + rows
        if needs[1]:
            of_cols[cols] = part
    return [of_rows, of_cols]


def select(problem: Fields, shard: Shard, backend: str, statistic: Any, selection: Selection) -> tuple[Tensor, Tensor]:
    """As the operator `select`, state `[own rows + N, k]`."""
    own = shard.rows[shard.rank] if statistic.rows else 0
    of_rows: Any = None
    of_cols: dict[int, tuple[Tensor, Tensor]] = {}
    for cols, here in turns(problem, shard):
        first = selection.place + selection.place.new_tensor([0, 0, 0, 1]) * cols.start
        totals = selection.totals
        if totals is not None:
            totals = torch.cat([totals[:own], totals[own:][cols]] if statistic.cols else [totals])
        told = replace(selection, place=first, totals=totals)
        law = told.k, told.noise, told.law, told.totals, told.place
        order, best = ops.SELECT[backend](*here, None, statistic.name, statistic.flags, False, *law)[4:]
        part = order[:own], best[:own]
        of_rows = part if of_rows is None else join(of_rows, part, selection.k)
        of_cols[cols.start if cols.stop > cols.start else -1 - len(of_cols)] = order[own:], best[own:]
    ordered = [of_cols[at] for at in sorted(of_cols)]
    return torch.cat([of_rows[0], *(o for o, _ in ordered)]), torch.cat([of_rows[1], *(b for _, b in ordered)])


def _padded(t: Tensor, rows: int) -> Tensor:
    return F.pad(t, (0, 0, 0, rows - t.shape[0])).contiguous()
