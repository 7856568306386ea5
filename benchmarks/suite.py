"""The sizes of each suite."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace

import torch

from fastvlm_loss.losses import LossSpec

from .measure import BOTH, MODES
from .size import Size

__all__ = ["SUITES", "Cell", "Plan", "Shapes", "Suite"]

SIZES = (4096, 8192, 16384, 32768, 65536, 131072, 262144, 1048576)
DIMS = (256, 512, 768, 1024)
FIRST = (Size.square(32768, 768), Size.square(65536, 768))  # what the targets speak of
LARGEST = Size.square(1048576, 512)
VOCABULARY = Size(4096, 30522, 512)  # tokens against BERT's vocabulary
FEWER = Size(1024, 30522, 512)
SWEPT = ("clip_loss", "siglip_loss")  # at every size; the others at the first


@dataclass(frozen=True)
class Cell:
    """One size in one dtype; `losses` empty stands for all losses of its kind that are not swept."""

    size: Size
    dtype: torch.dtype
    losses: tuple[str, ...] = SWEPT

    def takes(self, spec: LossSpec) -> bool:
        """Whether this loss is measured here."""
        kind = bool(spec.names) == (self.size.m != self.size.n)
        return spec.name in self.losses if self.losses else spec.name not in SWEPT and kind


@dataclass(frozen=True)
class Shapes:
    """Sizes of speed and memory, and the two of the gate."""

    speed: tuple[Size, ...]
    gate: tuple[Size, Size]


@dataclass(frozen=True)
class Plan:
    """What is measured of one loss: a line of the table of all, unless it says more.

    `size` of speed and memory where it is not the suite's; at most so many `repeats`.
    """

    parts: tuple[str, ...] = ("speed", "memory")
    modes: tuple[str, ...] = (BOTH,)
    repeats: int = 3
    size: Size | None = None


@dataclass(frozen=True)
class Suite:
    """`square` of losses of a batch, `vocabulary` of the others; `small` and `growth` are batches at one D.

    `plans` of the losses that have their own. A suite with `cells` takes those instead of the parts, in their order, as
    many as a budget of seconds allows; `headline` are the sizes whose tables stand open. `peers` adds the baselines of
    a GPU.
    """

    device: str
    square: Shapes
    vocabulary: Shapes
    plans: Mapping[str, Plan] = field(default_factory=dict)
    dtypes: tuple[torch.dtype, ...] = ()
    small: tuple[int, ...] = ()
    small_dim: int = 0
    growth: tuple[int, ...] = ()
    growth_dim: int = 0
    small_rounds: int = 4  # times the repeats: such calls are short and their times scatter
    small_block: int = 10  # calls a sample
    cells: tuple[Cell, ...] = ()
    headline: tuple[Size, ...] = ()
    peers: bool = False
    repeats: int = 5  # interleaved calls a row

    def shapes(self, spec: LossSpec) -> Shapes:
        """Those of this loss."""
        return self.vocabulary if spec.names else self.square

    def plan(self, spec: LossSpec) -> Plan:
        """That of this loss."""
        return self.plans.get(spec.name, Plan())

    def sizes(self, spec: LossSpec) -> tuple[Size, ...]:
        """Of the speed and memory of this loss."""
        size = self.plan(spec).size
        return (size,) if size else self.shapes(spec).speed

    def quick(self) -> Suite:
        """Tiny sizes: whether the program works, no figure worth keeping."""
        small = replace(
            self, small=(16,), small_dim=32, small_rounds=2, small_block=2, growth=(256, 1024), growth_dim=32,
            square=Shapes((Size.square(256, 32),), (Size.square(24, 16), Size.square(150, 32))),
            vocabulary=Shapes((Size(96, 200, 32),), (Size(24, 40, 16), Size(60, 150, 32))),
            plans={name: replace(plan, size=None) for name, plan in self.plans.items()},
        )  # fmt: skip
        if not self.cells:
            return small
        sizes, words, half = (Size.square(256, 64), Size.square(512, 64)), Size(128, 512, 64), torch.bfloat16
        return replace(
            small,
            square=Shapes((), (Size.square(64, 64), Size.square(192, 64))),
            vocabulary=Shapes((), (Size(64, 128, 64), Size(64, 192, 64))),
            cells=(
                *(Cell(size, half) for size in sizes), Cell(sizes[0], torch.float32), Cell(sizes[0], half, ()),
                Cell(words, half, ()),
            ),
            headline=(sizes[0], words),
        )  # fmt: skip


def by_importance() -> Iterator[Cell]:
    """The sizes of the targets, the largest, the other dtypes at one size, the other losses, then the rest from small
    to large."""
    for size in FIRST:
        yield Cell(size, torch.bfloat16)
    yield Cell(LARGEST, torch.bfloat16, ("clip_loss",))
    for dtype in (torch.float16, torch.float32):
        yield Cell(FIRST[0], dtype)
    yield Cell(VOCABULARY, torch.bfloat16, ("linear_cross_entropy",))
    for size in FIRST:
        yield Cell(size, torch.bfloat16, ())
    yield Cell(VOCABULARY, torch.bfloat16, ("caption_loss", "vqa_loss"))
    every = [Size.square(n, d) for n in SIZES for d in DIMS]
    for size in sorted(every, key=lambda size: size.n**2 * size.d):
        if size == LARGEST:
            yield Cell(size, torch.bfloat16, ("siglip_loss",))
        elif size not in FIRST:
            yield Cell(size, torch.bfloat16)


SUITES = {
    "cpu": Suite(
        device="cpu",
        dtypes=(torch.float32, torch.bfloat16),
        square=Shapes((Size.square(8192, 512),), (Size.square(48, 32), Size.square(1100, 128))),
        vocabulary=Shapes((VOCABULARY,), (Size(48, 70, 32), Size(600, 1500, 128))),
        plans={
            "clip_loss": Plan(("speed", "small", "memory", "growth"), MODES, repeats=100),
            "siglip_loss": Plan(("speed", "small", "memory"), MODES, repeats=100),
            # linear_cross_entropy under other names: a quarter of its tokens tells enough
            "caption_loss": Plan(size=FEWER),
            "vqa_loss": Plan(size=FEWER),
        },
        small=(64, 128, 256, 512),
        small_dim=512,
        growth=(1024, 2048, 4096, 8192, 16384, 32768, 65536),
        growth_dim=256,
    ),
    "gpu": Suite(
        device="cuda",
        # multiples of what the baselines take; ragged sizes are for the tests
        square=Shapes((), (Size.square(256, 256), Size.square(2048, 512))),
        vocabulary=Shapes((), (Size(256, 512, 256), Size(2048, 4096, 512))),
        cells=tuple(by_importance()),
        headline=(*FIRST, LARGEST, VOCABULARY),
        peers=True,
        repeats=11,
    ),
}
