"""Shake training pictures a little, so that a new drawing style is no surprise; the same step shakes the same way."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

ZOOM, SHIFT, TILT = 0.15, 0.10, 0.20  # factor, share of half a side, radians: at most, either way
LIGHT, CONTRAST, SATURATION = 0.15, 0.25, 0.4  # share of full white, factor, factor


def augment(images: Tensor, seed: int, step: int) -> Tensor:
    """Random zoom, shift, tilt, light, contrast and saturation per picture: uint8 [B, H, W, 3], same shape back.

    No mirroring, since "left of" must stay true. What comes in at the border repeats it.
    """
    generator = torch.Generator().manual_seed((seed * 1_000_003 + step) % 2**63)
    dice = (torch.rand(7, len(images), generator=generator) * 2 - 1).to(images.device)  # uniform in [-1, 1]
    zoom, tilt = 1 + ZOOM * dice[0], TILT * dice[3]
    cosine, sine = zoom * tilt.cos(), zoom * tilt.sin()
    rows = (cosine, -sine, SHIFT * dice[1], sine, cosine, SHIFT * dice[2])
    pictures = images.permute(0, 3, 1, 2).float().div_(255)
    grid = F.affine_grid(torch.stack(rows, 1).view(-1, 2, 3), list(pictures.shape), align_corners=False)
    pictures = F.grid_sample(pictures, grid, padding_mode="border", align_corners=False)
    light, contrast, saturation = (
        value[:, None, None, None] for value in (LIGHT * dice[4], 1 + CONTRAST * dice[5], 1 + SATURATION * dice[6])
    )
    gray = pictures.mean(1, keepdim=True)
    pictures = gray + saturation * (pictures - gray)
    pictures = (pictures - 0.5) * contrast + 0.5 + light
    return pictures.mul_(255).round_().clamp_(0, 255).to(torch.uint8).permute(0, 2, 3, 1)
