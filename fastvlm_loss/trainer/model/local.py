"""Heads of the objectives that compare a picture's patches with a text, or with its words; `VLPretrainModel` runs them.

Their scalars are of shape [1], because FSDP shards no scalars.
"""

from __future__ import annotations

import math
from collections.abc import Collection

import torch
from torch import nn

__all__ = ["LateInteraction", "Multiscale", "local_heads"]


class Multiscale(nn.Module):
    """Patches W to the space of the contrastive text features D, and what makes a logit of a score.

    Scale and bias begin where `multiscale_itm_loss` says.
    """

    def __init__(self, width: int, dim: int) -> None:
        super().__init__()
        self.patches = nn.Linear(width, dim)
        self.scale = nn.Parameter(torch.tensor([10.0]))
        self.bias = nn.Parameter(torch.tensor([-5.0]))


class LateInteraction(nn.Module):
    """Patches and words W to a space of their own, D, with a temperature of its own."""

    def __init__(self, width: int, dim: int) -> None:
        super().__init__()
        self.patches, self.words = nn.Linear(width, dim), nn.Linear(width, dim)
        self.log_scale = nn.Parameter(torch.tensor([math.log(1 / 0.07)]))


def local_heads(names: Collection[str], width: int, dim: int) -> dict[str, nn.Module]:
    """Those that a configuration names."""
    heads = {"multiscale": Multiscale, "late_interaction": LateInteraction}
    return {name: head(width, dim) for name, head in heads.items() if name in names}
