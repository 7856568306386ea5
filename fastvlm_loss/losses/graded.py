"""InfoNCE against graded relevance: a few texts of each image match it, some more than others.

R_ij >= 0 is the relevance of text j to image i, of at most K texts of each image and 0 for all others
Q^image_ij = R_ij / sum_j R_ij      Q^text_ij = R_ij / sum_i R_ij
l^image_i = LSE_j s_ij - sum_j Q^image_ij s_ij      l^text_j = LSE_i s_ij - sum_i Q^text_ij s_ij
"""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor

from ..distributed import eager_in_group
from ..scores import check
from ._batch import Batch, insist_on
from ._grades import Grades, Rest
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
    grades = Grades.of(x, limit, relevant, relevance, check.flag("check_finite", check_finite))
    batch = Batch.of(
        image_features, text_features, logit_scale, None, labels=grades.labels, image_weights=image_weights,
        text_weights=text_weights, directions=directions, normalize=normalize, reduction=reduction, group=group,
        check_finite=check_finite,
    )  # fmt: skip
    p, n = batch.problem, batch.problem.n
    check.indices("relevant", grades.index.flatten(), x, below=max(n, 1))
    if not p.m or not n:
        t = batch.softmax()
        return batch.reduce(t.nll, t)
    rest = Rest.of(p, grades)
    known = rest.known(p)
    if check.flag("strict", strict):
        insist_on(known, (None, None), directions)
    t = batch.softmax(everyone=True)
    counts = [side for side, other in zip(known, ("text", "image"), strict=True) if directions != other]
    t = replace(t, targets=torch.cat(counts).to(grades.values.dtype))
    return batch.reduce(t.nll + p.scale * rest.products(p, directions), t)


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
