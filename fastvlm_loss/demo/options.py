"""What a run is asked to do: one frozen value, read from the command line or from a checkpoint."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NoReturn

DEFAULT_STEPS = {"emoji": 300, "shapes": 150}
_FIXED = ("data", "steps", "batch_size", "loss", "lr", "seed", "size")  # what a checkpoint has settled


@dataclass(frozen=True)
class Config:
    """One training run; ``steps`` 0 stands for the data's own number (emoji 300, shapes 150, other 300)."""

    data: str = "emoji"
    steps: int = 0
    batch_size: int = 256
    loss: str = "fastvlm"
    lr: float = 1e-3
    seed: int = 0
    size: int = 48

    def with_data(self, data: str) -> Config:
        """The same run on the data that was really found, with the number of steps settled."""
        return replace(self, data=data, steps=self.steps or DEFAULT_STEPS.get(data, 300))


@dataclass(frozen=True)
class Options:
    """A run, and where and on what it runs."""

    config: Config
    output: Path
    resume: Path | None
    threads: int | None
    device: str


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}\n")


def parse(arguments: list[str] | None = None) -> Options:
    """Read and check the command line; a bad option ends the program with one line and status 2, before any work."""
    parser = _parser()
    given = parser.parse_args(arguments)
    chosen = {name: getattr(given, name) for name in _FIXED if getattr(given, name) is not None}
    resume = _checkpoint(parser, given.resume) if given.resume else None
    if resume:
        if chosen:
            flags = ", ".join("--" + name.replace("_", "-") for name in chosen)
            parser.error(f"{flags}: given with --resume, wanted none of them: the checkpoint has settled them")
        config = Config()
    else:
        config = Config(**chosen)
        if config.data not in DEFAULT_STEPS:
            if not Path(config.data).exists():
                parser.error(
                    f"--data: got {config.data}, which does not exist; wanted shapes, emoji, a folder, a .csv or a .tar"
                )
            config = replace(config, data=str(Path(config.data).resolve()))
    label = config.data if config.data in DEFAULT_STEPS else Path(config.data).stem
    output = given.output or (resume.parent if resume else Path("runs") / label)
    if any(part.is_file() for part in (output, *output.parents)):
        parser.error(f"--output: got {output}, where a file is in the way; wanted a folder")
    return Options(config, output, resume, given.threads, given.device)


def _checkpoint(parser: argparse.ArgumentParser, path: Path) -> Path:
    file = path / "checkpoint.pt" if path.is_dir() else path
    if not file.is_file():
        parser.error(
            f"--resume: got {path}, which is no checkpoint; wanted a checkpoint.pt or the folder that holds it"
        )
    return file


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="python -m fastvlm_loss.demo",
        description="Train a small image tower and a text tower with fastvlm_loss.clip_loss on the CPU (or a GPU), "
        "and show retrieval of pictures and captions never trained on. Writes report.html and checkpoint.pt.",
        epilog="Without options: 12,067 emoji pictures, 300 steps, about 3 minutes on two cores. "
        "Ctrl-C stops after the current step and keeps the checkpoint.",
    )
    add = parser.add_argument
    add(
        "--data",
        metavar="WHAT",
        help="emoji (default; fetched once with npm, test split is an unseen drawing style), shapes (embedded), "
        "a folder of pictures with .txt beside them, a .csv/.tsv table with image and caption columns, "
        "or a .tar of webdataset shards",
    )
    add("--steps", type=_whole(1), metavar="N", help="optimiser steps (default: emoji 300, shapes 150, your data 300)")
    add("--batch-size", type=_whole(2), metavar="N", help="pairs a step (default: 256)")
    add("--loss", choices=("fastvlm", "dense"), help="fastvlm (default), or the dense reference: same seed, same curve")
    add("--lr", type=_positive, metavar="RATE", help="peak learning rate of AdamW (default: 0.001)")
    add("--seed", type=_whole(0), metavar="N", help="of weights, order and words (default: 0)")
    add("--size", type=_size, metavar="PIXELS", help="picture side, a multiple of 16 up to 256 (default: 48)")
    add("--output", type=Path, metavar="DIR", help="folder for the report and the checkpoint (default: runs/DATA)")
    add("--resume", type=Path, metavar="PATH", help="continue a stopped run exactly, from its checkpoint or folder")
    add("--threads", type=_whole(1, 1024), metavar="N", help="CPU threads (default: torch's choice)")
    add(
        "--device",
        choices=("auto", "cpu", "cuda"),
        default="auto",
        help="auto (default) takes a GPU where there is one",
    )
    return parser


def _whole(least: int, most: int = 10**9) -> Callable[[str], int]:
    def read(text: str) -> int:
        if not text.strip().isdecimal() or not least <= int(text) <= most:
            raise argparse.ArgumentTypeError(f"got {text}, wanted a whole number from {least} to {most}")
        return int(text)

    return read


def _positive(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"got {text}, wanted a number above 0")
    return value


def _size(text: str) -> int:
    if not text.isdecimal() or int(text) % 16 or not 16 <= int(text) <= 256:
        raise argparse.ArgumentTypeError(f"got {text}, wanted a multiple of 16 from 16 to 256")
    return int(text)
