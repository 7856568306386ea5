"""Hard negatives as values: what was picked, by which law, and the schedule that makes them harder."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from . import check
from .problem import Problem
from .selection import MOST, NOBODY, Selection, index_of, join

__all__ = ["HardNegatives", "Hardness", "Law", "LinearHardness", "finite_rows"]

Hardness = float | Callable[[int], float]
LARGE = 1e9


@dataclass(frozen=True)
class HardNegatives:
    """Negatives of every image and of every text, in the order of their keys: the hardest, or the first drawn, first.

    Attributes:
        text_index: int64 `[M, k]`, for each image k texts that are not its own; -1 where there are not so many.
            N + s is slot s of the queue of texts.
        text_score: fp32 `[M, k]`, their scale * <x_i, y_j>, no gradient; 0 where there is none.
        text_valid: bool `[M, k]`, whether there is one.
        image_index, image_score, image_valid: `[N, k]`, for each text k images; M + s is slot s of the queue of images.
        nonfinite: int64 `[]`, how many images and texts have features that are NaN or infinite. They are nobody's
            negatives, and have none.
        image_in, text_in: bool `[M]`, `[N]`, who takes part at all: its id is not -1 and its features are finite; None
            means all.
    """

    text_index: Tensor
    text_score: Tensor
    text_valid: Tensor
    image_index: Tensor
    image_score: Tensor
    image_valid: Tensor
    nonfinite: Tensor
    image_in: Tensor | None = None
    text_in: Tensor | None = None


@dataclass(frozen=True)
class LinearHardness:
    """Hardness that grows from 0 (uniform) to `most` in the first steps: easy negatives first, then hard ones.

    Args:
        steps: of the whole training.
        most: hardness after the ramp.
        ramp: share of the steps over which it grows.
    """

    steps: int
    most: float = 1.0
    ramp: float = 0.2

    def __post_init__(self) -> None:
        check.whole("steps", self.steps, low=1)
        check.number("most", self.most, low=0.0)
        check.number("ramp", self.ramp, above=0.0, most=1.0)

    def __call__(self, step: int) -> float:
        """The hardness at a step, 0 <= step."""
        return self.most * min(max(step / (self.ramp * self.steps), 0.0), 1.0)


@dataclass(frozen=True)
class Law:
    """How k negatives are picked, checked and ready to become the selection of a problem."""

    k: int
    hardness: float
    scale: Tensor | float
    floor: float
    seed: int
    step: int | Tensor

    @classmethod
    def of(
        cls, k: int, hardness: Hardness, scale: Tensor | float, floor: float, seed: int | None,
        step: int | Tensor | None,
    ) -> Law:  # fmt: skip
        """Check the public arguments."""
        check.whole("k", k, low=1)
        if k > MOST:
            raise ValueError(f"k: got {k}, wanted at most {MOST}")
        given = hardness
        if callable(hardness):
            if step is None or isinstance(step, Tensor):
                raise TypeError(f"step: got {type(step).__name__} beside a schedule of hardness, wanted an int")
            hardness = hardness(check.whole("step", step, low=0))
        if hardness != math.inf:
            hardness = check.number("hardness", hardness, low=0.0, most=LARGE)  # beyond, inf is meant
        if not isinstance(scale, Tensor):
            check.number("scale", scale, above=0.0, most=LARGE)
        check.number("floor", floor, low=0.0, most=LARGE)
        if hardness == math.inf:
            if floor:
                raise ValueError(f"floor: got {floor} beside hardness=inf, which draws nothing, wanted 0")
            seed, step = 0 if seed is None else seed, 0 if step is None else step
        seed, step = check.draw(seed, step, f"hardness={given!r}")
        return cls(k, hardness, scale, floor, seed, step)

    def selection(self, problem: Problem, first_row: int = 0, first_col: int = 0) -> Selection:
        """Of the rows and columns of a problem, which have these global indices. Without the totals of a floor."""
        x = problem.x
        scale = check.scalar("scale", self.scale, x, torch.float32, positive=True).detach()
        greedy = self.hardness == math.inf
        # finite, or no key would be
        sharpness = torch.ones_like(scale) if greedy else (scale * self.hardness).clamp(max=LARGE**2)
        law = torch.stack([sharpness, torch.full_like(scale, self.floor)])

        def whole(value: int | Tensor) -> Tensor:
            if isinstance(value, Tensor):
                return value.detach().reshape(()).to(x.device, torch.int64)
            return torch.full((), value, dtype=torch.int64, device=x.device)

        if problem.shard is not None:
            first_row += problem.shard.own_rows.start
        place = torch.stack([whole(v) for v in (self.seed, self.step, first_row, first_col)])
        return Selection(self.k, not greedy, law, None, place)

    def result(self, rows: tuple[Tensor, Tensor], cols: tuple[Tensor, Tensor], problem: Problem) -> HardNegatives:
        """What states of rows and columns say."""
        scale = check.scalar("scale", self.scale, problem.x, torch.float32).detach()
        text, image = ((index_of(order), best * scale, order != NOBODY) for order, best in (rows, cols))
        ids, shard = (problem.row_id, problem.col_id), problem.shard
        if shard is not None and ids[0] is not None and ids[1] is not None:
            ids = ids[0][shard.own_rows], ids[1][shard.own_cols]
        finite = finite_rows(problem.x), finite_rows(problem.y)
        image_in, text_in = (f if of is None else f & (of != -1) for f, of in zip(finite, ids, strict=True))
        nonfinite = (~finite[0]).sum() + (~finite[1]).sum()
        return HardNegatives(*text, *image, nonfinite=nonfinite, image_in=image_in, text_in=text_in)

    def join(self, a: tuple[Tensor, Tensor], b: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """The best of two disjoint sets of candidates."""
        return join(a, b, self.k)


def finite_rows(features: Tensor) -> Tensor:
    """Which rows have neither NaN nor infinity, bool."""
    if not features.shape[0]:
        return features.new_zeros(0, dtype=torch.bool)
    return features.amax(1).isfinite() & features.amin(1).isfinite()
