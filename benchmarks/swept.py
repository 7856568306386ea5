"""What a report says of a suite of cells: every size in a line, what was left out, and under which conditions."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from .baselines import OURS
from .costs import sized
from .measure import BOTH
from .size import Size
from .tables import SHORT, amount, duration, held, labelled, table, where

__all__ = ["conditions", "every_size", "notes"]


def every_size(loss: dict[str, Any], kind: str) -> str:
    """Ours at each size in one dtype: time, ratio to the limit, how often its time each baseline takes, memory."""
    rows = list(where(loss["speed"], dtype=kind, mode=BOTH))
    others = [who for who in dict.fromkeys(r["contestant"] for r in rows) if who not in (OURS, "limit")]
    lines = []
    for size, ours in sorted(((Size.of(r), r) for r in where(rows, contestant=OURS)), key=lambda pair: pair[0]):
        line = [size.short(), duration(ours["median"]), f"{ours['over_limit']:.2f}"]
        for who in others:
            other = next(where(sized(rows, size), contestant=who), None)
            line.append(f"{other['median'] / ours['median']:.2f}" if other else "")
        peak = next(where(sized(loss["memory"], size), contestant=OURS, dtype=kind), None)
        lines.append([*line, held(peak)])
    return table(["size", labelled(OURS), "× limit", *others, "extra memory"], lines)


def notes(loss: dict[str, Any], headline: Sequence[Size]) -> Iterator[str]:
    """What the first call cost, who was not right or not run at the sizes of the tables, which sizes were not reached.

    Missing and refused baselines are named elsewhere.
    """
    for row in loss["first_calls"][:1]:
        told = f"The first call of {OURS} ({Size.of(row).short()}, {SHORT[row['dtype']]}) took {row['seconds']:.3g} s"
        counted = row["compiled"] is not None
        yield told + (f": {row['compiled']} kernels compiled, {row['from_cache']} from the cache." * counted or ".")
    for row in loss["left_out"]:
        if Size.of(row) in headline:
            yield f"Left out at {Size.of(row).short()}, {SHORT[row['dtype']]}: {row['contestant']} ({row['why']})."
    if late := loss["not_reached"]:
        sizes = ", ".join(f"{Size.of(r).short()} {SHORT[r['dtype']]} ({r['why']})" for r in late)
        yield f"Not reached: {sizes}."


def conditions(result: dict[str, Any], limit: str) -> str:
    """How, on what and with what it was measured."""
    hard, soft, settings = result["hardware"], result["versions"], result["settings"]
    gpu = (
        f"{hard['gpu']}, {amount(hard['gpu_memory'])}, driver {hard['driver']}, CUDA {hard['cuda']}"
        if "gpu" in hard
        else f"A rehearsal without a GPU: {hard['cpu']}"
    )
    packages = ", ".join(f"{k} {v}" for k, v in soft.items() if v)
    return (
        f"Medians of up to {settings['repeats']} interleaved calls between events on the stream, the L2 flushed before "
        "each, all in one run of `python -m benchmarks --suite gpu`; compile time excluded. The limit is "
        f"{limit} at the rate of `torch.mm` of 8192 × 8192 × 8192 random numbers in the same dtype measured between "
        "them. Extra memory is the peak allocated beyond inputs and gradients. A column under a baseline says how many "
        "times our time it takes. With half-precision features, dense and open_clip run under autocast. Before it was "
        "timed, everyone's answer was held against fp64: at every size that fp64 can hold all of it, else (of "
        f"clip_loss and siglip_loss) the loss and sampled rows of the gradients. {gpu}; {packages}; {result['date']}."
    )
