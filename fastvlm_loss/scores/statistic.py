"""What every statistic along rows and columns shares: directions, which entries are candidates, the hardest negative.

A state is one tensor `[fields, L]`: the rows first, then the columns, each present only if asked for. Scores and states
are in bits (base 2); what `finish` returns is in nats.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..kernels.lang import as_torch
from . import flags

__all__ = ["LN2", "Statistic"]

LN2 = math.log(2.0)
PLAIN = flags.ROWS | flags.COLS


@dataclass(frozen=True)
class Statistic:
    """A monoid of the scores of each row and column, and its gradient tile.

    Attributes:
        rows, cols: the directions.
        hardest: whether the state also holds the hardest negative (`kernels/epilogues/hardest.py`), not differentiable.
        positives: "mask": an equal id leaves the candidates unless it is the target; "out", "in": it is a target.
        limit, guide: whether negatives whose product (of the features, of the second pair of features) is above
            their row's or column's limit leave the candidates of that row or column.
        margin: whether the second products shift the scores of the negatives.
    """

    rows: bool = True
    cols: bool = True
    hardest: bool = False
    positives: str = "mask"
    limit: bool = False
    guide: bool = False
    margin: bool = False

    name: ClassVar[str]
    epilogue: ClassVar[Any]
    shift_invariant: ClassVar[bool]
    BITS: ClassVar[dict[str, int]] = {
        "rows": flags.ROWS, "cols": flags.COLS, "hardest": flags.HARDEST, "limit": flags.LIMIT, "guide": flags.GUIDE,
        "margin": flags.MARGIN,
    }  # fmt: skip

    @property
    def flags(self) -> int:
        """The value that travels through the op boundary."""
        found = sum(bit for name, bit in self.BITS.items() if getattr(self, name))
        return found | {"mask": 0, "out": flags.POSITIVE, "in": flags.POSITIVE | flags.INSIDE}[self.positives]

    @classmethod
    def of(cls, value: int) -> Any:
        """The statistic whose `flags` are this value."""
        options: dict[str, Any] = {name: bool(value & bit) for name, bit in cls.BITS.items()}
        positives = "in" if value & flags.INSIDE else "out" if value & flags.POSITIVE else "mask"
        found = cls(**options, positives=positives)
        if found.flags != value:
            raise ValueError(f"epilogue: got {cls.name!r} with flags {value}, wanted those of its options")
        return found

    @property
    def positive_ids(self) -> bool:
        """Whether equal ids are targets."""
        return self.positives != "mask"

    @property
    def kind(self) -> str:
        """Of its tiles, in the kernels' table."""
        return "plain" if self.rows and self.cols else "one"

    @property
    def plain(self) -> bool:
        """Whether one exponential may serve both directions."""
        return not self.flags & ~PLAIN

    @property
    def second(self) -> bool:
        """Whether tiles need the products of the second pair of features."""
        return self.guide or self.margin

    @property
    def fields(self) -> int:
        """Numbers that a row or column keeps."""
        return self._own_fields + 4 * self.hardest

    @property
    def _own_fields(self) -> int:
        raise AttributeError  # of a statistic

    def lengths(self, m: int, n: int) -> tuple[int, int]:
        """How many rows and columns the state holds."""
        return m if self.rows else 0, n if self.cols else 0

    def identity(self, like: Tensor, dtype: torch.dtype, length: int) -> Tensor:
        """The state of no scores at all."""
        zero = like.new_zeros(length, dtype=dtype)
        return torch.stack(as_torch(self.epilogue.identity)(zero, self.flags))

    def partial(
        self, s: Tensor, hit: Tensor | None, teacher: Tensor | None, factor: Tensor | None, index: Tensor | None,
        beta: Tensor | float, axis: int,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        """State of one tile of scores along `axis`."""
        state: tuple[Tensor, ...] = as_torch(self.epilogue.partial)(
            s, hit, teacher, factor, index, beta, axis, self.flags
        )
        return state

    def merge(self, a: tuple[Tensor, ...] | Tensor, b: tuple[Tensor, ...] | Tensor) -> tuple[Tensor, ...]:
        """State of the union of two disjoint sets of scores."""
        state: tuple[Tensor, ...] = as_torch(self.epilogue.merge)(a, b, self.flags)
        return state

    def gradient(
        self, s: Tensor, to_col: Tensor, hit: Tensor | None, teacher: Tensor | None, row: Tensor, col: Tensor,
        beta: Tensor | float,
    ) -> Tensor:  # fmt: skip
        """The gradient tile, from the scores as rows and as columns see them and the operands of both."""
        g: Tensor = as_torch(self.epilogue.gradient)(s, to_col, hit, teacher, row, col, beta, self.flags)
        return g

    def hardest_of(self, state: Tensor) -> dict[str, Tensor]:
        """What a state with `hardest` says: score and index (-1: none) of the hardest negative, best target, count."""
        b, a, w, count = state[-4:]
        index = torch.where((count > 0) & b.isfinite(), a, -1.0).to(torch.int64)  # nobody is the hardest beside NaN
        return {"hardest": b * LN2, "index": index, "best_target": w * LN2, "negatives": count}


def _check() -> None:
    assert {f.name for f in fields(Statistic)} == {*Statistic.BITS, "positives"}


_check()
