"""What the softmax losses share: their common options, checked once, and the way from statistics to the loss."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from torch import Tensor
from typing_extensions import TypedDict

from ..distributed import shard_of
from ..engine import tile
from ..engine.tile import SoftmaxTile
from ..scores import check
from ..scores.filters import Filter, filtered
from ..scores.problem import Problem
from ..scores.shard import Shard
from ._metrics import BatchMetrics
from ._negatives import BatchNegatives
from ._reduce import DIRECTIONS, REDUCTIONS, combine, sample_weights, unit_features

__all__ = [
    "Batch",
    "Options",
    "PairOptions",
    "SampleOptions",
    "insist",
    "insist_on",
    "refuse",
    "sharding_of",
    "smoothing",
]

POSITIVES = ("mask", "out", "in")


class PairOptions(TypedDict, total=False):
    """Options of whole images and texts, however they are scored, as `clip_loss` documents them."""

    labels: Tensor | None
    image_ids: Tensor | None
    text_ids: Tensor | None
    image_weights: Tensor | None
    text_weights: Tensor | None
    directions: Literal["both", "image", "text"]
    normalize: bool
    metrics: BatchMetrics | None
    group: object
    check_finite: bool
    strict: bool


class SampleOptions(PairOptions, total=False):
    """Options of which anchors and candidates take part, as `clip_loss` documents them."""

    filters: Filter | Sequence[Filter] | None
    negatives: BatchNegatives | None


class Options(SampleOptions, total=False):
    """Options that every softmax loss has, as `clip_loss` documents them."""

    reduction: Literal["mean", "sum", "none"]


@dataclass(frozen=True)
class Batch:
    """A problem with the weights of its anchors and what is to be made of their losses."""

    problem: Problem
    weights: tuple[Tensor | None, Tensor | None]
    directions: str
    reduction: str
    metrics: BatchMetrics | None
    negatives: BatchNegatives | None
    filters: bool

    @classmethod
    def of(
        cls, image_features: Tensor, text_features: Tensor, logit_scale: Tensor | float,
        logit_bias: Tensor | float | None, *, labels: Tensor | None = None, image_ids: Tensor | None = None,
        text_ids: Tensor | None = None, filters: Filter | Sequence[Filter] | None = None,
        image_weights: Tensor | None = None, text_weights: Tensor | None = None, directions: str = "both",
        normalize: bool = False, reduction: str = "mean", metrics: BatchMetrics | None = None,
        negatives: BatchNegatives | None = None, group: object = None, check_finite: bool = False,
        strict: bool = False, positives: str = "mask", agreed: tuple[object, ...] = (), tokens: int = 1,
        **unknown: object,
    ) -> Batch:  # fmt: skip
        """Check the public arguments.

        In a group `agreed` is what else must be the same in its processes, and each text has `tokens` features to send.
        """
        refuse(unknown)
        check.choice("directions", directions, DIRECTIONS)
        for name, w, other in (("image_weights", image_weights, "text"), ("text_weights", text_weights, "image")):
            if w is not None and directions == other:
                raise ValueError(
                    f"{name}: got weights beside directions={other!r}, which has no such anchors, wanted None"
                )
        check.choice("reduction", reduction, REDUCTIONS)
        if metrics is not None and not isinstance(metrics, BatchMetrics):
            raise TypeError(f"metrics: got {type(metrics).__name__}, wanted a fastvlm_loss.BatchMetrics to fill")
        if negatives is not None and not isinstance(negatives, BatchNegatives):
            raise TypeError(f"negatives: got {type(negatives).__name__}, wanted a fastvlm_loss.BatchNegatives to fill")
        if negatives is not None and directions != "both":
            raise ValueError(f"negatives: got them beside directions={directions!r}, wanted 'both'")
        if check.flag("normalize", normalize):
            image_features, text_features = unit_features(image_features, text_features)
        problem = Problem.of(
            image_features, text_features, logit_scale, logit_bias,
            labels=labels, image_ids=image_ids, text_ids=text_ids, check_finite=check_finite,
            sharding=sharding_of(
                group, labels, image_ids, text_ids, image_weights, text_weights, logit_bias, filters, metrics,
                negatives, directions, reduction, positives, bool(normalize), bool(strict), bool(check_finite),
                *agreed, tokens=tokens,
            ),
        )  # fmt: skip
        if check.flag("strict", strict):
            insist(problem, positives, directions)
        m, n = problem.m, problem.n
        if reduction == "none" and directions == "both" and m != n:
            raise ValueError(f"reduction: got 'none' for {m} images and {n} texts, wanted one direction, or M = N")
        weights = sample_weights(problem, image_weights, text_weights, check.flag("check_finite", check_finite))
        if check_finite:
            for rule in filters if isinstance(filters, (list, tuple)) else [filters]:
                if isinstance(rule, Filter) and rule.image_features is not None and rule.text_features is not None:
                    check.finite("filters' image_features", rule.image_features)
                    check.finite("filters' text_features", rule.text_features)
        return cls(filtered(problem, filters), weights, directions, reduction, metrics, negatives, filters is not None)

    def but(self, **changes: Any) -> Batch:
        """The same with other fields."""
        return replace(self, **changes)

    def softmax(self, **options: Any) -> SoftmaxTile:
        """`tile.softmax` in the directions asked for, by-products delivered."""
        rows, cols = self.directions != "text", self.directions != "image"
        if self.negatives is not None:
            options["selection"] = self.negatives.selection(self.problem)
        t = tile.softmax(self.problem, rows=rows, cols=cols, hardest=self.metrics is not None, **options)
        if self.negatives is not None:
            self.negatives.fill(t, self.problem)
        if self.metrics is not None:
            self.metrics.fill(t, self.problem.m, self.problem.n, self.filters)
        return t

    def smoothed(self, t: SoftmaxTile, eps: float) -> Tensor:
        """The loss of InfoNCE with the mass `eps` of every target spread over the candidates."""
        return self.reduce(t.nll if t.gap is None else t.nll + eps * t.gap, t)

    def reduce(self, losses: Tensor, t: SoftmaxTile) -> Tensor:
        """The loss of per-sample losses `[L]`."""
        loss, shard = combine(losses, t.targets, t.lengths, self.weights, self.reduction), self.problem.shard
        if shard is None or self.reduction != "none":
            return loss
        return shard.collectives.own(loss, shard.cols if self.directions == "text" else shard.rows)


def refuse(unknown: Iterable[str]) -> None:
    """Raise for options that a loss does not have: of `**options` Python itself takes any."""
    for name in unknown:
        raise TypeError(f"{name}: got an option that this loss does not have, see its documentation")


def smoothing(label_smoothing: object, positives: object = "mask") -> float:
    """The checked `label_smoothing`, and what `positives` has to be beside it."""
    check.choice("positives", positives, POSITIVES)
    eps = check.number("label_smoothing", label_smoothing, low=0.0, below=1.0)
    if eps and positives == "in":
        raise ValueError("label_smoothing: got a number above 0 beside positives='in', wanted 'mask' or 'out'")
    return eps


def insist(problem: Problem, positives: str, directions: str) -> None:
    """Raise unless every image and text that takes part has a positive (synchronises on a GPU)."""
    counts = problem.targets() if positives == "mask" else problem.positives()
    insist_on(counts, (problem.row_id, problem.col_id), directions)


def insist_on(
    counts: tuple[Tensor | None, Tensor | None], of: tuple[Tensor | None, Tensor | None], directions: str
) -> None:
    """The same, from how many each has (None: one) and the ids `of` them."""
    for name, count, ids, other in zip(("images", "texts"), counts, of, ("text", "image"), strict=True):
        if count is None or directions == other:
            continue
        lost = count == 0 if ids is None else (count == 0) & (ids != -1)
        if bool(lost.any()):
            found = f"{int(lost.sum())} of {lost.shape[0]} {name} without a positive, the first at index"
            raise ValueError(f"strict: got {found} {int(lost.int().argmax())}, wanted one for each")


def sharding_of(group: object, *options: object, tokens: int = 1) -> Callable[[Tensor, Tensor], Shard] | None:
    """How features find their place in a group; which options are given must agree in all its processes."""
    if group is None:
        return None
    given = [option if isinstance(option, (str, bool, int, float)) else option is None for option in options]
    return lambda x, y: shard_of(group, x, y, given, tokens=tokens)
