"""Sigmoid loss: every pair is a question of its own, match or not, with learnable temperature and bias.

s_ij = logit_scale * <image_i, text_j> + logit_bias          y_ij = 1 for a match, else 0
L = 1/M sum_ij [ softplus(s_ij) - y_ij s_ij ]
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from ..distributed import eager_in_group
from ..engine import tile
from ..scores import check
from ..scores.problem import Problem
from ._batch import sharding_of
from ._oracle import entries, matrix, some_ids, some_weights
from ._reduce import sample_weights, unit_features
from ._spec import Learned, LossSpec, register

__all__ = ["siglip_loss"]


@eager_in_group
def siglip_loss(
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: Tensor | float,
    logit_bias: Tensor | float | None = None,
    *,
    labels: Tensor | None = None,
    image_ids: Tensor | None = None,
    text_ids: Tensor | None = None,
    image_weights: Tensor | None = None,
    text_weights: Tensor | None = None,
    normalize: bool = False,
    reduction: Literal["mean", "sum"] = "mean",
    group: object = None,
    check_finite: bool = False,
) -> Tensor:
    """Sigmoid loss of SigLIP without the M x N score matrix, value and gradients from one sweep over the scores.

    Use it where pairs are to be judged one by one: the gradient of a score depends on no other pair of the batch, an
    image may have several matches or none, and the bias carries how rare matches are.

    Args:
        image_features: `[M, D]`, fp64, fp32, bf16 or fp16; L2-normalised by the caller, or `normalize=True`.
            Under autocast they are cast to its dtype, as a matmul's operands are.
        text_features: `[N, D]`, same dtype and device.
        logit_scale: multiplicative inverse temperature > 0 (`exp` of the parameter, 10 to begin with), a number or a
            tensor of shape `[]` or `[1]`, differentiable.
        logit_bias: added to every score (-10 to begin with), number or tensor, differentiable.
        labels: int `[M]`, the text of each image, -1 for none; None pairs image i with text i (M = N).
        image_ids, text_ids: int `[M]`, `[N]`. Equal ids are matches too, all of them; -1 takes a sample out of the
            loss, not out of the mean. One of them alone serves both, where there are no labels.
        image_weights, text_weights: `[M]`, `[N]`, the loss of pair ij counts image_weights_i * text_weights_j times.
            Meant to be >= 0; not checked. Differentiable, for another product where they are learned.
        normalize: L2-normalise the features first (differentiably).
        reduction: "mean" (the sum over all pairs divided by M, as published, or by the sum of the image weights; no
            weight at all gives 0) or "sum".
        group: as of `clip_loss`.
        check_finite: raise on NaN or infinity in the features, naming the row (synchronises on a GPU).

    Returns:
        fp32 scalar (fp64 for fp64 features), differentiable in features, scale, bias and weights; empty
        batches give 0.

    Raises:
        TypeError, ValueError: an argument of the wrong kind, shape, dtype, device or range, named.

    Source: Zhai et al. 2023 (SigLIP), equation 1.
    """
    check.choice("reduction", reduction, ("mean", "sum"))
    if check.flag("normalize", normalize):
        image_features, text_features = unit_features(image_features, text_features)
    problem = Problem.of(
        image_features, text_features, logit_scale, logit_bias,
        labels=labels, image_ids=image_ids, text_ids=text_ids, check_finite=check_finite,
        sharding=sharding_of(group, labels, image_ids, text_ids, image_weights, text_weights, logit_bias, reduction),
    )  # fmt: skip
    weights = sample_weights(problem, image_weights, text_weights, check.flag("check_finite", check_finite))
    if image_weights is not None or text_weights is not None:
        problem = problem.weighted(*weights)
    total = tile.sigmoid(problem)
    if reduction == "sum":
        return total
    if problem.row_factor is None or image_weights is None:
        return total / max(problem.m, 1)
    weight = problem.row_factor.sum()
    return total / torch.where(weight == 0, 1.0, weight)


def _oracle(
    image_features: Tensor, text_features: Tensor, logit_scale: Tensor | float,
    logit_bias: Tensor | float | None = None, *, labels: Tensor | None = None, image_ids: Tensor | None = None,
    text_ids: Tensor | None = None, image_weights: Tensor | None = None, text_weights: Tensor | None = None,
    normalize: bool = False, reduction: str = "mean",
) -> Tensor:  # fmt: skip
    """The equation on the dense score matrix."""
    c, s = matrix(image_features, text_features, logit_scale, logit_bias, normalize)
    y, present, same = entries(c, labels, image_ids, text_ids)
    w = s.new_ones(s.shape[0]) if image_weights is None else image_weights
    v = s.new_ones(s.shape[1]) if text_weights is None else text_weights
    # not softplus, which is linear beyond 20
    losses = -torch.where(present, F.logsigmoid(torch.where(y | same, s, -s)), 0.0) * w[:, None] * v
    return losses.sum() / torch.where(w.sum() == 0, 1.0, w.sum()) if reduction == "mean" else losses.sum()


SPEC = register(
    LossSpec(
        function=siglip_loss,
        oracle=_oracle,
        equation="1/M Σ_ij softplus((1 − 2 y_ij) s_ij)",
        paper="Zhai et al. 2023, equation 1",
        variants=(
            {},
            {"image_ids": some_ids},
            {"reduction": "sum", "image_weights": some_weights},
            {"text_ids": some_ids, "image_weights": some_weights, "text_weights": some_weights},
            {"text_ids": some_ids, "normalize": True},
            {"reduction": "sum", "text_weights": Learned(some_weights)},
            {"image_weights": Learned(some_weights), "text_weights": Learned(some_weights), "image_ids": some_ids},
        ),
        cost=(1, 3),
    )
)
