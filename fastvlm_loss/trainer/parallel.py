"""The model over the processes: as it is, a copy in each (DDP), or in shards (FSDP2)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.nn.parallel import DistributedDataParallel

from .world import World

__all__ = ["full_state", "settle", "touched", "unwrapped", "wrap"]


def wrap(model: nn.Module, blocks: Iterable[nn.Module], strategy: str, world: World) -> nn.Module:
    """The model that a stage trains; to be called, never its parts, or gradients would not be reduced.

    Which parameters learn is fixed here: a stage that trains others wraps anew.

    Args:
        blocks: the parts that FSDP gathers one at a time, for instance the layers of transformers.
        strategy: `ddp`, `fsdp` (parameters, gradients, optimiser in shards) or `zero2` (gradients and optimiser).
    """
    if world.size == 1 or not any(p.requires_grad for p in model.parameters()):
        return model
    if strategy == "ddp":
        devices = [world.device.index] if world.device.type == "cuda" else None
        return DistributedDataParallel(model, device_ids=devices, broadcast_buffers=False, gradient_as_bucket_view=True)
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(world.device.type, (world.size,))
    for block in blocks:
        fully_shard(block, mesh=mesh, reshard_after_forward=strategy == "fsdp")
    root = fully_shard(model, mesh=mesh, reshard_after_forward=False)
    # the vocabulary is read by losses, whose backward may come after that of another of the model's calls
    root.set_reshard_after_backward(False, recurse=False)
    return model


def settle(model: nn.Module) -> None:
    """After backward: give back what FSDP kept gathered for it."""
    from torch.distributed.fsdp import FSDPModule

    if isinstance(model, FSDPModule):
        model.reshard()


def unwrapped(model: object) -> Any:
    """The model itself, for its parameters and names."""
    return model.module if isinstance(model, DistributedDataParallel) else model


def full_state(model: nn.Module) -> Mapping[str, Tensor]:
    """All parameters and buffers, gathered on the CPU of the first process."""
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    return cast(Mapping[str, Tensor], get_model_state_dict(unwrapped(model), options=options))


def touched(loss: Tensor, model: nn.Module) -> Tensor:
    """The loss with a gradient of 0 for every parameter, since DDP waits for those that a batch does not reach."""
    if not isinstance(model, DistributedDataParallel):
        return loss
    touched: Tensor = _Touch.apply(loss, *(p for p in model.parameters() if p.requires_grad))
    return touched


class _Touch(torch.autograd.Function):
    """The first argument; the others have a gradient of 0."""

    @staticmethod
    def forward(ctx: Any, loss: Tensor, *parameters: Tensor) -> Tensor:
        ctx.parameters = parameters
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, ...]:
        return gradient, *(p.new_zeros(()).expand_as(p) for p in ctx.parameters)
