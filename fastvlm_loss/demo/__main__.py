"""Train, test and report: ``python -m fastvlm_loss.demo``."""

from __future__ import annotations

import math
import sys
import time
from importlib.util import find_spec
from pathlib import Path

import torch

from ..data import Splits, load
from . import cost, figures, report
from .evaluation import encode, retrieval, table
from .options import Options, parse
from .signals import stop_signal
from .training import CheckpointError, Run

SAVE_EVERY = 50  # steps
_NEEDED = {"open_clip": "open_clip_torch", "matplotlib": "matplotlib", "PIL": "pillow", "tqdm": "tqdm"}


def main(arguments: list[str] | None = None) -> int:
    """Run the demo.

    Exit status: 0; 1 for data, a checkpoint or packages that cannot be used; 2 for bad options; 130 after Ctrl-C.
    """
    options = parse(arguments)
    missing = " ".join(package for module, package in _NEEDED.items() if find_spec(module) is None)
    if missing:
        return _failed(f"packages are missing: pip install {missing}")
    if options.threads:
        torch.set_num_threads(options.threads)
    try:
        return _demo(options)
    except (CheckpointError, ValueError) as error:
        return _failed(str(error))
    except KeyboardInterrupt:
        saved = options.output / "checkpoint.pt"
        print(f"\nStopped. {_resume(saved) if saved.is_file() else 'Nothing was trained yet.'}", file=sys.stderr)
        return 130


def _demo(options: Options) -> int:
    device = torch.device("cuda" if options.device != "cpu" and torch.cuda.is_available() else "cpu")
    if options.device == "cuda" and device.type == "cpu":
        raise ValueError("--device: got cuda, wanted cpu: torch sees no GPU here")
    run = Run.load(options.resume, device) if options.resume else None
    config = run.config if run else options.config
    splits = load(config.data, config.size, config.seed)
    print(splits.note)
    if run is None:
        config = config.with_data("shapes" if splits.train.name.startswith("shapes") else config.data)
        _check(config.batch_size, splits)
        run = Run.begin(config, splits.train, device)
    try:
        options.output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"--output: got {options.output}, wanted a folder to write to ({error.strerror})") from error
    checkpoint = options.output / "checkpoint.pt"
    seconds, stopped = train(run, splits, checkpoint)
    if stopped:
        print(f"Stopped after step {run.step} of {config.steps}. {_resume(checkpoint)}")
        return 130
    _show(run, splits, options.output, seconds)
    return 0


def _show(run: Run, splits: Splits, output: Path, seconds: float) -> None:
    """Test the towers, measure the loss, print both and write the report."""
    config, test = run.config, splits.test
    images, texts = encode(run.model, run.tokenizer, test, run.device)
    recall = retrieval(images, texts, test.ids)
    print(f"\n{table(recall)}\n\nMeasuring the loss against dense ...", flush=True)
    measured = cost.measure(run.device)
    for loss in cost.LOSSES:
        taken, megabytes = measured.seconds[loss][-1], measured.megabytes[loss][-1]
        print(f"{loss:<10}batch {measured.sizes[-1]:,}: {taken:.3f} s, {megabytes:,.0f} MB beyond inputs")
    summary = (
        f"{test.name.removesuffix(' test')}: {len(splits.train):,} training pairs, {config.steps} steps of "
        f"{config.batch_size}, {config.size} pixels, loss {config.loss}, seed {config.seed}, {seconds:.0f} s"
    )
    sheet = figures.sheet(test, images, texts)
    page = report.draw(summary, config.data, run.curves, recall, measured, sheet, cost.DIM).write(output)
    print(f"\nReport: {page}")


def _failed(reason: str) -> int:
    print(f"python -m fastvlm_loss.demo: {reason}", file=sys.stderr)
    return 1


def _resume(checkpoint: Path) -> str:
    return f"The checkpoint is kept; continue with\n    python -m fastvlm_loss.demo --resume {checkpoint}"


def train(run: Run, splits: Splits, checkpoint: Path) -> tuple[float, bool]:
    """Train to the end with a progress bar, saving as it goes: (seconds, whether a signal stopped it)."""
    from tqdm import tqdm  # type: ignore[import-untyped, unused-ignore]

    config = run.config
    start = time.perf_counter()
    often = 0.1 if sys.stderr.isatty() else 10  # seconds between two pictures of the bar
    with (
        stop_signal() as stopped,
        tqdm(total=config.steps, initial=run.step, unit="step", desc="training", mininterval=often) as bar,
    ):
        before = time.perf_counter()
        for batch in run.advance(splits.train, config.steps, stopped):
            now = time.perf_counter()
            last = {name: values[-1] for name, values in run.curves.items()}
            if not math.isfinite(last["loss"]):
                raise ValueError(f"the loss is {last['loss']} at step {run.step}; --lr: got {config.lr}, wanted less")
            bar.set_postfix_str(
                f"loss {last['loss']:.3f}, scale {last['scale']:.1f}, accuracy {last['accuracy']:.0%}, "
                f"{len(batch.ids) / (now - before):,.0f} pairs/s",
                refresh=False,
            )
            bar.update()
            before = now
            if run.step % SAVE_EVERY == 0:
                run.save(checkpoint)
        run.save(checkpoint)
    return time.perf_counter() - start, run.step < config.steps


def _check(batch_size: int, splits: Splits) -> None:
    if batch_size > len(splits.train):
        raise ValueError(f"--batch-size: got {batch_size}, wanted at most {len(splits.train)}, the training pairs here")
    if not len(splits.test):
        raise ValueError(f"--data: got {len(splits.train)} pairs of which none fell to the test split, wanted more")


if __name__ == "__main__":
    sys.exit(main())
