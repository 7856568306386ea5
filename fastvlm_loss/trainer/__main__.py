"""Train, evaluate and report: `python -m fastvlm_loss.trainer --config configs/tiny-shapes.yaml`."""

from __future__ import annotations

import os
import sys
from importlib.util import find_spec

import torch

from ..demo.signals import stop_signal
from .cli import Arguments, parse

_NEEDED = {
    "jsonargparse": "jsonargparse[signatures]", "safetensors": "safetensors", "timm": "timm", "tqdm": "tqdm",
    "transformers": "transformers", "matplotlib": "matplotlib", "tensorboard": "tensorboard", "PIL": "pillow",
}  # fmt: skip


def main(arguments: list[str] | None = None) -> int:
    """Run the trainer.

    Exit status: 0 at the end, or after a checkpoint that SIGTERM or Ctrl-C asked for; 1 for data, a checkpoint or
    packages that cannot be used; 2 for a wrong configuration.
    """
    missing = " ".join(package for module, package in _NEEDED.items() if find_spec(module) is None)
    if missing:
        return _failed(f"packages are missing: pip install {missing}")
    asked = parse(arguments)
    if asked.config.threads:
        torch.set_num_threads(asked.config.threads)
    from .world import joined

    try:
        with joined(asked.config.device) as world:
            return _run(asked, world)
    except ValueError as error:
        return _failed(str(error))


def _run(asked: Arguments, world: object) -> int:
    from .plan import plan
    from .report import write
    from .run import Run
    from .world import World

    assert isinstance(world, World)
    run = Run(asked.config, world)
    if asked.dry_run:
        if world.first:
            print(plan(run))
        return 0
    if asked.evaluate:
        result = run.evaluate()
        if world.first:
            print(result.table())
        return 0
    if world.first:
        print(run.data.note, flush=True)
    with stop_signal() as stopped:
        found = run.train(stopped)
    if world.first:
        if found is None:
            print(f"Stopped after step {run.step} of {run.config.steps}; --resume auto goes on from there.")
        else:
            print(found.table())
            print(f"\nReport: {write(run.folder, found)}")
    return 0


def _failed(reason: str) -> int:
    rank = os.environ.get("RANK", "0")  # each of them: a file may be missing on one host alone
    print(f"fastvlm-train{f', process {rank}' if rank != '0' else ''}: {reason}", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
