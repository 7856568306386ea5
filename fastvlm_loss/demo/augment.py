"""Shake training pictures a little; the same step shakes the same way."""

from __future__ import annotations

import torch
from torch import Tensor

from ..data.augment import DICE, shake


def augment(images: Tensor, seed: int, step: int) -> Tensor:
    """Random zoom, shift, tilt, light, contrast and saturation per picture: uint8 [B, H, W, 3], same shape back."""
    generator = torch.Generator().manual_seed((seed * 1_000_003 + step) % 2**63)
    dice = (torch.rand(DICE, len(images), generator=generator) * 2 - 1).to(images.device)  # uniform in [-1, 1]
    return shake(images, dice)
