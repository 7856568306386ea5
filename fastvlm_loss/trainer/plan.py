"""What a run would do, before it does it: stages, what learns in each, sizes, steps, memory."""

from __future__ import annotations

from collections.abc import Iterator

from .freezing import learners, parameters_of
from .run import Run

__all__ = ["plan"]

_UNITS = ("", "K", "M", "G", "T")


def plan(run: Run) -> str:
    """The plan of a run as text."""
    return "\n".join(_lines(run))


def _lines(run: Run) -> Iterator[str]:
    config, model = run.config, run.source
    yield run.data.note
    total = sum(p.numel() for p in model.parameters())
    yield (
        f"{config.steps:,} steps of {config.batch_size:,} pairs in {run.world.size} process"
        f"{'es' if run.world.size > 1 else ''}, {run.precision}, vocabulary of {len(run.tokenizer):,} tokens"
    )
    yield f"model: {_number(total)} parameters"
    for name, parts in model.groups().items():
        count = sum({id(p): p.numel() for part in parts for p in parameters_of(part)}.values())
        yield f"  {name:<12}{_number(count):>8}"
    for stage in run.stages:
        learns = sum(p.numel() for p in learners(model, stage))
        frozen = [name for name in model.groups() if name not in stage.train]
        first, last = stage.weights(stage.start), stage.weights(stage.end - 1)
        weights = ", ".join(f"{t} {first.get(t, 0):g}" + _to(first, last, t) for t in stage.tasks)
        yield (
            f"stage {stage.name}: steps {stage.start:,} to {stage.end - 1:,}; {weights}; {_number(learns)} parameters "
            f"learn{', frozen: ' + ', '.join(frozen) if frozen else ''}"
        )
        yield f"  memory of each process without activations: {_number(_state(run, total, learns))}B"


def _state(run: Run, total: int, learns: int) -> float:
    """Bytes of fp32 weights, their averages, gradients and two moments of AdamW in a process."""
    weights, averages, learning = 4 * total, 4 * total if run.teacher is not None else 0, 12 * learns
    if run.config.strategy == "ddp" or run.world.size == 1:
        return weights + averages + learning
    shard = (weights + learning) / run.world.size  # there is no teacher beside shards
    return shard + (weights if run.config.strategy == "zero2" else 0)  # which stay whole from forward to backward


def _to(first: dict[str, float], last: dict[str, float], task: str) -> str:
    return "" if first.get(task, 0) == last.get(task, 0) else f" to {last.get(task, 0):g}"


def _number(count: float) -> str:
    """Three digits and a letter."""
    k = 0
    while count >= 999.5 and k < len(_UNITS) - 1:
        count, k = count / 1000, k + 1
    return f"{count:.3g}{_UNITS[k]}"
