"""What can be asked of a score matrix: an epilogue, its state per row and column, and the monoid merge of states.

A state is one tensor `[fields, L]`: the rows first, then the columns, each present only if asked for.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..kernels.epilogues import softmax as epilogue
from ..kernels.lang import as_torch

__all__ = ["Softmax", "decode"]

ROWS, COLS, GAP = 1, 2, 4


@dataclass(frozen=True)
class Softmax:
    """Log-sum-exp statistics along the rows and/or the columns, `gap` for label smoothing."""

    rows: bool = True
    cols: bool = True
    gap: bool = False

    # a constant added to every score changes nothing, so the bias has an exactly zero gradient
    shift_invariant = True
    name = "softmax"

    @property
    def flags(self) -> int:
        """The value that travels through the op boundary."""
        return ROWS * self.rows + COLS * self.cols + GAP * self.gap

    @property
    def fields(self) -> int:
        """Numbers a row or column keeps: m, l, p and, with `gap`, t, n."""
        return 5 if self.gap else 3

    def lengths(self, m: int, n: int) -> tuple[int, int]:
        """How many rows and columns the state holds."""
        return m if self.rows else 0, n if self.cols else 0

    def identity(self, like: Tensor, dtype: torch.dtype, length: int) -> Tensor:
        """The state of no scores at all."""
        state = like.new_zeros((self.fields, length), dtype=dtype)
        state[0] = -torch.inf
        return state

    def partial(self, s: Tensor, hit: Tensor | None, axis: int) -> tuple[Tensor, ...]:
        """State of one tile of scores along `axis`."""
        state: tuple[Tensor, ...] = as_torch(epilogue.partial)(s, hit, axis, self.gap)
        return state

    def merge(self, a: tuple[Tensor, ...] | Tensor, b: tuple[Tensor, ...] | Tensor) -> tuple[Tensor, ...]:
        """State of the union of two disjoint sets of scores."""
        state: tuple[Tensor, ...] = as_torch(epilogue.merge)(a, b, self.gap)
        return state

    def gradient(self, s: Tensor, hit: Tensor | None, row: Tensor, col: Tensor) -> Tensor:
        """The gradient tile, from the operands of its rows and columns."""
        g: Tensor = as_torch(epilogue.gradient)(s, hit, row, col, self.rows, self.cols, self.gap)
        return g

    def finish(self, state: Tensor, targets: Tensor | None) -> tuple[Tensor, ...]:
        """`(nll,)` or `(nll, gap)`, each `[L]`; 0 where there is no target. `targets` None means one each."""
        m, l, p, *candidates = state.unbind()  # noqa: E741
        positive = p if targets is None else p / targets
        # the order matters: m - p first, or a loss near 0 drowns in the size of m (2e-7 against 3e-6 at scale 100)
        out = [(m - positive) + l.log()]
        if candidates:
            out.append(positive - candidates[0] / candidates[1])
        return tuple(out if targets is None else [torch.where(targets > 0, v, 0.0) for v in out])

    def gradient_operands(self, state: Tensor, targets: Tensor | None, cotangents: tuple[Tensor, ...]) -> Tensor:
        """Vectors `[operands, L]` of the gradient tile for cotangents of what `finish` returned."""
        m, l, _, *candidates = state.unbind()  # noqa: E741
        nll = cotangents[0]
        soft, hit = [nll / l], [nll - cotangents[1] if candidates else nll]
        candidate = [cotangents[1] / candidates[1]] if candidates else []
        if targets is None:
            return torch.stack([m, *soft, *hit, *candidate])
        # no target: no gradient; no candidate: m = -inf and l = n = 0
        known = [torch.where(targets > 0, v, 0.0) for v in (*soft, hit[0] / targets, *candidate)]
        return torch.stack([torch.where(m == -torch.inf, 0.0, m), *known])


# a table, because torch.compile traces through a cache and says so
_BY_FLAGS = tuple(Softmax(bool(f & ROWS), bool(f & COLS), bool(f & GAP)) for f in range(8))


def decode(name: str, flags: int) -> Softmax:
    """The statistic that `name` and `flags` stand for at the op boundary."""
    if name != Softmax.name or not 0 <= flags < len(_BY_FLAGS):
        raise ValueError(f"epilogue: got {name!r} with flags {flags}, wanted {Softmax.name!r} with flags below 8")
    return _BY_FLAGS[flags]
