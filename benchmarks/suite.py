"""The sizes of each suite."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

__all__ = ["SUITES", "Suite"]


@dataclass(frozen=True)
class Suite:
    """Sizes are (N, D); `small` and `growth` are batches at one D."""

    device: str
    dtypes: tuple[torch.dtype, ...]
    sizes: tuple[tuple[int, int], ...]
    small: tuple[int, ...]
    small_dim: int
    growth: tuple[int, ...]
    growth_dim: int
    small_rounds: int = 4  # times the repeats: such calls are short and their times scatter
    small_block: int = 10  # calls a sample
    gate: tuple[tuple[int, int], tuple[int, int]] = ((48, 32), (1100, 128))

    def quick(self) -> Suite:
        """Tiny sizes: whether the program works, no figure worth keeping."""
        return replace(
            self, sizes=((256, 32),), small=(16,), small_dim=32, small_rounds=2, small_block=2,
            growth=(256, 1024), growth_dim=32, gate=((24, 16), (150, 32)),
        )  # fmt: skip


SUITES = {
    "cpu": Suite(
        device="cpu",
        dtypes=(torch.float32, torch.bfloat16),
        sizes=((8192, 512),),
        small=(64, 128, 256, 512),
        small_dim=512,
        growth=(1024, 2048, 4096, 8192, 16384, 32768, 65536),
        growth_dim=256,
    )
}
