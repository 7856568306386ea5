"""Other people's losses: each function makes one, called like ours, or raises `MissingError` with the reason."""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastvlm_loss import BatchMetrics

from .dense import Loss, under_autocast

__all__ = ["MissingError", "attribute", "said"]


class MissingError(Exception):
    """A baseline that cannot run here; the message says why."""


def compiled(loss: Loss) -> Callable[[], Loss]:
    """The same under `torch.compile`, mode default."""

    def compile_it() -> Loss:
        settings: Any = importlib.import_module("torch._dynamo.config")
        settings.recompile_limit = 256  # beyond it, sizes would silently run uncompiled
        result: Loss = torch.compile(loss)
        return result

    return compile_it


def clip_open_clip() -> Loss:
    """`open_clip.ClipLoss` of one process."""
    return under_autocast(attribute("open_clip", "ClipLoss")())


def siglip_open_clip() -> Loss:
    """`open_clip.loss.SigLipLoss` of one process."""
    return under_autocast(attribute("open_clip.loss", "SigLipLoss")())


def soft_target_open_clip() -> Loss:
    """The distillation term of `open_clip.loss.DistillClipLoss`, of one process."""
    distill = attribute("open_clip.loss", "DistillClipLoss")()

    def loss(
        image_features: Tensor, text_features: Tensor, logit_scale: Tensor, teacher_image_features: Tensor,
        teacher_text_features: Tensor, teacher_scale: float,
    ) -> Tensor:  # fmt: skip
        result: Tensor = distill(
            image_features, text_features, logit_scale, teacher_image_features, teacher_text_features, teacher_scale
        )[1]
        return result

    return under_autocast(loss)


def with_metrics(ours: Loss) -> Loss:
    """Our own loss, asked for its by-products too."""
    return lambda **named: ours(**named, metrics=BatchMetrics())


def linear_cross_entropy() -> Loss:
    """PyTorch's own."""
    theirs = attribute("torch.nn.functional", "linear_cross_entropy")
    options = attribute("torch.nn", "LinearCrossEntropyOptions")()  # without options it builds all scores
    return lambda hidden, weight, targets: theirs(hidden, weight, targets, options=options)


def cut_cross_entropy() -> Loss:
    """Cut Cross-Entropy, unfiltered: its filter drops the negatives of a large batch."""
    theirs = attribute("cut_cross_entropy", "linear_cross_entropy")
    return lambda hidden, weight, targets: theirs(hidden, weight, targets, filter_eps=None)


def liger() -> Loss:
    """Liger's fused linear cross-entropy; summed in fp32, or the weight's gradient drifts."""
    fused = attribute("liger_kernel.transformers", "LigerFusedLinearCrossEntropyLoss")(accum_dtype=torch.float32)
    return lambda hidden, weight, targets: fused(weight, hidden, targets)


def twice(make: Callable[[], Loss]) -> Callable[[], Loss]:
    """A linear cross-entropy as CLIP's loss, once for each direction."""

    def make_both() -> Loss:
        one = make()

        def loss(image_features: Tensor, text_features: Tensor, logit_scale: Tensor) -> Tensor:
            labels = torch.arange(len(image_features), device=image_features.device)
            to_text = one(logit_scale * image_features, text_features, labels)
            to_image = one(logit_scale * text_features, image_features, labels)
            return (to_text + to_image) / 2

        return loss

    return make_both


def left_out(why: str) -> Callable[[], Loss]:
    """A baseline that is named and not run."""

    def make() -> Loss:
        raise MissingError(why)

    return make


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


def siglip_kernel() -> Loss:
    """siglip-kernel, which takes the logarithm of the scale."""
    fused_siglip_loss = attribute("siglip_kernel", "fused_siglip_loss")

    def loss(image_features: Tensor, text_features: Tensor, logit_scale: Tensor, logit_bias: Tensor) -> Tensor:
        result: Tensor = fused_siglip_loss(image_features, text_features, logit_scale.log(), logit_bias)
        return result

    return loss


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
