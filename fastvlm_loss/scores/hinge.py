"""Hinges above a threshold of each row and column: what `kernels/epilogues/hinge.py` folds, begun and ended."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..kernels.epilogues import hinge
from .statistic import LN2, Statistic

__all__ = ["Hinge"]


@dataclass(frozen=True)
class Hinge(Statistic):
    """Sum over the negatives of max(s - f, 0), with the problem's factors as the thresholds f."""

    shift_invariant = False
    epilogue: ClassVar[Any] = hinge
    name: ClassVar[str] = "hinge"
    gap: ClassVar[bool] = False
    teacher: ClassVar[bool] = False
    factor: ClassVar[bool] = True

    @property
    def plain(self) -> bool:
        """It has no cheap way."""
        return False

    @property
    def _own_fields(self) -> int:
        return 2

    @property
    def operands(self) -> int:
        """Vectors a gradient tile takes of its rows, and of its columns."""
        return 2

    def finish(self, state: Tensor, targets: Tensor | None, factors: Tensor | None) -> tuple[Tensor, ...]:
        """`(sum of hinges,)`, `[L]`; 0 where there is no target."""
        total = state[0] * LN2
        return (total if targets is None else torch.where(targets > 0, total, 0.0),)

    def gradient_operands(
        self, state: Tensor, targets: Tensor | None, factors: Tensor | None, cotangents: tuple[Tensor, ...],
        beta: Tensor | float = 0.0,
    ) -> Tensor:  # fmt: skip
        """Vectors `[2, L]`: threshold and cotangent."""
        assert factors is not None
        given = cotangents[0]
        return torch.stack([factors, given if targets is None else torch.where(targets > 0, given, 0.0)])

    def factor_gradient(self, state: Tensor, targets: Tensor | None, cotangents: tuple[Tensor, ...]) -> Tensor:
        """Gradient `[L]` of the thresholds."""
        found = -cotangents[0] * state[1]
        return found if targets is None else torch.where(targets > 0, found, 0.0)

    def summary(self, state: Tensor, targets: Tensor | None) -> dict[str, Tensor]:
        """By-products of a state `[L]`: the number of active hinges, and those of `hardest`."""
        found = {"active": state[1]}
        return {**found, **self.hardest_of(state)} if self.hardest else found

    def known(self, state: Tensor, targets: Tensor | None) -> Tensor | None:
        """How many targets each counts with; None: one each."""
        return targets
