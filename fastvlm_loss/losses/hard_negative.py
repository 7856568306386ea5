"""Hardness-weighted negatives: HN-NCE, HCL and the debiased loss.

w_ij = n_i exp(beta s_ij) / sum_{k negative} exp(beta s_ik)          n_i negatives of row i
N_i = sum_{j negative} w_ij exp(s_ij);  debiased: max((N_i - tau n_i exp(s_ii)) / (1 - tau), n_i exp(-scale + bias))
l^image_i = log(alpha_pos exp(s_ii) + N_i) - s_ii      l^text_j likewise over the images; the mean of both
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor
from typing_extensions import Unpack

from ..distributed import eager_in_group
from ..engine import tile
from ..scores import check
from ._batch import Batch, Options
from ._oracle import entries, log_sum, matrix, mean_of, sides_of, some_ids, some_weights
from ._spec import LossSpec, register

__all__ = ["hard_negative_clip_loss"]


@eager_in_group
def hard_negative_clip_loss(
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: Tensor | float,
    logit_bias: Tensor | float | None = None,
    *,
    beta: float = 0.25,
    alpha_pos: float = 1.0,
    tau_plus: float = 0.0,
    detach_weights: bool = False,
    **options: Unpack[Options],
) -> Tensor:
    """InfoNCE in which harder negatives weigh more, in one sweep forward and one backward.

    Use it where most negatives are easy and `clip_loss` learns little from them. False negatives are hard ones too:
    where there are many give ids, filters or `tau_plus`. Start with a small `beta`: its effect grows with the scale.

    Args:
        image_features, text_features, logit_scale, logit_bias: as of `clip_loss`.
        beta: >= 0, a negative weighs in proportion to exp(beta * score); 0 with alpha_pos = 1 is `clip_loss`.
        alpha_pos: >= 0, weight of the positive among the candidates; 0 leaves it out (HCL's decoupled form).
        tau_plus: in [0, 1), the chance that a negative is a false one, whose part is subtracted (debiased; HCL).
        detach_weights: no gradient through the weights. False, as published, lets it through: easy negatives are then
            pulled in a little.
        **options: labels, image_ids, text_ids, filters, image_weights, text_weights, directions, normalize, reduction,
            metrics, negatives, group, check_finite, strict as of `clip_loss`. A sample without a negative is dropped.

    Returns:
        fp32 scalar (fp64 for fp64 features), or per-sample losses for reduction="none". Differentiable in features,
        scale, bias (it cancels: 0, or a rounding error with `tau_plus`) and weights.

    Raises:
        TypeError, ValueError: an argument of the wrong kind, shape, dtype, device or range, named.

    Source: Radenovic et al. 2023 (DiHT), equations 2 and 3; Robinson et al. 2021 (HCL), equation 4; Chuang et al. 2020
        (debiased), equation 8. A widely copied implementation divides row i by the sum of row j, sums the directions
        and shifts no exponential; here each row has its own sum, the directions are averaged and nothing overflows.
    """
    beta = check.number("beta", beta, low=0.0)
    alpha = check.number("alpha_pos", alpha_pos, low=0.0)
    tau = check.number("tau_plus", tau_plus, low=0.0, below=1.0)
    detached = check.flag("detach_weights", detach_weights)
    batch = Batch.of(image_features, text_features, logit_scale, logit_bias, **options)
    p = batch.problem
    numbers = torch.stack([torch.full_like(p.scale, v, requires_grad=False) for v in (beta, 0.0)])
    batch = batch.but(problem=replace(p, numbers=numbers))
    t = batch.softmax(hard=True, detached=detached)
    excess = t.nll  # log N_i - s_ii
    if tau:
        count = t.summary["negatives"].clamp(min=1).log()
        asked = t.statistic.rows, t.statistic.cols
        positive = torch.cat([side for side, wanted in zip(tile.positives(p), asked, strict=True) if wanted])
        left = 1 - tau * (count - excess).clamp(max=80).exp()  # what remains of N_i once false negatives are out
        least = count - p.scale - positive + (0.0 if p.bias is None else p.bias)
        most = excess + torch.where(left > 0, left, 1.0).log() - math.log1p(-tau)
        excess = torch.where((left <= 0) | (most <= least), least, most)  # NaN stays
    losses = excess if alpha == 0 else torch.logaddexp(excess, excess.new_full((), math.log(alpha)))
    return batch.reduce(losses if t.targets is None else torch.where(t.targets > 0, losses, 0.0), t)


def _oracle(
    image_features: Tensor, text_features: Tensor, logit_scale: Tensor | float,
    logit_bias: Tensor | float | None = None, *, beta: float = 0.25, alpha_pos: float = 1.0, tau_plus: float = 0.0,
    detach_weights: bool = False, labels: Tensor | None = None, image_ids: Tensor | None = None,
    text_ids: Tensor | None = None, image_weights: Tensor | None = None, directions: str = "both",
) -> Tensor:  # fmt: skip
    """The equation on the dense score matrix."""
    c, s = matrix(image_features, text_features, logit_scale, logit_bias)
    y, present, same = entries(c, labels, image_ids, text_ids)
    bottom = -logit_scale + (0.0 if logit_bias is None else logit_bias)

    def losses(z: Tensor, y: Tensor, negative: Tensor) -> Tensor:
        n = negative.sum(1).to(z.dtype)
        positive = (y * z).sum(1) / y.sum(1).clamp(min=1)
        z = z - positive[:, None]  # changes nothing on paper
        w = beta * z - log_sum(beta * z, negative)[:, None] + n.clamp(min=1).log()[:, None]
        excess = log_sum((w.detach() if detach_weights else w) + z, negative)
        if tau_plus:
            total = (excess.exp() - tau_plus * n) / (1 - tau_plus)
            excess = torch.maximum(total, n * torch.exp(bottom - positive)).log()
        own = torch.full_like(excess, alpha_pos).log()
        return torch.where(n > 0, torch.logaddexp(own, torch.where(n > 0, excess, 0.0)), 0.0)

    sides = sides_of(s, y, present & ~y & ~same)
    sides = tuple((z, y & live.any(1, keepdim=True), live) for z, y, live in sides)  # type: ignore[assignment]
    return mean_of(losses, sides, (image_weights, None), directions)


SPEC = register(
    LossSpec(
        function=hard_negative_clip_loss,
        oracle=_oracle,
        equation="mean log(α₊ e^{s_ii} + Σ_j ω_ij e^{s_ij}) − s_ii, ω_ij ∝ e^{β s_ij}, Σ_j ω_ij = n_i; both directions",
        paper="Radenovic et al. 2023 (DiHT), equations 2 and 3",
        variants=(
            {},
            {"beta": 0.5, "detach_weights": True, "image_ids": some_ids},
            {"beta": 0.0, "directions": "text"},
            {"beta": 1.0, "alpha_pos": 0.5, "image_ids": some_ids, "image_weights": some_weights},
            {"beta": 0.5, "tau_plus": 0.1},
            {"beta": 0.1, "tau_plus": 0.05, "directions": "image", "image_ids": some_ids},
            {"alpha_pos": 0.0, "image_ids": some_ids},
        ),
    )
)
