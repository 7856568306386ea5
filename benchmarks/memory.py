"""Memory: the peak of one call beyond its inputs and gradients, in a process of its own.

CPU: the child first makes a tiny call, so that libraries and threads are not counted, then creates the inputs, resets
the peak of its resident memory (`5` to /proc/self/clear_refs; VmHWM) and makes the call. Extra = peak - resident size
before - size of the returned gradients. The allocator gives every freed block back, so that no call hides in what
another left. `limit` is the most the child may allocate (RLIMIT_DATA): beyond it an allocation fails and the call dies.
CUDA: the same with `torch.cuda.max_memory_allocated`; there a suite measures in its own process.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from fastvlm_loss.losses import registry

from .baselines import makers
from .inputs import inputs
from .measure import BOTH, step
from .size import Size

__all__ = ["Peak", "extra", "free", "peak"]

ROOT = Path(__file__).parents[1]
ALLOCATOR = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
WARMUP = Size.square(64, 64)


@dataclass(frozen=True)
class Peak:
    """Bytes beyond inputs and gradients, or None and the reason why the call died."""

    extra: int | None
    died: str = ""


def peak(
    loss: str, contestant: str, size: Size, dtype: torch.dtype,
    *, device: str, threads: int, limit: int | None = None,
) -> Peak:  # fmt: skip
    """Measure the forward and backward of one contestant at one size."""
    asked = {
        "loss": loss, "contestant": contestant, "size": size, "dtype": str(dtype).removeprefix("torch."),
        "device": device, "threads": threads, "limit": limit,
    }  # fmt: skip
    command = [sys.executable, "-m", f"{__package__}.memory", json.dumps(asked)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env={**os.environ, **ALLOCATOR})
    if done.returncode == 0:
        return Peak(**json.loads(done.stdout.splitlines()[-1]))
    lines = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
    said = lines[-1].rpartition("DefaultCPUAllocator: ")[2]  # what comes before names a line of torch's source
    return Peak(None, said.partition(". Error code")[0])


def _child(
    loss: str, contestant: str, size: list[int], dtype: str, device: str, threads: int, limit: int | None
) -> Peak:
    if limit is not None:
        import resource

        resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    torch.set_num_threads(threads)
    call = makers(registry[loss])[contestant]()
    kind: torch.dtype = getattr(torch, dtype)
    step(call, inputs(registry[loss], WARMUP, kind, device), BOTH)
    given = inputs(registry[loss], Size(*size), kind, device)
    return Peak(extra(lambda: step(call, given, BOTH), device)[1])


def extra(call: Callable[[], tuple[Tensor, ...]], device: str) -> tuple[tuple[Tensor, ...], int]:
    """What a call returns, and the bytes that it held at its peak beyond what it was given and what it returns."""
    before = _restart(device)
    returned = call()
    highest = _highest(device)
    return returned, max(highest - before - sum(t.numel() * t.element_size() for t in returned), 0)


def free(device: torch.device) -> float:
    """Bytes that a call could have on a GPU, what the allocator keeps for later included; without limit on a CPU."""
    if device.type != "cuda":
        return float("inf")
    kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + kept


def _restart(device: str) -> int:
    """Count the peak anew; bytes held now."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.memory_allocated(device)
    Path("/proc/self/clear_refs").write_text("5")
    return _status("VmRSS")


def _highest(device: str) -> int:
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device)
    return _status("VmHWM")


def _status(field: str) -> int:
    # not getrusage: its peak survives exec, so a child starts with that of its parent
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"{field}: not in /proc/self/status, memory is measured on Linux only")


if __name__ == "__main__":
    print(json.dumps(_child(**json.loads(sys.argv[1])).__dict__))
