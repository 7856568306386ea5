"""What lies with several processes passes through each, part by part: rows by index, and their products, in O(n D)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .function import apply, once
from .shard import Shard, own_of

__all__ = ["Sent", "bags", "entries", "home", "picked", "send_home", "travel"]

Sent = Callable[[], list[Tensor]]


def travel(own: Sequence[Tensor], sizes: tuple[int, ...], shard: Shard) -> Iterator[tuple[slice, list[Tensor]]]:
    """The part of each process, the own first: where it lies among all rows, and its tensors. No gradient.

    The next part is on its way while one is used. Where nothing travels, the places alone come.
    """
    held = [_padded(t.detach(), max(sizes)) for t in own]
    for turn in range(shard.world):
        coming = shard.collectives.pass_on(held) if held and turn + 1 < shard.world else None
        rank = (shard.rank + turn) % shard.world
        yield own_of(sizes, rank), [t[: sizes[rank]] for t in held]
        if coming is not None:
            held = coming()


def send_home(sums: Sequence[Tensor], sent: Sent | None, sizes: tuple[int, ...], shard: Shard) -> Sent:
    """Begin to pass on the sums for the part in hand, those of the processes before included."""
    padded = [_padded(t, max(sizes)) for t in sums]
    if sent is not None:
        padded = [a + b for a, b in zip(padded, sent(), strict=True)]
    return shard.collectives.pass_on(padded)


def home(sent: Sent | None, sizes: tuple[int, ...], shard: Shard) -> list[Tensor]:
    """The sums for the own part, after the last turn."""
    return [] if sent is None else [t[: sizes[shard.rank]] for t in sent()]


def picked(own: Tensor, index: Tensor, sizes: tuple[int, ...], shard: Shard) -> Tensor:
    """Rows `index` `[k]` of those of all processes, 0 for a negative one. No gradient."""
    found = own.new_zeros((index.shape[0], *own.shape[1:]))
    for at, (part,) in travel([own], sizes, shard):
        here, place = _inside(index, at)
        if part.shape[0]:
            found = torch.where(here.reshape(-1, *[1] * (own.dim() - 1)), part[place], found)
    return found


def entries(x: Tensor, y: Tensor, index: Tensor, sizes: tuple[int, ...], shard: Shard, dtype: torch.dtype) -> Tensor:
    """<x_i, y_index(i, k)> `[n, K]` of the own `x` `[n, D]` with the `y` of all processes, 0 for a negative index.

    Differentiable; the gradients of all reach the owners of `y`, summed in `dtype`.
    """
    found: Tensor = apply(_Entries, x, y, index, sizes, shard, dtype)
    return found


def bags(index: Tensor, n: int) -> tuple[Tensor, Callable[..., Tensor]]:
    """The entries of `index` `[m, K]` in the order of what they name, 0 to n - 1, and their sums by that `[n, ...]`.

    Sums of bags, not additions in place, so they have always the same bits.
    """
    named, order = index.flatten().sort(stable=True)
    at = torch.searchsorted(named, torch.arange(n, device=index.device))

    def sums(values: Tensor, rows: Tensor = order, weights: Tensor | None = None) -> Tensor:
        return F.embedding_bag(rows, values, at, per_sample_weights=weights, mode="sum")

    return order, sums


class _Entries(torch.autograd.Function):
    """`(x, y, index, sizes, shard, dtype) -> products [n, K]`; nothing of the others is kept for backward."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Tensor:
        x, y, index, sizes, shard, dtype = arguments
        ctx.save_for_backward(x, y, index)
        ctx.place = sizes, shard, dtype
        wide: Tensor = x.to(dtype)
        found = wide.new_zeros(index.shape)
        for at, (part,) in travel([y], sizes, shard):
            here, place = _inside(index, at)
            for k in range(index.shape[1] if part.shape[0] else 0):
                products = (wide * part[place[:, k]].to(dtype)).sum(1)
                found[:, k] = torch.where(here[:, k], products, found[:, k])
        return found

    @staticmethod
    def backward(ctx: Any, d: Tensor) -> tuple[Tensor | None, ...]:
        (x, y, index), (sizes, shard, dtype), needs = ctx.saved_tensors, ctx.place, ctx.needs_input_grad
        with torch.no_grad():  # create_graph=True
            found = _of_entries(x, y, index, d, sizes, shard, dtype, needs)
        return (*once(found, (x, y), needs), None, None, None, None)


def _of_entries(
    x: Tensor, y: Tensor, index: Tensor, d: Tensor, sizes: tuple[int, ...], shard: Shard, dtype: torch.dtype,
    needs: tuple[bool, ...],
) -> list[Tensor | None]:  # fmt: skip
    """Gradients of `x` and of the own `y`, where needed; what stands in rows that are not named reaches nothing."""
    wide: Tensor = x.to(dtype)
    dx, sent = wide.new_zeros(x.shape), None
    for at, parts in travel([y] if needs[0] else [], sizes, shard):
        here, place = _inside(index, at)
        n = at.stop - at.start
        for part in parts if n else ():
            for k in range(index.shape[1]):
                dx += torch.where(here[:, k, None], d[:, k, None] * part[place[:, k]].to(dtype), 0.0)
        if needs[1]:  # nothing is sent for a frozen tower
            dy = wide.new_zeros((n, *x.shape[1:]))
            if n and index.numel():
                order, sums = bags(torch.where(here, place, n), n + 1)  # the last of what is named elsewhere
                dy = sums(wide, order // index.shape[1], d.flatten()[order])[:n]
            sent = send_home([dy], sent, sizes, shard)
    of_y = [t.to(y.dtype) for t in home(sent, sizes, shard)]
    return [dx.to(x.dtype) if needs[0] else None, of_y[0] if of_y else None]


def _inside(index: Tensor, at: slice) -> tuple[Tensor, Tensor]:
    """Which indices name a row of a part, and its place there."""
    return (index >= at.start) & (index < at.stop), (index - at.start).clamp(0, max(at.stop - at.start - 1, 0))


def _padded(t: Tensor, rows: int) -> Tensor:
    if t.shape[0] == rows:
        return t.contiguous()
    return F.pad(t, (*[0, 0] * (t.dim() - 1), 0, rows - t.shape[0])).contiguous()
