"""Hard negatives as a by-product of a loss: one product of the features serves both."""

from __future__ import annotations

from torch import Tensor

from ..engine.tile import SoftmaxTile
from ..scores.negatives import HardNegatives, Hardness, Law
from ..scores.problem import Problem
from ..scores.selection import Selection

__all__ = ["BatchNegatives"]


class BatchNegatives:
    """Negatives for image-text matching from a loss's own pass: `clip_loss(..., negatives=negatives)` fills it.

    What `hard_negatives` picks with the loss's labels, ids and filters, and without a second product of the features,
    except with `group=` and, on a GPU, beside several options, with k above 16, or in fp32 at matmul precision "high".

    Args:
        k, hardness, scale, seed, step: as of `hard_negatives`.

    Attributes:
        found: `HardNegatives` of the last call; before any, RuntimeError.

    Raises:
        TypeError, ValueError: named.
    """

    def __init__(
        self, k: int = 1, *, hardness: Hardness = 1.0, scale: Tensor | float = 1 / 0.07, seed: int | None = None,
        step: int | Tensor | None = None,
    ) -> None:  # fmt: skip
        self.law = Law.of(k, hardness, scale, 0.0, seed, step)
        self._found: HardNegatives | None = None

    @property
    def found(self) -> HardNegatives:
        """What the last call picked."""
        if self._found is None:
            raise RuntimeError("found: got no call with negatives= yet, wanted clip_loss(..., negatives=this)")
        return self._found

    def selection(self, problem: Problem) -> Selection:
        """What the loss's pass is asked for besides."""
        if problem.second == "margin":
            raise ValueError(
                "negatives: got them beside a margin, whose scores are shifted, wanted hard_negatives(...)"
            )
        return self.law.selection(problem)

    def fill(self, t: SoftmaxTile, problem: Problem) -> None:
        """From the states `[L, k]` of both directions."""
        assert t.selected is not None
        (order, best), m = t.selected, problem.x.shape[0]
        self._found = self.law.result((order[:m], best[:m]), (order[m:], best[m:]), problem)

    def __repr__(self) -> str:
        law = self.law
        return f"BatchNegatives(k={law.k}, hardness={law.hardness}, seed={law.seed}, step={law.step})"
