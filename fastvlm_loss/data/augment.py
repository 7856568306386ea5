"""Shake pictures a little, or draw them anew as somebody else might, so that a new drawing style is no surprise."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

ZOOM, SHIFT, TILT = 0.15, 0.10, 0.20  # factor, share of half a side, radians: at most, either way
LIGHT, CONTRAST, SATURATION = 0.15, 0.25, 0.4  # share of full white, factor, factor
DICE = 7  # numbers for each picture
SHADE, HUE, GAMMA, SHARP, COVER = 0.3, 0.4, 0.5, 1.5, 0.5  # share of the light, radians, log, factor, share of a side
GREY = 0.1  # share of the pictures
RESTYLE_DICE = 9


def shake(images: Tensor, dice: Tensor) -> Tensor:
    """Zoom, shift, tilt, light, contrast and saturation: uint8 [B, H, W, 3], same shape back.

    ``dice`` is fp32 [DICE, B] in [-1, 1]. No mirroring, since "left of" must stay true. What comes in at the border
    repeats it. A picture's result depends on its own numbers only, to the bit.
    """
    zoom, tilt = 1 + ZOOM * dice[0], TILT * dice[3]
    cosine, sine, right, down = (
        value[:, None, None] for value in (zoom * tilt.cos(), zoom * tilt.sin(), SHIFT * dice[1], SHIFT * dice[2])
    )
    y, x = (
        ((torch.arange(side, device=images.device) * 2 + 1) / side - 1).view(shape)
        for side, shape in zip(images.shape[1:3], ((1, -1, 1), (1, 1, -1)), strict=True)
    )
    pictures = images.permute(0, 3, 1, 2).float().div_(255)
    # not affine_grid, whose matrix product may round differently in a batch of another size
    grid = torch.stack((cosine * x - sine * y + right, sine * x + cosine * y + down), 3)
    pictures = F.grid_sample(pictures, grid, padding_mode="border", align_corners=False)
    light, contrast, saturation = (
        value[:, None, None, None] for value in (LIGHT * dice[4], 1 + CONTRAST * dice[5], 1 + SATURATION * dice[6])
    )
    gray = pictures.mean(1, keepdim=True)
    pictures = gray + saturation * (pictures - gray)
    pictures = (pictures - 0.5) * contrast + 0.5 + light
    return pictures.mul_(255).round_().clamp_(0, 255).to(torch.uint8).permute(0, 2, 3, 1)


def restyle(images: Tensor, dice: Tensor) -> Tensor:
    """Edges, gamma, hue, light from a side, no colour or a covered part: uint8 [B, H, W, 3], same shape back.

    ``dice`` is fp32 [RESTYLE_DICE, B] in [-1, 1]. A picture's result depends on its own numbers only, to the bit.
    """
    pictures = images.permute(0, 3, 1, 2).float().div_(255)
    edge, gamma, angle, right, down, grey, size, x0, y0 = dice[:, :, None, None]
    soft = F.avg_pool2d(F.pad(pictures, (1, 1, 1, 1), mode="replicate"), 3, 1)
    pictures = pictures + torch.where(edge > 0, edge, SHARP * edge)[:, None] * (soft - pictures)
    pictures = pictures.clamp_(0, 1) ** (GAMMA * gamma).exp()[:, None]
    # a turn of the colours about grey: r' = a r + b g + c b, and so on round
    cosine, sine = (HUE * angle).cos(), (HUE * angle).sin() / 3**0.5
    a, b, c = (1 + 2 * cosine) / 3, (1 - cosine) / 3 - sine, (1 - cosine) / 3 + sine
    r, g, b_ = pictures.unbind(1)
    turned = torch.stack((a * r + b * g + c * b_, c * r + a * g + b * b_, b * r + c * g + a * b_), 1)
    pictures = torch.where((grey > 1 - 2 * GREY)[:, None], turned.mean(1, keepdim=True), turned)
    y, x = (
        ((torch.arange(side, device=images.device) * 2 + 1) / side - 1).view(shape)
        for side, shape in zip(images.shape[1:3], ((1, -1, 1), (1, 1, -1)), strict=True)
    )
    pictures = pictures * (1 + SHADE * (right * x + down * y))[:, None]
    covered = ((x - x0).abs() < COVER * size) & ((y - y0).abs() < COVER * size)  # none where size < 0
    pictures = torch.where(covered[:, None], pictures.mean((1, 2, 3), keepdim=True), pictures)
    return pictures.mul_(255).round_().clamp_(0, 255).to(torch.uint8).permute(0, 2, 3, 1)
