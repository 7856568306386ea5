"""What each loss is compared with: one table by the loss's name; what is not installed is skipped with its reason."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastvlm_loss import backend
from fastvlm_loss.losses import LossSpec

__all__ = ["BASELINES", "DENSE", "OURS", "contestants", "makers", "on_backend"]

Loss = Callable[..., Tensor]
OURS, DENSE = "fastvlm_loss", "dense"


class MissingError(Exception):
    """A baseline that cannot run here; the message says why."""


def contestants(spec: LossSpec) -> tuple[dict[str, Loss], dict[str, str]]:
    """Everything that computes this loss, ours first, and the reason for each baseline that is missing."""
    found: dict[str, Loss] = {}
    missing: dict[str, str] = {}
    for name, make in makers(spec).items():
        try:
            found[name] = make()
        except MissingError as reason:
            missing[name] = str(reason)
    return found, missing


def makers(spec: LossSpec) -> dict[str, Callable[[], Loss]]:
    """How to make each contestant; one may raise `MissingError`."""
    return {
        OURS: lambda: spec.function,
        f"{OURS}, torch backend": lambda: on_backend(spec, "torch"),
        DENSE: lambda: on_backend(spec, DENSE),
        **BASELINES.get(spec.name, {}),
    }


def on_backend(spec: LossSpec, name: str) -> Loss:
    """The loss on one of our backends; the dense one under autocast, as users of a dense loss run it."""

    def loss(image_features: Tensor, text_features: Tensor, logit_scale: Tensor) -> Tensor:
        with backend(name), _autocast(image_features) if name == DENSE else nullcontext():
            return spec.function(image_features, text_features, logit_scale)

    return loss


def _clip_dense() -> Loss:
    def loss(image_features: Tensor, text_features: Tensor, logit_scale: Tensor) -> Tensor:
        with _autocast(image_features):
            scores = logit_scale * image_features @ text_features.T
            labels = torch.arange(len(scores), device=scores.device)
            return (F.cross_entropy(scores, labels) + F.cross_entropy(scores.T, labels)) / 2

    return loss


def _clip_open_clip() -> Loss:
    loss = _attribute("open_clip", "ClipLoss")()

    def under_autocast(image_features: Tensor, text_features: Tensor, logit_scale: Tensor) -> Tensor:
        with _autocast(image_features):
            result: Tensor = loss(image_features, text_features, logit_scale)
            return result

    return under_autocast


def _clip_linear_cross_entropy() -> Loss:
    linear_cross_entropy = _attribute("torch.nn.functional", "linear_cross_entropy")
    options = _attribute("torch.nn", "LinearCrossEntropyOptions")()  # without options it builds all scores

    def loss(image_features: Tensor, text_features: Tensor, logit_scale: Tensor) -> Tensor:
        labels = torch.arange(len(image_features), device=image_features.device)
        to_text = linear_cross_entropy(logit_scale * image_features, text_features, labels, options=options)
        to_image = linear_cross_entropy(logit_scale * text_features, image_features, labels, options=options)
        result: Tensor = (to_text + to_image) / 2
        return result

    return loss


def _clip_chunked() -> Loss:
    from .chunked import chunked_clip_loss

    return chunked_clip_loss


def _autocast(features: Tensor) -> torch.autocast:
    """What users of half-precision features run a dense loss under; off for fp32."""
    half = features.dtype in (torch.bfloat16, torch.float16)
    return torch.autocast(features.device.type, features.dtype if half else None, enabled=half)


def _attribute(module: str, name: str) -> Any:
    try:
        return getattr(importlib.import_module(module), name)
    except ImportError as error:
        raise MissingError(f"{error}") from error
    except AttributeError as error:
        raise MissingError(f"no {name} in {module} of torch {torch.__version__}") from error


BASELINES: dict[str, dict[str, Callable[[], Loss]]] = {
    "clip_loss": {
        DENSE: _clip_dense,
        "open_clip ClipLoss": _clip_open_clip,
        "linear_cross_entropy twice": _clip_linear_cross_entropy,
        "chunked PyTorch": _clip_chunked,
    },
}
