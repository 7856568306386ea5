"""Which entries are candidates, and no statistic of them: what a selection of negatives by itself asks for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from .statistic import Statistic

__all__ = ["Candidates"]


@dataclass(frozen=True)
class Candidates(Statistic):
    """The statistic that has no state and nothing to differentiate."""

    shift_invariant = True
    name: ClassVar[str] = "candidates"
    gap: ClassVar[bool] = False
    teacher: ClassVar[bool] = False
    factor: ClassVar[bool] = False

    @property
    def plain(self) -> bool:
        """It has no cheap way."""
        return False

    @property
    def _own_fields(self) -> int:
        return 0

    def identity(self, like: Tensor, dtype: torch.dtype, length: int) -> Tensor:
        """No fields."""
        return like.new_empty((0, length), dtype=dtype)

    def finish(self, state: Tensor, targets: Tensor | None, factors: Tensor | None) -> tuple[Tensor, ...]:
        """Nothing, `[0]`."""
        return (state.new_empty(0),)
