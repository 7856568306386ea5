"""False-negative filters: which negatives leave the candidates because they look too much like the positive.

Each is a limit of every row, and of every column, on the products <image_i, text_j> (cosines, for unit features) or on
those of a second pair of features. A filter has no gradient, never drops a target, and compares a column's candidates
with the column's own positive.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from . import check
from .pairs import best_of_columns, pair_products
from .problem import Problem

__all__ = ["Filter", "above_margin", "absolute", "filtered", "guide", "relative", "similar"]


@dataclass(frozen=True)
class Filter:
    """A rule; make one with the functions of this module.

    Attributes:
        rule: its name.
        value: its number.
        image_features, text_features: `[M, E]`, `[N, E]` of a rule that looks at other features than the loss.
    """

    rule: str
    value: float
    image_features: Tensor | None = None
    text_features: Tensor | None = None


def absolute(margin: float = 0.1) -> Filter:
    """Drops j if c_ij > c_ii + margin (Zhang et al. 2025, Qwen3-Embedding, section 3)."""
    return Filter("absolute", check.number("margin", margin))


def above_margin(margin: float = 0.05) -> Filter:
    """Drops j if c_ij >= c_ii - margin (Moreira et al. 2024, NV-Retriever, "TopK-MarginPos")."""
    return Filter("above_margin", check.number("margin", margin))


def relative(share: float = 0.95) -> Filter:
    """Drops j if c_ij >= share * c_ii, where c_ii > 0 (Moreira et al. 2024, NV-Retriever, "TopK-PercPos")."""
    return Filter("relative", check.number("share", share, above=0.0))


def guide(image_features: Tensor, text_features: Tensor, margin: float = 0.0) -> Filter:
    """Drops j if a guide model's products have t_ij > t_ii - margin (Solatorio 2024, GISTEmbed, equation 3).

    Args:
        image_features, text_features: `[M, E]`, `[N, E]` of the guide, in the dtype of the loss's features.
        margin: in units of the guide's products.
    """
    return Filter("guide", check.number("margin", margin), *_features(image_features, text_features))


def similar(image_features: Tensor, text_features: Tensor, most: float) -> Filter:
    """Drops j if the products R_ij of these features are above `most`, whatever those of the positive.

    Args:
        image_features, text_features: `[M, E]`, `[N, E]`; for text-to-text similarity the same text features twice.
        most: in units of their products.
    """
    return Filter("similar", check.number("most", most), *_features(image_features, text_features))


def _features(image_features: Tensor, text_features: Tensor) -> tuple[Tensor, Tensor]:
    return check.features("image_features", image_features), check.features("text_features", text_features)


def filtered(problem: Problem, filters: Filter | Sequence[Filter] | None) -> Problem:
    """The problem with the limits of all filters.

    Raises:
        TypeError: not a `Filter`.
        ValueError: two filters with features of their own, or one beside another second score matrix.
    """
    if filters is None:
        return problem
    several: list[Any] = list(filters) if isinstance(filters, (list, tuple)) else [filters]
    for each in several:
        if not isinstance(each, Filter):
            got = f"{type(each).__name__} {each!r}"
            raise TypeError(
                f"filters: got {got}, wanted fastvlm_loss.filters.absolute(...) or another, or a list of them"
            )
    m, n, dtype = problem.m, problem.n, problem.scale.dtype
    limits = problem.x.new_full((2, m), torch.inf, dtype=dtype), problem.x.new_full((2, n), torch.inf, dtype=dtype)
    with torch.no_grad():
        for each in several:
            own = each.image_features is None
            if each.image_features is not None and each.text_features is not None:
                names = "filters' image_features", "filters' text_features", "filters' scale"
                problem = problem.beside(
                    "guide", names, each.image_features.detach(), each.text_features.detach(), 1.0, problem.x.shape[0]
                )
            sides = _limits(each, problem, own)
            for limit, side in zip(limits, sides, strict=True):
                torch.minimum(limit[1 - own], side, out=limit[1 - own])
    return replace(problem, row_limit=limits[0], col_limit=limits[1])


def _limits(each: Filter, problem: Problem, own: bool) -> tuple[Tensor, Tensor]:
    x, y = (problem.x, problem.y) if own else (problem.teacher_x, problem.teacher_y)
    assert x is not None and y is not None
    m, n, dtype = problem.m, problem.n, problem.scale.dtype
    if each.rule == "similar":
        return x.new_full((m,), each.value, dtype=dtype), x.new_full((n,), each.value, dtype=dtype)
    positive = pair_products(x, y, problem.target, dtype, problem.shard)
    if problem.target is not None:
        positive = torch.where(problem.target >= 0, positive, torch.inf)
    of_columns = best_of_columns(positive, problem.target, n, -torch.inf)
    return _limit(each, positive), _limit(each, torch.where(of_columns == -torch.inf, torch.inf, of_columns))


def _limit(each: Filter, positive: Tensor) -> Tensor:
    if each.rule == "absolute":
        return positive + each.value
    if each.rule == "guide":
        return positive - each.value
    at_least = positive - each.value
    if each.rule == "relative":
        at_least = torch.where(positive > 0, each.value * positive, torch.inf)
    return torch.nextafter(at_least, torch.full_like(at_least, -torch.inf))  # what reaches it is dropped too
