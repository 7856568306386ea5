"""The report of a run: one HTML file in its folder, from its log and an evaluation."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..evaluation import Evaluation
from ..progress import read

__all__ = ["write"]


def write(folder: str | Path, evaluation: Evaluation | None = None) -> Path:
    """Write `report.html` into the folder of a run, whole or not at all, and return its path.

    Args:
        folder: with the run's `log.jsonl`, and checkpoints if there are any.
        evaluation: with its examples; without it the page has curves, and the figures that the log remembers.

    Raises:
        ValueError: there is no log, and nothing else to show.
    """
    from .page import page

    folder = Path(folder)
    lines = read(folder)
    if not lines and evaluation is None:
        raise ValueError(f"folder: got {folder}, which has no log of a run (log.jsonl), wanted the output of a run")
    final = folder / "report.html"
    part = final.with_name(f"{final.name}.tmp-{os.getpid()}")
    part.write_text(page(folder.resolve().name, lines, newest_meta(folder), evaluation), encoding="utf-8")
    part.replace(final)
    return final


def newest_meta(folder: Path) -> Mapping[str, Any]:
    """What the newest checkpoint says of itself; empty where there is none, or none that can be read."""
    for path in sorted(folder.glob("step_*/meta.json"), reverse=True):
        try:
            found: Mapping[str, Any] = json.loads(path.read_text())
        except (OSError, ValueError):
            continue
        if "config" in found:
            return found
    return {}
