"""`python -m benchmarks`: every registered loss against its baselines and the machine's limit, in one run."""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

from fastvlm_loss.losses import registry

from . import readme, store
from .baselines import OURS
from .machine import available_memory, hardware, versions
from .measure import too_slow
from .parts import PARTS, Run, run_loss
from .report import markdown
from .suite import SUITES
from .sweep import sweep
from .targets import targets


def main(arguments: list[str] | None = None) -> int:
    """Run the command; 1 if our own loss was refused by the gate, or the README is not up to date (`--check`)."""
    asked = _parser().parse_args(arguments)
    if (asked.command == "show") != (asked.file is not None):
        print(f"{asked.command}: got file {asked.file}, wanted one for show and for nothing else", file=sys.stderr)
        return 2
    if asked.command == "run":
        return _run(asked)
    if asked.command == "show":
        _show(store.load(asked.file))
        return 0
    try:
        up_to_date = readme.update(check=asked.check)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 1
    return int(asked.check and not up_to_date)


def _run(asked: argparse.Namespace) -> int:
    suite = SUITES[asked.suite].quick() if asked.quick else SUITES[asked.suite]
    suite = replace(suite, device=asked.device or suite.device)
    if torch.device(suite.device).type == "cuda" and not torch.cuda.is_available():
        print(f"--suite {asked.suite}: no CUDA device here", file=sys.stderr)
        return 2
    torch.set_num_threads(asked.threads)
    slow = {} if asked.quick or suite.cells else too_slow(suite.dtypes)
    suite = replace(suite, dtypes=tuple(dtype for dtype in suite.dtypes if dtype not in slow))
    limit = _limit(asked.memory_limit) if torch.device(suite.device).type == "cpu" else None
    repeats = asked.repeats or suite.repeats
    run = Run(suite, repeats, asked.threads, limit, lambda line: print(line, file=sys.stderr, flush=True))
    settings = {"repeats": repeats, "threads": asked.threads, "quick": asked.quick, "memory_limit": limit}
    if slow:
        settings["slow"] = {str(dtype).removeprefix("torch."): why for dtype, why in slow.items()}
    machine = hardware(suite.device)
    result: dict[str, Any] = {
        "name": store.slug(machine["gpu"]) if "gpu" in machine else asked.suite,
        "date": datetime.now(timezone.utc).date().isoformat(),
        "hardware": machine,
        "versions": versions(suite.peers),
        "settings": settings,
    }
    specs = {name: registry[name] for name in asked.losses or registry}
    path = _path(result["name"], asked)
    if suite.cells:
        settings |= {"budget": asked.budget, "headline": suite.headline}

        def save(losses: dict[str, Any]) -> None:
            if path is not None:
                store.save({**result, "losses": losses}, path)

        result["losses"] = sweep(run, specs, asked.budget, save)
    else:
        parts = {name: tuple(asked.only or suite.plan(spec).parts) for name, spec in specs.items()}
        result["losses"] = {name: run_loss(run, spec, parts[name]) for name, spec in specs.items()}
    _show(result)
    if path is None:
        print("\nNothing saved: not a complete run (--output DIR saves it).")
    else:
        store.save(result, path)
        store.render(path)
        print(f"\nSaved {path} with its table and plots.")
    refused = [who for loss in result["losses"].values() for who in loss["refused"] if who.startswith(OURS)]
    return 1 if refused else 0


def _show(result: dict[str, Any]) -> None:
    print(markdown(result))
    for name in result["losses"]:
        print(f"\nTargets of {name}:", *targets(result, name), sep="\n")


def _path(name: str, asked: argparse.Namespace) -> Path | None:
    """Where to save; an incomplete run is saved only where one asked for it."""
    if asked.output is None and (asked.quick or asked.only or asked.losses):
        return None
    folder: Path = asked.output or store.RESULTS
    folder.mkdir(parents=True, exist_ok=True)
    return folder / f"{name}.json"


def _limit(gigabytes: float) -> int:
    free = available_memory()
    return int(min(gigabytes * 1e9, 0.75 * free if free else gigabytes * 1e9))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("python -m benchmarks", description=__doc__)
    parser.add_argument(
        "command", nargs="?", choices=("run", "show", "readme"), default="run",
        help="run: measure, print the table, save JSON, Markdown and SVG (default); show: print a saved result; "
        "readme: redraw all saved results and the README's block from the saved JSON",
    )  # fmt: skip
    parser.add_argument("file", nargs="?", type=Path, help="show: the JSON of a result")
    parser.add_argument("--suite", choices=tuple(SUITES), default="cpu", help="sizes and device (default: %(default)s)")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, a check that everything runs")
    parser.add_argument("--only", nargs="+", choices=tuple(PARTS), metavar="PART", help=f"parts: {', '.join(PARTS)}")
    parser.add_argument("--losses", nargs="+", choices=tuple(registry), metavar="LOSS", help=f"{', '.join(registry)}")
    parser.add_argument(
        "--repeats", type=_positive,
        help="interleaved calls a row (default: 5 on a CPU, there at most 3 for most losses; 11 on a GPU)",
    )  # fmt: skip
    parser.add_argument("--device", help="where to run (default: the suite's)")
    parser.add_argument(
        "--budget", type=float, default=300.0, metavar="SECONDS",
        help="of a suite that takes its sizes in order of importance, gpu; the rest is named (default: %(default)s)",
    )  # fmt: skip
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
