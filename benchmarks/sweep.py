"""A suite of cells: the sizes in order of importance, as many as a budget of seconds allows, all losses in one run."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from fastvlm_loss.losses import LossSpec

from .adapters import said
from .baselines import COMPILED, DENSE, OURS, contestants
from .check import Answer, answer
from .dense import Loss
from .first_call import first_call
from .gate import survived
from .inputs import Inputs, inputs
from .measure import BOTH, MODES, step
from .memory import extra
from .pace import Pace
from .parts import Entry, Run, admit, line, times
from .suite import Cell

__all__ = ["sweep"]

Row = dict[str, Any]
Result = dict[str, Any]
LONG = 2.0  # seconds from which one call, without warm-up, is enough
LISTS = ("gate", "first_calls", "checks", "speed", "memory", "left_out", "not_reached", "fits")


def sweep(run: Run, specs: Mapping[str, LossSpec], budget: float, save: Callable[[Result], None]) -> Result:
    """Results by loss; `save` gets them after every cell, so that what was measured survives what comes."""
    pace = Pace(budget)
    found = {name: contestants(spec, run.suite.peers) for name, spec in specs.items()}
    results: Result = {
        name: {"missing": missing, "refused": {}, **{part: [] for part in LISTS}}
        for name, (_, missing) in found.items()
    }
    entries: dict[tuple[str, torch.dtype], Entry] = {}
    for cell, name in ((cell, name) for cell in run.suite.cells for name in specs if cell.takes(specs[name])):
        result, key = results[name], (name, cell.dtype)
        try:
            if pace.left() > 0 and key not in entries:
                entries[key] = _admit(run, Entry(specs[name], cell.dtype, found[name][0]), result)
            why = pace.too_late(entries[key], cell.size) if key in entries else "no time left"
            if not why:
                _cell(run, entries[key], cell, pace, result)
        except Exception as error:  # noqa: BLE001 (one size must not take the others with it)
            why = said(error)
        if why:
            kind = str(cell.dtype).removeprefix("torch.")
            result["not_reached"].append({**cell.size.row(), "dtype": kind, "why": why})
            run.log(f"{name}: not reached {cell.size.plain()} {kind}: {why}")
        save(results)
    return results


def _admit(run: Run, entry: Entry, result: Result) -> Entry:
    """The first call of ours, by the clock, then the gate."""
    size, device = run.suite.shapes(entry.spec).gate[0], run.suite.device
    torch.mm(*torch.ones(2, 64, 64, device=device, dtype=entry.dtype))  # starts the libraries
    given = inputs(entry.spec, size, entry.dtype, device)
    first = first_call(partial(step, entry.losses[OURS], given, BOTH), device)
    result["first_calls"].append({**entry.row(OURS, size), **first})
    return admit(run, entry.spec, entry.dtype, entry.losses, result)


def _cell(run: Run, entry: Entry, cell: Cell, pace: Pace, result: Result) -> None:
    """One size: the right answer, then everyone's memory and answer, then the times of those who were right."""
    if OURS not in entry.losses:
        raise RuntimeError("our own loss was refused by the gate")
    size, device = cell.size, run.suite.device
    if torch.device(device).type == "cuda":
        torch.cuda.empty_cache()
    if size in run.suite.headline and COMPILED in entry.losses:
        torch.compiler.reset()  # compiled for exactly this size, as for a training run
    given = inputs(entry.spec, size, cell.dtype, device)
    right = _right(entry, given, result)
    right_ones: dict[str, Loss] = {}
    for who, loss in entry.losses.items():
        if why := pace.refuses(entry, who, size, device):
            result["left_out"].append({**entry.row(who, size), "why": why})
            run.log(f"{entry.spec.name}: {size.plain()}, {who}: left out, {why}")
        elif row := _tried(run, entry, who, given, right, pace, result):
            result["memory"].append(row)
            pace.learn(entry, row)
            right_ones[who] = loss
    for row in _timed(run, replace(entry, losses=right_ones), given, pace):
        result["speed"].append(row)
        pace.learn(entry, row)
        run.log(f"{entry.spec.name} speed: {line(row)}")
    if OURS not in right_ones:
        raise RuntimeError("our own loss was refused at this size")


def _right(entry: Entry, given: Inputs, result: Result) -> Answer | None:
    kind = str(entry.dtype).removeprefix("torch.")
    judged = (row for row in result["gate"] if row["contestant"] == OURS and row["dtype"] == kind)
    try:
        forms = [entry.losses[DENSE]] if DENSE in entry.losses else []
        return answer(entry.spec, given, [*judged][-1]["budgets"], forms)
    except LookupError as error:
        result["left_out"].append({**entry.row("check", given.size), "why": str(error)})
        return None


def _tried(
    run: Run, entry: Entry, who: str, given: Inputs, right: Answer | None, pace: Pace, result: Result
) -> Row | None:
    """Warm up, then measure the memory and judge the answer of one call; None for who may not be timed."""
    device, row = run.suite.device, entry.row(who, given.size)
    call = partial(given.evaluate, entry.losses[who])
    try:
        if pace.seconds(entry, who, given.size) < LONG:
            first = first_call(call, device)
            result["first_calls"] += [{**row, **first}] if who == OURS else []
        returned, held = extra(lambda: tuple(call().values()), device)
        if right is not None:
            verdict = right.judge(who, given, dict(zip(("loss", *given.tensors), returned, strict=True)))
            result["checks"].append({**verdict.row(), "rows": right.how()})
            if not verdict.passed:
                raise ArithmeticError(verdict.reason)
    except torch.OutOfMemoryError as error:
        result["memory"].append({**row, "extra": None, "died": said(error)})
        torch.cuda.empty_cache()
        return None
    except Exception as error:  # noqa: BLE001 (a peer and its compiler may raise anything)
        result["refused"][f"{who}, {row['dtype']}, {given.size.plain()}"] = said(error)
        run.log(f"{entry.spec.name}: refused {who} at {given.size.plain()}: {said(error)}")
        survived(who, error, device)
        return None
    return {**row, "extra": held, "died": ""}


def _timed(run: Run, entry: Entry, given: Inputs, pace: Pace) -> Iterator[Row]:
    long = any(pace.seconds(entry, who, given.size) > LONG for who in entry.losses)
    rounds = pace.rounds(entry, given.size, run.repeats)
    for mode in MODES:
        yield from times(run, entry, given, mode, rounds, warmup=0 if long else 1, beside=True)
