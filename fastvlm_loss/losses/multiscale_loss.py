"""The loss of multi-scale image-text matching.

L = CE of the match logit  eta S + b  on given pairs, as of itm_loss; S as of multiscale_itm
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from ..distributed import eager_in_group
from ..scores import check
from ._reduce import REDUCTIONS
from .itm import match_loss
from .itm_pairs import ITMBatch
from .multiscale import multiscale_itm

__all__ = ["multiscale_itm_loss"]


@eager_in_group
def multiscale_itm_loss(
    patch_features: Tensor,
    text_features: Tensor,
    pairs: ITMBatch,
    logit_scale: Tensor | float = 10.0,
    logit_bias: Tensor | float = -5.0,
    *,
    patch_relevance: Tensor | None = None,
    mode: Literal["soft", "hard", "mul"] = "soft",
    sharpness: float = 10.0,
    relevance_weight: float = 1.0,
    floor: float = 0.05,
    patch_mask: Tensor | None = None,
    reduction: Literal["mean", "sum", "none"] = "mean",
    group: object = None,
    check_finite: bool = False,
) -> Tensor:
    """Matching loss of the scores of `multiscale_itm` on given pairs.

    Use it beside a contrastive loss whose hard negatives make the pairs: `itm_batch(hard_negatives(...), ...)`. With a
    queue, its patches and texts stand behind the batch's own.

    Args:
        patch_features, text_features: as of `multiscale_itm`.
        pairs: `ITMBatch`: indices, labels and weights. A pair whose image has no patch is dropped.
        logit_scale, logit_bias: eta and b of the match logit eta S + b, tensors `[]` or `[1]` to be learned, which
            begin at 10 and -5; numbers otherwise.
        patch_relevance, mode, sharpness, relevance_weight, floor, patch_mask, check_finite: as of `multiscale_itm`.
        reduction, group: as of `itm_loss`. With a group features are what the pairs' indices point into: for those of
            `itm_batch(..., group=group)` the group's, of `fastvlm_loss.distributed.gathered`.

    Returns:
        fp32 scalar (fp64 for fp64 features), or of each pair for reduction="none". Differentiable in patches, texts,
        relevance, scale, bias and the pairs' weights.

    Raises:
        TypeError, ValueError: an argument of the wrong kind, shape, dtype, device or range, named.

    Source: as of `multiscale_itm`; the loss is that of Li et al. 2021 (ALBEF), equation 4.
    """
    check.choice("reduction", reduction, REDUCTIONS)
    if not isinstance(pairs, ITMBatch):
        raise TypeError(f"pairs: got {type(pairs).__name__}, wanted an ITMBatch, for instance of itm_batch")
    scores, valid = multiscale_itm(
        patch_features, text_features, patch_relevance, image_index=pairs.image_index, text_index=pairs.text_index,
        mode=mode, sharpness=sharpness, relevance_weight=relevance_weight, floor=floor, patch_mask=patch_mask,
        check_finite=check_finite,
    )  # fmt: skip
    n = scores.shape[0]
    labels = check.indices("labels", pairs.labels, scores, 2, low=-1, length=n)
    weights = check.vector("weights", pairs.weights, n, scores, scores.dtype)
    scale = check.scalar("logit_scale", logit_scale, scores, scores.dtype)
    logit = scale * scores + check.scalar("logit_bias", logit_bias, scores, scores.dtype)
    return match_loss(logit, torch.where(valid, labels, -1), weights, reduction, group)
