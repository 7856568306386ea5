"""Markdown tables, and numbers as people read them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from .baselines import OURS
from .parts import CLIP, LIMIT

__all__ = ["SHORT", "amount", "duration", "folded", "held", "labelled", "table", "where"]

Row = dict[str, Any]
LABELS = {LIMIT: "*limit: `torch.mm` alone*", CLIP: "*the plain `clip_loss`*", OURS: f"**{OURS}**"}
SHORT = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}


def duration(seconds: float) -> str:
    """Three digits with a unit."""
    for unit, size in (("s", 1.0), ("ms", 1e-3)):
        if seconds >= size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds * 1e6:.3g} µs"


def amount(size: float | None) -> str:
    """Bytes with a decimal unit."""
    if size is None:
        return "unknown memory"
    return f"{size / 1e9:.3g} GB" if size >= 1e9 else f"{size / 1e6:.3g} MB"


def held(peak: Row | None) -> str:
    """The extra memory of a row, if there is one."""
    if peak is None:
        return ""
    return amount(peak["extra"]) if peak["extra"] is not None else "died"


def labelled(who: str) -> str:
    """A contestant as tables name it."""
    return LABELS.get(who, who)


def where(rows: Sequence[Row], **wanted: Any) -> Iterator[Row]:
    """The rows with these values."""
    return (r for r in rows if all(r[k] == v for k, v in wanted.items()))


def table(head: list[str], lines: list[list[str]]) -> str:
    """The first column to the left, the others to the right."""
    rule = ["---", *["---:"] * (len(head) - 1)]
    return "\n".join(f"| {' | '.join(line)} |" for line in (head, rule, *lines))


def folded(title: str, text: str) -> str:
    """What opens at a click."""
    return f"<details><summary>{title}</summary>\n\n{text}\n\n</details>"
