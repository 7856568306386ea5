"""InfoNCE with learnable temperature, symmetric over images and texts.

s_ij = logit_scale * <image_i, text_j> + logit_bias
l^image_i = LSE_{j in V_i} s_ij - (1 - eps) s_i,pos - eps mean_{j in V_i} s_ij     l^text_j likewise over i
L = ( sum_i w_i l^image_i / sum_i w_i + sum_j v_j l^text_j / sum_j v_j ) / 2
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from ..engine import tile
from ..scores import check
from ..scores.problem import Problem
from ._oracle import matrix, some_ids
from ._reduce import DIRECTIONS, REDUCTIONS, combine, unit_features
from ._spec import LossSpec, register

__all__ = ["clip_loss"]


def clip_loss(
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: Tensor | float,
    logit_bias: Tensor | float | None = None,
    *,
    labels: Tensor | None = None,
    label_smoothing: float = 0.0,
    image_ids: Tensor | None = None,
    text_ids: Tensor | None = None,
    image_weights: Tensor | None = None,
    text_weights: Tensor | None = None,
    directions: Literal["both", "image", "text"] = "both",
    normalize: bool = False,
    reduction: Literal["mean", "sum", "none"] = "mean",
    group: None = None,
    check_finite: bool = False,
) -> Tensor:
    """Contrastive loss of CLIP (InfoNCE in both directions) without the M x N score matrix.

    Args:
        image_features: `[M, D]`, fp64, fp32, bf16 or fp16; L2-normalised by the caller, or `normalize=True`.
            Under autocast they are cast to its dtype, as a matmul's operands are.
        text_features: `[N, D]`, same dtype and device.
        logit_scale: multiplicative inverse temperature alpha > 0 (`exp` of CLIP's parameter), a number or a tensor
            of shape `[]` or `[1]`, differentiable.
        logit_bias: added to every score; cancels in this loss (its gradient is exactly 0). Number or tensor.
        labels: int `[M]`, the text of each image, -1 for none; None pairs image i with text i (M = N). A text
            with several images takes the mean over them; one with none is dropped from the text direction.
        label_smoothing: eps in [0, 1), mass spread evenly over the valid candidates.
        image_ids, text_ids: int `[M]`, `[N]`. An equal id marks a false negative: the entry leaves the candidates
            unless it is the target. -1 takes a sample out of the loss (NaN in its features still reaches the
            gradients). One of them alone serves both, where there are no labels.
        image_weights, text_weights: `[M]`, `[N]`, weight of each anchor in its direction's mean; a weight of 0
            removes the anchor, not the negative. Meant to be >= 0; not checked.
        directions: "both", "image" (each image chooses among the texts) or "text".
        normalize: L2-normalise the features first (differentiably).
        reduction: "mean" (weighted mean of each direction, then their mean), "sum", or "none" (`[M]`; `[N]` for
            directions="text"; both directions need M = N).
        group: must be None; the loss over a process group is not part of this version.
        check_finite: raise on NaN or infinity in the features, naming the row (synchronises on a GPU).

    Returns:
        fp32 scalar (fp64 for fp64 features), or per-sample losses for reduction="none". Differentiable in features,
        scale, bias and weights; empty batches give 0.

    Raises:
        TypeError, ValueError: an argument of the wrong kind, shape, dtype, device or range, named.

    Source: Radford et al. 2021 (CLIP), figure 3; van den Oord et al. 2018 (InfoNCE), equation 4.
    """
    check.choice("directions", directions, DIRECTIONS)
    check.choice("reduction", reduction, REDUCTIONS)
    eps = check.number("label_smoothing", label_smoothing, low=0.0, below=1.0)
    if group is not None:
        raise ValueError(f"group: got {type(group).__name__}, wanted None (one process; gather the features yourself)")
    if check.flag("normalize", normalize):
        image_features, text_features = unit_features(image_features, text_features)
    problem = Problem.of(
        image_features, text_features, logit_scale, logit_bias,
        labels=labels, image_ids=image_ids, text_ids=text_ids, check_finite=check_finite,
    )  # fmt: skip
    m, n = problem.x.shape[0], problem.y.shape[0]
    if reduction == "none" and directions == "both" and m != n:
        raise ValueError(f"reduction: got 'none' for {m} images and {n} texts, wanted one direction, or M = N")
    dtype = problem.scale.dtype
    weights = (
        None if image_weights is None else check.vector("image_weights", image_weights, m, problem.x, dtype),
        None if text_weights is None else check.vector("text_weights", text_weights, n, problem.x, dtype),
    )
    if check.flag("check_finite", check_finite):
        for name, w in zip(("image_weights", "text_weights"), weights, strict=True):
            if w is not None:
                check.finite(name, w)
    t = tile.softmax(problem, rows=directions != "text", cols=directions != "image", gap=eps > 0)
    losses = t.nll if t.gap is None else t.nll + eps * t.gap
    return combine(losses, t.targets, t.lengths, weights, reduction)


def _oracle(
    image_features: Tensor, text_features: Tensor, logit_scale: Tensor | float,
    logit_bias: Tensor | float | None = None, *, labels: Tensor | None = None, label_smoothing: float = 0.0,
    image_ids: Tensor | None = None, text_ids: Tensor | None = None, image_weights: Tensor | None = None,
    text_weights: Tensor | None = None, directions: str = "both", normalize: bool = False, reduction: str = "mean",
) -> Tensor:  # fmt: skip
    """The equation on the dense score matrix."""
    s, y, present, same = matrix(
        image_features, text_features, logit_scale, logit_bias, labels, image_ids, text_ids, normalize
    )
    v = present & (y | ~same)
    results = []
    for z, pos, live, w, wanted in (
        (s, y, v, image_weights, directions != "text"),
        (s.T, y.T, v.T, text_weights, directions != "image"),
    ):
        if not wanted:
            continue
        w = pos.any(1).to(s.dtype) * (1.0 if w is None else w)
        live = live | ~pos.any(1, keepdim=True)  # weight 0: any finite value will do
        pos, share = pos.to(s.dtype), live.to(s.dtype)
        q = (1 - label_smoothing) * pos / pos.sum(1, keepdim=True).clamp(min=1)
        q = q + label_smoothing * share / share.sum(1, keepdim=True)
        losses = w * (z.masked_fill(~live, -torch.inf).logsumexp(1) - (q * z).sum(1))
        mean = losses.sum() / torch.where(w.sum() == 0, 1.0, w.sum())
        results.append({"none": losses, "sum": losses.sum(), "mean": mean}[reduction])
    return results[0] if len(results) == 1 else (results[0] + results[1]) / 2


def _weights(m: int, n: int, device: torch.device, g: torch.Generator) -> Tensor:
    return torch.rand(m, generator=g).mul(2).masked_fill(torch.rand(m, generator=g) < 0.2, 0.0).to(device)


SPEC = register(
    LossSpec(
        function=clip_loss,
        oracle=_oracle,
        equation="½ mean_i [LSE_j s_ij − s_ii] + ½ mean_j [LSE_i s_ij − s_jj]",
        paper="Radford et al. 2021, figure 3",
        variants=(
            {},
            {"label_smoothing": 0.1},
            {"image_ids": some_ids},
            {"image_ids": some_ids, "label_smoothing": 0.2, "image_weights": _weights, "text_weights": _weights},
            {"directions": "image"},
            {"directions": "text", "label_smoothing": 0.1},
            {"reduction": "sum", "image_weights": _weights},
            {"reduction": "none", "text_ids": some_ids},
            {"normalize": True},
        ),
    )
)
