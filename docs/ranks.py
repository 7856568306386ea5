"""Which negatives are picked: their ranks in the batch by hardness and by scale, as one small SVG for negatives.md.

A made-up batch of pairs in topics; every pick is one of `hard_negatives`, by its texts and by its images.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from fastvlm_loss import hard_negatives

from .gradients import BLUE, GOLD, GREEN, GREY, RED, style

__all__ = ["PICTURE", "batch", "draw", "places", "ranks", "shares"]

PICTURE = Path(__file__).parent / "negatives-ranks.svg"
PAIRS, DIM, TOPICS, STEPS = 1024, 64, 64, 4
HARDNESS = {0.0: GREY, 0.5: GREEN, 1.0: BLUE, 3.0: GOLD, math.inf: RED}
SCALES = {1 / 0.07: BLUE, 30.0: GOLD, 100.0: RED}


def batch() -> tuple[Tensor, Tensor]:
    """Image and text features `[PAIRS, DIM]`, nearly of unit length: of a topic, a pair and a tower each a part."""
    dice = torch.Generator().manual_seed(0)
    topics, own, *noise = (torch.randn(n, DIM, generator=dice) for n in (TOPICS, PAIRS, PAIRS, PAIRS))
    meaning = topics[torch.arange(PAIRS) % TOPICS] + own
    image, text = (F.normalize(meaning + 1.2 * each, dim=1) for each in noise)
    # in steps of 1/256 products are exact in any order of summation, so the picks are those of any CPU
    return (256 * image).round() / 256, (256 * text).round() / 256


def places(features: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Rank `[PAIRS, PAIRS]` of each text among its image's negatives, and of each image among its text's; from 1 on."""
    scores = (features[0] @ features[1].T).fill_diagonal_(-math.inf)
    by_text, by_image = (s.argsort(dim=1, descending=True, stable=True).argsort(1) + 1 for s in (scores, scores.T))
    return by_text, by_image


def ranks(features: tuple[Tensor, Tensor], of: tuple[Tensor, Tensor], **options: Any) -> Tensor:
    """Rank, `of` which the places are given, of every pick of `STEPS` steps."""
    found = []
    for step in range(STEPS):
        picked = hard_negatives(*features, seed=0, step=step, **options)
        found += [of[0].gather(1, picked.text_index), of[1].gather(1, picked.image_index)]
    return torch.cat(found).flatten()


def shares(picked: Tensor) -> Tensor:
    """Share of the picks within the r hardest, for r = 1 ... PAIRS - 1."""
    return torch.bincount(picked, minlength=PAIRS)[1:].cumsum(0) / picked.numel()


def draw(path: Path = PICTURE) -> Path:
    """The picture, the same bytes for the same picks."""
    from matplotlib.figure import Figure

    features = batch()
    of = places(features)
    by_hardness = [(f"{h:g}", ranks(features, of, hardness=h), color) for h, color in HARDNESS.items()]
    by_scale = [(f"{s:.3g}", ranks(features, of, scale=s), color) for s, color in SCALES.items()]
    with style():
        figure = Figure(figsize=(7.4, 3.0), layout="constrained")
        panels = ("scale 1/0.07", "hardness", by_hardness), ("hardness 1", "scale", by_scale)
        for k, (title, what, curves) in enumerate(panels):
            axes = figure.add_subplot(1, 2, k + 1, xlabel=f"rank among the {PAIRS - 1} negatives", ylim=(-0.02, 1.02))
            axes.set_title(title, fontsize=9)
            axes.set_xscale("log")
            at = torch.logspace(0, math.log10(PAIRS - 1), 60).long().unique()
            for label, picked, color in curves:
                axes.plot(at.tolist(), shares(picked)[at - 1].tolist(), label=label, color=color, linewidth=1.6)
            axes.grid(color=GREY, alpha=0.25, linewidth=0.6)
            axes.spines[["top", "right"]].set_visible(False)
            axes.legend(
                frameon=False, fontsize=8, title=what, title_fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5)
            )
        figure.axes[0].set_ylabel("share of the picks so far")
        figure.savefig(path, transparent=True, metadata={"Date": None})
    return path


if __name__ == "__main__":
    print(draw().relative_to(PICTURE.parents[1]))
