"""The parts of a run: for one loss in one dtype, each yields what it measured as flat rows."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fastvlm_loss.losses import LossSpec

from .adapters import Loss
from .baselines import DENSE, OURS, contestants
from .gate import gate
from .measure import BOTH, MODES, ProductRate, features, interleaved, power_law, step
from .memory import peak
from .suite import Suite
from .work import Work, work

__all__ = ["LIMIT", "PARTS", "Entry", "Run", "admit", "line", "run_loss", "times"]

Row = dict[str, Any]
LIMIT = "limit"
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

    def row(self, contestant: str, n: int, d: int, mode: str) -> Row:
        """The keys that every row has."""
        kind = str(self.dtype).removeprefix("torch.")
        return {"contestant": contestant, "dtype": kind, "n": n, "d": d, "mode": mode}


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
    for verdict in gate(spec, losses, dtype, run.suite.device, *run.suite.gate):
        result["gate"].append(verdict.row())
        if not verdict.passed and verdict.contestant in passed:
            del passed[verdict.contestant]
            result["refused"][f"{verdict.contestant}, {verdict.dtype}"] = verdict.reason
            run.log(f"{spec.name}: refused {verdict.contestant}, {verdict.dtype}: {verdict.reason}")
    return Entry(spec, dtype, passed)


def times(
    run: Run, entry: Entry, tensors: dict[str, Tensor], mode: str, rounds: int, warmup: int = 1, block: int = 1
) -> Iterator[Row]:
    """Everyone's time on the same tensors, and the limit's between them."""
    n, d = tensors["image_features"].shape
    rate = ProductRate(entry.work.operations(mode, n, d), entry.dtype, run.suite.device)
    calls = {name: partial(step, loss, tensors, mode) for name, loss in entry.losses.items()}
    timings = interleaved({LIMIT: rate, **calls}, rounds, run.suite.device, warmup, block)
    least = timings[LIMIT].scaled(rate.factor)
    for name, timing in {**timings, LIMIT: least}.items():
        yield {**entry.row(name, n, d, mode), **asdict(timing), "over_limit": timing.median / least.median}


def _times(run: Run, entry: Entry, n: int, d: int, *how: Any) -> Iterator[Row]:
    return times(run, entry, features(n, d, entry.dtype, run.suite.device, entry.work.bias), *how)


def _speed(run: Run, entry: Entry) -> Iterator[Row]:
    for n, d in run.suite.sizes:
        for mode in MODES:
            yield from _times(run, entry, n, d, mode, run.repeats)


def _small(run: Run, entry: Entry) -> Iterator[Row]:
    for n in run.suite.small:
        for mode in MODES:
            rounds = run.suite.small_rounds * run.repeats
            yield from _times(run, entry, n, run.suite.small_dim, mode, rounds, 1, run.suite.small_block)


def _memory(run: Run, entry: Entry) -> Iterator[Row]:
    for n, d in run.suite.sizes:
        for name in entry.losses:
            yield _peak(run, entry, name, n, d, None)


def _growth(run: Run, entry: Entry) -> Iterator[Row]:
    # one dtype, ours and dense only: the large sizes take a minute a call
    if entry.dtype != run.suite.dtypes[0]:
        return
    d, both = run.suite.growth_dim, {name: entry.losses[name] for name in (OURS, DENSE) if name in entry.losses}
    for n in run.suite.growth:
        peaks = {name: _peak(run, entry, name, n, d, run.limit) for name in both}
        alive = replace(entry, losses={k: v for k, v in both.items() if peaks[k]["extra"] is not None})
        rounds, warmup = (1, 0) if entry.work.operations(BOTH, n, d) >= LONG else (run.repeats, 1)
        for row in _times(run, alive, n, d, BOTH, rounds, warmup):
            yield {**peaks.pop(row["contestant"], {}), **row}
        yield from peaks.values()  # the dead, without a time


def _peak(run: Run, entry: Entry, name: str, n: int, d: int, limit: int | None) -> Row:
    found = peak(entry.spec.name, name, n, d, entry.dtype, device=run.suite.device, threads=run.threads, limit=limit)
    return {**entry.row(name, n, d, BOTH), "extra": found.extra, "died": found.died}


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
    size = f"{row['n']} x {row['d']} {row['dtype']} {row['mode']}"
    return f"{size}, {row['contestant']}: {', '.join(v for v in (time, extra) if v)}"


PARTS: dict[str, Callable[[Run, Entry], Iterator[Row]]] = {
    "speed": _speed,
    "small": _small,
    "memory": _memory,
    "growth": _growth,
}
