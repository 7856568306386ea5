"""Inputs, error budgets and poisoned memory for testing a loss: ours, yours, on any device and backend.

from fastvlm_loss.losses import registry
from fastvlm_loss.testing import Case, violations
assert not violations(registry["clip_loss"], Case(m=129, d=64, dtype=torch.bfloat16, device="cuda"))
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .engine.dispatch import backend
from .losses import Learned, LossSpec

__all__ = ["Case", "evaluate", "inputs", "poison", "violations"]

ULPS = 4
GRID = 64  # products of unit vectors of multiples of 1/64 are exact in fp32, in any order


@dataclass(frozen=True)
class Case:
    """One cell of the test matrix.

    Attributes:
        m, n, d: sizes; `n` None means as many texts as images.
        dtype, device: of the features.
        scale, bias: value of `logit_scale` and `logit_bias` (None leaves the bias out).
        scale_shape: `()` or `(1,)`.
        noise: distance of an image from its text; small makes the task easy (p_ii near 1).
        options: keyword arguments; a callable value is called with (m, n, device, generator).
        backend: forced backend.
        seed: of features and options.
    """

    m: int
    d: int
    n: int | None = None
    dtype: torch.dtype = torch.float32
    device: str = "cpu"
    scale: float = 14.3
    bias: float | None = None
    scale_shape: tuple[int, ...] = ()
    noise: float = 2.0
    options: Mapping[str, Any] = field(default_factory=dict)
    backend: str = "auto"
    seed: int = 0


def inputs(spec: LossSpec, case: Case) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Differentiable tensors by the loss's own names, and its other options, for a case.

    Features, `logit_scale` and `logit_bias` where the loss has them, and the options of the case that are `Learned`.
    """
    g = torch.Generator().manual_seed(case.seed)
    device, n = torch.device(case.device), case.m if case.n is None else case.n
    text = F.normalize(torch.randn(n, case.d, generator=g, dtype=torch.float64), dim=1)
    pair = text[torch.arange(case.m) % max(n, 1)] if n else text.new_zeros(case.m, case.d)
    image = F.normalize(pair + case.noise * torch.randn(case.m, case.d, generator=g, dtype=torch.float64) / case.d**0.5)
    if spec.tokens:
        image, text = (_tokens(t, number, g) for t, number in zip((image, text), spec.tokens, strict=True))
    small = torch.float64 if case.dtype == torch.float64 else torch.float32
    scaled = spec.takes("logit_scale")
    tensors = {
        # without a scale of its own, a loss on logits has that of its features
        spec.names.get("image_features", "image_features"): (image * _length(spec, case)).to(device, case.dtype),
        spec.names.get("text_features", "text_features"): text.to(device, case.dtype),
    }
    if scaled:
        tensors["logit_scale"] = torch.full(case.scale_shape, case.scale, dtype=small, device=device)
    if case.bias is not None and spec.takes("logit_bias"):
        tensors["logit_bias"] = torch.full(case.scale_shape, case.bias, dtype=small, device=device)
    options: dict[str, Any] = {}
    for name, value in case.options.items():
        make = value.make if isinstance(value, Learned) else value
        wide = (case.d,) if callable(make) and len(inspect.signature(make).parameters) > 4 else ()
        made = make(case.m, n, device, g, *wide) if callable(make) else make
        if wide and isinstance(made, Tensor) and made.is_floating_point():
            made = made.to(case.dtype)  # features of the loss's kind
        (tensors if isinstance(value, Learned) else options)[name] = made
    return {k: v.requires_grad_() for k, v in tensors.items()}, options


def _length(spec: LossSpec, case: Case) -> float:
    return case.scale if spec.names and not spec.takes("logit_scale") else 1.0


def _tokens(features: Tensor, number: int, g: torch.Generator) -> Tensor:
    """Tokens `[rows, number, D]` around each feature, on a grid on which every precision finds the same maxima."""
    noise = torch.randn(len(features), number, features.shape[1], generator=g, dtype=torch.float64)
    tokens = F.normalize(features[:, None] + noise / features.shape[1] ** 0.5, dim=2)
    return (tokens * GRID).round() / GRID


def evaluate(function: Any, tensors: Mapping[str, Tensor], options: Mapping[str, Any]) -> dict[str, Tensor]:
    """The loss and the gradient of its sum with respect to every differentiable tensor, detached."""
    value = function(**tensors, **options)
    wanted = {k: v for k, v in tensors.items() if v.requires_grad}
    gradients = torch.autograd.grad(value.sum(), list(wanted.values()), allow_unused=True)
    out = {"loss": value.detach()}
    for (name, tensor), gradient in zip(wanted.items(), gradients, strict=True):
        out[name] = torch.zeros_like(tensor) if gradient is None else gradient
    return out


def violations(spec: LossSpec, case: Case) -> list[str]:
    """What of a case is outside its error budget, one line each; empty is good.

    The reference is the oracle in fp64 on the rounded inputs. The budget of every value and gradient is twice the
    error of the same oracle in the statistics' dtype (fp32, or fp64 for fp64 features) plus a few units in the last
    place, of the largest score for what depends on scores, and of the output's dtype for gradients.
    """
    tensors, options = inputs(spec, case)
    with backend(case.backend):
        got = evaluate(spec.function, tensors, options)
    exact = evaluate(spec.oracle, _cast(tensors, torch.float64), _cast(options, torch.float64))
    dtype = torch.float64 if case.dtype == torch.float64 else torch.float32
    dense = evaluate(spec.oracle, _cast(tensors, dtype), _cast(options, dtype))
    # features have unit norm; a loss without a scale has none either, unless they carry it
    scale = case.scale if spec.names or spec.takes("logit_scale") else 1.0
    # what is summed over tokens is as many times as large
    scale *= max(spec.tokens or (1,)) if options.get("interaction") == "colbert" else 1
    peak = scale + abs(case.bias or 0.0)
    # the largest weight of one sample, so that what cancels exactly on paper may leave a rounding
    unit = 1.0 if options.get("reduction", spec.reduction) != "mean" else min(1.0, 2 / max(case.m, 1))
    features = {spec.names.get(k, k) for k in ("image_features", "text_features")}
    found = []
    for name, value in got.items():
        reference = exact[name].double()
        if value.shape != reference.shape or (name != "loss" and value.dtype != tensors[name].dtype):
            found.append(f"{name}: got {value.dtype} {list(value.shape)}, wanted {list(reference.shape)}")
            continue
        if not reference.numel():
            continue
        size = reference.abs().amax().item()
        if size > torch.finfo(value.dtype).max:
            continue  # no finite value of this dtype is right
        eps, out = torch.finfo(dtype).eps, torch.finfo(value.dtype)
        if name == "loss":
            floor = ULPS * eps * (size + peak)
        elif name in features or value.dim() == 2:
            floor = ULPS * ((eps * peak + out.eps) * size + eps * scale * unit + out.smallest_normal * out.eps)
        elif value.dim() == 1 and value.numel() > 1:  # of one number a sample
            floor = ULPS * ((eps * peak + out.eps) * size + eps * peak * unit)
        else:  # scale and bias sum over all entries: their floor is that of the loss
            floor = ULPS * max(eps, out.eps) * (size + peak / scale * _weight(exact["loss"]))
        error = (value.double() - reference).abs().amax().item()
        budget = 2 * (dense[name].double() - reference).abs().amax().item() + floor
        if not error <= budget:
            found.append(
                f"{name}: error {error:.2e} over a budget of {budget:.2e} (largest value {size:.2e}) in {case}"
            )
    return found


@contextmanager
def poison() -> Iterator[None]:
    """Uninitialised memory is NaN inside the block, so that a read before a write cannot go unnoticed."""
    settings: Any = torch.utils.deterministic
    before = settings.fill_uninitialized_memory, torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    settings.fill_uninitialized_memory = True
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        settings.fill_uninitialized_memory = before[0]
        torch.use_deterministic_algorithms(before[1], warn_only=warn_only)


def _weight(loss: Tensor) -> float:
    return max(float(loss.numel()), loss.double().abs().sum().item(), 1.0)


def _cast(values: Mapping[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    out = {}
    for name, value in values.items():
        if isinstance(value, Tensor) and value.is_floating_point():
            value = value.detach().to(dtype).requires_grad_(value.requires_grad)
        out[name] = value
    return out
