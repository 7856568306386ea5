"""What can be asked of a score matrix: an epilogue, its state per row and column, and the monoid merge of states.

A state is one tensor `[fields, L]`: the rows first, then the columns, each present only if asked for. Scores and states
are in bits (base 2); what `finish` returns is in nats.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..kernels.epilogues import sigmoid, softmax
from ..kernels.lang import as_torch

__all__ = ["LN2", "Sigmoid", "Softmax", "decode", "gradient_dtype"]

ROWS, COLS, GAP, TEACHER, FACTOR = 1, 2, 4, 8, 16
LN2 = math.log(2.0)


@dataclass(frozen=True)
class Softmax:
    """Log-sum-exp statistics along the rows and/or the columns.

    Attributes:
        rows, cols: the directions.
        gap: also the mean score of the targets over that under a second distribution: uniform over the candidates
            (label smoothing), or with `teacher` the softmax of the problem's second score matrix (soft targets).
        teacher: whether that second matrix is used; implies `gap`.
        factor: whether rows and columns multiply their scores by the problem's factors.
    """

    rows: bool = True
    cols: bool = True
    gap: bool = False
    teacher: bool = False
    factor: bool = False

    # a constant added to every score changes nothing, so the bias has an exactly zero gradient
    shift_invariant = True
    positive_ids = False
    epilogue: Any = softmax
    name = "softmax"

    @property
    def flags(self) -> int:
        """The value that travels through the op boundary."""
        options = TEACHER * self.teacher + FACTOR * self.factor
        return ROWS * self.rows + COLS * self.cols + GAP * (self.gap or self.teacher) + options

    @property
    def kind(self) -> str:
        """Of its tiles, in the kernels' table."""
        return "plain" if self.rows and self.cols else "one"

    @property
    def plain(self) -> bool:
        """Whether one exponential may serve both directions."""
        return not self.gap and not self.teacher and not self.factor

    @property
    def fields(self) -> int:
        """Numbers a row or column keeps: m, l, p, and u with `factor`, t and n with `gap`, q with `teacher`."""
        return 3 + self.factor + 2 * (self.gap or self.teacher) + self.teacher

    @property
    def operands(self) -> int:
        """Vectors a gradient tile takes of its rows, and of its columns."""
        return 3 + self.factor + (self.gap or self.teacher) + self.teacher

    def lengths(self, m: int, n: int) -> tuple[int, int]:
        """How many rows and columns the state holds."""
        return m if self.rows else 0, n if self.cols else 0

    def identity(self, like: Tensor, dtype: torch.dtype, length: int) -> Tensor:
        """The state of no scores at all."""
        zero = like.new_zeros(length, dtype=dtype)
        return torch.stack(as_torch(softmax.identity)(zero, self.flags))

    def partial(
        self, s: Tensor, hit: Tensor | None, teacher: Tensor | None, factor: Tensor | None, axis: int
    ) -> tuple[Tensor, ...]:
        """State of one tile of scores along `axis`."""
        state: tuple[Tensor, ...] = as_torch(softmax.partial)(s, hit, teacher, factor, axis, self.flags)
        return state

    def merge(self, a: tuple[Tensor, ...] | Tensor, b: tuple[Tensor, ...] | Tensor) -> tuple[Tensor, ...]:
        """State of the union of two disjoint sets of scores."""
        state: tuple[Tensor, ...] = as_torch(softmax.merge)(a, b, self.flags)
        return state

    def gradient(self, s: Tensor, hit: Tensor | None, teacher: Tensor | None, row: Tensor, col: Tensor) -> Tensor:
        """The gradient tile, from the operands of its rows and columns."""
        g: Tensor = as_torch(softmax.gradient)(s, hit, teacher, row, col, self.flags)
        return g

    def finish(self, state: Tensor, targets: Tensor | None, factors: Tensor | None) -> tuple[Tensor, ...]:
        """`(nll,)` or `(nll, gap)`, each `[L]`; 0 where there is no target. `targets` None means one each."""
        m, l, positive = self._positive(state, targets)  # noqa: E741
        scaled = positive if factors is None else factors * positive
        # the order matters: m - p first, or a loss near 0 drowns in the size of m (2e-7 against 3e-6 at scale 100)
        out = [((m - scaled) + l.log2()) * LN2]
        if self.gap or self.teacher:
            gap = positive - self._mean(state)
            out.append((gap if factors is None else factors * gap) * LN2)
        return tuple(out if targets is None else [torch.where(targets > 0, v, 0.0) for v in out])

    def gradient_operands(
        self, state: Tensor, targets: Tensor | None, factors: Tensor | None, cotangents: tuple[Tensor, ...]
    ) -> Tensor:
        """Vectors `[operands, L]` of the gradient tile for cotangents of what `finish` returned."""
        if factors is not None:
            cotangents = tuple(c * factors for c in cotangents)
        m, l, nll = state[0], state[1], cotangents[0]  # noqa: E741
        soft, hit = nll / l, nll
        if len(cotangents) > 1:
            hit = nll - cotangents[1]
        if targets is not None:
            # no target: no gradient; no candidate: m = -inf and l = n = 0
            soft, hit = torch.where(targets > 0, soft, 0.0), torch.where(targets > 0, hit / targets, 0.0)
            m = torch.where(m == -torch.inf, 0.0, m)
        out = [m, soft, hit] + ([] if factors is None else [factors])
        if len(cotangents) > 1:
            candidate = cotangents[1] / state[self._candidates + 1]
            out.append(candidate if targets is None else torch.where(targets > 0, candidate, 0.0))
        if self.teacher:
            q = state[self._candidates + 2]
            out.append(torch.where(q == -torch.inf, 0.0, q))
        return torch.stack(out)

    def factor_gradient(self, state: Tensor, targets: Tensor | None, cotangents: tuple[Tensor, ...]) -> Tensor:
        """Gradient `[L]` of the factors for cotangents of what `finish` returned."""
        _, l, positive = self._positive(state, targets)  # noqa: E741
        found = cotangents[0] * (state[3] / l - positive)
        if len(cotangents) > 1:
            found = found + cotangents[1] * (positive - self._mean(state))
        return (found if targets is None else torch.where(targets > 0, found, 0.0)) * LN2

    @property
    def _candidates(self) -> int:
        return 3 + self.factor

    def _positive(self, state: Tensor, targets: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        return state[0], state[1], state[2] if targets is None else state[2] / targets

    def _mean(self, state: Tensor) -> Tensor:
        return state[self._candidates] / state[self._candidates + 1]


@dataclass(frozen=True)
class Sigmoid:
    """Sum of the sigmoid loss over all entries, with `factor` each times the weights of its row and its column.

    One number without statistics of rows or columns: value and gradients come from one sweep.
    """

    factor: bool = False

    shift_invariant = False
    positive_ids = True  # equal ids are targets, all of them
    kind = "sweep"
    plain = True
    epilogue: Any = sigmoid
    name = "sigmoid"

    @property
    def flags(self) -> int:
        """As of `Softmax`."""
        return FACTOR * self.factor

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
        g: Tensor = as_torch(sigmoid.gradient)(s, hit, None, row, col, self.flags)
        return g


def gradient_dtype(dtype: torch.dtype) -> torch.dtype:
    """Of a sweep's gradients of the features, which wait for their cotangent: a sum that fp16 could not hold."""
    return torch.float32 if dtype == torch.float16 else dtype


# a table, because torch.compile traces through a cache and says so
_BY_FLAGS = tuple(
    Softmax(bool(f & ROWS), bool(f & COLS), bool(f & (GAP | TEACHER)), bool(f & TEACHER), bool(f & FACTOR))
    for f in range(32)
)


def decode(name: str, flags: int) -> Softmax:
    """The statistic that `name` and `flags` stand for at the op boundary."""
    if name != Softmax.name or not 0 <= flags < len(_BY_FLAGS):
        raise ValueError(f"epilogue: got {name!r} with flags {flags}, wanted {Softmax.name!r} with flags below 32")
    return _BY_FLAGS[flags]
