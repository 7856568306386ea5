"""What our losses change in other packages: `python -m benchmarks.dropin`.

Of each: a short run of the package's own training loop, with and without ours, and memory and time of the loss alone at
a large batch.
"""

from __future__ import annotations

import argparse
import importlib
import os
import tempfile
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from typing import Any

from .. import store
from ..machine import hardware, versions
from ..tables import amount, duration, table
from .layers import LAYERS, ROUNDS, D, N, peak, times

__all__ = ["CASES", "block", "main", "markdown"]

RESULTS = store.RESULTS / "dropin"
# module here -> package, its training loop, and what to write
CASES = {
    "open_clip": ("open_clip_torch", "`open_clip_train.main`", "`patch_open_clip()`"),
    "transformers": ("transformers", "`Trainer`", "`patch_transformers(model)`"),
    "sentence_transformers": (
        "sentence-transformers", "`SentenceTransformerTrainer`",
        "import it from `fastvlm_loss.integrations.sentence_transformers`",
    ),
    "metric_learning": (
        "pytorch-metric-learning", "`trainers.MetricLossOnly`",
        "import it from `fastvlm_loss.integrations.metric_learning`",
    ),
    "lightly": ("lightly", "its tutorials' loop", "import it from `fastvlm_loss.integrations.lightly`"),
}  # fmt: skip


def measure(module: str, kind: str) -> dict[str, Any]:
    """The measurements of one loss of one package."""
    run = importlib.import_module(f"{__package__}.{module}").curve
    with tempfile.TemporaryDirectory() as folder:
        curves = [run(kind, ours, Path(folder)) for ours in (False, True)]
    memory: list[int | str] = []
    for ours in (False, True):
        try:
            memory.append(peak(module, kind, ours))
        except RuntimeError as error:
            memory.append(str(error))
    seconds = times(module, kind) if all(isinstance(m, int) for m in memory) else None
    package = CASES[module][0]
    return {
        "module": module, "kind": kind, "package": package, "version": version(package), "curves": curves,
        "memory": memory, "seconds": seconds,
    }  # fmt: skip


def difference(curves: list[list[float]]) -> float:
    """The largest difference between the losses of a step, relative to the loss."""
    return max(abs(a - b) / abs(a) for a, b in zip(*curves, strict=True))


def markdown(result: dict[str, Any]) -> str:
    """The table of a result."""
    lines = []
    for row in result["rows"]:
        _, loop, write = CASES[row["module"]]
        before, after = (amount(m) if isinstance(m, int) else _died(m) for m in row["memory"])
        steps = f"{difference(row['curves']):.0e}, {len(row['curves'][0])} steps of {loop}"
        took = " → ".join(map(duration, row["seconds"])) if row["seconds"] else ""
        lines.append([f"{row['package']}, `{row['kind']}`", write, row["version"], steps, f"{before} → {after}", took])
    hard, soft = result["hardware"], {k: v for k, v in result["versions"].items() if v}
    head = [
        "package",
        "what to write",
        "verified with",
        "largest difference of a loss, relative",
        "memory of the loss",
        "time of the loss",
    ]
    return (
        f"{table(head, lines)}\n\n"
        f"Losses of every step of the package's own training loop with and without ours, the same seeds. Memory of "
        f"forward + backward beyond features and their gradients, N = {N}, D = {D}, fp32; its time is the "
        f"median of {ROUNDS} interleaved calls. "
        f"`python -m benchmarks.dropin`. "
        f"{hard['cpu']}, {hard['cores']} cores, {hard['instruction_set'] or 'no C++ backend'}; "
        f"{', '.join(f'{k} {v}' for k, v in soft.items())}; {result['date']}."
    )


def _died(said: str) -> str:
    tried = said.rpartition("tried to allocate ")[2].partition(" bytes")[0]
    return f"dies asking for {amount(int(tried))}" if tried.isdigit() else "dies"


def block() -> str:
    """What stands in the README: every saved result."""
    return "\n\n".join(markdown(store.load(path)) for path in sorted(RESULTS.glob("*.json")))


def main(arguments: list[str] | None = None) -> int:
    """Run, print, and save with `--save`."""
    parser = argparse.ArgumentParser("python -m benchmarks.dropin", description=__doc__)
    parser.add_argument("--only", choices=CASES, help="one package")
    parser.add_argument("--save", metavar="NAME", help="save the result and its table under this name")
    asked = parser.parse_args(arguments)
    os.environ["HF_HUB_OFFLINE"] = "1"  # nothing is downloaded
    result: dict[str, Any] = {
        "date": datetime.now(timezone.utc).date().isoformat(), "hardware": hardware("cpu"), "versions": versions(),
        "rows": [measure(*layer) for layer in LAYERS if asked.only in (None, layer[0])],
    }  # fmt: skip
    print(markdown(result))
    if asked.save:
        store.publish(result, RESULTS / f"{asked.save}.json", markdown(result))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
