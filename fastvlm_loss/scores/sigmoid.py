"""The sigmoid loss of a score matrix, a plain sum over its entries."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..kernels.epilogues import sigmoid
from ..kernels.lang import as_torch
from . import flags

__all__ = ["Sigmoid", "gradient_dtype"]


@dataclass(frozen=True)
class Sigmoid:
    """Sum of the sigmoid loss over all entries, with `factor` each times the weights of its row and its column.

    One number without statistics of rows or columns: value and gradients come from one sweep.
    """

    factor: bool = False

    shift_invariant = False
    positive_ids = True  # equal ids are targets, all of them
    limit = guide = margin = second = False
    kind = "sweep"
    plain = True
    epilogue: ClassVar[Any] = sigmoid
    name: ClassVar[str] = "sigmoid"

    @property
    def flags(self) -> int:
        """As of every statistic."""
        return flags.FACTOR * self.factor | flags.POSITIVE

    @property
    def operands(self) -> int:
        """Vectors a tile takes of its rows, and of its columns: the weights."""
        return int(self.factor)

    def value(self, s: Tensor, hit: Tensor | None, row: Tensor, col: Tensor) -> Tensor:
        """Weighted loss of every entry of a tile, in bits."""
        loss: Tensor = as_torch(sigmoid.value)(s, hit, row, col, self.flags)
        return loss

    def gradient(self, s: Tensor, hit: Tensor | None, row: Tensor, col: Tensor) -> Tensor:
        """The gradient tile."""
        g: Tensor = as_torch(sigmoid.gradient)(s, s, hit, None, row, col, 0.0, self.flags)
        return g


def gradient_dtype(dtype: torch.dtype) -> torch.dtype:
    """Of a sweep's gradients of the features, which wait for their cotangent: a sum that fp16 could not hold."""
    return torch.float32 if dtype == torch.float16 else dtype
