"""What a loss has to compute at the least, as its registration says."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from fastvlm_loss.losses import registry

from .measure import BOTH, FORWARD
from .size import Size

__all__ = ["Work", "work"]

SOFTMAX = (1.0, 4.0)  # statistics before the gradient: s, and s again, dX, dY


@dataclass(frozen=True)
class Work:
    """`products` of M x N x D that nobody can avoid without storing the scores, by mode."""

    products: Mapping[str, float]

    def operations(self, mode: str, size: Size) -> float:
        """Operations of one call; a product takes 2 M N D."""
        return self.products[mode] * 2.0 * size.m * size.n * size.d

    def said(self) -> str:
        """In words: `8·N²·D operations (forward alone: 2·N²·D)`."""
        both, forward = (f"{2 * self.products[mode]:g}·N²·D" for mode in (BOTH, FORWARD))
        return f"{both} operations (forward alone: {forward})"


def work(loss: str) -> Work:
    """By the name of the loss; one of a saved result that is no longer registered counts as a softmax."""
    return Work(dict(zip((FORWARD, BOTH), registry[loss].cost if loss in registry else SOFTMAX, strict=True)))
