"""What `measure` finds of a training step in one configuration, in this process: sizes and peak, time, gradients."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from statistics import median, quantiles
from typing import Any

import torch
from torch import Tensor

from ..demo.cost import peak_megabytes, restart_peak
from .build import precision_of
from .config import Config
from .data import Data
from .measure_kept import Kept
from .measure_trial import Row, Trial
from .world import World, joined

__all__ = ["EMULATED", "difference", "memory", "timing"]

EMULATED = "bf16 is emulated on this CPU"
WARMUP = 3


def memory(row: Row, config: Config, steps: int) -> dict[str, Any]:
    """Sizes and peak of a step; in a process whose allocator gives every freed block back, or the peak is none.

    Where bf16 is emulated a step may take minutes: then it is one, after an update that allocates the optimiser's
    state, and `why` says that there is no time to be measured.
    """
    with _alone(config, steps) as (config, data, world):
        emulated = row.precision != "fp32" and precision_of(replace(config, precision="auto"), world) == "fp32"
        _libraries(config, data, world)
        start = _restart(world)
        trial = Trial(row, config, data, world)
        if emulated:
            trial.prime()
        for step in range(0 if emulated else WARMUP):
            trial(step)
        _restart(world)
        with Kept([*trial.model.parameters(), *trial.model.buffers()]) as kept:
            trial(WARMUP)
        if not emulated:
            _restart(world)
            for step in range(WARMUP + 1, WARMUP + 1 + steps):
                trial(step)
        kinds = {str(kind).removeprefix("torch."): size for kind, size in kept.highest.items() if size}
        activations = {"activations": kept.highest.total(), "activations_by_type": kinds}
        found = {"row": row.name, **trial.sizes(), **activations, **_highest(world, start)}
    return found | ({"why": EMULATED} if emulated else {})


def timing(row: Row, config: Config, steps: int) -> dict[str, Any]:
    """Seconds of a step; in a process with the usual allocator, since giving blocks back takes time."""
    with _alone(config, steps) as (config, data, world):
        trial = Trial(row, config, data, world)
        for step in range(WARMUP):
            trial(step)
        wall, busy = zip(*(_timed(partial(trial, WARMUP + k), world) for k in range(steps)), strict=True)
    return {"seconds": _summary(wall), "processor": _summary(busy)}


def difference(config: Config) -> dict[str, float]:
    """Of the gradients with checkpointing from those without, fp32, dropout included."""
    config = replace(config, optimizer=replace(config.optimizer, clip=0.0))
    with _alone(config, 1) as (config, data, world):
        rows = Row("without"), Row("with", checkpointing=True)
        one, other = (_gradients(Trial(row, config, data, world)) for row in rows)
    if one.keys() != other.keys():
        raise ValueError(f"checkpointing: got gradients of {len(other)} parameters, wanted those of {len(one)}")
    apart = torch.stack([(one[n] - other[n]).double().norm() for n in one]).norm()
    size = torch.stack([g.double().norm() for g in one.values()]).norm()
    largest = max((one[n] - other[n]).abs().max().item() for n in one)
    return {"relative": (apart / size).item(), "largest": largest, "norm": size.item()}


@contextmanager
def _alone(config: Config, steps: int) -> Iterator[tuple[Config, Data, World]]:
    """The run's configuration, with room for the steps, its data and its only process."""
    with joined(config.device) as world:
        if world.size > 1:
            raise ValueError(f"torchrun: got {world.size} processes, wanted one")
        longer = replace(config, steps=max(config.steps, WARMUP + 1 + steps))
        yield longer, Data.open(config.data, config.seed), world


def _gradients(trial: Trial) -> dict[str, Tensor]:
    """Of a step, by the names of the parameters; the step itself clears them."""
    optimizer, named, found = trial.learning.optimizer, trial.learning.named, dict[str, Tensor]()
    assert optimizer is not None
    optimizer.register_step_pre_hook(
        lambda *_: found.update({name: p.grad.clone() for name, p in named.items() if p.grad is not None})
    )
    trial()
    return found


def _libraries(config: Config, data: Data, world: World) -> None:
    """A step of two pairs through few layers, so that modules, libraries and threads are no row's memory."""
    model = config.model
    few = replace(model, text=replace(model.text, layers=1), fusion=replace(model.fusion, layers=1))
    Trial(Row("libraries"), replace(config, model=few, batch_size=2), data, world)()
    gc.collect()


def _restart(world: World) -> float:
    """Count the peak anew; bytes that are held now."""
    if world.device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        return float(torch.cuda.memory_allocated())
    restart_peak()
    return peak_megabytes() * 1e6


def _highest(world: World, start: float) -> dict[str, float | None]:
    """The peak since the last restart, beyond the start; and on a GPU what the allocator had reserved."""
    if world.device.type == "cuda":
        torch.cuda.synchronize()
        return {"peak": torch.cuda.max_memory_allocated() - start, "reserved": float(torch.cuda.max_memory_reserved())}
    return {"peak": peak_megabytes() * 1e6 - start, "reserved": None}


def _timed(call: Callable[[], None], world: World) -> tuple[float, float]:
    """Seconds by the clock (on a GPU between two events) and of the processor, without those of other programs."""
    cuda = world.device.type == "cuda"
    events = [torch.cuda.Event(enable_timing=True) for _ in range(2)] if cuda else []
    start, busy = time.perf_counter(), time.process_time()
    if cuda:
        events[0].record()
    call()
    if cuda:
        events[1].record()
        events[1].synchronize()
        return events[0].elapsed_time(events[1]) / 1e3, time.process_time() - busy
    return time.perf_counter() - start, time.process_time() - busy


def _summary(values: Iterable[float]) -> dict[str, float]:
    """Median and interquartile range."""
    taken = [*values]
    low, _, high = quantiles(taken, n=4, method="inclusive") if len(taken) > 1 else (0.0, 0.0, 0.0)
    return {"median": median(taken), "spread": high - low, "steps": len(taken)}
