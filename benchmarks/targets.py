"""What the library promises of a symmetric loss on a CPU, against what a run measured."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from .baselines import DENSE, OURS
from .measure import BOTH

__all__ = ["Target", "targets"]

# dtype: at most this times the limit, and this share of dense's time
SPEED = {"float32": (1.25, 1 / 1.8), "bfloat16": (2.0, 1 / 2.0)}
MEMORY = {(8192, 512): 64e6, (65536, 256): 512e6}
SLACK, SHARE = 30e-6, 1.10  # what a small batch may take beyond dense
EXPONENTS = {"median": ("time", 2.1), "extra": ("memory", 1.1)}


@dataclass(frozen=True)
class Target:
    """`measured` must not exceed `most`."""

    what: str
    measured: float
    most: float

    def __str__(self) -> str:
        verdict = "met" if self.measured <= self.most else "MISSED"
        return f"{verdict:6} {self.what}: {self.measured:.4g}, wanted at most {self.most:.4g}"


def targets(loss: dict[str, Any]) -> Iterator[Target]:
    """All targets that the parts of this result can judge."""
    for ours, dense in _pairs(loss.get("speed", [])):
        if ours["mode"] == BOTH and ours["dtype"] in SPEED:
            limit, share = SPEED[ours["dtype"]]
            size = f"{ours['dtype']} at {ours['n']} x {ours['d']}"
            yield Target(f"time over limit, {size}", ours["over_limit"], limit)
            yield Target(f"time over dense, {size}", ours["median"] / dense["median"], share)
    for ours, dense in _pairs(loss.get("small", [])):
        what = f"microseconds, {ours['mode']}, {ours['dtype']} at N = {ours['n']}"
        yield Target(what, ours["median"] * 1e6, (dense["median"] * SHARE + SLACK) * 1e6)
    for row in [*loss.get("memory", []), *loss.get("growth", [])]:
        most = MEMORY.get((row["n"], row["d"]))
        if row["contestant"] == OURS and most and row.get("extra") is not None:
            yield Target(f"MB extra, {row['dtype']} at {row['n']} x {row['d']}", row["extra"] / 1e6, most / 1e6)
    for fit in loss["fits"]:
        if fit["contestant"] == OURS:
            what, most = EXPONENTS[fit["value"]]
            yield Target(f"exponent of {what}", fit["exponent"], most)


def _pairs(rows: list[dict[str, Any]]) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
    keys = ("mode", "dtype", "n", "d")
    dense = {tuple(r[k] for k in keys): r for r in rows if r["contestant"] == DENSE}
    for row in rows:
        if row["contestant"] == OURS and (match := dense.get(tuple(row[k] for k in keys))):
            yield row, match
