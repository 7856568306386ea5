"""What the library promises, on a CPU and on a GPU, against what a run measured."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from .baselines import COMPILED, DENSE, METRICS, OURS
from .measure import BOTH
from .parts import CLIP
from .size import Size

__all__ = ["Target", "targets"]

Row = dict[str, Any]
OLDEST = ("clip_loss", "siglip_loss")  # whose targets are in milliseconds and megabytes
# CPU, by dtype: at most this times the limit, and this share of dense's time
SPEED = {"float32": (1.25, 1 / 1.8), "bfloat16": (2.0, 1 / 2.0)}
MEMORY = {(8192, 512): 64e6, (65536, 256): 512e6}
SLACK, SHARE = 30e-6, 1.10  # what a small batch may take beyond dense
EXPONENTS = {"median": ("time", 2.1), "extra": ("memory", 1.1)}
# GPU, bf16, forward + backward: share of the limit, and times as fast as a baseline
SIZES = ((32768, 768), (65536, 768))
SHARE_OF_LIMIT = 0.65
FASTER = {DENSE: 2.0, COMPILED: 1.3, "linear_cross_entropy twice": 1.5, "memeff": 3.0, "Inf-CL": 8.0}
SIGLIP, SIGLIP_MS = (65536, 768), 49.0
LARGEST, LARGEST_GB = (1048576, 512), 8.0
# everywhere: at most this times the plain clip_loss of the same run, and for a vocabulary these shares of dense
TIMES_CLIP = {"soft_target_clip_loss": 1.5 * 1.15, "hard_negative_clip_loss": 1.25}
VOCABULARY = {"linear_cross_entropy": (1.0, 1 / 10)}


@dataclass(frozen=True)
class Target:
    """`measured` must not exceed `most`, nor fall short of `least`; None was not measured. No bound: told."""

    what: str
    measured: float | None
    most: float | None = None
    least: float | None = None

    def __str__(self) -> str:
        bounds = {"at most": self.most, "at least": self.least}
        wanted = "".join(f", wanted {how} {bound:.4g}" for how, bound in bounds.items() if bound is not None)
        if self.measured is None:
            return f"not measured: {self.what}{wanted}"
        said = ("met" if self.met() else "MISSED") if wanted else "told"
        return f"{said:6} {self.what}: {self.measured:.4g}{wanted}"

    def met(self) -> bool:
        """Whether it was measured and is within its bounds."""
        value = self.measured
        if value is None:
            return False
        return (self.most is None or value <= self.most) and (self.least is None or value >= self.least)


def targets(result: dict[str, Any], name: str) -> Iterator[Target]:
    """All targets of one loss that this kind of run can judge."""
    loss = result["losses"][name]
    yield from _anywhere(loss, name)
    if "headline" not in result["settings"]:
        yield from _on_cpu(loss) if name in OLDEST else ()
    elif name == "clip_loss":
        yield from _clip_on_gpu(loss)
    elif name == "siglip_loss":
        ours = _one(loss, "speed", OURS, *SIGLIP)
        size = f"bfloat16 at {SIGLIP[0]} x {SIGLIP[1]}"
        yield Target(f"ms, {size}", ours["median"] * 1e3 if ours else None, most=SIGLIP_MS)


def _anywhere(loss: dict[str, Any], name: str) -> Iterator[Target]:
    """What is a ratio within one run."""
    if most := TIMES_CLIP.get(name):
        yield from _ratios(loss, "speed", "median", OURS, CLIP, most)
    if shares := VOCABULARY.get(name):
        yield from _ratios(loss, "speed", "median", OURS, DENSE, shares[0])
        yield from _ratios(loss, "memory", "extra", OURS, DENSE, shares[1])
    if name == CLIP:
        yield from _ratios(loss, "speed", "median", METRICS, OURS, None)


def _ratios(loss: dict[str, Any], part: str, value: str, who: str, other: str, most: float | None) -> Iterator[Target]:
    """In every dtype and at every size; one that was not measured if there is none."""
    found = False
    what = {"median": "time", "extra": "extra memory"}[value]
    for mine, theirs in _pairs(loss.get(part, []), who, other):
        if mine["mode"] == BOTH and mine.get(value) is not None and theirs.get(value):
            found = True
            at = f"{mine['dtype']} at {Size.of(mine).plain()}"
            yield Target(f"{what} of {who} over {other}, {at}", mine[value] / theirs[value], most)
    if not found:
        yield Target(f"{what} of {who} over {other}", None, most)


def _clip_on_gpu(loss: dict[str, Any]) -> Iterator[Target]:
    for n, d in SIZES:
        ours = _one(loss, "speed", OURS, n, d)
        size = f"bfloat16 at {n} x {d}"
        yield Target(f"share of the limit, {size}", 1 / ours["over_limit"] if ours else None, least=SHARE_OF_LIMIT)
        for who, factor in FASTER.items():
            other = _one(loss, "speed", who, n, d)
            times = other["median"] / ours["median"] if ours and other else None
            yield Target(f"times as fast as {who}, {size}", times, least=factor)
    ours = _one(loss, "memory", OURS, *LARGEST)
    held = ours["extra"] / 1e9 if ours and ours["extra"] is not None else None
    yield Target(f"GB extra, bfloat16 at {LARGEST[0]} x {LARGEST[1]}", held, most=LARGEST_GB)


def _one(loss: dict[str, Any], part: str, who: str, n: int, d: int) -> Row | None:
    wanted = {"contestant": who, "n": n, "d": d, "dtype": "bfloat16", "mode": BOTH}
    return next((r for r in loss.get(part, []) if all(r[k] == v for k, v in wanted.items())), None)


def _on_cpu(loss: dict[str, Any]) -> Iterator[Target]:
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


def _pairs(rows: list[Row], who: str = OURS, other: str = DENSE) -> Iterator[tuple[Row, Row]]:
    others = {(r["mode"], r["dtype"], Size.of(r)): r for r in rows if r["contestant"] == other}
    for row in rows:
        if row["contestant"] == who and (match := others.get((row["mode"], row["dtype"], Size.of(row)))):
            yield row, match
