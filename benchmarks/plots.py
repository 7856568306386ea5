"""SVG plots of growth, drawn for light and dark pages, the same bytes for the same result."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .baselines import DENSE, OURS
from .parts import LIMIT
from .tables import amount

__all__ = ["draw"]

GREY = "#7d8590"  # readable on white and on near-black
STYLE: dict[str, dict[str, Any]] = {
    OURS: {"color": "#2f81f7", "marker": "o", "label": OURS},
    DENSE: {"color": "#e5534b", "marker": "s", "label": DENSE},
    LIMIT: {"color": GREY, "linestyle": ":", "label": "limit"},
}
AXES = {"time": ("median", "forward + backward, s", 1.0), "memory": ("extra", "extra memory, MB", 1e6)}


def draw(result: dict[str, Any], folder: Path) -> list[Path]:
    """Time and memory against batch of every loss that has them; the files written."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams.update({"svg.hashsalt": "fastvlm_loss", "svg.fonttype": "none", "font.family": "sans-serif"})
    for part in ("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color"):
        matplotlib.rcParams[part] = GREY
    made = []
    for name, loss in result["losses"].items():
        for what in AXES if loss.get("growth") else ():
            path = folder / f"{result['name']}-{name}-{what}.svg"
            _figure(loss, what, result["settings"]["memory_limit"]).savefig(
                path, transparent=True, metadata={"Date": None}
            )
            made.append(path)
    return made


def _figure(loss: dict[str, Any], what: str, limit: int | None) -> Any:
    from matplotlib.figure import Figure

    value, label, unit = AXES[what]
    figure = Figure(figsize=(4.6, 3.4), layout="constrained")
    axes = figure.add_subplot(
        xscale="log", yscale="log", xlabel=f"batch N (D = {loss['growth'][0]['d']})", ylabel=label
    )
    sizes = sorted({r["n"] for r in loss["growth"]})
    fits = {fit["contestant"]: fit for fit in loss["fits"] if fit["value"] == value}
    for who, style in STYLE.items():
        points = [(r["n"], r[value] / unit) for r in loss["growth"] if r["contestant"] == who and r.get(value)]
        if not points:
            continue
        if who in fits:
            style = {**style, "label": f"{style['label']}, N^{fits[who]['exponent']:.2f}"}
        axes.plot(*zip(*points, strict=True), linewidth=1.6, markersize=4, **style)
        dead = [r["n"] for r in loss["growth"] if r["contestant"] == who and r.get("extra", 0) is None]
        if dead and who in fits:
            predicted = [(n, fits[who]["factor"] * n ** fits[who]["exponent"] / unit) for n in dead]
            line = axes.plot(
                *zip(points[-1], *predicted, strict=True), linewidth=1, linestyle="--", color=style["color"]
            )
            line[0].set(marker="x", markevery=slice(1, None), label=f"{who} dies; predicted")
    if what == "memory" and limit:
        axes.axhline(limit / unit, color=GREY, linewidth=1, linestyle=":")
        axes.text(sizes[0], limit / unit, f"{amount(limit)} allowed", va="bottom", fontsize=9)
    axes.set_xticks(sizes, [f"{n // 1024}k" if n % 1024 == 0 else str(n) for n in sizes])
    axes.minorticks_off()
    axes.grid(color=GREY, alpha=0.25, linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside upper left", ncols=2, frameon=False, fontsize=9)
    return figure
