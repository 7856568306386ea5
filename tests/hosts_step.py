"""Run by test_distributed_hosts.py under `torchrun`: some losses of uneven shares, gathered and in a ring."""

import datetime

import torch
import torch.distributed as dist
from group_cases import SIZES, compare

from fastvlm_loss import distributed

CASES = ("clip ids", "clip labels", "siglip", "soft target, learned teacher", "triplet, hardest")

if __name__ == "__main__":
    dist.init_process_group("gloo", timeout=datetime.timedelta(seconds=60))
    rank, sizes, wrong = dist.get_rank(), SIZES["uneven"][: dist.get_world_size()], []
    for limit in (2**32, 0):
        distributed.set_gather_limit(limit)
        for case in CASES:
            wrong += compare(case, sizes, torch.float64, dist.group.WORLD, rank, 1e-9)
    assert not wrong, "\n".join(wrong)
    if rank == 0:
        print("loss and gradients are those of one process", flush=True)
    dist.destroy_process_group()
