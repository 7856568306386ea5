"""Two small towers into one space: a convolutional one for pictures, open_clip's transformer for words."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..data.tokenizer import END, PAD

MAX_LOG_SCALE = math.log(100)


class Residual(nn.Module):
    """Two 3 x 3 convolutions beside a shortcut, with batch normalisation; halves the picture with ``stride=2``."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False),
            nn.BatchNorm2d(outputs),
            nn.ReLU(inplace=True),
            nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False),
            nn.BatchNorm2d(outputs),
        )
        self.shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        """[B, inputs, H, W] to [B, outputs, H / stride, W / stride]."""
        return F.relu(self.body(x) + self.shortcut(x))


class ImageTower(nn.Module):
    """uint8 pictures [B, size, size, 3] to features [B, dim]; ``size`` must be a multiple of 16.

    The last map is flattened, not pooled: a pooled one could not tell "left of" from "right of".
    """

    def __init__(self, size: int, dim: int, widths: tuple[int, ...] = (48, 96, 128, 192)) -> None:
        super().__init__()
        stem, *stages = widths
        self.stem = nn.Sequential(nn.Conv2d(3, stem, 4, 2, 1, bias=False), nn.BatchNorm2d(stem), nn.ReLU(inplace=True))
        self.stages = nn.Sequential(*(Residual(i, o, 2) for i, o in zip(widths, stages, strict=False)))
        self.project = nn.Linear(stages[-1] * (size // 16) ** 2, dim)
        self.to(memory_format=torch.channels_last)

    def forward(self, images: Tensor) -> Tensor:
        """Features, not yet of length one."""
        x = images.permute(0, 3, 1, 2).to(torch.float32).sub_(127.5).div_(64.0)
        features: Tensor = self.project(self.stages(self.stem(x)).flatten(1))
        return features


class TextTower(nn.Module):
    """Token ids [B, L] to features [B, dim]: open_clip's TextTransformer, both ways, read at the end token."""

    def __init__(self, vocabulary: int, context_length: int, dim: int, width: int = 128, layers: int = 2) -> None:
        super().__init__()
        from open_clip.transformer import TextTransformer

        self.transformer = TextTransformer(
            context_length=context_length,
            vocab_size=vocabulary,
            width=width,
            heads=4,
            layers=layers,
            output_dim=dim,
            no_causal_mask=True,
            use_pad_mask=True,
            pad_id=PAD,
            eos_id=END,
            pool_type="eos",
        )

    def forward(self, tokens: Tensor) -> Tensor:
        """Features, not yet of length one."""
        features: Tensor = self.transformer(tokens)
        return features


class TwoTowers(nn.Module):
    """Both towers and the temperature: ``forward`` gives fp32 features of length one, [B, dim] each."""

    def __init__(self, size: int, vocabulary: int, context_length: int, dim: int = 128) -> None:
        super().__init__()
        self.image = ImageTower(size, dim)
        self.text = TextTower(vocabulary, context_length, dim)
        self.log_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))

    @property
    def logit_scale(self) -> Tensor:
        """The multiplicative scale, a scalar with a gradient."""
        return self.log_scale.exp()

    @torch.no_grad()
    def clamp_logit_scale(self) -> None:
        """Keep the scale in [1, 100]; called after each step, since a clamp in forward would stop the gradient."""
        self.log_scale.clamp_(0, MAX_LOG_SCALE)

    def forward(self, images: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Image features and text features, fp32 [B, dim] each."""
        return self.encode_image(images), self.encode_text(tokens)

    def encode_image(self, images: Tensor) -> Tensor:
        """uint8 [B, size, size, 3] to fp32 features of length one, [B, dim]."""
        with _autocast(images.device):
            features = self.image(images)
        return F.normalize(features.float(), dim=-1)

    def encode_text(self, tokens: Tensor) -> Tensor:
        """Token ids [B, L] to fp32 features of length one, [B, dim]."""
        with _autocast(tokens.device):
            features = self.text(tokens)
        return F.normalize(features.float(), dim=-1)


def fast_bf16(device: torch.device) -> bool:
    """Whether the device has instructions for bf16 products: GPUs from Ampere on; of CPUs AVX-512 alone has none."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    found = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    return any(found.get(name, False) for name in ("avx512_bf16", "amx_bf16", "bf16", "sve_bf16"))


def _autocast(device: torch.device) -> torch.autocast:
    return torch.autocast(device.type, torch.bfloat16, enabled=fast_bf16(device))
