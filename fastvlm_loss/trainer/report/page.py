"""The page of a run as one HTML text that needs nothing beside it."""

from __future__ import annotations

import html
import json
import platform
import statistics
from collections.abc import Iterator, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from ...demo.evaluation import KS
from ..evaluation import Evaluation
from ..evaluation.titles import other_lines, recall_lines
from . import examples
from .curves import bands, course, judged, losses
from .examples import inline, table
from .sheets import sheet

__all__ = ["page"]

_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{title}</title>
<style>
body {{ font: 16px/1.5 system-ui, sans-serif; color: #24292f; max-width: 1100px; margin: 2em auto; padding: 0 1em }}
h2 {{ margin: 2em 0 .4em }} p, li {{ color: #57606a }}
img.wide {{ width: 100%; border: 1px solid #eaeef2; border-radius: 6px }} .sheets {{ display: flex; gap: 1em }}
.sheets figure {{ flex: 1; margin: 0 }} figcaption {{ font-weight: 600 }}
table {{ border-collapse: collapse; margin-bottom: 1em }}
td, th {{ padding: .3em 1.2em .3em 0; text-align: right; border-bottom: 1px solid #eaeef2 }}
td:first-child, th:first-child, .small td, .small th {{ text-align: left }}
.small {{ font-size: 13px }} .small td {{ vertical-align: top }} .right {{ color: #1a7f37 }} .wrong {{ color: #cf222e }}
pre {{ font-size: 12px; background: #f6f8fa; padding: 1em; overflow-x: auto }} .faint {{ color: #8c959f }}
</style></head><body>
<h1>{title}</h1>
{body}
</body></html>
"""
_PACKAGES = ("torch", "triton", "transformers", "timm", "open_clip_torch", "safetensors", "numpy")


def page(name: str, lines: Sequence[Mapping[str, Any]], meta: Mapping[str, Any], evaluation: Evaluation | None) -> str:
    """The HTML text.

    Args:
        name: of the run.
        lines: of its log.
        meta: of its newest checkpoint; empty if there is none.
        evaluation: None shows what the log says of the last one.
    """
    steps = [line for line in lines if "raw" in line]
    evaluations = [line for line in lines if "evaluation" in line]
    figures = evaluation.figures if evaluation is not None else evaluations[-1]["evaluation"] if evaluations else {}
    parts = [
        f"<p>{html.escape(_summary(steps, meta))}</p>", *_figures(figures, evaluation),
        *_training(steps, evaluations), *(_shown(evaluation) if evaluation is not None else ()), *_origin(meta),
    ]  # fmt: skip
    return _PAGE.format(title=html.escape(f"Training run {name}"), body="\n".join(parts))


def _summary(steps: Sequence[Mapping[str, Any]], meta: Mapping[str, Any]) -> str:
    if not steps:
        return "No step is in the log."
    seconds = statistics.median(line["seconds"] for line in steps)
    found = f"{len(steps):,} steps, {1e3 * seconds:,.0f} ms a step (median)"
    if meta:
        batch = meta["config"]["batch_size"]
        found += f", {batch:,} pairs a step: {batch / max(seconds, 1e-9):,.0f} pairs/s"
    skipped = sum(bool(line["skipped"]) for line in steps)
    found += f"; {skipped:,} skipped because a loss was not finite" if skipped else ""
    stages = "; ".join(f"{name}: steps {first:,} to {last:,}" for name, first, last in bands(steps))
    return f"{found}. Stages: {stages}."


def _figures(figures: Mapping[str, float], evaluation: Evaluation | None) -> Iterator[str]:
    if not figures:
        return
    count = f" ({len(evaluation.samples):,} pairs)" if evaluation is not None else ""
    yield f"<h2>On pairs never trained on{count}</h2>"
    recalls = recall_lines(figures)
    if recalls:
        head = ["recall at k (%)", *(f"R@{k}" for k in KS)]
        yield table(head, [[html.escape(title), *(f"{v:.1f}" for v in values)] for title, values in recalls])
        yield "<p>How often a right answer is among the best k. Equal captions are equally right.</p>"
    others = other_lines(figures)
    if others:
        rows = [[html.escape(title), f"{value:.1f}", html.escape(beside)] for title, value, beside in others]
        yield table(["", "%", "beside it"], rows)


def _training(steps: Sequence[Mapping[str, Any]], evaluations: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    pictures = (
        ("curves of the losses", losses(steps), "Raw losses, in grey as they came and smoothed; dashed times weight."),
        ("curves of the training", course(steps), ""),
        ("figures over the steps", judged(steps, evaluations), ""),
    )
    if steps:
        yield "<h2>Training</h2>"
    for title, png, note in pictures:
        if png is not None:
            yield f'<img class="wide" alt="{title}" src="{inline(png)}">'
            yield f"<p>{note}</p>" if note else ""


def _shown(evaluation: Evaluation) -> Iterator[str]:
    if evaluation.rankings:
        yield "<h2>What it finds</h2>"
        yield "<p>Queries at even steps from the easiest to the hardest, not chosen by hand; right ones in green.</p>"
        yield '<div class="sheets">'
        for way, title in (("t2i", "Texts ask for pictures"), ("i2t", "Pictures ask for texts")):
            png = inline(sheet(evaluation, way))
            yield f'<figure><figcaption>{title}</figcaption><img class="wide" alt="{title}" src="{png}"></figure>'
        yield "</div>"
    sections = (
        (
            "Negatives", examples.negatives(evaluation),
            "Texts drawn for a picture out of a batch: hardness 0 is a uniform draw, 1 ALBEF's, ∞ takes the nearest.",
        ),
        (
            "Where a hidden word looks", examples.looks(evaluation),
            "Cross-attention of the hidden word to the parts of the picture, mean over heads and layers.",
        ),
        ("Captions", examples.captions(evaluation), ""),
        ("Questions", examples.answers(evaluation), ""),
    )  # fmt: skip
    for title, found, note in sections:
        if found:
            yield f"<h2>{title}</h2>"
            yield f"<p>{note}</p>" if note else ""
            yield found


def _origin(meta: Mapping[str, Any]) -> Iterator[str]:
    if meta:
        yield "<h2>Configuration</h2>"
        yield f"<pre>{html.escape(json.dumps(meta['config'], indent=2))}</pre>"
    trained = ", ".join(f"{name} {found}" for name, found in meta.get("versions", {}).items())
    here = ", ".join([*_installed(), f"{platform.system()} {platform.machine()}"])
    yield f'<p class="faint">{html.escape(f"Trained with {trained}. " if trained else "")}'
    yield f"{html.escape(f'This page: Python {platform.python_version()}, {here}.')}</p>"


def _installed() -> Iterator[str]:
    for name in _PACKAGES:
        try:
            yield f"{name} {version(name)}"
        except PackageNotFoundError:
            continue
