"""What autograd Functions have in common: one derivative, in reverse mode, and an error for any other."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

__all__ = ["apply", "once"]

ELSEWHERE = "compute this loss under fastvlm_loss.backend('dense')"


def apply(function: type[torch.autograd.Function], *arguments: Any) -> Any:
    """What `function.apply` gives, in eager mode and traced by torch.compile.

    Raises:
        RuntimeError: inside a transform of `torch.func` (grad, vmap, jvp, ...), or for an argument with a tangent.
    """
    # eager PyTorch would refuse by itself; a compiled graph would take the operators for constants: tangents of 0
    if torch._C._are_functorch_transforms_active():
        raise RuntimeError(f"fastvlm_loss: no torch.func transforms; {ELSEWHERE}")
    # the level is -1 outside of forward mode, where nothing is looked at
    if forward_ad._current_level >= 0 and any(isinstance(t, Tensor) and _tangent(t) for t in arguments):
        raise RuntimeError(f"fastvlm_loss: no forward mode; {ELSEWHERE}")
    return function.apply(*arguments)


def once(found: Sequence[Tensor | None], given: Sequence[Tensor | None], needs: Sequence[bool]) -> list[Tensor | None]:
    """The gradients found that are needed; differentiating them again fails instead of being silently 0."""
    made = [gradient if needed else None for gradient, needed in zip(found, needs, strict=False)]
    if torch.is_grad_enabled():  # create_graph=True
        anchor = next(t for t, needed in zip(given, needs, strict=False) if needed)
        made = [None if g is None else _Once.apply(g.detach(), anchor) for g in made]
    return made


class _Once(torch.autograd.Function):
    """Identity of a gradient that cannot be differentiated again."""

    @staticmethod
    def forward(ctx: Any, gradient: Tensor, anchor: Tensor) -> Tensor:
        """The gradient, tied to what it depends on."""
        return gradient.view_as(gradient)

    @staticmethod
    def backward(ctx: Any, _: Tensor) -> tuple[Tensor, Tensor]:
        """Refuse."""
        raise RuntimeError(f"fastvlm_loss: no second derivatives; {ELSEWHERE}")


def _tangent(tensor: Tensor) -> bool:
    return forward_ad.unpack_dual(tensor).tangent is not None
