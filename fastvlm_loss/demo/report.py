"""One HTML file that needs nothing beside it: the result, the curves, the retrieval sheet, the cost of the loss."""

from __future__ import annotations

import base64
import html
import os
import platform
from dataclasses import dataclass
from pathlib import Path

import torch

from . import figures
from .cost import Cost
from .evaluation import KS, Retrieval

_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>fastvlm_loss demo: {data}</title>
<style>
body {{ font: 16px/1.5 system-ui, sans-serif; color: #24292f; max-width: 1100px; margin: 2em auto; padding: 0 1em }}
h2 {{ margin: 2em 0 .4em }} p, li {{ color: #57606a }}
img {{ width: 100%; border: 1px solid #eaeef2; border-radius: 6px }} .sheet {{ max-width: 820px }}
table {{ border-collapse: collapse }}
td, th {{ padding: .3em 1.2em .3em 0; text-align: right; border-bottom: 1px solid #eaeef2 }}
td:first-child, th:first-child {{ text-align: left }} .faint {{ color: #8c959f }}
</style></head><body>
<h1>Two towers trained with <code>fastvlm_loss.clip_loss</code></h1>
<p>{summary}</p>
<h2>Retrieval on data never trained on</h2>
{recall}
<p>Recall at k in per cent: how often a right answer is among the best k of {count}.
Equal captions are equally right.</p>
<h2>Training</h2>
<img alt="curves of loss, in-batch accuracy and logit scale" src="{curves}">
<h2>What it finds</h2>
<p>Queries at even steps from the easiest to the hardest, not chosen by hand. The right answer has a green frame.</p>
<img class="sheet" alt="queries and their five best answers" src="{sheet}">
<h2>What the loss costs</h2>
<img alt="time and memory over the batch size" src="{cost}">
{costs}
<p>Features of {dim} numbers in fp32, forward and backward, symmetric loss, both measured in turn in this run.
Memory is the highest resident size beyond inputs{where}.</p>
<p class="faint">{machine}</p>
</body></html>
"""


@dataclass(frozen=True)
class Report:
    """All that the page says; pictures are PNG bytes by name (curves, sheet, cost)."""

    data: str
    summary: str
    recall: Retrieval
    cost: Cost
    dim: int
    pictures: dict[str, bytes]

    def write(self, folder: Path) -> Path:
        """Write ``report.html`` and its pictures as PNG files, and return the page's path."""
        for name, content in self.pictures.items():
            (folder / f"{name}.png").write_bytes(content)
        page = folder / "report.html"
        part = page.with_name(f"{page.name}.tmp-{os.getpid()}")
        part.write_text(self.page(), encoding="utf-8")
        part.replace(page)
        return page

    def page(self) -> str:
        """The HTML text."""
        inline = {
            name: f"data:image/png;base64,{base64.b64encode(png).decode()}" for name, png in self.pictures.items()
        }
        rows = (
            ("image to text", self.recall.image_to_text),
            ("text to image", self.recall.text_to_image),
            ("chance", self.recall.chance),
        )
        recall = _table(["", *(f"R@{k}" for k in KS)], [[name, *(f"{v:.1f}" for v in values)] for name, values in rows])
        measured = self.cost
        costs = _table(
            ["batch", "time, fastvlm_loss", "time, dense", "memory, fastvlm_loss", "memory, dense"],
            [
                [f"{size:,}", *(f"{1e3 * measured.seconds[loss][i]:,.1f} ms" for loss in measured.seconds)]
                + [f"{measured.megabytes[loss][i]:,.1f} MB" for loss in measured.megabytes]
                for i, size in enumerate(measured.sizes)
            ],
        )
        threads = f"{torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}"
        return _PAGE.format(
            data=html.escape(self.data),
            summary=html.escape(self.summary),
            recall=recall,
            count=f"{self.recall.count:,}",
            costs=costs,
            dim=self.dim,
            where=", each loss in a process of its own" if measured.device == "cpu" else " on the device",
            machine=html.escape(f"torch {torch.__version__}, {platform.system()} {platform.machine()}, {threads}"),
            **{name: inline[name] for name in ("curves", "sheet", "cost")},
        )


def _table(head: list[str], rows: list[list[str]]) -> str:
    def line(cells: list[str], tag: str) -> str:
        return "<tr>" + "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in cells) + "</tr>"

    return "<table>" + line(head, "th") + "".join(line(row, "td") for row in rows) + "</table>"


def draw(
    summary: str, data: str, curves: dict[str, list[float]], recall: Retrieval, cost: Cost, sheet: bytes, dim: int
) -> Report:
    """Draw the curves and the cost beside a finished sheet."""
    pictures = {"curves": figures.curves(curves, summary), "sheet": sheet, "cost": figures.cost(cost)}
    return Report(data, summary, recall, cost, dim, pictures)
