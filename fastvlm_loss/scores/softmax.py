"""Softmax statistics of a score matrix: what `kernels/epilogues/softmax.py` folds, begun and ended."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..kernels.epilogues import softmax
from . import flags
from .statistic import LN2, Statistic

__all__ = ["Softmax"]


@dataclass(frozen=True)
class Softmax(Statistic):
    """Log-sum-exp statistics along the rows and/or the columns.

    Attributes:
        gap: also the mean score of the targets over that under a second distribution: uniform over the candidates
            (label smoothing), or with `teacher` the softmax of the problem's second score matrix (soft targets).
        teacher: whether that second matrix is used; implies `gap`.
        factor: whether rows and columns multiply their scores by the problem's factors.
        hardness: the log-sum-exp is over the negatives, each weighted in proportion to exp(hardness * score).
        detached: those weights have no gradient.
        swapped: for the gradient of the teacher: the two score matrices have changed places.
    """

    gap: bool = False
    teacher: bool = False
    factor: bool = False
    hardness: bool = False
    detached: bool = False
    swapped: bool = False

    # a constant added to every score changes nothing, so the bias has an exactly zero gradient
    shift_invariant = True
    epilogue: ClassVar[Any] = softmax
    name: ClassVar[str] = "softmax"
    BITS: ClassVar[dict[str, int]] = {
        **Statistic.BITS, "gap": flags.GAP, "teacher": flags.TEACHER, "factor": flags.FACTOR,
        "hardness": flags.HARDNESS, "detached": flags.DETACHED, "swapped": flags.SWAPPED,
    }  # fmt: skip

    def __post_init__(self) -> None:
        if self.teacher:
            object.__setattr__(self, "gap", True)

    @property
    def second(self) -> bool:
        """As of every statistic."""
        return self.teacher or self.guide or self.margin

    @property
    def _own_fields(self) -> int:
        if self.hardness:
            return 6
        return 3 + self.factor + 2 * self.gap + self.teacher + 2 * (self.positives == "in")

    @property
    def operands(self) -> int:
        """Vectors a gradient tile takes of its rows, and of its columns."""
        if self.swapped:
            return 3
        if self.hardness or self.positives == "in":
            return 5
        return 3 + self.factor + self.gap + self.teacher

    def swap(self) -> Softmax:
        """The same for the gradient of the teacher."""
        return replace(self, swapped=True, limit=self.guide, guide=self.limit)

    def unbiased(self, state: Tensor, bias: Tensor | None) -> Tensor:
        """The state with the teacher's mean of the student's scores as it is without the bias."""
        if bias is None:
            return state
        state, at = state.clone(), self._candidates
        state[at] -= state[at + 1] * (bias / LN2)
        return state

    def finish(self, state: Tensor, targets: Tensor | None, factors: Tensor | None) -> tuple[Tensor, ...]:
        """`(nll,)` or `(nll, gap)`, each `[L]`; 0 where there is no target. `targets` None means one each."""
        m, l, positive = self._positive(state, targets)  # noqa: E741
        scaled = positive if factors is None else factors * positive
        if self.positives == "in":
            scaled, l = state[3], l / state[4]  # noqa: E741
        elif self.hardness:
            scaled, l = scaled + state[3], l * (state[5] / state[4])  # noqa: E741
        # the order matters: m - p first, or a loss near 0 drowns in the size of m (2e-7 against 3e-6 at scale 100)
        out = [((m - scaled) + l.log2()) * LN2]
        if self.gap:
            gap = positive - self._mean(state)
            out.append((gap if factors is None else factors * gap) * LN2)
        known = self._known(state, targets)
        return tuple(out if known is None else [torch.where(known, v, 0.0) for v in out])

    def gradient_operands(
        self, state: Tensor, targets: Tensor | None, factors: Tensor | None, cotangents: tuple[Tensor, ...],
        beta: Tensor | float = 0.0,
    ) -> Tensor:  # fmt: skip
        """Vectors `[operands, L]` of the gradient tile for cotangents of what `finish` returned."""
        if factors is not None:
            cotangents = tuple(c * factors for c in cotangents)
        m, l, nll = state[0], state[1], cotangents[0]  # noqa: E741
        known = self._known(state, targets)

        def where_known(*vectors: Tensor) -> tuple[Tensor, ...]:
            # no target: no gradient; no candidate: m = -inf and l = n = 0
            return vectors if known is None else tuple(torch.where(known, v, 0.0) for v in vectors)

        def finite(v: Tensor) -> Tensor:
            return v if known is None else torch.where(v == -torch.inf, 0.0, v)

        if self.swapped:
            mean, weight = self._mean(state), cotangents[1] / state[self._candidates + 1] * LN2
            return torch.stack([finite(state[self._candidates + 2]), *where_known(weight, mean)])
        soft, hit = nll / l, nll
        if len(cotangents) > 1:
            hit = nll - cotangents[1]
        if targets is not None:
            hit = hit / targets
        if self.hardness:
            reweighted = 0.0 * nll if self.detached else beta * nll / state[4]
            soft, hit, reweighted = where_known(soft if self.detached else (1.0 + beta) * soft, hit, reweighted)
            return torch.stack([finite(m), soft, hit, finite(state[3]), reweighted])
        soft, hit = where_known(soft, hit)
        out = [finite(m), soft, hit] + ([] if factors is None else [factors])
        if len(cotangents) > 1:
            out += where_known(cotangents[1] / state[self._candidates + 1])
        if self.teacher:
            out.append(finite(state[self._candidates + 2]))
        if self.positives == "in":
            out += [finite(state[3]), *where_known(nll / state[4])]
        return torch.stack(out)

    def factor_gradient(self, state: Tensor, targets: Tensor | None, cotangents: tuple[Tensor, ...]) -> Tensor:
        """Gradient `[L]` of the factors for cotangents of what `finish` returned."""
        _, l, positive = self._positive(state, targets)  # noqa: E741
        found = cotangents[0] * (state[3] / l - positive)
        if len(cotangents) > 1:
            found = found + cotangents[1] * (positive - self._mean(state))
        return (found if targets is None else torch.where(targets > 0, found, 0.0)) * LN2

    def summary(self, state: Tensor, targets: Tensor | None) -> dict[str, Tensor]:
        """By-products of a state `[L]` in nats: log-sum-exp, mean score of the targets, and those of `hardest`."""
        m, l, positive = self._positive(state, targets)  # noqa: E741
        found = {"positive": positive * LN2}
        if self.hardness:  # whose sums are others
            found["negatives"] = state[5]
        else:
            found["lse"] = (m + l.log2()) * LN2
        return {**found, **self.hardest_of(state)} if self.hardest else found

    def known(self, state: Tensor, targets: Tensor | None) -> Tensor | None:
        """How many targets each counts with, 0 for none or for no negative where those are needed; None: one each."""
        if not self.hardness:
            return targets
        one = torch.ones_like(state[0]) if targets is None else targets
        return torch.where(state[5] > 0, one, 0.0)

    def _known(self, state: Tensor, targets: Tensor | None) -> Tensor | None:
        counted = self.known(state, targets)
        return None if counted is None else counted > 0

    @property
    def _candidates(self) -> int:
        return 3 + self.factor

    def _positive(self, state: Tensor, targets: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        return state[0], state[1], state[2] if targets is None else state[2] / targets

    def _mean(self, state: Tensor) -> Tensor:
        return state[self._candidates] / state[self._candidates + 1]
