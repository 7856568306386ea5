"""Image-text matching: the loss of a fusion encoder's match logits.

l = CE(x, y) = softplus(-(2 y - 1)(x_1 - x_0))       x [n, 2], class 1 is a match;  L = sum w l / sum w
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from ..distributed import eager_in_group, group_of
from ..scores import check
from ._reduce import REDUCTIONS, combine

__all__ = ["itm_loss", "match_loss"]


@eager_in_group
def itm_loss(
    logits: Tensor,
    labels: Tensor,
    weights: Tensor | None = None,
    *,
    reduction: Literal["mean", "sum", "none"] = "mean",
    group: object = None,
    check_finite: bool = False,
) -> Tensor:
    """Cross-entropy of match logits, of class 0 (no match) and class 1 (match).

    Use it on what the fusion encoder's head says of the pairs of `itm_batch`, with their labels and weights.

    Args:
        logits: `[n, 2]`, fp64, fp32, bf16 or fp16; or `[n, Q, 2]`, one pair of logits a query token, which are averaged
            over the Q tokens (BLIP-2).
        labels: int or bool `[n]`, 1 for a match, 0 for none; -1 takes a pair out, whatever its logits.
        weights: floating `[n]`, or None for ones.
        reduction: "mean", the weighted mean sum w l / sum w, 0 where no pair has weight; "sum" of w l, or "none".
        group: None, or a process group or `DeviceMesh` dimension: mean and sum are over the pairs of all its processes,
            as many as each has, and DDP's mean of the gradients is that of one process with all of them.
        check_finite: whether NaN or infinity in logits or weights raises (synchronises).

    Returns:
        fp32 scalar (fp64 for fp64 logits), or w l of each pair for reduction="none". Differentiable in logits and
        weights; no pairs give 0.

    Raises:
        TypeError, ValueError: an argument of the wrong kind, shape, dtype, device or range, named.

    Source: Li et al. 2021 (ALBEF), equation 4; Li et al. 2023 (BLIP-2), section 3.1.
    """
    check.choice("reduction", reduction, REDUCTIONS)
    if not isinstance(logits, Tensor) or logits.dtype not in check.DTYPES:
        got = logits.dtype if isinstance(logits, Tensor) else type(logits).__name__
        raise TypeError(f"logits: got {got}, wanted a floating tensor of shape [n, 2] or [n, Q, 2]")
    shape = list(logits.shape)
    if len(shape) not in (2, 3) or shape[-1] != 2 or 0 in shape[1:]:
        raise ValueError(f"logits: got shape {shape}, wanted [n, 2] or [n, Q, 2] with Q >= 1")
    dtype, n = torch.promote_types(logits.dtype, torch.float32), logits.shape[0]
    match = labels.to(torch.int64) if isinstance(labels, Tensor) and labels.dtype == torch.bool else labels
    match = check.indices("labels", match, logits, 2, low=-1, length=n)
    w = None if weights is None else check.vector("weights", weights, n, logits, dtype)
    if check.flag("check_finite", check_finite):
        check.finite("logits", logits)
        if w is not None:
            check.finite("weights", w)
    wide = logits.to(dtype)
    logit = wide[..., 1] - wide[..., 0]
    return match_loss(logit if logit.dim() == 1 else logit.mean(1), match, w, reduction, group)


def match_loss(logit: Tensor, labels: Tensor, weights: Tensor | None, reduction: str, group: object = None) -> Tensor:
    """The loss of x_1 - x_0 `[n]`, checked; labels -1, 0 or 1."""
    present = labels >= 0
    known, lengths = present.to(logit.dtype), (logit.shape[0], 0)
    losses = -F.logsigmoid(torch.where(present, torch.where(labels > 0, logit, -logit), 0.0))
    if group is None or reduction == "none":
        return combine(losses, known, lengths, (weights, None), reduction)
    weight = known if weights is None else known * weights
    sums = group_of(group).total(torch.stack([(losses * weight).sum(), weight.sum()]))
    return sums[0] if reduction == "sum" else sums[0] / torch.where(sums[1] == 0, 1.0, sums[1])
