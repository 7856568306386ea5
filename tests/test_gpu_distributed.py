"""Two processes on one GPU, over gloo: every loss and all gradients are those of one process with the whole batch.

NCCL refuses two processes on one device. With FASTVLM_TEST_DEVICE=cpu it runs without one.
"""

import os
import socket

import group_cases
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from fastvlm_loss import distributed

DEVICE = os.environ.get("FASTVLM_TEST_DEVICE", "cuda")
pytestmark = pytest.mark.gpu if DEVICE != "cpu" else []


def every_case(rank, world):
    """All losses in fp64 and fp32, gathered and in a ring."""
    wrong = []
    for limit in (2**32, 0):
        distributed.set_gather_limit(limit)
        for case in group_cases.CASES:
            for dtype, budget in ((torch.float64, 1e-9), (torch.float32, 2e-5)):
                wrong += group_cases.compare(case, (7, 2), dtype, dist.group.WORLD, rank, budget, DEVICE)
    return wrong


@pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="no gloo")
def test_two_processes_on_one_device():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with mp.Manager() as manager:
        results = manager.dict()
        # not forked: CUDA would not start again
        mp.start_processes(group_cases.main, (2, port, every_case, results), nprocs=2, start_method="spawn")
        wrong = [line for rank in range(2) for line in results[rank]]
    assert not wrong, "\n".join(wrong[:20])
