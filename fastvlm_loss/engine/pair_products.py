"""Products of texts with the patches of images, for given pairs, differentiable: two operators with fakes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..backends import pair_products as chunked
from ..scores.function import apply, once
from .define import operator
from .dispatch import _forced
from .ops import no_autocast

__all__ = ["GRADIENT", "PRODUCTS", "pair_products"]

_PAIRS = "Tensor x, Tensor y, Tensor? padding, Tensor? image, Tensor? text"
_SCHEMAS = {
    "pair_products": f"({_PAIRS}) -> Tensor",
    "pair_products_gradient": f"({_PAIRS}, Tensor d, bool need_x, bool need_y) -> (Tensor dx, Tensor dy)",
}


def pair_products(x: Tensor, y: Tensor, padding: Tensor | None, image: Tensor | None, text: Tensor | None) -> Tensor:
    """<x_ip, y_t> `[n, P]`, fp32 (fp64 if either is), of pairs (i, t); 0 for padding, which has no gradient either.

    Beside its result it holds one chunk of patches, in backward also the n rows of texts. Differentiable in `x`
    `[B, P, D]` and `y` `[N, D]`.

    Raises:
        ValueError: a backend that has no such products was forced.
    """
    if _forced.name in ("cpp", "triton"):
        raise ValueError(f"backend: got {_forced.name!r} for pairs of patches, wanted 'auto', 'torch' or 'dense'")
    if _forced.name == "dense":
        wide, whole = _dtype(x, y), slice(None)
        patches = chunked.patches_of(x, padding, image, whole, wide)
        with no_autocast(x.device.type):
            return torch.einsum("kpd,kd->kp", patches, chunked.rows_of(y, text, whole).to(wide))
    if text is not None and text is image:  # the same tensor twice cannot be traced by torch.compile
        text = text.view_as(text)
    return apply(_Products, x, y, padding, image, text)  # type: ignore[no-any-return]


class _Products(torch.autograd.Function):
    """`(x, y, padding, image, text) -> c [n, P]`; in backward the patches are gathered again."""

    @staticmethod
    def forward(ctx: Any, *pairs: Any) -> Tensor:
        """Only inputs are kept."""
        ctx.save_for_backward(*pairs)
        return PRODUCTS(*pairs)  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, d: Tensor) -> tuple[Tensor | None, ...]:
        """What needs no gradient costs none."""
        pairs, needs = ctx.saved_tensors, ctx.needs_input_grad
        found = list(GRADIENT(*pairs, d.contiguous(), *needs[:2]))
        return (*once(found, pairs, needs), None, None, None)


def _dtype(x: Tensor, y: Tensor) -> torch.dtype:
    return torch.promote_types(torch.promote_types(x.dtype, y.dtype), torch.float32)


def _products(x: Tensor, y: Tensor, padding: Any, image: Any, text: Any) -> Tensor:
    with torch.no_grad(), no_autocast(x.device.type):
        return chunked.products(x, y, padding, image, text, _dtype(x, y))


def _gradient(x: Tensor, *more: Any) -> tuple[Tensor, Tensor]:
    with torch.no_grad(), no_autocast(x.device.type):
        return chunked.gradient(x, *more)


def _products_fake(x: Tensor, y: Tensor, padding: Any, image: Tensor | None, text: Any) -> Tensor:
    return x.new_empty((x.shape[0] if image is None else image.shape[0], x.shape[1]), dtype=_dtype(x, y))


def _gradient_fake(x: Tensor, y: Tensor, *more: Any) -> tuple[Tensor, ...]:
    return tuple(t.new_empty(t.shape if need else (0,)) for t, need in zip((x, y), more[-2:], strict=True))


PRODUCTS = operator("pair_products", _SCHEMAS["pair_products"], _products, _products_fake)
GRADIENT = operator("pair_products_gradient", _SCHEMAS["pair_products_gradient"], _gradient, _gradient_fake)
