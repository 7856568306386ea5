"""Batches of several tensors: tuples, lists and mappings of tensors (and of None), nested at will."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

__all__ = ["each", "leaves", "split"]

WANTED = "wanted a tensor or a tuple, list or mapping of tensors"


def each(function: Callable[[str, Tensor], Any], name: str, value: Any) -> Any:
    """Function of the path and value of every tensor, in the form of `value`; a mapping becomes a dict."""
    if isinstance(value, Tensor):
        return function(name, value)
    if value is None:
        return None
    if isinstance(value, Mapping):
        return {k: each(function, f"{name}[{k!r}]", v) for k, v in value.items()}
    if isinstance(value, (tuple, list)):
        items = [each(function, f"{name}[{k}]", v) for k, v in enumerate(value)]
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    raise TypeError(f"{name}: got {type(value).__name__}, {WANTED}")


def leaves(name: str, value: Any) -> dict[str, Tensor]:
    """Its tensors by their paths, at least one, each with a dimension 0."""
    found: dict[str, Tensor] = {}
    each(found.__setitem__, name, value)
    if not found:
        raise TypeError(f"{name}: got {type(value).__name__} without a tensor, {WANTED}")
    for path, t in found.items():
        if t.dim() == 0:
            raise ValueError(f"{path}: got a tensor of shape [], wanted the batch in dimension 0")
    return found


def split(name: str, batch: Any, size: int) -> list[Any]:
    """Micro-batches of up to `size` rows, views; an empty batch is one."""
    found = leaves(name, batch)
    first, rows = next((path, t.shape[0]) for path, t in found.items())
    for path, t in found.items():
        if t.shape[0] != rows:
            raise ValueError(f"{path}: got {t.shape[0]} rows, wanted {rows} as in {first}")

    def part(start: int) -> Any:
        return each(lambda _, t: t[start : start + size], name, batch)

    return [part(start) for start in range(0, max(rows, 1), size)]
