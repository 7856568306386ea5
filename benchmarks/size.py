"""The size of a problem: M rows, N columns, features of D."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

__all__ = ["Size"]


class Size(NamedTuple):
    """M images (tokens) against N texts (words of the vocabulary), each of D numbers."""

    m: int
    n: int
    d: int

    @classmethod
    def square(cls, n: int, d: int) -> Size:
        """A batch of pairs."""
        return cls(n, n, d)

    @classmethod
    def of(cls, row: Mapping[str, Any]) -> Size:
        """Of a row of a result."""
        return cls(row.get("m", row["n"]), row["n"], row["d"])

    def row(self) -> dict[str, int]:
        """As a row of a result has it; M only where it is not N."""
        return {"n": self.n, "d": self.d} if self.m == self.n else {"m": self.m, "n": self.n, "d": self.d}

    def said(self) -> str:
        """For a title: `N = 8192, D = 512`."""
        return ", ".join(f"{name.upper()} = {value}" for name, value in self.row().items())

    def short(self) -> str:
        """For a table: `8192 × 512`."""
        return " × ".join(str(value) for value in self.row().values())

    def plain(self) -> str:
        """For a log: `8192 x 512`."""
        return self.short().replace("×", "x")
