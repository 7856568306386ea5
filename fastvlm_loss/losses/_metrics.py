"""What one forward pass tells besides its loss."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

from ..engine.tile import SoftmaxTile
from ..scores import check

__all__ = ["BatchMetrics"]

MUCH = 0.2  # of the negatives: a filter that takes more is probably not calibrated


class BatchMetrics:
    """By-products of one call, made in its own pass over the scores: `clip_loss(..., metrics=metrics)` fills it.

    None of it has a gradient; what a call cannot tell (a direction that it does not have) is None.

    Attributes:
        image_accuracy, text_accuracy: `[]`, share of the images (texts) with a positive whose best positive scores
            above every negative (top-1; a tie is a miss).
        positive_score: `[]`, mean score of the positives, scale and bias included.
        image_lse, text_lse: `[]`, mean log-sum-exp of the candidates' scores.
        hardest_text: `[M]` int64, the best-scoring negative text of each image, -1 where it has none.
        hardest_image: `[N]` int64, likewise of each text.
        filtered: `[]`, share of the entries beside the positives that ids and filters took out. Filters that take more
            than a fifth are warned of (on a CPU, where reading it does not wait).
    """

    def __init__(self) -> None:
        self.image_accuracy: Tensor | None = None
        self.text_accuracy: Tensor | None = None
        self.positive_score: Tensor | None = None
        self.image_lse: Tensor | None = None
        self.text_lse: Tensor | None = None
        self.hardest_text: Tensor | None = None
        self.hardest_image: Tensor | None = None
        self.filtered: Tensor | None = None

    def fill(self, t: SoftmaxTile, m: int, n: int, filters: bool, positive: Tensor | None = None) -> None:
        """From the statistics `[L]` of M images and N texts, and the scores of the positives if those do not tell."""
        found, (rows, cols) = t.summary, t.lengths
        right = (found["best_target"] > found["hardest"]).to(t.nll.dtype)
        known = torch.ones_like(right) if t.targets is None else (t.targets > 0).to(right.dtype)
        image, text = slice(0, rows), slice(rows, rows + cols)

        def mean(values: Tensor, side: slice) -> Tensor | None:
            weight = known[side]
            # where, not a product: the log-sum-exp of no candidates is infinite
            total = torch.where(weight > 0, values[side], 0.0).sum()
            return total / weight.sum().clamp(min=1) if side.stop > side.start else None

        self.image_accuracy, self.text_accuracy = mean(right, image), mean(right, text)
        scores = found["positive"] if positive is None else positive.detach()
        self.positive_score = mean(scores, image if rows else text)
        self.image_lse, self.text_lse = (mean(found["lse"], s) if "lse" in found else None for s in (image, text))
        index = found["index"]
        self.hardest_text, self.hardest_image = (index[image] if rows else None), (index[text] if cols else None)
        others = known.new_full((rows,), n), known.new_full((cols,), m)
        every = torch.cat(others) - (known if t.counts is None else t.counts)
        self.filtered = 1 - found["negatives"].sum() / every.sum().clamp(min=1)
        if filters and check.readable(self.filtered):
            share = float(self.filtered)
            if share > MUCH:
                warnings.warn(
                    f"filters: with the ids they took out {share:.0%} of the negatives, more than {MUCH:.0%}",
                    stacklevel=5,
                )

    def __repr__(self) -> str:
        told = (f"{k}={v.tolist()}" for k, v in vars(self).items() if v is not None and not v.ndim)
        return f"BatchMetrics({', '.join(told)})"
