"""The group behind `group=`: which processes share a batch, and what they send one another.

Gradients follow one convention. Every process computes the same loss from the same O(M + N) vectors, so each has the
whole gradient of what it sent, and takes its own part of it times the number of processes; what is a sum over the
processes (of the features, of the scale) is summed, and times the same number. The mean over the processes, which DDP
takes, is then the gradient of one process with the whole batch.
"""

from __future__ import annotations

import functools
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ParamSpec, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from .scores import check
from .scores.shard import Shard, own_of

__all__ = ["Group", "eager_in_group", "gathered", "group_of", "set_gather_limit", "shard_of"]

# the names before torch 2.14
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor

P = ParamSpec("P")
R = TypeVar("R")
_gathered = 2**32


def set_gather_limit(size: int) -> None:
    """Bound the features that a loss of a group gathers in each process; beyond it they travel in a ring.

    Args:
        size: bytes, at least 0; 4 GiB to begin with. The same in every process. Gathered, the texts' features of the
            whole group lie in every process until backward; in a ring two shards of them do, at more exchanges.

    Raises:
        TypeError, ValueError: not an int, or negative.
    """
    global _gathered
    _gathered = check.whole("size", size, low=0)


def eager_in_group(function: Callable[P, R]) -> Callable[P, R]:
    """A function with `group=`: beside a group it runs as written, and torch.compile compiles what is around it.

    The sizes of the other processes' shares are not known to a compiler, and what is sent is not to be rearranged.
    """
    why = "a loss with group= is not compiled: fullgraph=False compiles what is around it"
    eager: list[Callable[P, R]] = []  # made when it is needed, since it imports the whole compiler

    @functools.wraps(function)
    def called(*args: P.args, **kwargs: P.kwargs) -> R:
        if kwargs.get("group") is None:
            return function(*args, **kwargs)
        if not eager:
            eager.append(torch.compiler.disable(function, reason=why))
        return eager[0](*args, **kwargs)

    return called


def group_of(group: object) -> Group:
    """The collectives of what `group=` stands for: a process group, or that of a one-dimensional `DeviceMesh`.

    Raises:
        TypeError: neither of them.
        ValueError: this process is not in it.
    """
    if hasattr(group, "get_group") and hasattr(group, "ndim"):
        if group.ndim != 1:
            raise ValueError(f"group: got a DeviceMesh of {group.ndim} dimensions, wanted one: mesh['name']")
        group = group.get_group()
    if group is dist.GroupMember.NON_GROUP_MEMBER:
        raise ValueError("group: got one that this process is not in, wanted one that it is in, or no call")
    if not isinstance(group, dist.ProcessGroup):
        raise TypeError(f"group: got {type(group).__name__}, wanted None, a ProcessGroup or a DeviceMesh dimension")
    return Group(group, dist.get_rank(group), dist.get_world_size(group))


def gathered(own: Tensor, group: object) -> Tensor:
    """The rows `[N, ...]` of all processes of a group, from the own ones `[n, ...]`, in the order of their ranks.

    For what the group's indices point into, such as the inputs of a fusion encoder for the pairs of `itm_batch`. All
    other rows are sent here; gradients go back to their owners, summed, by the convention of the losses.

    Raises:
        TypeError, ValueError: not a group, or the processes' tensors do not fit together.
    """
    flat = own.flatten(1) if own.dim() > 1 else own[:, None]
    shard = shard_of(group, flat, flat, "gathered", own.shape[1:])
    return shard.collectives.spread(own, shard.rows)


def shard_of(group: object, x: Tensor, y: Tensor, *same: object, tokens: int = 1) -> Shard:
    """The place of this process's features in the group's; `same` is what must agree between the processes.

    Each row of `y` stands for `tokens` of them, which must agree too.

    One exchange of a few numbers, before any other, so that what does not fit together is an error everywhere.

    Raises:
        ValueError: the processes disagree in D, dtype or options.
    """
    found = group_of(group)
    agreed = zlib.crc32(repr((x.dtype, x.shape[1], same, tokens, _gathered)).encode())
    mine = found.sendable(torch.tensor([x.shape[0], y.shape[0], x.shape[1], agreed], device=x.device))
    every = mine.new_empty(found.world * 4)
    _all_gather(every, mine, group=found.group)
    told = every.reshape(-1, 4).tolist()
    if len({t[3] for t in told}) > 1:
        raise ValueError(
            f"group: got processes with D = {[t[2] for t in told]} and dtypes or options that differ, wanted the same "
            "arguments in each (which are given, and the options)"
        )
    rows, cols = (tuple(t[k] for t in told) for k in (0, 1))
    gathered = sum(cols) * tokens * y.shape[1] * y.element_size()
    return Shard(found, found.rank, rows, cols, ring=found.world > 1 and gathered > _gathered)


@dataclass(frozen=True)
class Group:
    """`scores.shard.Collectives` over a process group."""

    group: dist.ProcessGroup
    rank: int
    world: int

    def sendable(self, t: Tensor) -> Tensor:
        """A tensor where the backend can reach it: gloo, which sends little of a GPU's memory, has a copy of it."""
        gloo = t.is_cuda and self.group._get_backend(t.device).name() == "gloo"
        return t.cpu() if gloo else t.contiguous()

    def gather(self, own: Tensor, sizes: tuple[int, ...]) -> Tensor:
        """As of `Collectives`."""
        gathered: Tensor = _Gather.apply(own, self, sizes)
        return gathered

    def spread(self, own: Tensor, sizes: tuple[int, ...]) -> Tensor:
        """As of `Collectives`."""
        gathered: Tensor = _Spread.apply(own, self, sizes)
        return gathered

    def scatter(self, partial: Tensor, sizes: tuple[int, ...]) -> Tensor:
        """As of `Collectives`; no gradient."""
        most, padded = max(sizes), partial.contiguous()
        if any(size < most for size in sizes):
            padded = partial.new_zeros((self.world, most, *partial.shape[1:]))
            for rank, part in enumerate(partial.split(sizes)):
                padded[rank, : sizes[rank]] = part
            padded = padded.flatten(0, 1)
        padded = self.sendable(padded)
        own = padded.new_empty((most, *partial.shape[1:]))
        _reduce_scatter(own, padded, group=self.group)
        return own[: sizes[self.rank]].to(partial.device)

    def exchange(self, parts: Tensor) -> Tensor:
        """As of `Collectives`; no gradient."""
        sent = self.sendable(parts)
        received = torch.empty_like(sent)
        dist.all_to_all_single(received, sent, group=self.group)
        return received.to(parts.device)

    def total(self, own: Tensor) -> Tensor:
        """As of `Collectives`."""
        summed: Tensor = _Total.apply(own, self)
        return summed

    def pass_on(self, tensors: Sequence[Tensor]) -> Callable[[], list[Tensor]]:
        """As of `Collectives`; no gradient."""
        before, behind = (dist.get_global_rank(self.group, (self.rank + k) % self.world) for k in (-1, 1))
        sent = [self.sendable(t) for t in tensors]
        received = [torch.empty_like(t) for t in sent]
        ops = [dist.P2POp(dist.isend, t, before, self.group) for t in sent]
        ops += [dist.P2POp(dist.irecv, t, behind, self.group) for t in received]
        under_way = dist.batch_isend_irecv(ops)

        def arrived() -> list[Tensor]:
            for work in under_way:
                work.wait()
            return [t.to(own.device) for t, own in zip(received, tensors, strict=True)]

        return arrived

    def own(self, every: Tensor, sizes: tuple[int, ...]) -> Tensor:
        """As of `Collectives`."""
        mine: Tensor = _Own.apply(every, self, sizes)
        return mine

    def collect(self, own: Tensor, sizes: tuple[int, ...]) -> Tensor:
        """The rows of all processes, without gradient."""
        most = max(sizes)
        padded = own.contiguous()
        if own.shape[0] < most:
            padded = own.new_zeros((most, *own.shape[1:]))
            padded[: own.shape[0]] = own
        padded = self.sendable(padded)
        every = padded.new_empty((self.world * most, *own.shape[1:]))
        _all_gather(every, padded, group=self.group)
        every = every.to(own.device)
        if all(size == most for size in sizes):
            return every
        return torch.cat([every[rank * most : rank * most + size] for rank, size in enumerate(sizes)])


class _Gather(torch.autograd.Function):
    """All rows; the gradient of the own ones, which every process has whole."""

    @staticmethod
    def forward(ctx: Any, own: Tensor, group: Group, sizes: tuple[int, ...]) -> Tensor:
        ctx.place = group, sizes
        return group.collect(own, sizes)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        group, sizes = ctx.place
        return gradient[own_of(sizes, group.rank)] * group.world, None, None


class _Spread(_Gather):
    """All rows; the sum of the gradients that the processes have of them."""

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        group, sizes = ctx.place
        return group.scatter(gradient, sizes), None, None


class _Own(torch.autograd.Function):
    """The own rows of what every process has whole; what the processes make of theirs is averaged, as DDP does."""

    @staticmethod
    def forward(ctx: Any, every: Tensor, group: Group, sizes: tuple[int, ...]) -> Tensor:
        ctx.place = group, sizes
        return every[own_of(sizes, group.rank)].clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        group, sizes = ctx.place
        return group.collect(gradient.contiguous(), sizes) / group.world, None, None


class _Total(torch.autograd.Function):
    """The sum; each part's gradient is that of the sum."""

    @staticmethod
    def forward(ctx: Any, own: Tensor, group: Group) -> Tensor:
        ctx.world = group.world
        summed = group.sendable(own.clone())
        dist.all_reduce(summed, group=group.group)
        return summed.to(own.device)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient * ctx.world, None
