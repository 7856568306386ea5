"""A selection under way: what a kernel takes of its law, the places that it fills, and how they are joined."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..kernels.epilogues.topk import EMPTY
from .selection import NOBODY, Selection, join

__all__ = ["Places"]


@dataclass(frozen=True)
class Places:
    """The best of each row and then of each column so far, `[L, k]`.

    Attributes:
        selection: the law.
        order, product: its state.
    """

    selection: Selection
    order: Tensor
    product: Tensor

    @property
    def width(self) -> int:
        """Places that the kernel has of a row or column, a power of two."""
        return max(2, 1 << (self.selection.k - 1).bit_length())

    @property
    def how(self) -> tuple[int, bool, bool]:
        """What the kernel is compiled for: its places, whether there is noise, whether a floor."""
        return self.width, self.selection.noise, self.selection.totals is not None

    def law(self, rows: int) -> tuple[Tensor | None, ...]:
        """What the kernel reads: numbers, log-sum-exps of rows and columns, seed, the last place of each column."""
        told, totals = self.selection, self.selection.totals
        sides = (None, None) if totals is None else (totals[:rows], totals[rows:])
        least = self.order[rows:, -1].contiguous() if rows < self.order.shape[0] else None
        return told.law, *sides, told.place, least

    def parts(self, count: int, length: int) -> tuple[Tensor, Tensor]:
        """Where a launch leaves `count` parts of what it finds."""
        shape = count, length, self.width
        return self.order.new_empty(shape), self.product.new_empty(shape)

    def join(self, order: Tensor, product: Tensor, at: slice) -> None:
        """Join the parts of a launch onto the rows or columns `at`."""
        order, product = (t.transpose(0, 1).flatten(1) for t in (order, product))
        order = torch.where(order < EMPTY.value, NOBODY, order)
        here = self.order[at], self.product[at]
        for t, new in zip(here, join(here, (order, product), self.selection.k), strict=True):
            t.copy_(new)
