"""The parts of a run: for one loss in one dtype, each yields what it measured as flat rows."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import torch

from fastvlm_loss.losses import LossSpec, registry

from .baselines import DENSE, OURS, contestants
from .dense import Loss
from .gate import gate
from .inputs import Inputs, clip_inputs, inputs
from .measure import BOTH, MODES, ProductRate, interleaved, power_law, step
from .memory import peak
from .size import Size
from .suite import Suite
from .work import Work, work

__all__ = ["CLIP", "LIMIT", "PARTS", "Entry", "Run", "admit", "line", "run_loss", "times"]

Row = dict[str, Any]
LIMIT, CLIP = "limit", "clip_loss"  # timed beside the contestants
LONG = 5e11  # operations from which one call, without warm-up, is enough


@dataclass(frozen=True)
class Run:
    """A suite with the user's settings; `limit` is the most bytes a process may hold in the growth of memory."""

    suite: Suite
    repeats: int
    threads: int
    limit: int | None
    log: Callable[[str], None]


@dataclass(frozen=True)
class Entry:
    """A loss in one dtype, with the contestants that passed the gate."""

    spec: LossSpec
    dtype: torch.dtype
    losses: dict[str, Loss]

    @property
    def work(self) -> Work:
        """What the loss has to compute at the least."""
        return work(self.spec.name)

    def row(self, contestant: str, size: Size, mode: str = BOTH) -> Row:
        """The keys that every row has."""
        kind = str(self.dtype).removeprefix("torch.")
        return {"contestant": contestant, "dtype": kind, **size.row(), "mode": mode}


def run_loss(run: Run, spec: LossSpec, parts: tuple[str, ...]) -> dict[str, Any]:
    """Gate, then every part for every dtype: lists of rows by part, and who was left out and why."""
    losses, missing = contestants(spec)
    result: dict[str, Any] = {"missing": missing, "refused": {}, "gate": []}
    for dtype in run.suite.dtypes:
        entry = admit(run, spec, dtype, losses, result)
        for part in parts:
            for row in PARTS[part](run, entry):
                result.setdefault(part, []).append(row)
                run.log(f"{spec.name} {part}: {line(row)}")
    return {**result, "fits": list(_fits(run, result))}


def admit(run: Run, spec: LossSpec, dtype: torch.dtype, losses: dict[str, Loss], result: dict[str, Any]) -> Entry:
    """The gate: who computes the loss in this dtype; the others go to `result["refused"]` with the reason."""
    passed = dict(losses)
    for verdict in gate(spec, losses, dtype, run.suite.device, *run.suite.shapes(spec).gate):
        result["gate"].append(verdict.row())
        if not verdict.passed and verdict.contestant in passed:
            del passed[verdict.contestant]
            result["refused"][f"{verdict.contestant}, {verdict.dtype}"] = verdict.reason
            run.log(f"{spec.name}: refused {verdict.contestant}, {verdict.dtype}: {verdict.reason}")
    return Entry(spec, dtype, passed)


def times(
    run: Run, entry: Entry, given: Inputs, mode: str, rounds: int, warmup: int = 1, block: int = 1,
    beside: bool = False,
) -> Iterator[Row]:  # fmt: skip
    """Everyone's time on the same inputs, between them the limit's and, if asked (`beside`), the plain clip_loss's."""
    rate = ProductRate(entry.work.operations(mode, given.size), entry.dtype, run.suite.device)
    calls: dict[str, Callable[[], object]] = {LIMIT: rate}
    if beside and entry.spec.name != CLIP and not entry.spec.names:
        calls[CLIP] = partial(step, registry[CLIP].function, clip_inputs(given), mode)
    calls |= {name: partial(step, loss, given, mode) for name, loss in entry.losses.items()}
    timings = interleaved(calls, rounds, run.suite.device, warmup, block)
    least = timings[LIMIT].scaled(rate.factor)
    for name, timing in {**timings, LIMIT: least}.items():
        yield {**entry.row(name, given.size, mode), **asdict(timing), "over_limit": timing.median / least.median}


def _times(run: Run, entry: Entry, size: Size, *how: Any) -> Iterator[Row]:
    return times(run, entry, inputs(entry.spec, size, entry.dtype, run.suite.device), *how)


def _speed(run: Run, entry: Entry) -> Iterator[Row]:
    plan = run.suite.plan(entry.spec)
    for size in run.suite.sizes(entry.spec):
        for mode in plan.modes:
            yield from _times(run, entry, size, mode, min(run.repeats, plan.repeats), 1, 1, True)


def _small(run: Run, entry: Entry) -> Iterator[Row]:
    for n in run.suite.small:
        for mode in MODES:
            rounds = run.suite.small_rounds * run.repeats
            size = Size.square(n, run.suite.small_dim)
            yield from _times(run, entry, size, mode, rounds, 1, run.suite.small_block)


def _memory(run: Run, entry: Entry) -> Iterator[Row]:
    for size in run.suite.sizes(entry.spec):
        for name in entry.losses:
            yield _peak(run, entry, name, size, None)


def _growth(run: Run, entry: Entry) -> Iterator[Row]:
    # one dtype, ours and dense only: the large sizes take a minute a call
    if entry.dtype != run.suite.dtypes[0]:
        return
    both = {name: entry.losses[name] for name in (OURS, DENSE) if name in entry.losses}
    for n in run.suite.growth:
        size = Size.square(n, run.suite.growth_dim)
        peaks = {name: _peak(run, entry, name, size, run.limit) for name in both}
        alive = replace(entry, losses={k: v for k, v in both.items() if peaks[k]["extra"] is not None})
        rounds, warmup = (1, 0) if entry.work.operations(BOTH, size) >= LONG else (run.repeats, 1)
        for row in _times(run, alive, size, BOTH, rounds, warmup):
            yield {**peaks.pop(row["contestant"], {}), **row}
        yield from peaks.values()  # the dead, without a time


def _peak(run: Run, entry: Entry, name: str, size: Size, limit: int | None) -> Row:
    found = peak(entry.spec.name, name, size, entry.dtype, device=run.suite.device, threads=run.threads, limit=limit)
    return {**entry.row(name, size), "extra": found.extra, "died": found.died}


def _fits(run: Run, result: dict[str, Any]) -> Iterator[Row]:
    """Exponents of time and memory in N; memory at the largest batch is predicted for who did not reach it."""
    for name in (OURS, DENSE):
        for value in ("median", "extra"):
            rows = [r for r in result.get("growth", []) if r["contestant"] == name and r.get(value)]
            if len(rows) > 1:
                factor, exponent = power_law([r["n"] for r in rows], [r[value] for r in rows])
                reached = [r["n"] for r in rows]
                row = {"contestant": name, "value": value, "exponent": exponent, "factor": factor, "n": reached}
                predicted = {n: factor * n**exponent for n in run.suite.growth if n > max(reached)}
                yield {**row, "predicted": predicted}


def line(row: Row) -> str:
    """For the log."""
    time = f"{row['median'] * 1e3:.3f} ms ({row['over_limit']:.2f} x limit)" if "median" in row else ""
    extra = f"{row['extra'] / 1e6:.1f} MB extra" if row.get("extra") is not None else row.get("died", "")
    size = f"{Size.of(row).plain()} {row['dtype']} {row['mode']}"
    return f"{size}, {row['contestant']}: {', '.join(v for v in (time, extra) if v)}"


PARTS: dict[str, Callable[[Run, Entry], Iterator[Row]]] = {
    "speed": _speed,
    "small": _small,
    "memory": _memory,
    "growth": _growth,
}
