"""Which rows and columns of the group's score matrix are this process's own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

__all__ = ["Collectives", "Shard", "own_of"]


class Collectives(Protocol):
    """What a group of processes does with tensors whose rows lie with their owners, `sizes` of each in rank order."""

    def gather(self, own: Tensor, sizes: tuple[int, ...]) -> Tensor:
        """The rows of all processes, in rank order, with the gradient of the own ones."""

    def spread(self, own: Tensor, sizes: tuple[int, ...]) -> Tensor:
        """As `gather`, for what each process makes something else of: the gradients of all are summed."""

    def scatter(self, partial: Tensor, sizes: tuple[int, ...]) -> Tensor:
        """The sum over the processes of the own rows."""

    def exchange(self, parts: Tensor) -> Tensor:
        """Row r of each process's `[world, ...]` to process r."""

    def pass_on(self, tensors: Sequence[Tensor]) -> Callable[[], list[Tensor]]:
        """Begin to send these to the process before this one; what it returns waits for those of the one behind."""

    def own(self, every: Tensor, sizes: tuple[int, ...]) -> Tensor:
        """The own rows of what every process has whole, differentiably."""

    def total(self, own: Tensor) -> Tensor:
        """The sum over the processes, with the gradient of the own part."""


@dataclass(frozen=True)
class Shard:
    """The place of a process in its group.

    Every process has the features of its own images and texts, and all O(M + N) vectors of the group; so what a loss
    makes of the vectors is the same everywhere, and is the group's.

    Attributes:
        collectives: of the group.
        rank: of this process in the group.
        rows, cols: numbers of images and texts of each process.
        ring: whether column shards travel, instead of being gathered.
    """

    collectives: Collectives
    rank: int
    rows: tuple[int, ...]
    cols: tuple[int, ...]
    ring: bool = False

    @property
    def world(self) -> int:
        """Number of processes."""
        return len(self.rows)

    @property
    def own_rows(self) -> slice:
        """Of all rows."""
        return own_of(self.rows, self.rank)

    @property
    def own_cols(self) -> slice:
        """Of all columns."""
        return own_of(self.cols, self.rank)

    def cols_of(self, rank: int) -> slice:
        """A process's, of all columns."""
        return own_of(self.cols, rank)

    def gather_rows(self, own: Tensor) -> Tensor:
        """Something of each row, of all processes."""
        return self.collectives.gather(own, self.rows)

    def gather_cols(self, own: Tensor) -> Tensor:
        """Something of each column, of all processes."""
        return self.collectives.gather(own, self.cols)


def own_of(sizes: tuple[int, ...], rank: int) -> slice:
    """Where the part of a process lies among those of all."""
    first = sum(sizes[:rank])
    return slice(first, first + sizes[rank])
