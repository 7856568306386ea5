"""Texts in groups of like length, so that a long one does not make all the others as long."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["GROUPS", "by_length"]

GROUPS = 4


def by_length(
    run: Callable[..., Tensor], mask: Tensor, texts: tuple[Tensor, ...], others: tuple[Tensor | None, ...] = ()
) -> Tensor:  # fmt: skip
    """`run(mask, *texts, *others)`, `[n, T, W]`, from up to `GROUPS` groups of rows, each as long as its longest text.

    The results are those of one call, but at padding, where they may be 0. On a CPU alone: on a GPU the lengths
    would have to be waited for.

    Args:
        run: gives `[m, t, W]` for m of the rows, whatever the other rows are.
        mask: bool `[n, T]`, False at padding.
        texts: `[n, T, ...]`, cut to the length of the group.
        others: `[n, ...]` or None.
    """
    count, longest = mask.shape
    if mask.device.type != "cpu" or count < GROUPS:
        return run(mask, *texts, *others)
    lengths = (mask * torch.arange(1, longest + 1)).amax(1).clamp(min=1)
    order = lengths.argsort(stable=True)
    parts = []
    for rows in order.tensor_split(GROUPS):
        t = int(lengths[rows[-1]])
        made = run(
            mask[rows, :t], *(text[rows, :t] for text in texts), *(None if o is None else o[rows] for o in others)
        )  # fmt: skip
        parts.append(F.pad(made, (0, 0, 0, longest - t)))
    return torch.cat(parts)[order.argsort()]
