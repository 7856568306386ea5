"""Grades of a few texts of each image: checked, and what scores in tiles, which know targets alone, lack of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ..scores import check
from ..scores.problem import Problem, statistics_dtype
from ..scores.travel import bags, entries

__all__ = ["Grades", "Rest"]


@dataclass(frozen=True)
class Grades:
    """Of each own image K texts and their grades, 0 and 0 for none.

    Attributes:
        index: `[M, K]` int64.
        values: `[M, K]`.
        best: `[M, K]`, 1 at the largest grade of an image that has one, else 0.
    """

    index: Tensor
    values: Tensor
    best: Tensor

    @classmethod
    def of(cls, x: Tensor, n: int, relevant: Tensor, relevance: Tensor, check_finite: bool) -> Grades:
        """Check the arguments `relevant`, texts below `n`, and `relevance` beside the features `x`."""
        m = x.shape[0]
        if not isinstance(relevant, Tensor) or relevant.dim() != 2 or relevant.shape[0] != m or not relevant.shape[1]:
            got = f"shape {list(relevant.shape)}" if isinstance(relevant, Tensor) else type(relevant).__name__
            raise ValueError(f"relevant: got {got}, wanted an integer tensor of shape [{m}, K] with K >= 1")
        index = check.indices("relevant", relevant.flatten(), x, below=n, low=-1).reshape(relevant.shape)
        grades = check.floating("relevance", relevance, relevant.shape, x).detach().to(statistics_dtype(x.dtype))
        if check_finite:
            check.finite("relevance", grades)
            if bool((grades < 0).any()):
                raise ValueError(f"relevance: got {float(grades.min()):g}, wanted values >= 0")
        counts = (index >= 0) & (grades >= 0) & (grades < torch.inf)
        index, grades = index.clamp(min=0), torch.where(counts, grades, 0.0)
        best = F.one_hot(grades.argmax(1), grades.shape[1]).to(grades.dtype) * (grades.sum(1) > 0)[:, None]
        return cls(index, grades, best)

    @property
    def labels(self) -> Tensor:
        """The best text of each image `[M]`, -1 for none."""
        return torch.where(self.values.sum(1) > 0, (self.index * self.best.to(torch.int64)).sum(1), -1)


@dataclass(frozen=True)
class Rest:
    """What a softmax with `labels` as its targets lacks of the grades of a problem, in O(M K D).

    Attributes:
        index: `[M, K]`, the texts.
        parts: `[M, K, 3]`: whether an entry is the target, its grade if so, its grade if not.
        order, of_texts: as of `bags`, by text.
        of_columns: `[N, 3]`, sums of the parts of each text over the images of all processes.
    """

    index: Tensor
    parts: Tensor
    order: Tensor
    of_texts: Callable[..., Tensor]
    of_columns: Tensor

    @classmethod
    def of(cls, p: Problem, grades: Grades) -> Rest:
        """Of the own images' grades."""
        best, values = grades.best, grades.values
        parts = torch.stack([best, values * best, values * (1 - best)], 2)
        order, of_texts = bags(grades.index, p.n)
        return cls(grades.index, parts, order, of_texts, _total(p, of_texts(parts.flatten(0, 1))))

    def known(self, p: Problem) -> tuple[Tensor, Tensor]:
        """Which images `[M]` and texts `[N]` of the whole group have a grade above 0."""
        rows, cols = ((sums[:, 1] + sums[:, 2] > 0) for sums in (p.of_rows(self.parts.sum(1)), self.of_columns))
        return rows, cols

    def products(self, p: Problem, directions: str) -> Tensor:
        """Sums of <x, y> over the entries of each row, then column, by what a tile takes too much, differentiable."""
        rows, cols = directions != "text", directions != "image"
        x, dtype = p.x.to(p.scale.dtype), p.scale.dtype
        of_row, of_col = (
            _off(self.parts, self.parts.sum(1, keepdim=True)),
            _off(self.parts, self.of_columns[self.index]),
        )
        found: list[Tensor] = []
        if p.shard is not None and p.shard.ring:
            each = entries(p.x, p.y, self.index, p.shard.cols, p.shard, dtype)
            if rows:
                found.append(p.of_rows((of_row * each).sum(1)))
            if cols:
                found.append(_total(p, self.of_texts((of_col * each).flatten()[:, None])[:, 0]))
            return torch.cat(found)
        # the texts' features of the whole group, of which each process makes something else
        y = (p.y if p.shard is None else p.shard.collectives.spread(p.y, p.shard.cols)).to(dtype)
        if rows:
            bag = F.embedding_bag(self.index, y, per_sample_weights=of_row, mode="sum")
            found.append(p.of_rows((x * bag).sum(1)))
        if cols:
            images = self.order // self.index.shape[1]
            bag = self.of_texts(x, images, of_col.flatten()[self.order])
            found.append(_total(p, (y * bag).sum(1)))
        return torch.cat(found)


def _total(p: Problem, own: Tensor) -> Tensor:
    """What the own images add to something of each text, of all images."""
    return own if p.shard is None else p.shard.collectives.total(own)


def _off(parts: Tensor, sums: Tensor) -> Tensor:
    """What a tile takes of each entry, 1 over the number of targets, less its share of the grades `[M, K]`.

    Of a target alone it is the share of the others, which is 0 or keeps its digits; 1 less its own would not.
    """
    best, own, other = parts.unbind(2)
    number, targets, others = sums.unbind(2)
    number, total = number.clamp(min=1), targets + others
    total = torch.where(total > 0, total, 1.0)
    return ((targets / number * best - own) + others / number * best - other) / total
