"""The kernels' language: Triton where it is installed, and a PyTorch stand-in that runs the same tile functions.

The only file that knows Triton may be absent. A tile function is written once against `tl`; `jit` hands it to Triton,
`as_torch` rebuilds it with `tl` bound to PyTorch, for any dtype (fp64 included) and any device.
"""

from __future__ import annotations

import functools
import math
import types
from collections.abc import Callable
from typing import Any

import torch

__all__ = ["HAS_TRITON", "LOG2E", "as_torch", "jit", "log2_1p", "tl"]

_stand_in = types.SimpleNamespace(
    constexpr=lambda value: value,
    abs=torch.abs,
    exp2=torch.exp2,
    where=torch.where,
    maximum=lambda a, b: a.clamp(min=b) if isinstance(b, float) else torch.maximum(a, b),
    expand_dims=torch.unsqueeze,
    max=lambda x, axis: x.amax(axis),
    min=lambda x, axis: x.amin(axis),
    sum=lambda x, axis: x.sum(axis),
)

try:
    import triton
    import triton.language as tl

    jit = triton.jit
    HAS_TRITON = True
except ImportError:
    tl = _stand_in

    class _Source:
        """Without Triton a tile function only carries its source, for `as_torch`."""

        def __init__(self, fn: Callable[..., Any]) -> None:
            self.fn = fn

        def __call__(self, *_: Any, **__: Any) -> Any:
            """Only Triton could."""
            raise RuntimeError(f"{self.fn.__name__} is a Triton function and Triton is not installed")

    def jit(fn: Callable[..., Any] | None = None, **_: Any) -> Any:
        """As of Triton, with or without options."""
        return _Source if fn is None else _Source(fn)

    HAS_TRITON = False


LOG2E = tl.constexpr(1.4426950408889634)


@jit
def log2_1p(e):
    """log2(1 + e) for e in [0, 1], every digit of a small e kept (minimax, relative error 3e-8)."""
    p = 0.007549172732979059
    p = p * e - 0.04256702587008476
    p = p * e + 0.11285613477230072
    p = p * e - 0.19711892306804657
    p = p * e + 0.27564138174057007
    p = p * e - 0.35840848088264465
    p = p * e + 0.48069295287132263
    p = p * e - 0.7213401794433594
    p = p * e + 1.4426950216293335
    return p * e


_IN_TORCH = {log2_1p: lambda e: torch.log1p(e) / math.log(2.0)}  # to the digits of any dtype


@functools.cache
def as_torch(tile_function: Any) -> Callable[..., Any]:
    """The same tile function over PyTorch tensors; the tile functions and constants it uses are rebuilt with it."""
    if tile_function in _IN_TORCH:
        return _IN_TORCH[tile_function]
    source = tile_function.fn
    scope = dict(source.__globals__, tl=_stand_in)
    for name in source.__code__.co_names:
        used = source.__globals__.get(name)
        if HAS_TRITON and isinstance(used, tl.constexpr):
            scope[name] = used.value
        elif used is not tile_function and callable(getattr(used, "fn", None)):
            scope[name] = as_torch(used)
    return types.FunctionType(source.__code__, scope, source.__name__)
