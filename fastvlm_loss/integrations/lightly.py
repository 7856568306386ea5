"""lightly's `NTXentLoss` without its four blocks of B x B scores.

from fastvlm_loss.integrations.lightly import NTXentLoss      # instead of lightly.loss
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from lightly.loss import NTXentLoss as Original
from torch import Tensor

from fastvlm_loss import clip_loss

from ._group import everyone
from ._versions import require

__all__ = ["NTXentLoss"]

require("lightly")

BITS = 32  # of an id those of the place in a process; above them the process


class NTXentLoss(Original):  # type: ignore[misc]
    """SimCLR's loss of two views, or with a memory bank MoCo's; the same values and gradients as lightly's.

    Without a bank each of the 2B views (of all processes with `gather_distributed`) chooses its other view among all
    views but itself. With one each view of `out0` chooses its `out1` among that and what the bank holds.

    Args:
        temperature: of the scores; lightly takes a negative one too.
        memory_bank_size: 0, or (number of features, their dimension). The bank is lightly's own module, at
            `self.memory_bank`; it changes after a call whose `out0` requires grad.
        gather_distributed: without a bank the views of all processes are candidates, of as many samples as each has;
            with one the bank takes those of all.

    Raises:
        ValueError: what lightly refuses.

    Source: Chen et al. 2020 (SimCLR), equation 1; He et al. 2020 (MoCo), equation 1.
    """

    def __init__(
        self, temperature: float = 0.5, memory_bank_size: int | Sequence[int] = 0, gather_distributed: bool = False
    ) -> None:
        super().__init__(temperature, memory_bank_size, gather_distributed)

    def forward(self, out0: Tensor, out1: Tensor) -> Tensor:
        """The loss `[]` of two views `[B, D]`, which are normalised here.

        Raises:
            ValueError: views of different shapes.
        """
        if out0.shape != out1.shape:
            raise ValueError(f"out1: got {list(out1.shape)}, wanted {list(out0.shape)} as out0")
        x0, x1 = F.normalize(out0, dim=1), F.normalize(out1, dim=1)
        x1, bank = self.memory_bank(x1, update=out0.requires_grad)
        return self._of_batch(x0, x1) if bank is None else self._of_bank(x0, x1, bank.T)

    def _loss(self, anchors: Tensor, candidates: Tensor, **options: Any) -> Tensor:
        # a scale is positive: the sign of the temperature goes to the candidates
        signed = candidates if self.temperature > 0 else -candidates
        return clip_loss(anchors, signed, 1 / abs(self.temperature), directions="image", **options)

    def _of_batch(self, x0: Tensor, x1: Tensor) -> Tensor:
        group = everyone(self.gather_distributed)
        first = 0 if group is None else dist.get_rank() << BITS
        # row i has its other view in column i; an equal id, its own column, is no candidate
        ids, own = torch.arange(2 * len(x0), device=x0.device) + first, torch.cat([x0, x1])
        losses = self._loss(
            own, torch.cat([x1, x0]), image_ids=ids, text_ids=ids.roll(len(x0)), reduction="none", group=group
        )
        return losses.mean()  # of the own samples, as lightly's

    def _of_bank(self, x0: Tensor, x1: Tensor, bank: Tensor) -> Tensor:
        # all of the batch have one id, so that only the bank is negative
        ids = torch.zeros(len(x0), dtype=torch.int64, device=x0.device)
        return self._loss(
            x0, torch.cat([x1, bank.to(x1)]), labels=torch.arange(len(x0), device=x0.device), image_ids=ids,
            text_ids=torch.cat([ids, ids.new_ones(len(bank))]),
        )  # fmt: skip
