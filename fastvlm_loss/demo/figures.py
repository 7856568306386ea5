"""The report's pictures as PNG bytes: training curves, a retrieval sheet, and the cost of the loss."""

from __future__ import annotations

import io
import textwrap
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from .cost import Cost
from .evaluation import ranks

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from ..data import Pairs

OURS, DENSE, INK, RIGHT = "#1f6feb", "#b0b7c3", "#24292f", "#1a9e4b"
_STYLE: dict[str, Any] = {
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#8c959f",
    "axes.grid": True,
    "grid.color": "#eaeef2",
    "text.color": INK,
    "axes.labelcolor": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "savefig.dpi": 130,
}
_TOP = 5
_QUERIES = 6  # per direction


def curves(values: dict[str, list[float]], label: str) -> bytes:
    """Loss, in-batch accuracy and logit scale over the steps, raw and smoothed."""
    figure, axes = _canvas(1, 3, (11, 3.1))
    titles = {"loss": "loss", "accuracy": "in-batch accuracy (image to text)", "scale": "logit scale"}
    for axis, (name, title) in zip(axes[0], titles.items(), strict=True):
        series = np.asarray(values[name])
        steps = np.arange(1, len(series) + 1)
        if name != "scale":
            axis.plot(steps, series, color=DENSE, linewidth=0.8)
            series = smoothed(series)
        axis.plot(steps, series, color=OURS, linewidth=2)
        _title(axis, title)
        axis.set_xlabel("step")
        if name == "accuracy":
            axis.set_ylim(0, 1)
            axis.yaxis.set_major_formatter(lambda value, _: f"{100 * value:.0f} %")
        elif name == "loss":
            axis.set_ylim(bottom=0)
    figure.suptitle(label, x=0.01, ha="left", fontsize=10, color="#57606a")
    return _png(figure)


def cost(measured: Cost) -> bytes:
    """Time and memory over the batch size, ours against dense, on logarithmic axes."""
    figure, axes = _canvas(1, 2, (11, 3.6))
    sides = (
        (measured.seconds, 1e3, "time, forward + backward", "ms"),
        (measured.megabytes, 1, "peak extra memory", "MB"),
    )
    for axis, (values, unit, title, name) in zip(axes[0], sides, strict=True):
        for loss, label, colour in (("dense", "dense", "#7d8590"), ("fastvlm", "fastvlm_loss", OURS)):
            series = [max(v * unit, 0.1) for v in values[loss]]
            axis.loglog(measured.sizes, series, "o-", color=colour, linewidth=2, label=label)
            axis.annotate(f"  {series[-1]:,.0f} {name}", (measured.sizes[-1], series[-1]), color=colour, va="center")
        _title(axis, title)
        axis.set(xlabel="batch", ylabel=name, xlim=(measured.sizes[0] * 0.8, measured.sizes[-1] * 2.6))
        axis.set_xticks(measured.sizes, [f"{size:,}" for size in measured.sizes])
        axis.yaxis.set_major_formatter(lambda value, _: f"{value:,g}")
        axis.minorticks_off()
        axis.legend(frameon=False, loc="upper left")
    return _png(figure)


def sheet(test: Pairs, images: Tensor, texts: Tensor) -> bytes:
    """Queries and their five best answers, the right one marked: pictures for a text, then texts for a picture.

    Queries are spread over the ranks of their right answer, good and bad alike, so that the sheet does not flatter.
    """
    figure, axes = _canvas(2 * _QUERIES + 1, 1 + _TOP, (8, 16.6), plain=True)
    for axis in axes[_QUERIES]:  # a narrow empty row between the halves
        axis.axis("off")
    _sheet_half(axes[:_QUERIES], test, texts, images, by_text=True)
    _sheet_half(axes[_QUERIES + 1 :], test, images, texts, by_text=False)
    figure.subplots_adjust(0.01, 0.008, 0.99, 0.965, wspace=0.08, hspace=0.16)
    return _png(figure)


def smoothed(values: np.ndarray) -> np.ndarray:
    """Mean over a window centred on each step, a twelfth of the run wide and narrower at the ends."""
    half = len(values) // 24
    sums = np.concatenate([[0.0], np.cumsum(values)])
    at = np.arange(len(values))
    reach = np.minimum(half, np.minimum(at, at[::-1]))
    means: np.ndarray = (sums[at + reach + 1] - sums[at - reach]) / (2 * reach + 1)
    return means


def spread(found: Tensor, count: int) -> list[int]:
    """``count`` queries whose ranks stand at even quantiles of ``found`` [N] (the same ones in every call)."""
    shuffled = torch.randperm(len(found), generator=torch.Generator().manual_seed(0))
    order = shuffled[found[shuffled].argsort(stable=True)]
    at = (torch.arange(count) + 0.5) * len(found) / count
    return order[at.long()].tolist()


def _sheet_half(axes: np.ndarray, test: Pairs, queries: Tensor, gallery: Tensor, by_text: bool) -> None:
    found = ranks(queries, gallery, test.ids)
    heading = "Text query" if by_text else "Picture query"
    _note(
        axes[0, 0],
        f"{heading}, and the best five {'pictures' if by_text else 'texts'}",
        1.28,
        fontsize=11,
        fontweight="bold",
    )
    for axis in axes.flat:
        axis.axis("off")
    for row, query in zip(axes, spread(found, min(len(axes), len(test))), strict=False):
        _cell(row[0], test, query, picture=not by_text, frame="#8c959f")
        best = (gallery @ queries[query]).topk(min(_TOP, len(test))).indices.tolist()
        for axis, answer in zip(row[1:], best, strict=False):
            right = bool(test.ids[answer] == test.ids[query])
            _cell(axis, test, answer, picture=by_text, frame=RIGHT if right else None)
        _note(row[0], f"right one at rank {found[query] + 1:,}", 1.04, fontsize=7.5, color="#57606a")


def _cell(axis: Any, test: Pairs, index: int, picture: bool, frame: str | None = None) -> None:
    """One picture or one caption, framed in a colour where it is the query or the right answer."""
    axis.axis("on")
    axis.set(xticks=[], yticks=[])
    axis.set_box_aspect(1)
    for spine in axis.spines.values():
        spine.set(visible=True, color=frame or "#d0d7de", linewidth=3.5 if frame == RIGHT else 0.8)
    if picture:
        axis.imshow(test.images[torch.tensor([index])][0].numpy(), interpolation="lanczos")
    else:
        lines = textwrap.wrap(test.captions[index], 16)
        text = "\n".join([*lines[:6], "..."] if len(lines) > 7 else lines)
        axis.text(0.5, 0.5, text, ha="center", va="center", fontsize=7.2, transform=axis.transAxes)


def _note(axis: Any, text: str, height: float, **style: Any) -> None:
    axis.text(0, height, text, transform=axis.transAxes, **style)


def _title(axis: Any, text: str) -> None:
    axis.set_title(text, loc="left", fontsize=11, fontweight="bold")


def _canvas(rows: int, columns: int, inches: tuple[float, float], plain: bool = False) -> tuple[Figure, np.ndarray]:
    """A figure with its axes; ``plain`` ones have no grid and are placed by hand."""
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    style: Any = {**_STYLE, "axes.grid": not plain}
    with matplotlib.rc_context(style):
        figure = Figure(figsize=inches, layout=None if plain else "constrained")
        FigureCanvasAgg(figure)
        heights = [0.35 if plain and row == _QUERIES else 1 for row in range(rows)]
        return figure, figure.subplots(rows, columns, squeeze=False, height_ratios=heights)


def _png(figure: Figure) -> bytes:
    with io.BytesIO() as buffer:
        figure.savefig(buffer, format="png", dpi=_STYLE["savefig.dpi"], facecolor="white")
        return buffer.getvalue()
