"""What freezing, checkpointing and bf16 save, measured: `python -m fastvlm_loss.trainer.measure`.

Every row of the table is a training step in a fresh process, with the same seed, batch and text length: 3 steps to warm
up, one that counts what autograd keeps, then the measured ones, the update included; and again in another process for
the time, because the allocator that makes a peak a peak takes some.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import platform
import subprocess
import sys
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from ..demo.cost import ALLOCATOR
from ..engine.dispatch import report
from .cli import parse
from .config import Config
from .measure_row import difference, memory, timing
from .measure_table import markdown, picture
from .measure_trial import ROWS
from .stages import stages_of

__all__ = ["AGREE", "main", "measure"]

# ViT-Ti/16 at 224 pixels, 6 + 6 layers of BERT: a batch of 16 has about the share of activations that ALBEF's has
STANDARD = """
--batch_size 16 --weights {itc:\t1,itm:\t1,mlm:\t1} --data.size 224 --data.augment false --data.full_length true
--data.context_length 24 --data.sources [{path:\tshapes,samples:\t64}] --model.image.source timm
--model.image.name vit_tiny_patch16_224 --model.image.size 224 --model.text.width 192 --model.text.layers 6
--model.text.heads 3 --model.text.inner 768 --model.text.dropout 0.1 --model.fusion.layers 6 --model.fusion.dropout 0.1
--optimizer.lr 1e-4
"""
AGREE = 1e-6  # relative difference that the gradients may have with checkpointing
MEMORY, TIME, GRADIENTS = "memory: ", "time: ", "gradients"
PACKAGES = ("fastvlm_loss", "torch", "timm", "transformers", "open_clip_torch")


def measure(arguments: list[str], steps: int) -> dict[str, Any]:
    """All rows, and the comparison of the gradients; `arguments` are the trainer's."""
    config = parse(arguments).config
    rows = [_row(arguments, steps, row.name) for row in ROWS]
    return {
        "date": datetime.now(timezone.utc).date().isoformat(),
        "hardware": _hardware(config),
        "versions": {"python": platform.python_version(), **{name: _version(name) for name in PACKAGES}},
        "load": round(os.getloadavg()[0], 1) if hasattr(os, "getloadavg") else None,
        "settings": {"steps": steps, **_settings(config)},
        "gradients": _apart(arguments, steps, GRADIENTS),
        "rows": rows,
    }


def main(arguments: list[str] | None = None) -> int:
    """Measure, print the table, and with `--output` write JSON, table and picture; 1 where something went wrong."""
    parser = argparse.ArgumentParser(
        "python -m fastvlm_loss.trainer.measure", description=__doc__,
        epilog="All other arguments are the trainer's: --config FILE, --batch_size 32, --model.image.size 336, ...",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--steps", type=int, default=10, help="measured steps of a row (default: %(default)s)")
    parser.add_argument("--output", type=Path, metavar="DIR", help="folder for JSON, table and picture")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    asked, others = parser.parse_known_args(arguments)
    if asked.steps < 1:
        parser.error(f"--steps: got {asked.steps}, wanted at least 1")
    given = others if any(a.startswith("--config") for a in others) else [*standard(), *others]
    if asked.child:
        return _child(parse(given).config, asked.steps, asked.child)
    try:
        result = measure(given, asked.steps)
    except RuntimeError as error:
        print(f"measure: {error}", file=sys.stderr)
        return 1
    table = markdown(result)
    print(table)
    if asked.output:
        asked.output.mkdir(parents=True, exist_ok=True)
        path = asked.output / _name(result["hardware"])
        path.with_suffix(".json").write_text(json.dumps(result, indent=1) + "\n")
        path.with_suffix(".md").write_text(table + "\n")
        path.with_suffix(".png").write_bytes(picture(result))
    apart = result["gradients"]["relative"]
    if not apart <= AGREE:
        print(f"measure: gradients with checkpointing differ by {apart:.2g}, wanted {AGREE:g}", file=sys.stderr)
        return 1
    return 0


def standard() -> list[str]:
    """The trainer's arguments where no configuration is given."""
    return [word.replace("\t", " ") for word in STANDARD.replace("\n", " ").split(" ") if word]


def _row(arguments: list[str], steps: int, name: str) -> dict[str, Any]:
    found = _apart(arguments, steps, f"{MEMORY}{name}")
    return found if "why" in found else found | _apart(arguments, steps, f"{TIME}{name}")


def _apart(arguments: list[str], steps: int, what: str) -> dict[str, Any]:
    """Memory or time of a row, or the gradients, from a process of its own; that of memory with its allocator."""
    command = [sys.executable, "-m", __spec__.name, *arguments, "--steps", str(steps), "--child", what]
    print(f"{what} ...", file=sys.stderr, flush=True)
    environment = {**os.environ, **(ALLOCATOR if what.startswith(MEMORY) else {})}
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, env=environment)
    if done.returncode:
        raise RuntimeError(f"{what}: the process ended with status {done.returncode}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def _child(config: Config, steps: int, what: str) -> int:
    if config.threads:
        torch.set_num_threads(config.threads)
    try:
        if what == GRADIENTS:
            print(json.dumps(difference(config)))
        else:
            row = next(row for row in ROWS if what.endswith(f": {row.name}"))
            print(json.dumps((memory if what.startswith(MEMORY) else timing)(row, config, steps)))
    except ValueError as error:
        print(f"measure: {error}", file=sys.stderr)
        return 1
    return 0


def _settings(config: Config) -> dict[str, Any]:
    last = stages_of(config)[-1]
    return {
        "batch_size": config.batch_size, "seed": config.seed, "tasks": last.tasks,
        "context_length": config.data.context_length, "model": dataclasses.asdict(config.model),
    }  # fmt: skip


def _hardware(config: Config) -> dict[str, Any]:
    found = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    names = [line.partition(":")[2].strip() for line in found.splitlines() if line.startswith("model name")]
    with_gpu = torch.cuda.is_available() and config.device != "cpu"
    return {
        "cpu": names[0] if names else platform.processor(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "torch_cpu": torch.backends.cpu.get_cpu_capability(),
        "threads": config.threads or torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if with_gpu else None,
        "backends": report(),
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _name(hardware: dict[str, Any]) -> str:
    """Of the files: the GPU's name, or the processor's instructions."""
    return "-".join((hardware["gpu"] or f"cpu {hardware['torch_cpu']}").lower().split())


if __name__ == "__main__":
    sys.exit(main())
