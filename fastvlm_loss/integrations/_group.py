"""The processes that a package gathers from: all of them."""

from __future__ import annotations

import torch.distributed as dist
from torch import Tensor

from ..distributed import shard_of

__all__ = ["everyone", "samples_before"]


def everyone(gather: bool) -> dist.ProcessGroup | None:
    """The group of all processes where they are to be gathered and there are several, for `group=` of the losses."""
    several = gather and dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
    return dist.group.WORLD if several else None


def samples_before(features: Tensor, group: dist.ProcessGroup | None) -> tuple[int, int]:
    """How many samples the processes before this one have, and all together, of features `[B, D]` in each."""
    if group is None:
        return 0, len(features)
    shard = shard_of(group, features, features)
    return shard.own_rows.start, sum(shard.rows)
