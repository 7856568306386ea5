"""Time: interleaved medians, the machine's product rate as the limit, and exponents of growth."""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from statistics import median, quantiles
from typing import ClassVar

import torch
from torch import Tensor

from .inputs import Inputs

__all__ = ["BOTH", "FORWARD", "MODES", "ProductRate", "Timing", "interleaved", "power_law", "step", "too_slow"]

Loss = Callable[..., Tensor]
FORWARD, BOTH = "forward", "forward + backward"
MODES = (FORWARD, BOTH)
SLOW = 4  # times slower than fp32; with instructions for it a dtype is faster


@dataclass(frozen=True)
class Timing:
    """Seconds of one call over the repeats; `spread` is the interquartile range."""

    median: float
    min: float
    spread: float
    repeats: int

    @classmethod
    def of(cls, samples: Sequence[float]) -> Timing:
        """Summary of at least one sample."""
        low, _, high = quantiles(samples, n=4, method="inclusive") if len(samples) > 1 else (0.0, 0.0, 0.0)
        return cls(median(samples), min(samples), high - low, len(samples))

    def scaled(self, factor: float) -> Timing:
        """The same for `factor` times the work."""
        return Timing(self.median * factor, self.min * factor, self.spread * factor, self.repeats)


def step(loss: Loss, given: Inputs, mode: str) -> tuple[Tensor, ...]:
    """One call: the loss alone, or the gradients of all tensors."""
    if mode == FORWARD:
        with torch.no_grad():
            return (loss(**given.tensors, **given.options),)
    return torch.autograd.grad(loss(**given.tensors, **given.options), tuple(given.tensors.values()))


def interleaved(
    calls: Mapping[str, Callable[[], object]], rounds: int, device: str, warmup: int = 1, block: int = 1
) -> dict[str, Timing]:
    """Time all calls in turn, `rounds` times; whatever slows the machine for a while slows them alike.

    Short calls go in blocks of `block` back to back, one sample each: alone, a call would pay for refilling the caches
    after its neighbour.
    """
    names = list(calls)
    samples: dict[str, list[float]] = {name: [] for name in names}
    for i in range(warmup + rounds):
        shift = i % len(names)  # nobody always follows the same neighbour, whose data fill the caches
        for name in names[shift:] + names[:shift]:
            taken = _seconds(calls[name], device, block)
            if i >= warmup:
                samples[name].append(taken)
    return {name: Timing.of(taken) for name, taken in samples.items()}


class ProductRate:
    """The limit: operations at the rate of `torch.mm` of `SHAPE` random numbers into a preallocated output.

    One call makes as many of these products as `operations` fill, at most 16; multiply its time by `factor`.
    """

    SHAPE: ClassVar = {"cpu": (2048, 512, 2048), "cuda": (8192, 8192, 8192)}
    MOST = 16

    def __init__(self, operations: float, dtype: torch.dtype, device: str) -> None:
        m, k, n = self.SHAPE[torch.device(device).type]
        self.a, self.b = torch.randn(m, k, device=device).to(dtype), torch.randn(k, n, device=device).to(dtype)
        self.out = torch.empty(m, n, dtype=dtype, device=device)
        wanted = operations / (2 * m * k * n)
        self.products = min(max(math.ceil(wanted), 1), self.MOST)
        self.factor = wanted / self.products

    def __call__(self) -> None:
        """Make the products."""
        for _ in range(self.products):
            torch.mm(self.a, self.b, out=self.out)


def too_slow(dtypes: Sequence[torch.dtype]) -> dict[torch.dtype, str]:
    """What this CPU has no instructions for, and why: a dense loss would take minutes a call."""

    pairs = {dtype: torch.randn(2, 384, 384).to(dtype) for dtype in {torch.float32, *dtypes}}
    calls = {str(dtype): partial(torch.mm, *pair) for dtype, pair in pairs.items()}
    timings = interleaved(calls, 8, "cpu")  # many, because one that is disturbed would fool it
    seconds = {dtype: timings[str(dtype)].min for dtype in pairs}
    rates = {dtype: 2 * 384**3 / seconds[dtype] / 1e9 for dtype in dtypes}
    usual = seconds[torch.float32]
    return {d: f"torch.mm makes {r:.1f} GFlop/s here" for d, r in rates.items() if seconds[d] > SLOW * usual}


def power_law(sizes: Sequence[int], values: Sequence[float]) -> tuple[float, float]:
    """`(c, p)` of values ~ c * size^p, least squares on log-log."""
    x, y = [math.log(v) for v in sizes], [math.log(v) for v in values]
    mean_x, mean_y = sum(x) / len(x), sum(y) / len(y)
    p = sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True)) / sum((a - mean_x) ** 2 for a in x)
    return math.exp(mean_y - p * mean_x), p


def _seconds(call: Callable[[], object], device: str, block: int) -> float:
    if torch.device(device).type == "cuda":
        return _seconds_on_gpu(call, device, block)
    start = time.perf_counter()
    for _ in range(block):
        call()
    return (time.perf_counter() - start) / block


def _seconds_on_gpu(call: Callable[[], object], device: str, block: int) -> float:
    """Between two events on the stream; nobody finds its inputs, or its neighbour's, in the L2."""
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize(device)
    _filler(device).zero_()
    start.record()
    for _ in range(block):
        call()
    end.record()
    end.synchronize()
    seconds: float = start.elapsed_time(end) / 1e3 / block
    return seconds


@functools.cache
def _filler(device: str) -> Tensor:
    return torch.empty(4 * torch.cuda.get_device_properties(device).L2_cache_size, dtype=torch.uint8, device=device)
