"""`python -m benchmarks.scaling`: the step of `clip_loss` on many GPUs, on paper; writes docs/scaling.md.

Nothing here is measured but the rate of the CPU. The volumes are those of docs/distributed.md, which a test counts.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from . import store
from .tables import amount, duration, table, where

__all__ = ["ETHERNET", "INFINIBAND", "NETWORKS", "NVLINK", "PAGE", "Network", "Step", "hiding", "main", "page", "step"]

PAGE = Path(__file__).parents[1] / "docs" / "scaling.md"
PEAK, FRACTION, LINKS, MESSAGE = 989e12, 0.5, 0.8, 10e-6
D, BYTES, LIMIT, STATES, HOST = 768, 2, 2**32, 3, 8
SIZES, WORLDS = (32768, 131072, 262144, 1048576), (8, 64, 1024)
ASSUMED = (
    ("bf16 peak of a GPU", "989 TFLOP/s", "H100 SXM, NVIDIA's data sheet: 1,979 with sparsity, half of it without"),
    ("share of the peak that the loss reaches", f"{FRACTION:.0%}", "**assumption**: no GPU has been measured"),
    ("NVLink", "450 GB/s a GPU, each way", "H100, NVIDIA's data sheet: 900 GB/s, both ways together"),
    (
        "InfiniBand",
        "50 GB/s a GPU, 400 GB/s a host",
        "NDR, 400 Gb/s a port, 8 ports a host (ConnectX-7, DGX H100)",
    ),
    ("Ethernet", "12.5 GB/s a host", "100 Gb/s (IEEE 802.3ba), shared by the host's GPUs"),
    ("share of a link's bandwidth that a step gets", f"{LINKS:.0%}", "**assumption**"),
    ("latency of a message", "10 µs", "**assumption**; a turn of the ring is one, a collective log₂ W"),
    ("GPUs of a host", f"{HOST}", "DGX H100 user guide"),
    ("features", f"D = {D}, bf16, both towers learn", "ViT-L/14 of CLIP"),
)


@dataclass(frozen=True)
class Network:
    """Bytes a second, one way: between GPUs of a host, of a host, and of one GPU's connection to another host."""

    name: str
    inside: float
    host: float = math.inf
    flow: float = math.inf
    gpus: int = HOST

    def collective(self, n: int, world: int, size: float) -> float:
        """Seconds until every process has `size` bytes of each of the n samples of each other process."""
        within = (world - 1) * n * size / self.inside
        across = max(world - self.gpus, 0) * n * size / self.host
        return max(within, across) / LINKS + MESSAGE * math.log2(world)

    def turn(self, world: int, size: float) -> float:
        """Seconds in which every process sends `size` bytes to its neighbour; the slowest link tells."""
        slowest = self.inside if world <= self.gpus else min(self.inside, self.flow)
        return size / slowest / LINKS + MESSAGE


NVLINK = Network("NVLink alone", 450e9)
INFINIBAND = Network("NVLink and InfiniBand", 450e9, 400e9, 50e9)
ETHERNET = Network("NVLink and Ethernet", 450e9, 12.5e9, 12.5e9)
NETWORKS = (NVLINK, INFINIBAND, ETHERNET)


@dataclass(frozen=True)
class Step:
    """Seconds of a forward and a backward of the loss, and bytes of a process beyond its own features.

    Attributes:
        compute: of the own rows, 8 n N D operations.
        sent: communication, hidden or not.
        total: the whole step.
        memory: at its peak.
    """

    compute: float
    sent: float
    total: float
    memory: float

    @property
    def hidden(self) -> float:
        """Share of the communication during which something is computed."""
        return (self.compute + self.sent - self.total) / self.sent


def step(
    big: int, world: int, network: Network, ring: bool, rate: float = PEAK * FRACTION, d: int = D, b: int = BYTES
) -> Step:
    """Of a batch of `big` pairs in equal shares, at `rate` operations a second."""
    n = big // world
    product = 2 * n * big * d / rate
    # states of rows to all, of columns to who joins them, and the joined ones to all
    states = 3 * network.collective(n, world, 4 * STATES)
    vectors = 40 * big  # states, losses, their gradients, of rows and columns
    if not ring:
        features = network.collective(n, world, d * b)  # forward; of the gradients backward
        sent = 2 * features + states
        return Step(4 * product, sent, 4 * product + sent, 2 * big * d * b + vectors)
    shard, sums = network.turn(world, n * d * b), network.turn(world, n * d * 4)
    each, turns = product / world, world - 1
    forward = each + turns * max(each, shard)
    # the next shard, and the sums of the one before, are under way while one is used; the last sums are waited for
    backward = 3 * each + turns * max(3 * each, shard + sums) + sums
    sent = turns * 2 * shard + world * sums + states
    return Step(4 * product, sent, forward + backward + states, n * d * (2 * b + 2 * 4) + vectors)


def hiding(speed: float) -> float:
    """Samples of a process from which a turn of forward, 2 n^2 D operations, outlasts n D b bytes on their way."""
    return PEAK * FRACTION * BYTES / (2 * speed * LINKS)


def measured() -> tuple[float, str]:
    """Operations a second of a CPU, and what measured them."""
    result = store.load(store.RESULTS / "cpu-avx2.json")
    wanted = {"contestant": "fastvlm_loss", "dtype": "float32", "mode": "forward + backward"}
    found = next(where(result["losses"]["clip_loss"]["speed"], **wanted))
    machine = result["hardware"]
    said = (
        f"{machine['cpu']}, {machine['cores']} cores, {machine['instruction_set']}, N = {found['n']}, D = {found['d']}"
    )
    return 8 * found["n"] ** 2 * found["d"] / found["median"], said


def _rows() -> Iterator[list[str]]:
    for world in WORLDS:
        for network in NETWORKS[:1] if world <= HOST else NETWORKS[1:]:
            for big in SIZES:
                gather, ring = (step(big, world, network, kind) for kind in (False, True))
                yield [
                    f"{world}, {network.name}", f"{big}", f"{big // world}", duration(gather.compute),
                    duration(gather.sent), duration(gather.total), amount(gather.memory), duration(ring.sent),
                    f"{ring.hidden:.0%}", duration(ring.total), amount(ring.memory),
                ]  # fmt: skip


def _starts() -> Iterator[list[str]]:
    for d, b, dtype in ((512, 2, "bf16"), (768, 2, "bf16"), (1024, 2, "bf16"), (768, 4, "fp32")):
        yield [f"{dtype}, D = {d}", *(f"{limit // (d * b):,}" for limit in (2**28, 2**30, LIMIT))]


def _cpus(rate: float) -> Iterator[list[str]]:
    alone = Network("Ethernet, 10 Gb/s", 1.25e9, 1.25e9, 1.25e9, gpus=1)
    for world in (8, 64):
        gather, ring = (step(65536, world, alone, kind, rate, 512, 4) for kind in (False, True))
        yield [
            f"{world}", duration(gather.compute), duration(gather.sent), duration(gather.total), duration(ring.total),
        ]  # fmt: skip


def page() -> str:
    """docs/scaling.md."""
    rate, said = measured()
    far, near = (f"{hiding(speed):,.0f}" for speed in (INFINIBAND.flow, NVLINK.inside))
    most, many = SIZES[-1], WORLDS[-1]
    wide, slow = (step(most, many, network, False) for network in (INFINIBAND, ETHERNET))
    enough = next(n for n in SIZES if (s := step(n, 64, INFINIBAND, False)).total < 2 * s.compute)
    head = ["GPUs, network", "N", "n", "compute", "sent", "step", "memory", "sent", "hidden", "step", "memory"]
    titles, rule, *lines = table(head, list(_rows())).split("\n")
    rows = "\n".join(["|  |  |  |  | gathered |  |  | ring |  |  |  |", rule, titles, *lines])
    assumed = table(["", "number", "from"], [list(line) for line in ASSUMED]).replace("---:", "---")
    return f"""# Scaling, on paper

What a step of `clip_loss` (forward and backward, the loss alone) costs on 8, 64 and 1024 GPUs, by arithmetic.
**Nothing here has been measured on a GPU.** `python -m benchmarks.scaling` makes this page; put the numbers of your
machines there.

## What is assumed

{assumed}

Of N pairs each of W processes has n = N / W. It computes 8 n N D operations and sends what the table of
[distributed.md](distributed.md) says. **Gathered**, nothing that is sent is hidden: features come before the first
product, gradients go after the last. Between hosts the collectives use all ports of a host, as NCCL's do. **In a ring**
a shard travels while one is used, so a turn takes the longer of both, and the slowest link between two neighbours
tells: one GPU's port, because the ring goes from host to host once. Memory is beyond a process's own features and their
gradients.

## The step

{rows}

## What follows

- **Gathering is what grows.** {many} GPUs compute the loss {many} times as fast as one, but each receives all N
  features, however many there are: for N = {most} {duration(wide.compute)} of computing, and {duration(wide.sent)} of
  sending over InfiniBand or {duration(slow.sent)} over Ethernet.
- **A ring hides what it sends** once a shard takes longer to use than to travel: from n of about {near} on over NVLink,
  {far} over one InfiniBand port, whatever D and N. There it is the faster way, by what gathering does not hide. With
  fewer samples a process gathering is faster: the ring waits for one port in each of its W turns.
- **It starts where the features do not fit**: beyond `set_gather_limit`, 4 GiB of N D b bytes to begin with. Their
  gradient takes as much again. So a million pairs of D = {D} in bf16 are still gathered; the ring is for more of them,
  or for less memory:

{table(["a ring beyond N =", "limit 256 MiB", "1 GiB", "4 GiB"], list(_starts()))}

- **NVLink** makes the communication of 8 GPUs small beside their computing. With **InfiniBand** 64 GPUs take less than
  twice their computing from N = {enough} on. With **Ethernet** that a host's GPUs share they send for longer than they
  compute, up to a million pairs.
- Where n is a few dozen, no tile is large enough for that share of the peak: the first rows of 1024 GPUs are bounds
  from below.

## A rate that was measured

A CPU ({said}) makes {rate / 1e9:.0f} GFLOP/s of `clip_loss` in fp32
(`benchmarks/results/cpu-avx2.json`). At that rate, N = 65536, D = 512, one process a host and 10 Gb/s (IEEE 802.3ae)
between them, with the same assumptions about links:

{table(["hosts", "compute", "sent, gathered", "step, gathered", "step, in a ring"], list(_cpus(rate)))}
"""


def main(check: bool) -> int:
    """Write the page, or with `check` tell whether it is stale."""
    stale = not PAGE.exists() or PAGE.read_text() != page()
    if stale and not check:
        PAGE.write_text(page())
    if stale:
        print(f"docs/scaling.md: {'stale, run python -m benchmarks.scaling' if check else 'written'}")
    return int(check and stale)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true")
    raise SystemExit(main(parser.parse_args().check))
