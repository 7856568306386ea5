"""`python -m benchmarks.overlap`: does the ring compute while it sends? gloo, two processes of one thread each.

The step of `clip_loss` in a ring, against its computing without sending, its messages without computing, and itself
with every message waited for at once. Over loopback as it is, and slowed to a rate in a network namespace of its own.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from torch import Tensor

from fastvlm_loss import clip_loss
from fastvlm_loss.distributed import Group, group_of, set_gather_limit

from . import store
from .machine import hardware, versions
from .measure import Timing
from .tables import amount, duration, table

__all__ = ["RING", "hidden", "main", "markdown", "measure"]

WORLD, BYTES = 2, 4
RING, LATER, ALONE, SENDING, GATHERED = (
    "the ring", "the ring, every message waited for", "*its computing alone*", "*its messages alone*", "gathered",
)  # fmt: skip
# in a network namespace of its own
SLOWED = """
set -e
ip link set lo up
tc qdisc add dev lo root tbf rate "$1"gbit burst 1mb latency 1s
exec "${@:2}"
"""
Send = Callable[[Group, Sequence[Tensor]], Callable[[], list[Tensor]]]
asynchronous = Group.pass_on


def waited(group: Group, tensors: Sequence[Tensor]) -> Callable[[], list[Tensor]]:
    """A message that is there before anything else happens."""
    received = asynchronous(group, tensors)()
    return lambda: received


def silent(group: Group, tensors: Sequence[Tensor]) -> Callable[[], list[Tensor]]:
    """No message: what comes is what was to go, which is as much to compute with."""
    return lambda: list(tensors)


@contextmanager
def sending(way: Send) -> Iterator[None]:
    """The ring's messages, made in another way."""
    Group.pass_on = way  # type: ignore[method-assign]
    try:
        yield
    finally:
        Group.pass_on = asynchronous  # type: ignore[method-assign]


def contestants(n: int, d: int, rank: int) -> dict[str, Callable[[], object]]:
    """What a process does, by name."""
    g = torch.Generator().manual_seed(rank)
    x, y = (F.normalize(torch.randn(n, d, generator=g), dim=1).requires_grad_() for _ in range(2))
    group = group_of(dist.group.WORLD)

    def step(limit: int, way: Send) -> None:
        set_gather_limit(limit)
        with sending(way):
            torch.autograd.grad(clip_loss(x, y, 14.3, group=dist.group.WORLD), (x, y))

    def messages() -> None:
        for _ in range(2 * (WORLD - 1) + WORLD):  # features forward and backward, and the sums of gradients
            asynchronous(group, [y.detach()])()

    return {
        RING: lambda: step(0, asynchronous), LATER: lambda: step(0, waited), ALONE: lambda: step(0, silent),
        SENDING: messages, GATHERED: lambda: step(2**40, asynchronous),
    }  # fmt: skip


def process(rank: int, port: int, n: int, d: int, rounds: int, found: Any) -> None:
    """One of the two: all contestants in turn; a call takes as long as the slower process needs."""
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "GLOO_SOCKET_IFNAME": "lo"}
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=WORLD)
    calls = contestants(n, d, rank)
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(rounds + 1):  # the first to warm up
        for name, call in calls.items():
            dist.barrier()
            start = time.perf_counter()
            call()
            took = torch.tensor(time.perf_counter() - start)
            dist.all_reduce(took, dist.ReduceOp.MAX)
            if turn:
                seconds[name].append(took.item())
    if rank == 0:
        found.update({name: asdict(Timing.of(samples)) for name, samples in seconds.items()})
    dist.destroy_process_group()


def measure(n: int, d: int, rounds: int) -> dict[str, Any]:
    """Timings of all contestants, here."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with mp.Manager() as manager:
        found = manager.dict()
        mp.spawn(process, (port, n, d, rounds, found), nprocs=WORLD)
        return dict(found)


def over(gigabits: float, n: int, d: int, rounds: int) -> dict[str, Any]:
    """The same in another program, over loopback of this rate; 0 leaves it as it is."""
    program = [sys.executable, "-m", "benchmarks.overlap", "--child", json.dumps([n, d, rounds])]
    if gigabits:
        program = ["unshare", "--map-root-user", "--net", "bash", "-c", SLOWED, "-", str(gigabits), *program]
    told = subprocess.run(program, stdout=subprocess.PIPE, text=True, check=True)
    return {"gigabits": gigabits, "n": n, "d": d, "timings": json.loads(told.stdout)}


def hidden(timings: dict[str, Any]) -> float:
    """Share of the messages' time during which something is computed."""
    ring, alone, sent = (timings[name]["median"] for name in (RING, ALONE, SENDING))
    return float((alone + sent - ring) / sent)


def markdown(result: dict[str, Any]) -> str:
    """The table of a result."""
    links = result["links"]
    names = [f"{link['gigabits']:g} Gb/s" if link["gigabits"] else "loopback as it is" for link in links]
    lines = []
    for who in links[0]["timings"]:
        found = [link["timings"][who] for link in links]
        lines.append([who, *(f"{duration(t['median'])} (± {duration(t['spread'] / 2)})" for t in found)])
    lines.append(["share of its messages' time that is hidden", *(f"{hidden(link['timings']):.0%}" for link in links)])
    n, d, hard = links[0]["n"], links[0]["d"], result["hardware"]
    sent = (2 * (WORLD - 1) + WORLD) * n * d * BYTES
    where = f"{hard['cpu']}, {hard['cores']} cores, {hard['instruction_set'] or 'no C++ backend'}"
    kept = ", ".join(f"{k} {v}" for k, v in result["versions"].items() if v)
    rounds, load = links[0]["timings"][RING]["repeats"], result["settings"]["load"]
    return (
        f"`clip_loss`, forward + backward, fp32, {WORLD} processes of one thread, n = {n} of N = {WORLD * n}, D = {d}, "
        f"{amount(sent)} sent by each:\n\n{table(['', *names], lines)}\n\n"
        f"Medians, and half the interquartile range, of {rounds} interleaved calls, all in one run of "
        f"`python -m benchmarks.overlap`, on a machine with a load of {load:g} besides. {where}; {kept}; "
        f"{result['date']}."
    )


def main(arguments: list[str] | None = None) -> int:
    """Run, print, and save with `--output`."""
    parser = argparse.ArgumentParser("python -m benchmarks.overlap", description=__doc__)
    parser.add_argument("--gigabits", type=float, nargs="*", default=[0.25], help="rates of the link; 0 as it is")
    parser.add_argument("--size", type=int, nargs=2, default=[1024, 512], metavar=("N", "D"), help="of a process")
    parser.add_argument("--rounds", type=int, default=21, help="interleaved calls (default: %(default)s)")
    parser.add_argument("--output", type=Path, metavar="FILE", help="where to save the JSON and its table")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    asked = parser.parse_args(arguments)
    if asked.child:
        print(json.dumps(measure(*json.loads(asked.child))))
        return 0
    result: dict[str, Any] = {
        "date": datetime.now(timezone.utc).date().isoformat(), "hardware": hardware("cpu"), "versions": versions(),
        "settings": {"load": round(os.getloadavg()[0], 1)},
        "links": [over(rate, *asked.size, asked.rounds) for rate in asked.gigabits],
    }  # fmt: skip
    print(markdown(result))
    if asked.output:
        store.publish(result, asked.output, markdown(result))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
