"""Heads of the objectives that compare a picture's patches with a text, or with its words."""

from __future__ import annotations

import math
from collections.abc import Collection

import torch
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["LateInteraction", "Multiscale", "local_heads"]


class Multiscale(nn.Module):
    """Patches in the space of the contrastive text features, and what makes a logit of a score.

    The scalars are of shape [1], because FSDP shards no scalars; they begin where `multiscale_itm_loss` says.
    """

    def __init__(self, width: int, dim: int) -> None:
        super().__init__()
        self.patches = nn.Linear(width, dim)
        self.scale = nn.Parameter(torch.tensor([10.0]))
        self.bias = nn.Parameter(torch.tensor([-5.0]))

    def forward(self, image_tokens: Tensor) -> dict[str, Tensor]:
        """[n, P, W] to patches of length one [n, P, D]; beside them the scale and the bias."""
        return {"patches": unit(self.patches, image_tokens), "scale": self.scale * 1.0, "bias": self.bias * 1.0}


class LateInteraction(nn.Module):
    """Patches and words in a space of their own, with a temperature of its own."""

    def __init__(self, width: int, dim: int) -> None:
        super().__init__()
        self.patches, self.words = nn.Linear(width, dim), nn.Linear(width, dim)
        self.log_scale = nn.Parameter(torch.tensor([math.log(1 / 0.07)]))

    def forward(self, image_tokens: Tensor, hidden: Tensor) -> dict[str, Tensor]:
        """[n, P, W] and [m, T, W] to patches [n, P, D] and words [m, T, D] of length one, and the scores' scale."""
        patches, words = unit(self.patches, image_tokens), unit(self.words, hidden)
        return {"patches": patches, "words": words, "scale": self.log_scale.exp()}


def local_heads(names: Collection[str], width: int, dim: int) -> dict[str, nn.Module]:
    """Those that a configuration names."""
    heads = {"multiscale": Multiscale, "late_interaction": LateInteraction}
    return {name: head(width, dim) for name, head in heads.items() if name in names}


def unit(project: nn.Linear, rows: Tensor) -> Tensor:
    """Projected and of length one, fp32 under autocast too."""
    with torch.autocast(rows.device.type, enabled=False):
        return F.normalize(project(rows.to(project.weight.dtype)), dim=-1)
