"""The sizes of each suite."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch

__all__ = ["SUITES", "Cell", "Suite"]

SIZES = (4096, 8192, 16384, 32768, 65536, 131072, 262144, 1048576)
DIMS = (256, 512, 768, 1024)
FIRST = ((32768, 768), (65536, 768))  # what the targets speak of
LARGEST = (1048576, 512)


@dataclass(frozen=True)
class Cell:
    """One size in one dtype; `losses` None stands for all."""

    n: int
    d: int
    dtype: torch.dtype
    losses: tuple[str, ...] | None = None

    def takes(self, loss: str) -> bool:
        """Whether this loss is measured here."""
        return self.losses is None or loss in self.losses


@dataclass(frozen=True)
class Suite:
    """Sizes are (N, D); `small` and `growth` are batches at one D.

    A suite with `cells` takes those instead of the parts, in their order, as many as a budget of seconds allows;
    `headline` are the sizes whose tables stand open. `peers` adds the baselines of a GPU.
    """

    device: str
    dtypes: tuple[torch.dtype, ...] = ()
    sizes: tuple[tuple[int, int], ...] = ()
    small: tuple[int, ...] = ()
    small_dim: int = 0
    growth: tuple[int, ...] = ()
    growth_dim: int = 0
    small_rounds: int = 4  # times the repeats: such calls are short and their times scatter
    small_block: int = 10  # calls a sample
    gate: tuple[tuple[int, int], tuple[int, int]] = ((48, 32), (1100, 128))
    cells: tuple[Cell, ...] = ()
    headline: tuple[tuple[int, int], ...] = ()
    peers: bool = False
    repeats: int = 5  # interleaved calls a row

    def quick(self) -> Suite:
        """Tiny sizes: whether the program works, no figure worth keeping."""
        cells = (Cell(256, 64, torch.bfloat16), Cell(512, 64, torch.bfloat16), Cell(256, 64, torch.float32))
        return replace(
            self, sizes=((256, 32),), small=(16,), small_dim=32, small_rounds=2, small_block=2,
            growth=(256, 1024), growth_dim=32, gate=((64, 64), (192, 64)) if self.cells else ((24, 16), (150, 32)),
            cells=cells if self.cells else (), headline=((256, 64),) if self.cells else (),
        )  # fmt: skip


def by_importance() -> Iterator[Cell]:
    """The sizes of the targets, the largest, the other dtypes at one size, then the rest from small to large."""
    for n, d in FIRST:
        yield Cell(n, d, torch.bfloat16)
    yield Cell(*LARGEST, torch.bfloat16, ("clip_loss",))
    for dtype in (torch.float16, torch.float32):
        yield Cell(*FIRST[0], dtype)
    for n, d in sorted(((n, d) for n in SIZES for d in DIMS), key=lambda size: size[0] ** 2 * size[1]):
        if (n, d) == LARGEST:
            yield Cell(n, d, torch.bfloat16, ("siglip_loss",))
        elif (n, d) not in FIRST:
            yield Cell(n, d, torch.bfloat16)


SUITES = {
    "cpu": Suite(
        device="cpu",
        dtypes=(torch.float32, torch.bfloat16),
        sizes=((8192, 512),),
        small=(64, 128, 256, 512),
        small_dim=512,
        growth=(1024, 2048, 4096, 8192, 16384, 32768, 65536),
        growth_dim=256,
    ),
    "gpu": Suite(
        device="cuda",
        gate=((256, 256), (2048, 512)),  # multiples of what the baselines take; ragged sizes are for the tests
        cells=tuple(by_importance()),
        headline=(*FIRST, LARGEST),
        peers=True,
        repeats=11,
    ),
}
