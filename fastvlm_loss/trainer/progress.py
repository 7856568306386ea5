"""What a person sees of a run: one line that moves, a JSON line a step, and TensorBoard."""

from __future__ import annotations

import json
import sys
import time
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from .step import Record
from .world import World

__all__ = ["Log", "read"]


class Log:
    """Writes `log.jsonl` and TensorBoard's files into the run's folder, from the first process.

    A resumed run goes on from its checkpoint's step: what the log says of later ones is cut off.
    """

    def __init__(self, folder: Path, steps: int, start: int, batch_size: int, world: World, tensorboard: bool) -> None:
        self.steps, self.batch_size, self.world = steps, batch_size, world
        self.path, self.before = folder / "log.jsonl", time.perf_counter()
        self.writer: Any = None
        self.bar: Any = None
        if world.first:
            folder.mkdir(parents=True, exist_ok=True)
            _cut(self.path, start)
            self.file = self.path.open("a")
            if tensorboard:
                from torch.utils.tensorboard import SummaryWriter

                self.writer = SummaryWriter(folder / "tensorboard", purge_step=start)
            from tqdm import tqdm  # type: ignore[import-untyped, unused-ignore]

            often = 0.1 if sys.stderr.isatty() else 20  # seconds between two pictures of the line
            self.bar = tqdm(total=steps, initial=start, unit="step", mininterval=often, dynamic_ncols=True)

    def __enter__(self) -> Log:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.world.first:
            self.bar.close()
            self.file.close()
            if self.writer is not None:
                self.writer.close()

    def step(self, record: Record, stage: str) -> None:
        """After a step."""
        now = time.perf_counter()
        seconds, self.before = now - self.before, now
        if not self.world.first:
            return
        self._write({**asdict(record), "stage": stage, "seconds": round(seconds, 4)})
        self._board(record.step, {**_prefixed("raw", record.raw), **_prefixed("weighted", record.weighted)})
        self._board(record.step, _prefixed("step", record.metrics))
        losses = " ".join(f"{task} {value:.3f}" for task, value in record.raw.items())
        parts = [
            stage,
            losses,
            f"scale {record.metrics['logit_scale']:.1f}",
            f"{self.batch_size / seconds:,.0f} pairs/s",
        ]
        self.bar.set_postfix_str(", ".join([*parts, memory(self.world.device)]), refresh=False)
        self.bar.update()

    def evaluated(self, step: int, figures: dict[str, float]) -> None:
        """After an evaluation that follows `step` steps."""
        if self.world.first:
            self._write({"step": step, "evaluation": figures})
            self._board(step, _prefixed("evaluation", figures))
        self.before = time.perf_counter()

    def say(self, text: str) -> None:
        """A line of its own."""
        if self.world.first:
            self.bar.write(text)

    def _write(self, line: dict[str, Any]) -> None:
        self.file.write(json.dumps(line) + "\n")
        self.file.flush()

    def _board(self, step: int, values: dict[str, float]) -> None:
        if self.writer is not None:
            for name, value in values.items():
                self.writer.add_scalar(name, value, step)


def read(folder: Path) -> list[dict[str, Any]]:
    """The lines of a run's log; a line that was cut off by a crash is left out."""
    path, lines = folder / "log.jsonl", []
    for line in path.read_text().splitlines() if path.is_file() else []:
        try:
            lines.append(json.loads(line))
        except ValueError:
            continue
    return lines


def memory(device: torch.device) -> str:
    """Of the process at most so far."""
    if device.type == "cuda":
        return f"{torch.cuda.max_memory_allocated(device) / 2**30:.1f} GiB"
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    return f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30:.1f} GiB"


def _prefixed(name: str, values: dict[str, float]) -> dict[str, float]:
    return {f"{name}/{key}": value for key, value in values.items()}


def _cut(path: Path, start: int) -> None:
    """Leave what was written before step `start`: records of earlier steps, evaluations after at most as many."""
    kept = [
        line for line in read(path.parent) if line["step"] < start or ("evaluation" in line and line["step"] == start)
    ]
    part = path.with_name(f"{path.name}.part")
    part.write_text("".join(json.dumps(line) + "\n" for line in kept))
    part.replace(path)
