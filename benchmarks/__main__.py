"""`python -m benchmarks`: every registered loss against its baselines and the machine's limit, in one run."""

from __future__ import annotations

import argparse
import sys
from datetime import datetime, timezone
from pathlib import Path

import torch

from fastvlm_loss.losses import registry

from . import readme, store
from .baselines import OURS
from .machine import available_memory, hardware, versions
from .parts import PARTS, Run, run_loss
from .report import markdown
from .suite import SUITES
from .targets import targets


def main(arguments: list[str] | None = None) -> int:
    """Run the command; 1 if our own loss was refused by the gate, or the README is not up to date (`--check`)."""
    asked = _parser().parse_args(arguments)
    if asked.command == "run":
        return _run(asked)
    try:
        up_to_date = readme.update(check=asked.check)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 1
    return int(asked.check and not up_to_date)


def _run(asked: argparse.Namespace) -> int:
    torch.set_num_threads(asked.threads)
    suite = SUITES[asked.suite].quick() if asked.quick else SUITES[asked.suite]
    parts = tuple(asked.only or PARTS)
    limit = _limit(asked.memory_limit) if torch.device(suite.device).type == "cpu" else None
    run = Run(suite, asked.repeats, asked.threads, limit, lambda line: print(line, file=sys.stderr, flush=True))
    result = {
        "name": asked.suite,
        "date": datetime.now(timezone.utc).date().isoformat(),
        "hardware": hardware(suite.device),
        "versions": versions(),
        "settings": {"repeats": asked.repeats, "threads": asked.threads, "quick": asked.quick, "memory_limit": limit},
        "losses": {name: run_loss(run, registry[name], parts) for name in asked.losses or registry},
    }
    print(markdown(result))
    for name, loss in result["losses"].items():
        print(f"\nTargets of {name}:", *targets(loss), sep="\n")
    _write(result, asked, complete=not (asked.quick or asked.only or asked.losses))
    refused = [who for loss in result["losses"].values() for who in loss["refused"] if who.startswith(OURS)]
    return 1 if refused else 0


def _write(result: dict[str, object], asked: argparse.Namespace, complete: bool) -> None:
    if asked.output is None and not complete:
        print("\nNothing saved: not a complete run (--output DIR saves it).")
        return
    folder = asked.output or store.RESULTS
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{result['name']}.json"
    store.save(result, path)
    store.render(path)
    print(f"\nSaved {path} with its table and plots.")


def _limit(gigabytes: float) -> int:
    free = available_memory()
    return int(min(gigabytes * 1e9, 0.75 * free if free else gigabytes * 1e9))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("python -m benchmarks", description=__doc__)
    parser.add_argument(
        "command", nargs="?", choices=("run", "readme"), default="run",
        help="run: measure, print the table, save JSON, Markdown and SVG (default); "
        "readme: redraw all saved results and the README's block from the saved JSON",
    )  # fmt: skip
    parser.add_argument("--suite", choices=tuple(SUITES), default="cpu", help="sizes and device (default: %(default)s)")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, a check that everything runs")
    parser.add_argument("--only", nargs="+", choices=tuple(PARTS), metavar="PART", help=f"parts: {', '.join(PARTS)}")
    parser.add_argument("--losses", nargs="+", choices=tuple(registry), metavar="LOSS", help=f"{', '.join(registry)}")
    parser.add_argument("--repeats", type=_positive, default=5, help="interleaved calls a row (default: %(default)s)")
    parser.add_argument("--threads", type=_positive, default=torch.get_num_threads(), help="default: %(default)s")
    parser.add_argument(
        "--memory-limit", type=float, default=16.0, metavar="GB",
        help="what a process may hold in the growth of memory; at most 75%% of what is free (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--output", type=Path, metavar="DIR",
        help="where to save (default: benchmarks/results for a complete run, else nowhere)",
    )  # fmt: skip
    parser.add_argument("--check", action="store_true", help="readme: change nothing, exit 1 if it is not up to date")
    return parser


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"got {value}, wanted 1 or more")
    return value


if __name__ == "__main__":
    raise SystemExit(main())
