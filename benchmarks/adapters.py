"""The baselines: each function makes one, called like our loss, or raises `MissingError` with the reason."""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["Loss", "MissingError", "attribute", "autocast", "said"]

Loss = Callable[..., Tensor]


class MissingError(Exception):
    """A baseline that cannot run here; the message says why."""


def clip_dense() -> Loss:
    """The textbook: all scores, cross-entropy of the rows and of the columns."""

    def loss(image_features: Tensor, text_features: Tensor, logit_scale: Tensor) -> Tensor:
        with autocast(image_features):
            scores = logit_scale * image_features @ text_features.T
            labels = torch.arange(len(scores), device=scores.device)
            return (F.cross_entropy(scores, labels) + F.cross_entropy(scores.T, labels)) / 2

    return loss


def siglip_dense() -> Loss:
    """The textbook: all scores, the sigmoid loss of each, summed over the columns."""

    def loss(image_features: Tensor, text_features: Tensor, logit_scale: Tensor, logit_bias: Tensor) -> Tensor:
        with autocast(image_features):
            scores = logit_scale * image_features @ text_features.T + logit_bias
            signs = 2 * torch.eye(len(scores), device=scores.device, dtype=scores.dtype) - 1
            return -F.logsigmoid(signs * scores).sum() / len(scores)

    return loss


def compiled(make: Callable[[], Loss]) -> Callable[[], Loss]:
    """The same under `torch.compile`, mode default."""

    def compile_it() -> Loss:
        settings: Any = importlib.import_module("torch._dynamo.config")
        settings.recompile_limit = 256  # beyond it, sizes would silently run uncompiled
        result: Loss = torch.compile(make())
        return result

    return compile_it


def clip_open_clip() -> Loss:
    """`open_clip.ClipLoss` of one process."""
    return _under_autocast(attribute("open_clip", "ClipLoss")())


def siglip_open_clip() -> Loss:
    """`open_clip.loss.SigLipLoss` of one process."""
    return _under_autocast(attribute("open_clip.loss", "SigLipLoss")())


def clip_linear_cross_entropy() -> Loss:
    """PyTorch's own, once for each direction."""
    linear_cross_entropy = attribute("torch.nn.functional", "linear_cross_entropy")
    options = attribute("torch.nn", "LinearCrossEntropyOptions")()  # without options it builds all scores
    return _twice(lambda x, y, labels: linear_cross_entropy(x, y, labels, options=options))


def clip_chunked() -> Loss:
    """Chunks of rows in plain PyTorch."""
    from .chunked import chunked_clip_loss

    return chunked_clip_loss


def clip_inf_cl() -> Loss:
    """Inf-CL on one GPU: losses of the rows, one direction a call.

    Not its `cal_inf_loss`, whose gradient of a learnable scale needs a process group.
    """
    cal_flash_loss = attribute("inf_cl", "cal_flash_loss")

    def loss(image_features: Tensor, text_features: Tensor, logit_scale: Tensor) -> Tensor:
        head = math.gcd(image_features.shape[1], 256)  # a power of two that divides D
        labels = torch.arange(len(image_features), device=image_features.device)
        to_text = cal_flash_loss(image_features, text_features, labels, logit_scale, head)
        to_image = cal_flash_loss(text_features, image_features, labels, logit_scale, head)
        result: Tensor = (to_text.mean() + to_image.mean()) / 2
        return result

    return loss


def clip_memeff() -> Loss:
    """memeff with `stable=False`: its default multiplies the gradient. Its temperature is a number without gradient."""
    make = attribute("memeff", "MemoryEfficientCLIPLoss")
    made: list[Any] = [None, None]

    def loss(image_features: Tensor, text_features: Tensor, logit_scale: Tensor) -> Tensor:
        if made[0] is not logit_scale:  # not at every call: reading the number waits for the GPU
            made[:] = logit_scale, make(temperature=1 / logit_scale.item(), normalized_inputs=True, stable=False)
        result: Tensor = made[1](image_features, text_features) + 0 * logit_scale
        return result

    return loss


def clip_cut_cross_entropy() -> Loss:
    """Cut Cross-Entropy, once for each direction, unfiltered: its filter drops the negatives of a large batch."""
    linear_cross_entropy = attribute("cut_cross_entropy", "linear_cross_entropy")
    return _twice(lambda x, y, labels: linear_cross_entropy(x, y, labels, filter_eps=None))


def clip_liger() -> Loss:
    """Liger's fused linear cross-entropy, once for each direction; summed in fp32, or the weight's gradient drifts."""
    fused = attribute("liger_kernel.transformers", "LigerFusedLinearCrossEntropyLoss")(accum_dtype=torch.float32)
    return _twice(lambda x, y, labels: fused(y, x, labels))


def siglip_kernel() -> Loss:
    """siglip-kernel, which takes the logarithm of the scale."""
    fused_siglip_loss = attribute("siglip_kernel", "fused_siglip_loss")

    def loss(image_features: Tensor, text_features: Tensor, logit_scale: Tensor, logit_bias: Tensor) -> Tensor:
        result: Tensor = fused_siglip_loss(image_features, text_features, logit_scale.log(), logit_bias)
        return result

    return loss


def autocast(features: Tensor) -> torch.autocast:
    """What users of half-precision features run a dense loss under; off for fp32."""
    half = features.dtype in (torch.bfloat16, torch.float16)
    return torch.autocast(features.device.type, features.dtype if half else None, enabled=half)


def attribute(module: str, name: str) -> Any:
    """`module.name`; `MissingError` if it cannot be had, whatever importing it raises (some want a GPU to be there)."""
    try:
        found = importlib.import_module(module)
    except ImportError as error:
        raise MissingError(f"{error}") from error
    except Exception as error:
        raise MissingError(f"import {module}: {said(error)}") from error
    if not hasattr(found, name):
        raise MissingError(f"no {name} in {module}" + f" of torch {torch.__version__}" * module.startswith("torch"))
    return getattr(found, name)


def said(error: Exception) -> str:
    """One line of an exception."""
    return next(iter(str(error).strip().splitlines()), "") or type(error).__name__


def _twice(one: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Loss:
    """A cross-entropy of one direction `(inputs, weights, labels)` as CLIP's loss."""

    def loss(image_features: Tensor, text_features: Tensor, logit_scale: Tensor) -> Tensor:
        labels = torch.arange(len(image_features), device=image_features.device)
        to_text = one(logit_scale * image_features, text_features, labels)
        to_image = one(logit_scale * text_features, image_features, labels)
        return (to_text + to_image) / 2

    return loss


def _under_autocast(loss: Loss) -> Loss:
    def under_autocast(image_features: Tensor, text_features: Tensor, *scalars: Tensor, **named: Tensor) -> Tensor:
        with autocast(image_features):
            return loss(image_features, text_features, *scalars, **named)

    return under_autocast
