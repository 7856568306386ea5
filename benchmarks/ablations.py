"""What a choice of the trainer is worth, over seeds: `python -m benchmarks.ablations NAME`.

Each run is `python -m fastvlm_loss.trainer` in a process of its own; what was stopped is gone on with.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from . import store
from .machine import hardware, versions

__all__ = ["EXPERIMENTS", "Experiment", "block", "main", "markdown"]

ROOT = Path(__file__).parents[1]
RESULTS = store.RESULTS / "trainer"
R10 = "retrieval/r10"


@dataclass(frozen=True)
class Experiment:
    """Variants of a configuration that differ in the choice alone.

    Attributes:
        config: in configs/.
        variants: arguments by the name of the variant, the usual one first.
        figures: of the evaluation, by their titles in the table.
    """

    config: str
    variants: dict[str, Sequence[str]]
    figures: dict[str, str]
    question: str


FIGURES = {
    "R@10": R10, "R@1 image to text": "retrieval/i2t_r1", "matching, hard negatives": "itm/accuracy_hard",
    "masked word": "mlm/accuracy", "gain by the image": "mlm/gain",
}  # fmt: skip
EXPERIMENTS = {
    "real": Experiment(
        "tiny-real.yaml",
        {
            "ITC + ITM + MLM": (),
            "ITC alone": ("--weights", "{itc: 1.0}"),
        },
        {
            "R@1": "retrieval/r1", "R@10": R10, "R@1, CSLS": "csls/r1", "R@10, CSLS": "csls/r10",
            "R@1, CSLS, words": "evidence/r1", "R@10, CSLS, words": "evidence/r10",
            "R@1, matching": "rerank/r1", "R@10, matching": "rerank/r10",
        },
        "Real pairs: do matching and re-ranking help retrieval?",
    ),
    "shapes": Experiment(
        "tiny-shapes.yaml",
        {"all objectives": ()},
        {
            "R@1 image to text": "retrieval/i2t_r1", "re-ranked by matching": "rerank/i2t_r1",
            "matching, hard negatives": "itm/accuracy_hard", "masked word": "mlm/accuracy",
            "without the image": "mlm/accuracy_blind", "questions": "vqa/accuracy",
        },
        "Composed shapes: is each objective learned?",
    ),
    "negatives": Experiment(
        "tiny-shapes.yaml", {"hard": (), "random": ("--itm.random", "true")}, FIGURES,
        "Negatives for matching: drawn as ALBEF draws them, harder over the run, or uniformly?",
    ),
    "masking": Experiment(
        "tiny-shapes.yaml", {"objects": (), "baseline": ("--mlm.strategy", "baseline")}, FIGURES,
        "Masked words: object words, or 15 % at random?",
    ),
    "weighting": Experiment(
        "tiny-shapes.yaml",
        {"fixed": (), "curriculum": ("--weighting.kind", "curriculum"), "inverse": ("--weighting.kind", "inverse")},
        FIGURES, "Weights of the objectives: all 1, contrast first, or inverse to the loss?",
    ),
}  # fmt: skip


def figures(folder: Path) -> dict[str, float]:
    """Of the last evaluation in a run's log, and R@1 as the mean of both ways."""
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    found: dict[str, float] = [line["evaluation"] for line in lines if "evaluation" in line][-1]
    for way in [name for name in found if name.endswith("/i2t_r1")]:
        found[way.replace("i2t_r1", "r1")] = (found[way] + found[way.replace("i2t", "t2i")]) / 2
    seconds = sum(line["seconds"] for line in lines if "raw" in line)
    return {**found, "steps": sum("raw" in line for line in lines), "seconds": round(seconds, 1)}


def trained(name: str, variant: str, seed: int, more: Sequence[str], folder: Path) -> dict[str, float]:
    """Train one run, or take what an earlier call trained, for whatever experiment."""
    experiment = EXPERIMENTS[name]
    choices = " ".join([*experiment.variants[variant], *more])
    config = ROOT / "configs" / experiment.config
    now = f"{zlib.crc32(config.read_bytes()):08x}"  # what an earlier configuration trained is another run
    output = folder / "-".join(filter(None, (config.stem, now, store.slug(choices), str(seed))))
    command = [
        sys.executable, "-m", "fastvlm_loss.trainer", "--config", str(config),
        "--output", str(output), "--resume", "auto", "--seed", str(seed), "--tensorboard", "false",
        *experiment.variants[variant], *more,
    ]  # fmt: skip
    if not (output / "report.html").is_file():
        print(f"{name}: {variant}, seed {seed}", file=sys.stderr, flush=True)
        if subprocess.run(command, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}).returncode:
            raise RuntimeError(f"{name}: the run of {variant!r} with seed {seed} failed")
    return figures(output)


def markdown(result: dict[str, Any]) -> str:
    """The table of a result: mean and spread over the seeds, in per cent."""
    experiment = EXPERIMENTS[result["experiment"]]
    titles = [title for title, key in experiment.figures.items() if any(key in r for r in _runs(result))]
    head = ["", *titles]
    rows = [head, ["---", *["---:"] * (len(head) - 1)]]
    for variant, runs in result["runs"].items():
        rows.append([variant, *(_cell([run.get(experiment.figures[title]) for run in runs]) for title in titles)])
    first = _runs(result)[0]
    soft = ", ".join(f"{k} {result['versions'][k]}" for k in ("python", "fastvlm_loss", "torch", "commit"))
    hard, seconds = result["hardware"], [run["seconds"] for run in _runs(result)]
    took = " to ".join(dict.fromkeys(f"{f(seconds):.0f}" for f in (min, max)))
    command = " ".join(["python -m benchmarks.ablations", result["experiment"], *result["arguments"]])
    return "\n".join(
        [
            experiment.question, "", *("| " + " | ".join(row) + " |" for row in rows), "",
            f"In per cent, held-out pairs; {_over(len(next(iter(result['runs'].values()))))}; "
            f"`configs/{experiment.config}`, {first['steps']} steps, "
            f"{took} s of training each. `{command}`{', ' + result['beside'] if result.get('beside') else ''}. "
            f"{hard['cpu']}, {hard['cores']} cores, {hard['instruction_set']}; {soft}; {result['date']}.",
        ]
    )  # fmt: skip


def _runs(result: dict[str, Any]) -> list[dict[str, float]]:
    return [run for runs in result["runs"].values() for run in runs]


def _over(seeds: int) -> str:
    return f"mean ± standard deviation over {seeds} seeds" if seeds > 1 else "one seed"


def _cell(values: Sequence[float | None]) -> str:
    known = [value for value in values if value is not None]
    if not known:
        return "–"
    spread = f" ± {statistics.stdev(known):.1f}" if len(known) > 1 else ""
    return f"{statistics.mean(known):.1f}{spread}"


def block() -> str:
    """What stands in the README: the saved results of `real` and `shapes`."""
    paths = [RESULTS / f"{name}.json" for name in ("real", "shapes")]
    return "\n\n".join(markdown(store.load(path)) for path in paths if path.is_file())


def main(arguments: list[str] | None = None) -> int:
    """Run, print, and save with `--save`."""
    parser = argparse.ArgumentParser("python -m benchmarks.ablations", description=__doc__)
    parser.add_argument("name", choices=EXPERIMENTS)
    parser.add_argument("--seeds", type=int, default=3, help="runs of each variant (default: %(default)s)")
    parser.add_argument("--runs", type=Path, default=ROOT / "runs", help="folder of the runs (default: %(default)s)")
    parser.add_argument("--beside", default="", help="what else the machine did, to be said below the table")
    parser.add_argument("--save", action="store_true", help="write the result and its table beside the others")
    asked, more = parser.parse_known_args(arguments)
    result: dict[str, Any] = {
        "experiment": asked.name, "date": datetime.now(timezone.utc).date().isoformat(), "hardware": hardware("cpu"),
        "versions": versions(), "arguments": more, "beside": asked.beside,
        "runs": {
            variant: [trained(asked.name, variant, seed, more, asked.runs) for seed in range(asked.seeds)]
            for variant in EXPERIMENTS[asked.name].variants
        },
    }  # fmt: skip
    print(markdown(result))
    if asked.save:
        store.publish(result, RESULTS / f"{asked.name}.json", markdown(result))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
