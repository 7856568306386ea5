"""The ring: column shards travel from process to process, with the sums of their gradients, instead of being gathered.

O(n D) memory a process. The next shard is on its way while one is used, and the sums of one while the next are made.
What a process makes of a shard is the problem of its own rows with that shard's columns; states join as ever.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..scores.problem import FIELDS
from ..scores.selection import Selection, join
from ..scores.shard import Shard
from ..scores.travel import home, send_home, travel
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
    for cols, held in travel([rows[k] for k in travelling], shard.cols, shard):
        here = list(rows)
        for k, t in zip(travelling, held, strict=True):
            here[k] = t
        for k in (COL_ID, COL_FACTOR):
            t = here[k]
            here[k] = None if t is None else t[cols]
        limit = here[COL_LIMIT]
        here[COL_LIMIT] = None if limit is None else limit[:, cols].contiguous()
        here[TARGET] = target_among(mine, cols)
        yield cols, tuple(here)


def target_among(target: Tensor, cols: slice) -> Tensor:
    """Targets, columns of the whole matrix, as those of a part; -1 for one elsewhere."""
    return torch.where((target >= cols.start) & (target < cols.stop), target - cols.start, -1)


def of_turn(vector: Any, own: int, cols: slice, statistic: Any) -> Any:
    """Of a vector, or state, of the own rows and all columns that of a part of the columns."""
    if vector is None:
        return None
    columns = vector[..., own:][..., cols] if statistic.cols else vector[..., own:]
    return torch.cat([vector[..., :own], columns], -1).contiguous()


def add(total: list[Any], found: Any, fields: Sequence[int], dtype: torch.dtype) -> None:
    """Add these fields to the sums so far, in a wide dtype."""
    for k in fields:
        wide = found[k].to(dtype)
        total[k] = wide if total[k] is None else total[k] + wide


def states(problem: Fields, shard: Shard, backend: str, statistic: Any) -> Tensor:
    """States `[fields, own rows + N]` of the own rows, and of all columns from the own rows."""
    how = statistic.name, statistic.flags, False
    made = ((cols, ops.STATISTICS[backend](*here, None, *how)[2]) for cols, here in turns(problem, shard))
    return merged(made, shard.rows[shard.rank] if statistic.rows else 0, statistic)


def merged(made: Iterable[tuple[slice, Tensor]], own: int, statistic: Any) -> Tensor:
    """One state of the own rows and all columns, from those of the own rows with each part of the columns."""
    of_rows: Any = None
    of_cols: dict[int, Tensor] = {}
    for cols, state in made:
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
    of_cols = [k for k in (Y, TEACHER_Y) if needs[k]]
    for cols, here in turns(problem, shard):
        counts, here_state, *cotangents = (of_turn(t, own, cols, statistic) for t in (targets, state, *given))
        nothing = state.new_empty(0)
        found: list[Any] = gradients(here, counts, here_state, nothing, cotangents, backend, statistic, needs)
        add(total, found, [k for k in (X, SCALE, BIAS, TEACHER_X, TEACHER_SCALE) if needs[k]], state.dtype)
        if of_cols:
            sent = send_home([found[k].to(state.dtype) for k in of_cols], sent, shard.cols, shard)
    for k, t in zip(of_cols, home(sent, shard.cols, shard), strict=True):
        total[k] = t
    return [None if t is None else t.to(problem[k].dtype) for k, t in enumerate(total)]


def sweep(problem: Fields, shard: Shard, backend: str, needs: tuple[bool, ...]) -> list[Tensor]:
    """As the operator `sweep`, of the own rows and all columns; the gradient of the own columns at home."""
    total: list[Any] = [None] * 5
    sent: Any = None
    for _, here in turns(problem, shard):
        made = list(ops.SWEEP[backend](*here, *needs[:2], any(needs[2:4])))
        if needs[Y]:
            sent = send_home(made[2:3], sent, shard.cols, shard)
        for k in (0, 1, 3, 4):
            total[k] = made[k] if total[k] is None else total[k] + made[k]
        total[2] = made[2]
    if needs[Y]:
        (total[2],) = home(sent, shard.cols, shard)
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
