"""What a loss has to compute at the least, and the inputs it takes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from .measure import BOTH, FORWARD

__all__ = ["WORK", "Work", "work"]


@dataclass(frozen=True)
class Work:
    """`products` of N x N x D that nobody can avoid without storing the scores, by mode; `bias` is None for no bias."""

    products: Mapping[str, int]
    bias: float | None = None

    def operations(self, mode: str, n: int, d: int) -> float:
        """Operations of one call; a product takes 2 N^2 D."""
        return self.products[mode] * 2.0 * n * n * d

    def said(self) -> str:
        """In words: `8·N²·D operations (forward alone: 2·N²·D)`."""
        return f"{2 * self.products[BOTH]}·N²·D operations (forward alone: {2 * self.products[FORWARD]}·N²·D)"


# a softmax needs its statistics before it has a gradient: s, and s again, dX, dY
SOFTMAX = Work({FORWARD: 1, BOTH: 4})
# a sigmoid makes loss and gradient of an entry in one sweep: s, dX, dY
SIGMOID = Work({FORWARD: 1, BOTH: 3}, bias=-10.0)
WORK = {"clip_loss": SOFTMAX, "siglip_loss": SIGMOID}


def work(loss: str) -> Work:
    """By the name of the loss; a new one counts as a softmax."""
    return WORK.get(loss, SOFTMAX)
