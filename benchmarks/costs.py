"""What each loss costs, in one line: ours beside the limit, the plain clip_loss and the dense loss of the same run."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from .baselines import DENSE, METRICS, OURS
from .measure import BOTH
from .parts import CLIP
from .size import Size
from .tables import SHORT, duration, held, table, where

__all__ = ["costs", "sized"]

Row = dict[str, Any]


def costs(losses: Mapping[str, Mapping[str, Any]], sizes: Mapping[str, Size]) -> str:
    """By loss and dtype, at the size of each; the title says the size of most, a line where it is another."""
    shown = {name: size for name, size in sizes.items() if losses[name].get("speed")}
    kinds = list(dict.fromkeys(r["dtype"] for name in shown for r in losses[name]["speed"]))
    usual = next(iter(shown.values()))
    lines = []
    for name, size in sorted(shown.items(), key=lambda item: item[1] != usual):
        for who in (OURS, METRICS):
            cells = [cell for kind in kinds for cell in _cells(name, losses[name], size, who, kind)]
            if any(cells):
                label = f"`{name}`" + ", with metrics" * (who == METRICS)
                lines.append([label if size == usual else f"{label}, {size.short()}", *cells])
    head = [""]
    for kind in kinds:
        head += [SHORT.get(kind, kind), "× limit", f"× `{CLIP}`", "× dense", "extra memory (dense)"]
    return f"What each loss costs, {BOTH}, {usual.said()}:\n\n{table(head, lines)}"


def sized(rows: list[Row], size: Size) -> list[Row]:
    """The rows of this size."""
    return [row for row in rows if Size.of(row) == size]


def _cells(name: str, loss: Mapping[str, Any], size: Size, who: str, kind: str) -> Iterator[str]:
    """Time, and how many times the limit's, clip_loss's and dense's it is; memory."""
    times = {r["contestant"]: r for r in where(sized(loss["speed"], size), dtype=kind, mode=BOTH)}
    peaks = {r["contestant"]: r for r in where(sized(loss.get("memory", []), size), dtype=kind, mode=BOTH)}
    mine = times.get(who)
    if mine is None:
        yield from [""] * 5
        return
    yield duration(mine["median"])
    yield f"{mine['over_limit']:.2f}"
    for other in (times.get(OURS if name == CLIP else CLIP), times.get(DENSE)):
        yield f"{mine['median'] / other['median']:.2f}" if other else ""
    ours, dense = held(peaks.get(who)), held(peaks.get(DENSE))
    yield f"{ours} ({dense})" if dense else ours
