"""Retrieval sheets as PNG bytes: queries with their best answers, by the features and re-ranked."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from ...data.pairs import Pairs
from ...demo.figures import RIGHT, _canvas, _cell, _note, _png, spread
from ..data.samples import Sample
from ..evaluation import Evaluation

__all__ = ["sheet"]

_ROWS, _BEST = 6, 5
_BY = {"retrieval": "by the features", "rerank": "re-ranked by matching", "evidence": "re-ranked by words"}


def sheet(evaluation: Evaluation, way: str) -> bytes:
    """Queries and their best answers by the features and, below, re-ranked; right ones have a green frame.

    Queries are spread over the ranks of their right answer, good and bad alike.

    Args:
        way: `i2t`, a picture asks for texts, or `t2i`.
    """
    pairs = _pairs(evaluation.samples)
    found = {kind: rankings[way] for kind, rankings in evaluation.rankings.items() if kind in _BY}
    queries = spread(found["retrieval"].ranks, min(_ROWS // len(found), len(pairs)))
    rows = len(queries) * len(found)
    figure, axes = _canvas(rows, 1 + _BEST, (8, 1.42 * rows + 0.3), plain=True)
    for axis in axes.flat:
        axis.axis("off")
    at = iter(axes)
    for query in queries:
        for kind, ranking in found.items():
            row = next(at)
            if kind == "retrieval":
                _cell(row[0], pairs, query, picture=way == "i2t", frame="#8c959f")
            said = f"right one at rank {int(ranking.ranks[query]) + 1:,}"
            _note(row[1], f"{_BY[kind]}: {said}", 1.05, fontsize=7.5)
            for axis, answer in zip(row[1:], ranking.order[query, :_BEST].tolist(), strict=False):
                right = bool(evaluation.ids[answer] == evaluation.ids[query])
                _cell(axis, pairs, answer, picture=way == "t2i", frame=RIGHT if right else None)
    figure.subplots_adjust(0.01, 0.01, 0.99, 1 - 0.28 / (1.42 * rows + 0.3), wspace=0.08, hspace=0.18)
    return _png(figure)


class _Pictures:
    """Pictures of samples, looked up when drawn."""

    def __init__(self, samples: Sequence[Sample]) -> None:
        self.samples = samples

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, indices: Tensor) -> Tensor:
        return torch.from_numpy(np.stack([np.asarray(self.samples[i].image) for i in indices.tolist()]))


def _pairs(samples: Sequence[Sample]) -> Pairs:
    return Pairs("held out", _Pictures(samples), [sample.caption for sample in samples])
