"""What is left of a budget of seconds, and what a call will cost: expected from the calls before it."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any

import torch

from .baselines import OURS, QUADRATIC
from .measure import BOTH
from .memory import free
from .parts import LIMIT, Entry
from .size import Size

__all__ = ["Pace"]

Row = dict[str, Any]
Key = tuple[str, torch.dtype, str]
CALLS = 3  # a contestant's least: warm up, check, time
SHARE = 0.05  # of the budget, the most that one baseline, or the rounds of one size, may take
UNKNOWN = 10.0  # times the limit, until it is measured
SCORE_BYTES = 32  # that a dense loss holds for a score, until it is measured


@dataclass
class Pace:
    """The clock starts when it is made."""

    budget: float = float("inf")
    start: float = field(default_factory=time.monotonic)
    rates: dict[torch.dtype, float] = field(default_factory=dict)  # operations a second
    ratios: dict[Key, float] = field(default_factory=dict)  # times the limit
    held: dict[Key, float] = field(default_factory=dict)  # bytes a score

    def left(self) -> float:
        """Seconds until the budget is spent."""
        return self.budget - (time.monotonic() - self.start)

    def seconds(self, entry: Entry, who: str, size: Size) -> float:
        """Expected of one forward and backward; 0 as long as nothing was measured in this dtype."""
        rate = self.rates.get(entry.dtype)
        ratio = self.ratios.get((entry.spec.name, entry.dtype, who), UNKNOWN)
        return entry.work.operations(BOTH, size) / rate * ratio if rate else 0.0

    def too_late(self, entry: Entry, size: Size) -> str:
        """Why a size is not reached, or nothing."""
        takes, left = CALLS * self.seconds(entry, OURS, size), self.left()
        if left <= 0:
            return "no time left"
        return f"would take about {takes:.0f} s, {left:.0f} s are left" if takes > left else ""

    def refuses(self, entry: Entry, who: str, size: Size, device: str) -> str:
        """Why a baseline is left out at a size, or nothing."""
        if who == OURS:
            return ""
        if who in QUADRATIC:
            needs = self.held.get((entry.spec.name, entry.dtype, who), SCORE_BYTES) * size.m * size.n
            here = free(torch.device(device))
            if needs > here:
                return f"would hold about {needs / 1e9:.0f} GB, {here / 1e9:.0f} GB are free"
        takes = CALLS * self.seconds(entry, who, size)
        return f"would take about {takes:.0f} s" if takes > min(SHARE * self.budget, self.left()) else ""

    def rounds(self, entry: Entry, size: Size, most: int) -> int:
        """How often all contestants of an entry can take their turn."""
        each = sum(self.seconds(entry, who, size) for who in entry.losses)
        allowed = min(SHARE * self.budget, self.left())
        return max(min(int(allowed / each), most), 1) if each and allowed < float("inf") else most

    def learn(self, entry: Entry, row: Row) -> None:
        """From a time or memory just measured."""
        key, size = (entry.spec.name, entry.dtype, row["contestant"]), Size.of(row)
        if row.get("extra"):
            self.held[key] = row["extra"] / (size.m * size.n)
        if row["mode"] == BOTH and "median" in row:
            self.ratios[key] = row["over_limit"]
            if row["contestant"] == LIMIT:
                self.rates[entry.dtype] = entry.work.operations(BOTH, size) / row["median"]
