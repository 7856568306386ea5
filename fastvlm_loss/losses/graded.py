"""InfoNCE against graded relevance: a few texts of each image match it, some more than others.

R_ij >= 0 is the relevance of text j to image i, of at most K texts of each image and 0 for all others
Q^image_ij = R_ij / sum_j R_ij      Q^text_ij = R_ij / sum_i R_ij
l^image_i = LSE_j s_ij - sum_j Q^image_ij s_ij      l^text_j = LSE_i s_ij - sum_i Q^text_ij s_ij
"""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from ..distributed import eager_in_group
from ..scores import check
from ..scores.problem import Problem, statistics_dtype
from ..scores.travel import bags, entries
from ._batch import Batch, insist_on
from ._oracle import log_sum, matrix, mean_of, some_weights
from ._spec import Learned, LossSpec, register

__all__ = ["graded_clip_loss"]

NO_LIMIT = 2**62


@eager_in_group
def graded_clip_loss(
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: Tensor | float,
    *,
    relevant: Tensor,
    relevance: Tensor,
    image_weights: Tensor | None = None,
    text_weights: Tensor | None = None,
    directions: Literal["both", "image", "text"] = "both",
    normalize: bool = False,
    reduction: Literal["mean", "sum", "none"] = "mean",
    group: object = None,
    check_finite: bool = False,
    strict: bool = False,
) -> Tensor:
    """InfoNCE whose targets are given grades: each image has a few texts that match it, some more than others.

    Use it where annotators, or a model, have graded pairs: several captions of an image, near duplicates, clicks. Where
    the grades are a product of features for all pairs, `soft_target_clip_loss` takes those.

    The best text of each image is its target inside the tiles of scores, the others are O(M K D) beside them. Where all
    grades of an image but one are 0, it is `clip_loss` with labels. Near its optimum, where the softmax has come close
    to the grades, gradients of 16-bit features are the difference of two that are rounded to 16 bits.

    Args:
        image_features: `[M, D]`, `text_features`: `[N, D]`, `logit_scale`: as of `clip_loss`. A bias would cancel.
        relevant: int `[M, K]`, K >= 1, texts that match each image, -1 for none. What is named twice counts twice.
        relevance: floating `[M, K]`, their grades, in any unit. No gradient. What is negative or not finite counts as 0
            (with `check_finite` it is an error). An image whose grades are all 0 is dropped from the image direction, a
            text that no image has a grade for from the text direction; both stay candidates of the others.
        image_weights, text_weights, directions, normalize, reduction, check_finite, strict: as of `clip_loss`.
        group: as of `clip_loss`; `relevant` numbers the texts of all processes, in the order of their ranks. The texts'
            features are gathered, or travel, as those of `clip_loss`.

    Returns:
        fp32 scalar (fp64 for fp64 features), or per-sample losses for reduction="none". Differentiable in features,
        scale and weights. The least it can be is the entropy of the grades, not 0.

    Raises:
        TypeError, ValueError: an argument of the wrong kind, shape, dtype, device or range, named.

    Source: cross-entropy against a graded distribution; Li et al. 2021 (ALBEF), equation 6, with given targets.
    """
    x, y = check.features("image_features", image_features), check.features("text_features", text_features)
    limit = y.shape[0] if group is None else NO_LIMIT  # of a group it is known once the processes have met
    index, grades = _checked(x, limit, relevant, relevance, check.flag("check_finite", check_finite))
    best = F.one_hot(grades.argmax(1), grades.shape[1]).to(grades.dtype) * (grades.sum(1) > 0)[:, None]
    labels = torch.where(grades.sum(1) > 0, (index * best.to(torch.int64)).sum(1), -1)
    batch = Batch.of(
        image_features, text_features, logit_scale, None, labels=labels, image_weights=image_weights,
        text_weights=text_weights, directions=directions, normalize=normalize, reduction=reduction, group=group,
        check_finite=check_finite,
    )  # fmt: skip
    p, n = batch.problem, batch.problem.n
    check.indices("relevant", index.flatten(), x, below=max(n, 1))
    if not p.m or not n:
        t = batch.softmax()
        return batch.reduce(t.nll, t)
    parts = torch.stack([best, grades * best, grades * (1 - best)], 2)  # number and grade of targets, the other grades
    texts, of_texts = bags(index, n)
    sums_of_images, sums_of_texts = _rows(p, parts.sum(1)), _total(p, of_texts(parts.flatten(0, 1)))
    known = [sums[:, 1] + sums[:, 2] > 0 for sums in (sums_of_images, sums_of_texts)]
    if check.flag("strict", strict):
        insist_on((known[0], known[1]), (None, None), directions)
    t = batch.softmax(everyone=True)
    x, dtype = p.x.to(p.scale.dtype), p.scale.dtype
    beside: list[Tensor] = []
    if p.shard is not None and p.shard.ring:
        products = entries(p.x, p.y, index, p.shard.cols, p.shard, dtype)
        if directions != "text":
            beside.append(_rows(p, (_off(parts, parts.sum(1, keepdim=True)) * products).sum(1)))
        if directions != "image":
            off = _off(parts, sums_of_texts[index])
            beside.append(_total(p, of_texts((off * products).flatten()[:, None])[:, 0]))
    else:
        y = _all_texts(p).to(dtype)
        if directions != "text":
            off = _off(parts, parts.sum(1, keepdim=True))
            beside.append(_rows(p, (x * F.embedding_bag(index, y, per_sample_weights=off, mode="sum")).sum(1)))
        if directions != "image":
            off = _off(parts, sums_of_texts[index]).flatten()[texts]
            beside.append(_total(p, (y * of_texts(x, texts // index.shape[1], off)).sum(1)))
    counts = [side for side, other in zip(known, ("text", "image"), strict=True) if directions != other]
    t = replace(t, targets=torch.cat(counts).to(grades.dtype))
    return batch.reduce(t.nll + p.scale * torch.cat(beside), t)


def _rows(p: Problem, own: Tensor) -> Tensor:
    """Something of each own image, of all images."""
    return own if p.shard is None else p.shard.gather_rows(own)


def _total(p: Problem, own: Tensor) -> Tensor:
    """What the own images add to something of each text, of all images."""
    return own if p.shard is None else p.shard.collectives.total(own)


def _all_texts(p: Problem) -> Tensor:
    """The texts' features of the whole group, of which each process makes something else."""
    return p.y if p.shard is None else p.shard.collectives.spread(p.y, p.shard.cols)


def _off(parts: Tensor, sums: Tensor) -> Tensor:
    """What a tile takes of each entry, 1 over the number of targets, less its share of the grades `[M, K]`.

    Of a target alone it is the share of the others, which is 0 or keeps its digits; 1 less its own would not.
    """
    best, own, other = parts.unbind(2)
    number, targets, others = sums.unbind(2)
    number = number.clamp(min=1)
    return ((targets / number * best - own) + others / number * best - other) / _some(targets + others)


def _checked(x: Tensor, n: int, relevant: Tensor, relevance: Tensor, check_finite: bool) -> tuple[Tensor, Tensor]:
    """Indices and grades `[M, K]`, 0 and 0 for none."""
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
    return index.clamp(min=0), torch.where(counts, grades, 0.0)


def _some(sums: Tensor) -> Tensor:
    return torch.where(sums > 0, sums, 1.0)


def _oracle(
    image_features: Tensor, text_features: Tensor, logit_scale: Tensor | float, *, relevant: Tensor, relevance: Tensor,
    image_weights: Tensor | None = None, text_weights: Tensor | None = None, directions: str = "both",
    normalize: bool = False, reduction: str = "mean",
) -> Tensor:  # fmt: skip
    """The equation on the dense score matrix."""
    _, s = matrix(image_features, text_features, logit_scale, None, normalize)
    row = torch.arange(s.shape[0], device=s.device)[:, None].expand_as(relevant)
    r = torch.where(relevant >= 0, relevance, 0.0).to(s.dtype)
    if s.numel():
        r = torch.zeros_like(s).index_put((row, relevant.clamp(min=0)), r, accumulate=True)
    else:
        r = torch.zeros_like(s)

    def losses(both: Tensor, y: Tensor, live: Tensor) -> Tensor:
        s, r = both.unbind(2)
        total = r.sum(1, keepdim=True)
        return log_sum(s, live) - (r / torch.where(total > 0, total, 1.0) * s).sum(1)

    live = torch.ones_like(s, dtype=torch.bool)
    sides = (torch.stack([s, r], 2), r > 0, live), (torch.stack([s.T, r.T], 2), (r > 0).T, live.T)
    return mean_of(losses, sides, (image_weights, text_weights), directions, reduction)


def _relevant(m: int, n: int, device: torch.device, g: torch.Generator) -> Tensor:
    found = torch.randint(0, max(n, 1), (m, 3), generator=g)
    found[:, 0] = torch.arange(m) % max(n, 1)
    return found.masked_fill(torch.rand(m, 3, generator=g) < 0.2, -1).to(device)


def _relevance(m: int, n: int, device: torch.device, g: torch.Generator) -> Tensor:
    return torch.rand(m, 3, generator=g).to(device)


GRADES = {"relevant": _relevant, "relevance": _relevance}

SPEC = register(
    LossSpec(
        function=graded_clip_loss,
        oracle=_oracle,
        equation="½ mean_i H(R_i / Σ_j R_ij, P_i) + ½ mean_j H(R_j / Σ_i R_ij, P_j), R of at most K texts an image",
        paper="Li et al. 2021 (ALBEF), equation 6, with given targets",
        variants=(
            GRADES,
            {**GRADES, "directions": "image", "image_weights": Learned(some_weights)},
            {**GRADES, "directions": "text", "reduction": "sum"},
            {**GRADES, "image_weights": some_weights, "text_weights": some_weights, "reduction": "none"},
            {**GRADES, "normalize": True},
        ),
    )
)
