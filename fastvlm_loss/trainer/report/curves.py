"""Curves over the steps, with the stages behind them, as PNG bytes."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np

from ...demo.figures import DENSE, OURS, RIGHT, _canvas, _png, _title, smoothed
from ..config import TASKS
from ..evaluation.titles import OVER_STEPS

__all__ = ["bands", "course", "judged", "losses"]

COLOURS = {
    "itc": OURS, "itm": "#d97706", "mlm": RIGHT, "caption": "#a626a4", "vqa": "#cf222e", "multiscale": "#0e7490",
    "late_interaction": "#6b7280",
}  # fmt: skip
NAMES = {
    "itc": "contrast", "itm": "matching", "mlm": "masked words", "caption": "captions", "vqa": "questions",
    "multiscale": "multi-scale matching", "late_interaction": "late interaction",
}  # fmt: skip
_SHARES = {"accuracy": "contrast, image to text", "matching": "matching"}
_BANDS = ("#f6f8fa", "#e6edf5")
_COLUMNS = 3
_GREY = "#57606a"

Line = Mapping[str, Any]
Draw = Callable[[Any], None]


def losses(lines: Sequence[Line]) -> bytes | None:
    """Every objective over the steps, raw and, where its weight is not 1, weighted; None without a step."""
    tasks = [task for task in TASKS if any(task in line["raw"] for line in lines)]
    return _panels(lines, [(NAMES[task], partial(_loss, lines=lines, task=task)) for task in tasks])


def course(lines: Sequence[Line]) -> bytes | None:
    """Learning rate, logit scale, weights of the objectives, what the batches say, norm of the gradient."""
    draws: list[tuple[str, Draw]] = []
    for name, title in (("learning_rate", "learning rate"), ("logit_scale", "logit scale")):
        if any(name in line["metrics"] for line in lines):
            draws.append((title, partial(_plain, lines=lines, name=name)))
    if lines:
        draws.append(("weights of the objectives", partial(_weights, lines=lines)))
    if any(name in line["metrics"] for name in _SHARES for line in lines):
        draws.append(("accuracy in the batch", partial(_shares, lines=lines)))
    for name, title in (
        ("negative_score", "mean score of picked negatives"),
        ("gradient_norm", "norm of the gradient"),
    ):
        if any(name in line["metrics"] for line in lines):
            draws.append((title, partial(_plain, lines=lines, name=name, noisy=True)))
    return _panels(lines, draws)


def judged(lines: Sequence[Line], evaluations: Sequence[Line]) -> bytes | None:
    """The main figures of the evaluations over the steps; None where there are less than two."""
    names = [name for name in OVER_STEPS if any(name in line["evaluation"] for line in evaluations)]
    if len(evaluations) < 2 or not names:
        return None

    def draw(axis: Any) -> None:
        for name in names:
            found = [(line["step"], line["evaluation"][name]) for line in evaluations if name in line["evaluation"]]
            axis.plot(*zip(*found, strict=True), "o-", markersize=3.5, linewidth=1.6, label=OVER_STEPS[name])
        axis.set(ylim=(0, 102), ylabel="%")
        axis.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))

    return _panels(lines, [("figures of the held-out pairs", draw)], columns=1)


def bands(lines: Sequence[Line]) -> list[tuple[str, int, int]]:
    """Stages in order: name, first and last step."""
    found: list[tuple[str, int, int]] = []
    for line in lines:
        name, step = line["stage"], line["step"]
        if found and found[-1][0] == name:
            found[-1] = (name, found[-1][1], step)
        else:
            found.append((name, step, step))
    return found


def _panels(lines: Sequence[Line], draws: Sequence[tuple[str, Draw]], columns: int = _COLUMNS) -> bytes | None:
    if not draws or not lines:
        return None
    columns = min(columns, len(draws))
    rows = -(-len(draws) // columns)
    figure, axes = _canvas(rows, columns, (11, 3 * rows))
    stages = bands(lines)
    for k, axis in enumerate(axes.flat):
        if k >= len(draws):
            axis.axis("off")
            continue
        title, draw = draws[k]
        for n, (name, first, last) in enumerate(stages if len(stages) > 1 else []):
            axis.axvspan(first, last + 1, color=_BANDS[n % 2], zorder=0, linewidth=0)
            place = {"transform": axis.get_xaxis_transform(), "ha": "center", "va": "top"}
            axis.text((first + last + 1) / 2, 0.99, name, fontsize=7, color=_GREY, **place)
        draw(axis)
        _title(axis, title)
        if len(stages) > 1:  # room for their names
            low, high = axis.get_ylim()
            axis.set_ylim(low, high + 0.09 * (high - low))
        axis.set(xlabel="step", xlim=(lines[0]["step"], lines[-1]["step"] + 1))
    return _png(figure)


def _loss(axis: Any, lines: Sequence[Line], task: str) -> None:
    raw, weighted = _series(lines, "raw", task), _series(lines, "weighted", task)
    _curve(axis, lines, raw, COLOURS[task], "raw", shadow=True)
    if not np.allclose(raw, weighted, equal_nan=True):
        _curve(axis, lines, weighted, "#24292f", "weighted", style="--")
        axis.legend(frameon=False, fontsize=8)
    seen = raw[np.isfinite(raw)]
    if len(seen):
        axis.set_ylim(min(0.0, seen.min()), 1.1 * max(np.percentile(seen, 99.5), 1e-6))


def _plain(axis: Any, lines: Sequence[Line], name: str, noisy: bool = False) -> None:
    values = _series(lines, "metrics", name)
    _curve(axis, lines, values, OURS, name, shadow=noisy, smooth=noisy)


def _weights(axis: Any, lines: Sequence[Line]) -> None:
    for task in TASKS:
        raw = _series(lines, "raw", task)
        values = _series(lines, "weighted", task) / np.where(raw == 0, math.nan, raw)
        if np.isfinite(values).any():
            _curve(axis, lines, values, COLOURS[task], NAMES[task], smooth=False)
    axis.set_ylim(bottom=0)
    axis.legend(frameon=False, fontsize=8)


def _shares(axis: Any, lines: Sequence[Line]) -> None:
    for (name, title), colour in zip(_SHARES.items(), (COLOURS["itc"], COLOURS["itm"]), strict=True):
        values = _series(lines, "metrics", name)
        if np.isfinite(values).any():
            _curve(axis, lines, values, colour, title)
    axis.set_ylim(0, 1)
    axis.yaxis.set_major_formatter(lambda value, _: f"{100 * value:.0f} %")
    axis.legend(frameon=False, fontsize=8)


def _curve(
    axis: Any, lines: Sequence[Line], values: np.ndarray, colour: str, label: str, style: str = "-",
    shadow: bool = False, smooth: bool = True,
) -> None:  # fmt: skip
    """A line with gaps where there are no values, smoothed between them, and as it was in grey behind it."""
    steps = np.array([line["step"] for line in lines])
    there = np.flatnonzero(np.isfinite(values))
    for part in np.split(there, np.flatnonzero(np.diff(there) > 1) + 1):
        if shadow:
            axis.plot(steps[part], values[part], color=DENSE, linewidth=0.7)
        shown = smoothed(values[part]) if smooth else values[part]
        axis.plot(steps[part], shown, style, color=colour, linewidth=1.8, label=label)
        label = "_again"  # no second line in the legend


def _series(lines: Sequence[Line], part: str, name: str) -> np.ndarray:
    """NaN where there is none."""
    return np.array([float(line[part].get(name, math.nan)) for line in lines])
