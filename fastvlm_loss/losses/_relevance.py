"""The relevance of images and texts: checked, of the whole group, over its mean and clamped."""

from __future__ import annotations

import warnings
from typing import NamedTuple

import torch
from torch import Tensor

from ..scores import check
from ..scores.problem import Problem
from ._batch import Options

__all__ = ["Relevance", "refuse"]

LOW, HIGH = 0.25, 4.0


class Relevance(NamedTuple):
    """Values of one side, and which of its samples are present (None for all)."""

    values: Tensor
    present: Tensor | None

    @classmethod
    def of(
        cls, p: Problem, image_relevance: Tensor, text_relevance: Tensor | None, learned: bool, raw: bool, finite: bool
    ) -> list[Relevance]:
        """That of the images, and of the texts if they have their own; `finite` checks the values (synchronises)."""
        named = [("image_relevance", image_relevance, p.x.shape[0], p.of_rows, p.row_id)]
        if text_relevance is not None:
            named.append(("text_relevance", text_relevance, p.y.shape[0], p.of_cols, p.col_id))
        given = [check.vector(name, r, size, p.x, p.scale.dtype) for name, r, size, *_ in named]
        for (name, *_), r in zip(named, given if finite else (), strict=finite):
            check.finite(name, r)
            if bool((r < 0).any()):
                raise ValueError(f"{name}: got {r.min().item():g}, wanted values >= 0")
        found = []
        for (name, _, _, gather, ids), r in zip(named, given, strict=True):
            whole, present = gather(r if learned else r.detach()), None if ids is None else ids != -1
            found.append(cls(whole if raw else _normalised(name, whole, present), present))
        return found

    def spread(self) -> Tensor:
        """Mean over those present of (log r)^2, which a learned relevance pays for."""
        return _mean(self.values.log().square(), self.present)


def refuse(
    mode: str, scope: str, text_relevance: Tensor | None, learned: bool, raw: bool, options: Options
) -> None:  # fmt: skip
    """Combinations without meaning."""
    text, directions = text_relevance is not None, options.get("directions")
    rules = (
        (mode == "weight" and scope != "anchor", f"scope: got {scope!r} beside mode='weight', wanted mode='logit'"),
        (text and scope != "anchor",
         f"text_relevance: got a value beside scope={scope!r}, wanted None or scope='anchor'"),
        (text and directions == "image", "text_relevance: got a value beside directions='image', wanted None"),
        (options.get("filters") is not None and scope == "shared",
         "filters: got a value beside scope='shared', whose scores have no cosine, wanted None"),
        (scope == "row" and directions == "text",
         "directions: got 'text' beside scope='row', wanted 'image' or 'both'"),
        (scope == "row" and options.get("text_weights") is not None,
         "text_weights: got a value beside scope='row', which has no text direction, wanted None"),
        (learned and raw,
         "raw: got True beside relevance_grad=True, wanted False: a trained relevance needs the clamp"),
        (learned and options.get("reduction") == "none",
         "reduction: got 'none' beside relevance_grad=True, wanted 'mean' or 'sum'"),
    )  # fmt: skip
    for wrong, message in rules:
        if wrong:
            raise ValueError(message)


def _normalised(name: str, r: Tensor, present: Tensor | None) -> Tensor:
    """Over its mean and clamped; samples that are not present count with neither."""
    r = torch.where((r >= 0) & (r < torch.inf), r, 0.0)
    mean = _mean(r, present)
    if r.numel() and check.readable(mean) and float(mean.detach()) == 0:
        warnings.warn(f"{name}: got no positive value, all count as 1", stacklevel=5)
    r = torch.where(mean > 0, r / torch.where(mean > 0, mean, 1.0), 1.0)
    return r.clamp(LOW, HIGH)


def _mean(values: Tensor, present: Tensor | None) -> Tensor:
    if present is None:
        return values.sum() / max(values.shape[0], 1)
    return torch.where(present, values, 0.0).sum() / present.sum().clamp(min=1)
