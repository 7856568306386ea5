"""Patches of images and the texts they are paired with, checked."""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ..scores import check

__all__ = ["Patches"]


@dataclass(frozen=True)
class Patches:
    """Pairs of images and texts.

    Attributes:
        x: patches `[B, P, D]`, P >= 1.
        y: texts `[N, D]`.
        images, texts: `[n]` of each pair, or None for each in order.
        relevance: `[B, P]` in the statistics' dtype, 1 for padding; or None.
        padding: bool `[B, P]`, or None for none.
        present: bool `[B]`, which images have a patch.
    """

    x: Tensor
    y: Tensor
    images: Tensor | None
    texts: Tensor | None
    relevance: Tensor | None
    padding: Tensor | None
    present: Tensor

    @classmethod
    def of(
        cls, patch_features: Tensor, text_features: Tensor, patch_relevance: Tensor | None, image_index: Tensor | None,
        text_index: Tensor | None, patch_mask: Tensor | None, finite: bool,
    ) -> Patches:  # fmt: skip
        """Check the arguments of `multiscale_itm`; with `finite` also the values."""
        x, y = _features(patch_features, text_features)
        images = None if image_index is None else check.indices("image_index", image_index, x, x.shape[0])
        texts = None if text_index is None else check.indices("text_index", text_index, x, y.shape[0])
        n, others = (len(t) if i is None else len(i) for t, i in ((x, images), (y, texts)))
        if n != others:
            raise ValueError(f"text_index: got {others} texts for {n} images, wanted as many: pairs")
        shape, dtype = x.shape[:2], torch.promote_types(torch.promote_types(x.dtype, y.dtype), torch.float32)
        mask = None if patch_mask is None else check.mask("patch_mask", patch_mask, shape, x)
        r = None if patch_relevance is None else check.floating("patch_relevance", patch_relevance, shape, x).to(dtype)
        if r is not None and mask is not None:
            r = torch.where(mask, r, 1.0)
        if finite:
            check.finite("patch_features", x if mask is None else x.masked_fill(~mask[..., None], 0.0))
            check.finite("text_features", y)
            if r is not None:
                check.finite("patch_relevance", r)
        if r is not None and check.readable(r) and bool(((r < 0) | (r > 1)).any()):
            warnings.warn("patch_relevance: got values outside [0, 1], they are clamped", stacklevel=3)
        if not x.shape[1]:  # one patch that is padding: the same, and no empty axis
            x, r = F.pad(x, (0, 0, 0, 1)), None
            mask = x.new_zeros(x.shape[:2], dtype=torch.bool)
        present = torch.ones_like(x[:, 0, 0], dtype=torch.bool) if mask is None else mask.any(1)
        return cls(x, y, images, texts, r, None if mask is None else ~mask, present)

    @property
    def out(self) -> Tensor | None:
        """Padding beside patches; where there are no patches at all it stays, finite, and the score is dropped."""
        return None if self.padding is None else self.padding & self.present[:, None]


def _features(patches: object, texts: object) -> tuple[Tensor, Tensor]:
    y = check.features("text_features", texts)
    if not isinstance(patches, Tensor) or patches.dtype not in check.DTYPES:
        got = patches.dtype if isinstance(patches, Tensor) else type(patches).__name__
        raise TypeError(f"patch_features: got {got}, wanted a floating tensor of shape [B, P, D]")
    if patches.dim() != 3 or not patches.shape[2]:
        raise ValueError(f"patch_features: got shape {list(patches.shape)}, wanted [B, P, D] with D >= 1")
    # under autocast one tower may end in fp32 and the other not: a chunk is cast to fp32 in any case
    mixed = y.device.type != "meta" and torch.is_autocast_enabled(y.device.type)
    check.alike("text_features", y.to(patches.dtype) if mixed else y, "patch_features", patches)
    return patches, y
