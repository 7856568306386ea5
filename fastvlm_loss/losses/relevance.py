"""Relevance-weighted InfoNCE: each pair has a relevance r >= 0, as a weight of its loss or a factor of its scores.

r <- clamp(r / mean(r), 1/4, 4)
mode "weight"                   L as of clip_loss with the weights w_i = r_i of the images and v_j = r_j of the texts
mode "logit", scope "anchor"    row i of the image direction has the scores r_i s_ij, column j of the other r_j s_ij
              scope "row"       r_i s_ij, image direction alone: the literal form
              scope "shared"    r_i s_ij in both directions: images compete at different temperatures
relevance_grad adds             regularizer * mean (log r)^2
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor
from typing_extensions import Unpack

from ..distributed import eager_in_group
from ..scores import check
from ._batch import Batch, Options, smoothing
from ._oracle import cross_entropy, entries, matrix, mean_of, sides_of, some_ids, some_relevance, some_text_relevance
from ._relevance import Relevance, refuse
from ._spec import Learned, LossSpec, register

__all__ = ["relevance_clip_loss"]


@eager_in_group
def relevance_clip_loss(
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: Tensor | float,
    logit_bias: Tensor | float | None = None,
    *,
    image_relevance: Tensor,
    text_relevance: Tensor | None = None,
    mode: Literal["weight", "logit"] = "weight",
    scope: Literal["anchor", "row", "shared"] = "anchor",
    raw: bool = False,
    relevance_grad: bool = False,
    regularizer: float = 0.1,
    label_smoothing: float = 0.0,
    **options: Unpack[Options],
) -> Tensor:
    """InfoNCE in which some pairs matter more than others.

    Use it when a score of each pair says how much it should count. `mode="weight"` is what "more relevant is more
    important" asks for: r weighs each anchor's loss; the anchor stays a negative of the others.

    `mode="logit"` is no weight but an inverse temperature of each row: with `raw`, r = 0 gives log N and no gradient,
    and a negative r repels. The reference document's form is `mode="logit", scope="row", raw=True`, the image direction
    alone; its multiplication by the temperature and its unguarded gradient into r are not reproduced.

    Args:
        image_features, text_features, logit_scale, logit_bias: as of `clip_loss`.
        image_relevance: `[M]`, >= 0. Divided by its mean and clamped to [1/4, 4] unless `raw`; what is negative or not
            finite counts as 0 (with `check_finite` not finite is an error); a mean of 0 makes all 1, with a warning.
        text_relevance: `[N]`, likewise; None takes that of the images (M = N). Not with scope "row" or "shared".
        mode: "weight" or "logit".
        scope: of mode "logit". With "shared" 16-bit features are multiplied in fp32, which is slower.
        raw: take the relevance as it is.
        relevance_grad: whether the relevance has a gradient. A trained relevance is degenerate (descent raises it where
            the task is easy), so this needs the clamp (not `raw`) and adds the regularizer.
        regularizer: >= 0.1, the weight of mean (log r)^2.
        label_smoothing: as of `clip_loss`.
        **options: labels, image_ids, text_ids, filters, image_weights, text_weights, directions, normalize, reduction,
            metrics, negatives, group, check_finite, strict as of `clip_loss`. Weights multiply the relevance in mode
            "weight".

    Returns:
        fp32 scalar (fp64 for fp64 features), or per-sample losses for reduction="none". Differentiable in features,
        scale, bias, weights and, if asked, relevance. The bias cancels, but not with scope "shared".

    Raises:
        TypeError, ValueError: an argument of the wrong kind, shape, dtype, device or range, or a combination without
            meaning, named.

    Source: the relevance-weighted objective of this project's reference document; specification sections 3a to 3c.
    """
    check.choice("mode", mode, ("weight", "logit"))
    check.choice("scope", scope, ("anchor", "row", "shared"))
    check.number("regularizer", regularizer, low=0.1)
    eps = smoothing(label_smoothing)
    learned, raw = check.flag("relevance_grad", relevance_grad), check.flag("raw", raw)
    refuse(mode, scope, text_relevance, learned, raw, options)
    if scope == "row":
        options["directions"] = "image"
    batch = Batch.of(image_features, text_features, logit_scale, logit_bias, **options)
    p, (m, n) = batch.problem, (len(image_features), len(text_features))
    if text_relevance is None and m != n and scope == "anchor" and batch.directions != "image":
        raise ValueError(f"text_relevance: got None for {m} images and {n} texts, wanted shape [{n}]")
    if scope == "shared" and batch.negatives is not None:
        raise ValueError(
            "negatives: got them beside scope='shared', whose scores are scaled, wanted hard_negatives(...)"
        )
    sides = Relevance.of(p, image_relevance, text_relevance, learned, raw, bool(options.get("check_finite")))
    rows, cols = sides[0].values, sides[-1].values if len(sides[-1].values) == p.n else None
    if mode == "weight":
        own = tuple(r if w is None or r is None else r * w for r, w in zip((rows, cols), batch.weights, strict=True))
        batch = batch.but(weights=own)
    elif scope == "shared":
        batch = batch.but(problem=p.tempered_rows(rows))
    else:
        batch = batch.but(problem=p.weighted(rows, None if scope == "row" else cols))
    loss = batch.smoothed(batch.softmax(gap=eps > 0), eps)
    return loss + regularizer * torch.stack([side.spread() for side in sides]).mean() if learned else loss


def _oracle(
    image_features: Tensor, text_features: Tensor, logit_scale: Tensor | float,
    logit_bias: Tensor | float | None = None, *, image_relevance: Tensor, text_relevance: Tensor | None = None,
    mode: str = "weight", scope: str = "anchor", raw: bool = False, relevance_grad: bool = False,
    regularizer: float = 0.1, label_smoothing: float = 0.0, image_ids: Tensor | None = None,
    labels: Tensor | None = None, text_ids: Tensor | None = None, directions: str = "both",
) -> Tensor:  # fmt: skip
    """The equation on the dense score matrix."""
    c, s = matrix(image_features, text_features, logit_scale, logit_bias)
    y, present, same = entries(c, labels, image_ids, text_ids)
    both = [image_relevance, image_relevance if text_relevance is None else text_relevance]
    row_id, col_id = (text_ids if image_ids is None else image_ids), (image_ids if text_ids is None else text_ids)
    here = [torch.ones_like(v) if i is None else (i != -1).to(v) for v, i in zip(both, (row_id, col_id), strict=True)]

    def mean(v: Tensor, w: Tensor) -> Tensor:
        return (v * w).sum() / w.sum().clamp(min=1)

    means = [torch.where(w.any(), mean(v, w), 1.0) for v, w in zip(both, here, strict=True)]
    r, k = both if raw else (torch.clamp(v / q, 0.25, 4.0) for v, q in zip(both, means, strict=True))

    def losses(z: Tensor, y: Tensor, live: Tensor) -> Tensor:
        return cross_entropy(z, y, live, label_smoothing)

    row, col = sides_of(s, y, present & (y | ~same))
    weights: Any = (None, None)
    if mode == "weight":
        weights = (r, k)
    else:
        shared = scope == "shared"
        row = (r[:, None] * row[0], *row[1:])
        col = ((r[None] if shared else k[:, None]) * col[0], *col[1:])
    loss = mean_of(losses, (row, col), weights, "image" if scope == "row" else directions)
    if relevance_grad:
        loss = loss + regularizer * (mean(r.log().square(), here[0]) + mean(k.log().square(), here[1])) / 2
    return loss


SPEC = register(
    LossSpec(
        function=relevance_clip_loss,
        oracle=_oracle,
        equation="½ Σ_i r_i ℓ_i / Σ r + ½ Σ_j r_j ℓ_j / Σ r, or ℓ of the scores r_i s_ij",
        paper="this project; with weights an importance-weighted mean, with factors a temperature of each sample",
        variants=(
            {"image_relevance": some_relevance},
            {"image_relevance": Learned(some_relevance), "relevance_grad": True, "image_ids": some_ids},
            {"image_relevance": some_relevance, "mode": "logit"},
            {"image_relevance": Learned(some_relevance), "text_relevance": Learned(some_text_relevance),
             "mode": "logit", "relevance_grad": True, "label_smoothing": 0.1},
            {"image_relevance": some_relevance, "mode": "logit", "scope": "row", "raw": True},
            {"image_relevance": some_relevance, "mode": "logit", "scope": "shared", "image_ids": some_ids},
        ),
        not_square={"text_relevance": some_text_relevance},
    )
)  # fmt: skip
