"""The processes of a run: one, or those that `torchrun` has started."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from ..distributed import Group, group_of

__all__ = ["World", "joined"]


@dataclass(frozen=True)
class World:
    """This process among those of the run; each has an equal share of every batch."""

    device: torch.device
    rank: int = 0
    size: int = 1

    @property
    def group(self) -> dist.ProcessGroup | None:
        """For `group=` of a loss: None alone."""
        return dist.group.WORLD if self.size > 1 else None

    @property
    def collectives(self) -> Group:
        """What the processes send one another."""
        return group_of(self.group)

    @property
    def first(self) -> bool:
        """Whether this is the process that writes and prints."""
        return self.rank == 0

    def share(self, batch_size: int) -> int:
        """Pairs of a batch in this process."""
        return batch_size // self.size

    @torch.no_grad()
    def mean(self, values: Tensor) -> Tensor:
        """Over the processes."""
        if self.size > 1:
            values = values.clone()
            dist.all_reduce(values)
            values /= self.size
        return values

    @torch.no_grad()
    def collect(self, own: Tensor) -> Tensor:
        """Rows of all processes, which have as many each, without gradient."""
        return self.collectives.collect(own, (own.shape[0],) * self.size) if self.size > 1 else own

    @torch.no_grad()
    def collect_any(self, own: Tensor) -> Tensor:
        """As `collect`, for as many rows as each process has."""
        if self.size == 1:
            return own
        sizes = self.collect(torch.tensor([own.shape[0]], device=own.device))
        return self.collectives.collect(own, tuple(sizes.tolist()))

    def spread(self, own: Tensor) -> Tensor:
        """Rows of all processes, which have as many each; the gradients that all have of them are summed."""
        return self.collectives.spread(own, (own.shape[0],) * self.size) if self.size > 1 else own

    def most(self, value: int) -> int:
        """The largest of all processes."""
        if self.size == 1:
            return value
        largest = torch.tensor(value, device=self.device)
        dist.all_reduce(largest, op=dist.ReduceOp.MAX)
        return int(largest.item())

    def any(self, flag: bool) -> bool:
        """Whether it holds in any process."""
        if self.size == 1:
            return flag
        value = torch.tensor(float(flag), device=self.device)
        dist.all_reduce(value, op=dist.ReduceOp.MAX)
        return bool(value.item())

    def wait(self) -> None:
        """For the others."""
        if self.size > 1:
            dist.barrier()


@contextmanager
def joined(device: str) -> Iterator[World]:
    """The run's processes, joined by NCCL on GPUs and gloo on CPUs; apart again at the end.

    Raises:
        ValueError: a GPU is asked for and there is none.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("device: got cuda, wanted cpu or auto: torch sees no GPU here")
    on_gpu = device != "cpu" and torch.cuda.is_available()
    size = int(os.environ.get("WORLD_SIZE", "1"))
    own = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0"))) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(own)
    if size == 1:
        yield World(own)
        return
    dist.init_process_group("nccl" if on_gpu else "gloo", device_id=own if on_gpu else None)
    try:
        yield World(own, dist.get_rank(), size)
    finally:
        dist.destroy_process_group()
