"""Argument checks: every error names the argument, what it got and what was wanted, before any work is done."""

from __future__ import annotations

import math
import numbers
from typing import cast

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import is_fake

__all__ = [
    "alike", "choice", "draw", "features", "finite", "flag", "floating", "indices", "integers", "mask", "number",
    "readable", "scalar", "sets", "shaped", "tokens", "vector", "whole", "whole_numbers",
]  # fmt: skip

INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)  # all of which int64 holds
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def _got(value: object) -> str:
    if isinstance(value, Tensor):
        return f"a {str(value.dtype).removeprefix('torch.')} tensor of shape {list(value.shape)}"
    return f"{type(value).__name__} {value!r}" if not isinstance(value, type) else repr(value)


def features(name: str, value: object) -> Tensor:
    """A floating `[rows, D]` tensor."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: got {_got(value)}, wanted a floating tensor of shape [rows, D]")
    if value.dtype not in DTYPES:
        raise TypeError(f"{name}: got {_got(value)}, wanted float64, float32, bfloat16 or float16")
    if value.layout != torch.strided:
        raise TypeError(f"{name}: got a {value.layout} tensor, wanted a dense one")
    if value.dim() != 2 or value.shape[1] == 0:
        raise ValueError(f"{name}: got {_got(value)}, wanted shape [rows, D] with D >= 1")
    return value


def alike(name: str, value: Tensor, other: str, base: Tensor) -> None:
    """Features that share D, dtype and device with those of the argument `other`."""
    if value.shape[-1] != base.shape[-1]:
        raise ValueError(f"{name}: got {_got(value)}, wanted D = {base.shape[-1]} as in {other}")
    if value.device != base.device:
        raise ValueError(f"{name}: got a tensor on {value.device}, wanted {base.device} as in {other}")
    if value.dtype != base.dtype:
        raise TypeError(f"{name}: got {_got(value)}, wanted {base.dtype} as in {other}")


def scalar(name: str, value: object, like: Tensor, dtype: torch.dtype, positive: bool = False) -> Tensor:
    """A number or a one-element tensor as a `[]` tensor of `dtype` beside `like`, differentiable."""
    if isinstance(value, Tensor):
        if value.numel() != 1 or value.dim() > 1 or not value.is_floating_point():
            raise ValueError(f"{name}: got {_got(value)}, wanted a floating tensor of shape [] or [1]")
        if value.device != like.device and value.device.type != "cpu":
            raise ValueError(f"{name}: got a tensor on {value.device}, wanted {like.device} or cpu")
        if value.dim():
            value = value.reshape(())
        return value if value.dtype == dtype and value.device == like.device else value.to(like.device, dtype)
    most = torch.finfo(dtype).max
    value = number(name, value, above=0.0 if positive else None, low=-most, most=most)
    return torch.full((), value, dtype=dtype, device=like.device)


def number(
    name: str, value: object, *, above: float | None = None, low: float | None = None, below: float | None = None,
    most: float | None = None,
) -> float:  # fmt: skip
    """A finite real number, optionally `> above`, `>= low`, `< below`, `<= most`."""
    if isinstance(value, bool) or not isinstance(value, (int, float, numbers.Real)):
        raise TypeError(f"{name}: got {_got(value)}, wanted a number")
    value = cast(float, value)
    bounds = ((">", above), (">=", low), ("<", below), ("<=", most))
    inside = (
        (above is None or value > above)
        and (low is None or value >= low)
        and (below is None or value < below)
        and (most is None or value <= most)
    )
    if not inside or value != value or abs(value) == math.inf:  # math.isfinite would break a compiled graph
        wanted = " and ".join(f"{sign} {bound:g}" for sign, bound in bounds if bound is not None)
        raise ValueError(f"{name}: got {value!r}, wanted a finite number {wanted}".rstrip())
    return float(value)


def whole(name: str, value: object, low: int | None = None) -> int:
    """An int, optionally `>= low`."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name}: got {_got(value)}, wanted an int")
    if low is not None and value < low:
        raise ValueError(f"{name}: got {value}, wanted at least {low}")
    return value


def flag(name: str, value: object) -> bool:
    """A bool and nothing that merely counts as one."""
    if not isinstance(value, bool):
        raise TypeError(f"{name}: got {_got(value)}, wanted True or False")
    return value


def choice(name: str, value: object, among: tuple[str, ...]) -> str:
    """One of the strings `among`."""
    if not isinstance(value, str) or value not in among:
        raise ValueError(f"{name}: got {value!r}, wanted one of {', '.join(map(repr, among))}")
    return value


def vector(name: str, value: object, length: int, like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """A floating `[length]` tensor beside `like`, cast to `dtype`, differentiable."""
    if not isinstance(value, Tensor) or not value.is_floating_point():
        raise TypeError(f"{name}: got {_got(value)}, wanted a floating tensor of shape [{length}]")
    return _sized(name, value, length, like).to(dtype or value.dtype)


def integers(name: str, value: object, length: int, like: Tensor) -> Tensor:
    """An integer `[length]` tensor beside `like`, as contiguous int64."""
    if not isinstance(value, Tensor) or value.dtype not in INTEGERS:
        raise TypeError(f"{name}: got {_got(value)}, wanted an integer tensor of shape [{length}]")
    return _sized(name, value, length, like).to(torch.int64).contiguous()


def indices(name: str, value: object, like: Tensor, below: int, low: int = 0, length: int | None = None) -> Tensor:
    """An integer vector beside `like` with values in [low, below), as int64; on a GPU nothing waits for the answer."""
    size = value.shape[0] if length is None and isinstance(value, Tensor) and value.dim() == 1 else length
    found = integers(name, value, size or 0, like)
    inside = ((found >= low) & (found < below)).all()
    if torch.compiler.is_compiling() or found.is_cuda:
        torch._assert_async(inside, f"{name}: out of range, wanted values in [{low}, {below})")
    elif readable(inside) and not bool(inside):
        bad = int(((found < low) | (found >= below)).int().argmax())
        raise ValueError(f"{name}: got {int(found[bad])} at index {bad}, wanted values in [{low}, {below})")
    return found


def tokens(name: str, value: object) -> Tensor:
    """Floating `[..., H]` features of tokens as `[n, H]`."""
    if not isinstance(value, Tensor) or value.layout != torch.strided or value.dim() == 0:
        raise TypeError(f"{name}: got {_got(value)}, wanted a floating tensor of shape [..., H]")
    return features(name, value.flatten(0, -2) if value.dim() > 2 else value)


def sets(name: str, value: object, axes: str = "rows, tokens, D") -> Tensor:
    """A floating `[rows, tokens, D]` tensor, or one whose `axes` have other names."""
    if not isinstance(value, Tensor) or value.dtype not in DTYPES:
        raise TypeError(f"{name}: got {_got(value)}, wanted a floating tensor of shape [{axes}]")
    if value.layout != torch.strided:
        raise TypeError(f"{name}: got a {value.layout} tensor, wanted a dense one")
    if value.dim() != 3 or 0 in value.shape[1:]:
        some = axes.partition(", ")[2].replace(",", " and")
        raise ValueError(f"{name}: got {_got(value)}, wanted shape [{axes}] with {some} >= 1")
    return value


def mask(name: str, value: object, shape: torch.Size, like: Tensor) -> Tensor:
    """A bool tensor of this shape beside `like`."""
    flat = shaped(name, value, shape)
    if flat.dtype != torch.bool:
        raise TypeError(f"{name}: got {_got(value)}, wanted a bool tensor")
    return _sized(name, flat, flat.shape[0], like).reshape(shape)


def shaped(name: str, value: object, shape: torch.Size) -> Tensor:
    """A tensor of this shape, flattened."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: got {_got(value)}, wanted a tensor of shape {list(shape)}")
    if value.shape != shape:
        raise ValueError(f"{name}: got {_got(value)}, wanted shape {list(shape)}")
    return value.reshape(-1)


def whole_numbers(name: str, value: object, shape: torch.Size, like: Tensor) -> Tensor:
    """An integer tensor of this shape beside `like`, as int64."""
    flat = shaped(name, value, shape)
    return integers(name, flat, flat.shape[0], like).reshape(shape)


def floating(name: str, value: object, shape: torch.Size, like: Tensor) -> Tensor:
    """A floating tensor of this shape beside `like`, differentiable."""
    flat = shaped(name, value, shape)
    return vector(name, flat, flat.shape[0], like).reshape(shape)


def _sized(name: str, value: Tensor, length: int, like: Tensor) -> Tensor:
    if value.dim() != 1 or value.shape[0] != length:
        raise ValueError(f"{name}: got {_got(value)}, wanted shape [{length}]")
    if value.device != like.device:
        raise ValueError(f"{name}: got a tensor on {value.device}, wanted {like.device}")
    return value


def draw(seed: object, step: object, beside: str) -> tuple[int, int | Tensor]:
    """Seed and step of a draw, which is a function of them: ints in [0, 2**63), the step also an int64 tensor `[]`."""
    for name, value in (("seed", seed), ("step", step)):
        if value is None:
            raise ValueError(f"{name}: got None beside {beside}, wanted an int: the draw is a function of it")
        if name == "step" and isinstance(value, Tensor):
            if value.numel() != 1 or value.dtype != torch.int64:
                raise ValueError(f"step: got {_got(value)}, wanted an int or an int64 tensor of shape []")
        elif whole(name, value, low=0) >= 2**63:
            raise ValueError(f"{name}: got {value}, wanted less than 2**63")
    return cast(int, seed), cast("int | Tensor", step)


def readable(value: Tensor) -> bool:
    """Whether values may be looked at now: they are there, of one batch, nothing is traced, no GPU is waited for."""
    transformed = torch._C._are_functorch_transforms_active()  # by torch.func.vmap, say
    return value.device.type == "cpu" and not torch.compiler.is_compiling() and not is_fake(value) and not transformed


def finite(name: str, value: Tensor) -> None:
    """Raise with the first row that holds NaN or infinity (reads the tensor: synchronises on a GPU)."""
    bad = ~value.detach().isfinite().reshape(value.shape[0] if value.dim() else 1, -1).all(dim=1)
    if bool(bad.any()):
        raise ValueError(f"{name}: got NaN or infinity in row {int(bad.int().argmax())}, wanted finite values")
