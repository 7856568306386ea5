"""Image towers: a small convolutional one, and those of timm and open_clip, all giving tokens and a pooled feature."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from .config import ImageConfig, known

__all__ = ["ImageTower", "ImportedTower", "TinyTower", "image_tower"]

GROUPS = 8  # of the normalisation


class ImageTower(nn.Module, ABC):
    """uint8 pictures [B, size, size, 3] to tokens [B, count, token_width] and a pooled feature [B, feature_width]."""

    count: int
    token_width: int
    feature_width: int
    mean: Tensor
    std: Tensor

    def __init__(self, mean: tuple[float, ...], std: tuple[float, ...]) -> None:
        super().__init__()
        for name, value in (("mean", mean), ("std", std)):
            shape = torch.tensor(value).mul(255).reshape(1, 3, 1, 1)
            self.register_buffer(name, shape, persistent=False)

    def normalise(self, images: Tensor) -> Tensor:
        """uint8 [B, H, W, 3] to fp32 [B, 3, H, W], in memory the channels last."""
        return images.permute(0, 3, 1, 2).to(self.mean.dtype).sub_(self.mean).div_(self.std)

    @abstractmethod
    def set_checkpointing(self, enable: bool) -> None:
        """Recompute activations in backward."""

    @abstractmethod
    def blocks(self) -> list[nn.Module]:
        """The parts that FSDP gathers one at a time."""


class Residual(nn.Module):
    """Two 3 x 3 convolutions beside a shortcut, with group normalisation; halves the picture.

    Not batch normalisation: a picture's feature must not depend on the others, or gradient caching and several
    processes would give another gradient than the whole batch.
    """

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(inputs, outputs, 3, 2, 1, bias=False),
            nn.GroupNorm(GROUPS, outputs),
            nn.ReLU(inplace=True),
            nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False),
            nn.GroupNorm(GROUPS, outputs),
        )
        self.shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, 2, bias=False), nn.GroupNorm(GROUPS, outputs))

    def forward(self, x: Tensor) -> Tensor:
        """[B, inputs, H, W] to [B, outputs, H / 2, W / 2]."""
        return F.relu(self.body(x) + self.shortcut(x))


class TinyTower(ImageTower):
    """Convolutions: tokens from the map of stride 8 (36 of a picture of 48 pixels), the feature from that of stride 16.

    The last map is flattened, not pooled: a pooled one could not tell "left of" from "right of". Tokens have a learned
    position for the same reason.
    """

    def __init__(self, config: ImageConfig) -> None:
        super().__init__(config.mean or (0.5,) * 3, config.std or (0.25,) * 3)
        stem, *stages = config.widths
        self.stem = nn.Sequential(
            nn.Conv2d(3, stem, 4, 2, 1, bias=False), nn.GroupNorm(GROUPS, stem), nn.ReLU(inplace=True)
        )
        self.stages = nn.ModuleList(Residual(i, o) for i, o in zip(config.widths, stages, strict=False))
        self.count, self.token_width = (config.size // 8) ** 2, stages[1]
        self.feature_width = stages[2] * (config.size // 16) ** 2
        self.norm = nn.LayerNorm(self.token_width)
        self.position = nn.Parameter(torch.empty(self.count, self.token_width).normal_(0.0, 0.5))
        self.checkpointing = False

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens and feature."""
        x = self._call(self.stem, self.normalise(images))
        maps = []
        for stage in self.stages:
            x = self._call(stage, x)
            maps.append(x)
        return self.norm(maps[1].flatten(2).transpose(1, 2)) + self.position, x.flatten(1)

    def _call(self, stage: nn.Module, x: Tensor) -> Tensor:
        out: Tensor = checkpoint(stage, x, use_reentrant=False) if self.checkpointing else stage(x)
        return out

    def set_checkpointing(self, enable: bool) -> None:
        """Recompute activations in backward, stage by stage."""
        self.checkpointing = enable

    def blocks(self) -> list[nn.Module]:
        """The stages."""
        return [*self.stages]


class ImportedTower(ImageTower):
    """A tower of timm or open_clip, with its own names inside `trunk`.

    Batch normalisation inside one makes gradient caching inexact: prefer transformers or ConvNeXt.
    """

    trunk: Any

    def __init__(
        self, config: ImageConfig, trunk: Any, mean: tuple[float, ...], std: tuple[float, ...],
        classifier: tuple[str, ...] = (),
    ) -> None:  # fmt: skip
        super().__init__(config.mean or mean, config.std or std)
        self.trunk, self.name, self.classifier = trunk, config.name, classifier
        training, device = trunk.training, next(trunk.parameters()).device
        with torch.no_grad():
            tokens, feature = self.eval()(torch.zeros(1, config.size, config.size, 3, dtype=torch.uint8, device=device))
        self.train(training)
        self.count, self.token_width, self.feature_width = tokens.shape[1], tokens.shape[2], feature.shape[1]

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens, of a transformer its class token too where timm gives it, and feature."""
        x, trunk = self.normalise(images), self.trunk
        if hasattr(trunk, "forward_features"):  # timm
            found = trunk.forward_features(x)
            return self._tokens(found, trunk.num_features), trunk.forward_head(found, pre_logits=True)
        if hasattr(trunk, "trunk"):  # timm's inside open_clip
            found = trunk.trunk.forward_features(x)
            return self._tokens(found, trunk.trunk.num_features), trunk.head(trunk.trunk.forward_head(found))
        if hasattr(trunk, "output_tokens"):  # open_clip's transformer
            feature, tokens = trunk(x)
            return tokens, feature
        found = trunk.forward_intermediates(x, indices=1)
        return self._tokens(found["image_intermediates"][-1]), found["image_features"]

    @staticmethod
    def _tokens(found: Any, width: int | None = None) -> Tensor:
        """[B, P, W] of that, of [B, W, H', W'], or of [B, H', W', W]."""
        if found.dim() == 4 and found.shape[1] != width and found.shape[3] == width:
            found = found.permute(0, 3, 1, 2)
        tokens: Tensor = found.flatten(2).transpose(1, 2) if found.dim() == 4 else found
        return tokens

    def set_checkpointing(self, enable: bool) -> None:
        """Recompute activations in backward, as the library does it (not reentrant)."""
        trunk = getattr(self.trunk, "trunk", self.trunk)  # open_clip's wrapper would only warn
        if enable and hasattr(trunk, "attnpool"):
            raise ValueError(f"checkpointing: got True for the image tower {self.name!r}, which open_clip cannot")
        trunk.set_grad_checkpointing(enable)

    def resampled(self, table: Tensor, like: Tensor) -> Tensor:
        """A table of positions, of pictures of another size, resampled to those of `like`."""
        if table.shape == like.shape or table.shape[-1] != like.shape[-1]:
            return table
        from timm.layers import resample_abs_pos_embed

        trunk = getattr(self.trunk, "trunk", self.trunk)
        grid = trunk.patch_embed.grid_size if hasattr(trunk, "patch_embed") else trunk.grid_size
        rows = table.reshape(1, -1, table.shape[-1])
        extra = like.numel() // like.shape[-1] - grid[0] * grid[1]
        out: Tensor = resample_abs_pos_embed(rows, list(grid), num_prefix_tokens=extra)
        return out.reshape(like.shape)

    def blocks(self) -> list[nn.Module]:
        """The largest list of modules inside, which of a transformer are its layers."""
        lists = [m for m in self.trunk.modules() if isinstance(m, (nn.ModuleList, nn.Sequential))]
        return [*max(lists, key=lambda m: sum(p.numel() for p in m.parameters()))] if lists else []


def image_tower(config: ImageConfig) -> ImageTower:
    """The tower that the configuration names, with new weights; nothing is downloaded.

    Raises:
        ValueError: an architecture or an option that there is not, named.
    """
    if config.source == "tiny":
        return TinyTower(config)
    return _timm(config) if config.source == "timm" else _open_clip(config)


def _timm(config: ImageConfig) -> ImportedTower:
    import timm

    known("image.name", config.name.partition(".")[0], timm.list_models())
    form = timm.get_pretrained_cfg(config.name)
    sized = {"img_size": config.size} if form is not None and form.fixed_input_size else {}
    try:
        trunk = timm.create_model(config.name, pretrained=False, num_classes=0, **sized, **config.options)
    except TypeError as error:
        raise ValueError(f"image.options: got {config.options} for {config.name!r}: {error}") from error
    form = trunk.pretrained_cfg
    named = form.get("classifier") or ()
    classifier = tuple(f"{name}." for name in ((named,) if isinstance(named, str) else named))
    return ImportedTower(config, trunk, form["mean"], form["std"], classifier)


def _open_clip(config: ImageConfig) -> ImportedTower:
    import open_clip
    from open_clip.model import CLIPVisionCfg, _build_vision_tower

    known("image.name", config.name, open_clip.list_models())
    form = open_clip.get_model_config(config.name)
    fields = {**form["vision_cfg"], **config.options, "image_size": config.size, "timm_model_pretrained": False}
    for name in config.options:
        known("image.options", name, CLIPVisionCfg.__dataclass_fields__)
    # not create_model: it would build the text tower too, and some of those ask the network
    trunk = _build_vision_tower(form["embed_dim"], CLIPVisionCfg(**fields), form.get("quick_gelu", False))
    if hasattr(trunk, "output_tokens"):
        trunk.output_tokens = True
    elif hasattr(trunk, "set_input_size") and config.size != form["vision_cfg"].get("image_size", 224):
        trunk.set_input_size(config.size)
    return ImportedTower(config, trunk, open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD)
