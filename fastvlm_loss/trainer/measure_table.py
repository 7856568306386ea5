"""The table and the picture of what `measure` has found."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..demo.figures import DENSE, OURS, RIGHT, _canvas, _png, _title

__all__ = ["markdown", "picture", "saved"]

HEAD = (
    "", "learn", "weights", "gradients", "optimiser", "activations", "activations saved", "peak", "peak saved", "step",
    "time",
)  # fmt: skip
PARTS = {"weights": "#57606a", "gradients": DENSE, "optimizer": "#d97706", "activations": OURS}
Result = Mapping[str, Any]


def saved(result: Result, row: Mapping[str, Any], what: str) -> float:
    """1 - new / old, old being the first row."""
    return 1 - float(row[what]) / float(result["rows"][0][what])


def seconds(row: Mapping[str, Any]) -> Mapping[str, float] | None:
    """The time that compares: of the processor on a CPU, because other programs do not count in it."""
    found: Mapping[str, float] | None = row.get("seconds" if row["reserved"] is not None else "processor")
    return found


def markdown(result: Result) -> str:
    """The table, and what it was measured on."""
    rows = [_line(result, row) for row in result["rows"]]
    rule = ["---", *["---:"] * (len(HEAD) - 1)]
    table = "\n".join(f"| {' | '.join(line)} |" for line in (HEAD, rule, *rows))
    settings, first, gradients = result["settings"], result["rows"][0], result["gradients"]
    image, text = settings["model"]["image"], settings["model"]["text"]
    fusion = settings["model"]["fusion"]
    name = image["name"] or "the tiny tower"
    on_cpu = first["reserved"] is None
    peak = (
        "Peak: resident memory beyond what the process held before it built the model"
        if on_cpu
        else f"Peak: `max_memory_allocated` (reserved: {', '.join(_amount(row['reserved']) for row in result['rows'])})"
    )
    clock = ", ".join(f"{row['seconds']['median']:.3g} s" for row in result["rows"] if "seconds" in row)
    time = (
        f"Step: median of {settings['steps']} steps in seconds of the processor, which other programs do not count in "
        f"(by the clock {clock}, with a load of {result['load']:g} on the machine)"
        if on_cpu
        else f"Step: median of {settings['steps']} steps between two events"
    )
    why = sorted({row["why"] for row in result["rows"] if "why" in row})
    told = f" No time: {'; '.join(why)}." if why else ""
    versions = ", ".join(f"{name} {found}" for name, found in result["versions"].items() if found)
    hard = result["hardware"]
    where = hard["gpu"] or f"{hard['cpu']}, {hard['cores']} cores, {hard['torch_cpu']}"
    return (
        f"{name} at {image['size']} pixels, {text['layers']} + {fusion['layers']} layers of BERT of width "
        f"{text['width']}, {first['parameters'] / 1e6:.3g} M parameters, batch {settings['batch_size']}, texts of at "
        f"most {settings['context_length']} tokens, {', '.join(settings['tasks'])}:\n\n{table}\n\n"
        f"{peak}; saved: 1 − new / old against the first row. Activations: what autograd keeps for backward, under "
        f"autocast with the bf16 copies of the weights. {time}.{told} Gradients with checkpointing differ from those "
        f"without by {gradients['relative']:.1g} of their norm (fp32). {where}, threads: {hard['threads']}; "
        f"{versions}; {result['date']}."
    )


def picture(result: Result) -> bytes:
    """Memory in its parts beside the measured peak, and the time of a step, of every row; PNG."""
    rows = result["rows"][::-1]
    names = [row["row"] for row in rows]
    figure, axes = _canvas(1, 2, (11, 0.9 + 0.42 * len(rows)))
    memory, time = axes[0]
    for axis in axes[0]:
        axis.set_axisbelow(True)
    left = [0.0] * len(rows)
    for part, colour in PARTS.items():
        widths = [row[part] / 1e6 for row in rows]
        memory.barh(names, widths, left=left, color=colour, height=0.6, label=part.replace("z", "s"))
        left = [a + b for a, b in zip(left, widths, strict=True)]
    memory.plot([row["peak"] / 1e6 for row in rows], names, "|", color="#cf222e", markersize=14, label="measured peak")
    memory.set(xlabel="MB")
    _title(memory, "memory of a step")
    found = [seconds(row) for row in rows]
    time.barh(names, [0 if s is None else s["median"] for s in found], color=RIGHT, height=0.6)
    for name, row, s in zip(names, rows, found, strict=True):
        if s is None:
            time.annotate(f" {row['why']}", (0, name), va="center", fontsize=8)
    time.set(xlabel="s", yticklabels=[])
    _title(time, "time of a step" + (" (processor)" if rows[0]["reserved"] is None else ""))
    figure.legend(*memory.get_legend_handles_labels(), loc="outside lower left", ncols=5, frameon=False, fontsize=9)
    return _png(figure)


def _line(result: Result, row: Mapping[str, Any]) -> list[str]:
    first = result["rows"][0]
    sizes = [_amount(row[name]) for name in PARTS]
    time, usual = seconds(row), seconds(first)
    took = ["", ""] if time is None or usual is None else [
        f"{time['median']:.3g} s (± {time['spread'] / 2:.2g})", f"× {time['median'] / usual['median']:.2f}"
    ]  # fmt: skip
    less = ["" if row is first else f"{saved(result, row, what):.0%}" for what in ("activations", "peak")]
    return [row["row"], f"{row['learn'] / 1e6:.3g} M", *sizes, less[0], _amount(row["peak"]), less[1], *took]


def _amount(size: float) -> str:
    """Bytes with a decimal unit."""
    return f"{size / 1e9:.3g} GB" if size >= 1e9 else f"{size / 1e6:.3g} MB"
