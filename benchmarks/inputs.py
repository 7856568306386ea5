"""What the contestants of a loss are called with: the loss's own tensors and options, at any size and on any device."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastvlm_loss import testing
from fastvlm_loss.losses import LossSpec
from fastvlm_loss.testing import Case

from .size import Size

__all__ = ["Inputs", "clip_inputs", "inputs"]

BIAS = {"siglip_loss": -10.0}  # where its training begins


@dataclass(frozen=True)
class Inputs:
    """Differentiable tensors and other options, all by name; the first two tensors are the features."""

    size: Size
    tensors: dict[str, Tensor]
    options: dict[str, Any]

    @property
    def features(self) -> tuple[Tensor, Tensor]:
        """The rows `[M, D]` and the columns `[N, D]`."""
        rows, columns, *_ = self.tensors.values()
        return rows, columns

    @property
    def dtype(self) -> str:
        """Of the features, by its short name."""
        return str(self.features[0].dtype).removeprefix("torch.")

    def evaluate(self, loss: Callable[..., Tensor]) -> dict[str, Tensor]:
        """The loss and its gradients by name."""
        return testing.evaluate(loss, self.tensors, self.options)

    def double(self) -> Inputs:
        """The same numbers in fp64."""
        return Inputs(self.size, _double(self.tensors), _double(self.options))


def inputs(spec: LossSpec, size: Size, dtype: torch.dtype, device: str, seed: int = 0) -> Inputs:
    """Correlated unit features and what else the first variant of the loss takes."""
    options = spec.variants[0]
    case = Case(m=size.m, n=size.n, d=size.d, dtype=dtype, device=device, bias=BIAS.get(spec.name), seed=seed)
    if torch.device(device).type != "cuda" or options or spec.names:
        return Inputs(size, *testing.inputs(spec, replace(case, options=options)))
    g = torch.Generator(device).manual_seed(seed)  # there, because a million of them take a minute on a CPU
    text = F.normalize(torch.randn(size.n, size.d, generator=g, device=device), dim=1)
    image = torch.randn(size.m, size.d, generator=g, device=device).mul_(case.noise / size.d**0.5).add_(text)
    small, _ = testing.inputs(spec, replace(case, m=1, n=1, d=1))  # scale and bias
    made = {**small, "image_features": F.normalize(image, dim=1).to(dtype), "text_features": text.to(dtype)}
    return Inputs(size, {name: tensor.detach().requires_grad_() for name, tensor in made.items()}, {})


def clip_inputs(given: Inputs) -> Inputs:
    """The same pairs for the plain `clip_loss`."""
    rows, columns = given.features
    scale = given.tensors.get("logit_scale")
    if scale is None:
        scale = torch.tensor(Case.scale, device=rows.device, requires_grad=True)
    return Inputs(given.size, {"image_features": rows, "text_features": columns, "logit_scale": scale}, {})


def _double(values: Mapping[str, Any]) -> dict[str, Any]:
    out = dict(values)
    for name, value in values.items():
        if isinstance(value, Tensor) and value.is_floating_point():
            out[name] = value.detach().double().requires_grad_(value.requires_grad)
    return out
