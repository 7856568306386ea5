"""A process that raises, or dies, ends the step of the others with an error in bounded time; nobody hangs."""

import datetime
import os
import socket
import time

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from fastvlm_loss import clip_loss, distributed

pytestmark = pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="no gloo")
TIMEOUT = 5  # of the group, in seconds


def process(rank, world, port, how, limit, results):
    """Rank 1 fails as told; the others say how their step ended, and after how long."""
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=world, timeout=datetime.timedelta(seconds=90))
    group = dist.new_group(timeout=datetime.timedelta(seconds=TIMEOUT))
    distributed.set_gather_limit(limit)
    x = torch.eye(4).requires_grad_()
    clip_loss(x, torch.eye(4), 5.0, group=group).backward()  # all is well
    start = time.monotonic()
    if rank == 1 and how == "dies":
        os._exit(9)
    try:
        if rank == 1:
            clip_loss(x, torch.eye(3), 5.0, group=group)  # D differs: raises before anything is sent
        clip_loss(x, torch.eye(4), 5.0, group=group).backward()
        ended = "as if nothing had happened"
    except (RuntimeError, ValueError) as error:
        ended = type(error).__name__
    results.put((rank, ended, time.monotonic() - start))
    results.close()
    results.join_thread()
    os._exit(0)  # without waiting for a group that is no more


@pytest.mark.parametrize("limit", [2**32, 0], ids=["gather", "ring"])
@pytest.mark.parametrize("how", ["raises", "dies"])
def test_the_others_end_with_an_error(how, limit):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    context, world = mp.get_context("spawn"), 3
    results = context.Queue()
    running = [context.Process(target=process, args=(r, world, port, how, limit, results)) for r in range(world)]
    for one in running:
        one.start()
    try:
        expected = world if how == "raises" else world - 1
        told = sorted(results.get(timeout=120) for _ in range(expected))
    finally:
        for one in running:
            one.kill()
    assert [rank for rank, *_ in told] == ([0, 1, 2] if how == "raises" else [0, 2])
    for rank, ended, seconds in told:
        assert ended in (("ValueError",) if rank == 1 else ("RuntimeError", "DistBackendError")), told
        assert seconds < TIMEOUT + 20, told
