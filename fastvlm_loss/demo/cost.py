"""Time and memory of our loss against the dense reference, forward and backward, measured in this run."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch

from .training import contrast

SIZES = (256, 1024, 4096, 8192)
DIM = 128
LOSSES = ("fastvlm", "dense")
ALLOCATOR = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}  # gives every freed block back


@dataclass(frozen=True)
class Cost:
    """Per loss and batch size: median seconds of one forward and backward, and peak extra memory in MB."""

    sizes: tuple[int, ...]
    seconds: dict[str, list[float]]
    megabytes: dict[str, list[float]]
    device: str


def measure(device: torch.device, sizes: tuple[int, ...] = SIZES, dim: int = DIM) -> Cost:
    """Time both losses in turn on the same features, then find the peak memory of each."""
    seconds: dict[str, list[float]] = {loss: [] for loss in LOSSES}
    for size in sizes:
        inputs = _inputs(size, dim, device)
        taken: dict[str, list[float]] = {loss: [] for loss in LOSSES}
        for _ in range(6 if size <= 1024 else 3):
            for loss in LOSSES:
                taken[loss].append(_timed(loss, inputs))
        for loss in LOSSES:
            seconds[loss].append(median(taken[loss]))
    peak = _peak_cuda if device.type == "cuda" else _peak_cpu
    return Cost(sizes, seconds, {loss: peak(loss, sizes, dim) for loss in LOSSES}, device.type)


def _inputs(size: int, dim: int, device: torch.device) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(size)
    features = torch.randn(2, size, dim, generator=generator)
    images, texts = torch.nn.functional.normalize(features, dim=-1).to(device).unbind()
    scale = torch.tensor(20.0, device=device, requires_grad=True)
    return images.clone().requires_grad_(), texts.clone().requires_grad_(), scale


def _step(loss: str, inputs: tuple[torch.Tensor, ...]) -> None:
    images, texts, scale = inputs
    torch.autograd.grad(contrast(loss, images, texts, scale), (images, texts, scale))


def _timed(loss: str, inputs: tuple[torch.Tensor, ...]) -> float:
    _wait(inputs[0].device)
    start = time.perf_counter()
    _step(loss, inputs)
    _wait(inputs[0].device)
    return time.perf_counter() - start


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def _peak_cuda(loss: str, sizes: tuple[int, ...], dim: int) -> list[float]:
    found = []
    for size in sizes:
        inputs = _inputs(size, dim, torch.device("cuda"))
        _step(loss, inputs)
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        _step(loss, inputs)
        found.append((torch.cuda.max_memory_allocated() - before) / 1e6)
    return found


def _peak_cpu(loss: str, sizes: tuple[int, ...], dim: int) -> list[float]:
    """In a process of its own, with an allocator that gives every freed block back, so that a peak is a peak."""
    work = json.dumps({"loss": loss, "sizes": sizes, "dim": dim, "threads": torch.get_num_threads()})
    command = [sys.executable, "-m", __name__, work]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env={**os.environ, **ALLOCATOR})
    megabytes: list[float] = json.loads(done.stdout)
    return megabytes


def _child(work: str) -> list[float]:
    asked: dict[str, Any] = json.loads(work)
    torch.set_num_threads(asked["threads"])
    cpu = torch.device("cpu")
    _step(asked["loss"], _inputs(64, asked["dim"], cpu))  # libraries and threads are not the loss's memory
    found = []
    for size in asked["sizes"]:
        inputs = _inputs(size, asked["dim"], cpu)
        restart_peak()
        before = peak_megabytes()
        _step(asked["loss"], inputs)
        found.append(peak_megabytes() - before)
    return found


def restart_peak() -> None:
    """Let Linux count the peak anew; elsewhere it only grows, which is why sizes are measured in rising order."""
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def peak_megabytes() -> float:
    """Highest resident size of this process in MB."""
    status = Path("/proc/self/status")
    if status.exists():  # Linux, where getrusage would start with the parent's peak
        lines = status.read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) * 1024 / 1e6
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6


if __name__ == "__main__":
    print(json.dumps(_child(sys.argv[1])))
