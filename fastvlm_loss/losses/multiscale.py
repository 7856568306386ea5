"""Multi-scale image-text matching: a text against the patches of an image, with a relevance of each patch as a prior.

c_p = <x_p, y>, r_p in (0, 1] the relevance, s the sharpness, a the relevance's weight
soft   S = ( LSE_p [s c_p + a log r_p] - LSE_p [a log r_p] ) / s
hard   S = max_p [c_p + a/s log r_p]
mul    S = max_p r_p c_p
L      = CE of the match logit  eta S + b  on the pairs, as of itm_loss
"""

from __future__ import annotations

import warnings
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..distributed import eager_in_group
from ..engine.pair_products import pair_products
from ..scores import check
from ._reduce import REDUCTIONS
from .itm import ITMBatch, match_loss

__all__ = ["MultiscaleScores", "multiscale_itm", "multiscale_itm_loss"]


class MultiscaleScores(NamedTuple):
    """Scores of pairs.

    Attributes:
        scores: fp32 `[n]` (fp64 for fp64 features), 0 where the image has no patch.
        valid: bool `[n]`, whether it has one.
    """

    scores: Tensor
    valid: Tensor


def multiscale_itm(
    patch_features: Tensor,
    text_features: Tensor,
    patch_relevance: Tensor | None = None,
    *,
    image_index: Tensor | None = None,
    text_index: Tensor | None = None,
    mode: Literal["soft", "hard", "mul"] = "soft",
    sharpness: float = 10.0,
    relevance_weight: float = 1.0,
    floor: float = 0.05,
    patch_mask: Tensor | None = None,
    check_finite: bool = False,
) -> MultiscaleScores:
    """How well a text matches an image by its patches, of which some are more relevant than others.

    Use it where a text may be about a part of the image: the score is that of its best patches. Relevance is a prior on
    which patch is meant, log r beside the product, so that a patch of little relevance can be chosen but has to match
    better. Pairs are given by index: their patches are gathered a few pairs at a time, in backward once more, and
    beside inputs and gradients there are O(n (P + D)) numbers and that chunk (4 MB on a CPU, 64 MB on a GPU), never
    n x P x D. All of it is PyTorch, in fp32 (fp64 for fp64 features), under autocast too.

    "soft" is a mean over the patches that leans towards the best, always within their products; a relevance that is
    the same everywhere changes nothing. "hard" is its limit, the best patch alone; of equal ones the first has the
    gradient. "mul" is the reference document's form, for comparison only: where the products are negative a patch of
    relevance 0 scores 0 and beats every relevant one.

    Args:
        patch_features: `[B, P, D]`, fp64, fp32, bf16 or fp16, each patch L2-normalised by the caller.
        text_features: `[N, D]`, likewise.
        patch_relevance: floating `[B, P]` in [0, 1], None for ones. Differentiable; what is outside is clamped, with a
            warning where values can be read without waiting, and has no gradient.
        image_index, text_index: int `[n]`, the pairs, for instance of `itm_batch`; None takes each image (text) once,
            in order.
        mode: "soft", "hard" or "mul".
        sharpness: > 0, of soft and hard: how much better than the mean patch the best one must be to count alone, in
            units of 1 / sharpness.
        relevance_weight: >= 0, of soft and hard; 0 ignores the relevance.
        floor: in (0, 1], of soft and hard: a smaller relevance counts as this, and has no gradient.
        patch_mask: bool `[B, P]`, False for padding, which takes no part and has no gradient, whatever stands there. An
            image without any patch has score 0, no gradient, and is not valid.
        check_finite: whether NaN or infinity in features or relevance raises (synchronises).

    Returns:
        `MultiscaleScores`, differentiable in patches, texts and relevance.

    Raises:
        TypeError, ValueError: an argument of the wrong kind, shape, dtype, device or range, named.

    Source: the multi-scale matching of this project's reference document, as corrected in its specification, section
        5b.
    """
    check.choice("mode", mode, ("soft", "hard", "mul"))
    sharpness = check.number("sharpness", sharpness, above=0.0)
    weight = check.number("relevance_weight", relevance_weight, low=0.0)
    floor = check.number("floor", floor, above=0.0, most=1.0)
    x, y = _features(patch_features, text_features)
    images = None if image_index is None else check.indices("image_index", image_index, x, x.shape[0])
    texts = None if text_index is None else check.indices("text_index", text_index, x, y.shape[0])
    n, others = (len(t) if i is None else len(i) for t, i in ((x, images), (y, texts)))
    if n != others:
        raise ValueError(f"text_index: got {others} texts for {n} images, wanted as many: pairs")
    shape, dtype = x.shape[:2], torch.promote_types(torch.promote_types(x.dtype, y.dtype), torch.float32)
    mask = None if patch_mask is None else check.mask("patch_mask", patch_mask, shape, x)
    r = None if patch_relevance is None else check.floating("patch_relevance", patch_relevance, shape, x).to(dtype)
    if r is not None and mask is not None:
        r = torch.where(mask, r, 1.0)
    if check.flag("check_finite", check_finite):
        check.finite("patch_features", x if mask is None else x.masked_fill(~mask[..., None], 0.0))
        check.finite("text_features", y)
        if r is not None:
            check.finite("patch_relevance", r)
    if r is not None and check.readable(r) and bool(((r < 0) | (r > 1)).any()):
        warnings.warn("patch_relevance: got values outside [0, 1], they are clamped", stacklevel=2)
    if not x.shape[1]:  # one patch that is padding: the same, and no empty axis
        x, r = F.pad(x, (0, 0, 0, 1)), None
        mask = x.new_zeros(x.shape[:2], dtype=torch.bool)
    c = pair_products(x, y, None if mask is None else ~mask, images, texts)
    present = c.new_ones(x.shape[0], dtype=torch.bool) if mask is None else mask.any(1)
    # padding beside patches is out; where there are no patches at all it stays, finite, and the score is dropped
    out = None if mask is None else ~mask & present[:, None]
    if mode == "mul":
        s = _largest(c if r is None else c * _paired(_clamped(r, 0.0), images), out, images)
    else:
        prior = c.new_zeros(x.shape[:2]) if r is None else weight * _clamped(r, floor).log()
        z = c if r is None else c + _paired(prior / sharpness, images)
        if mode == "hard":
            s = _largest(z, out, images)
        else:
            total = _paired(_log_sum(prior, out, None)[:, None], images)[:, 0]
            s = (_log_sum(sharpness * z, out, images) - total) / sharpness
    valid = present if images is None else present[images]
    return MultiscaleScores(torch.where(valid, s, 0.0), valid)


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


def _features(patches: object, texts: object) -> tuple[Tensor, Tensor]:
    y = check.features("text_features", texts)
    if not isinstance(patches, Tensor) or patches.dtype not in check.DTYPES:
        got = patches.dtype if isinstance(patches, Tensor) else type(patches).__name__
        raise TypeError(f"patch_features: got {got}, wanted a floating tensor of shape [B, P, D]")
    if patches.dim() != 3 or not patches.shape[2]:
        raise ValueError(f"patch_features: got shape {list(patches.shape)}, wanted [B, P, D] with D >= 1")
    # under autocast one tower may end in fp32 and the other not: a chunk is cast to fp32 in any case
    mixed = y.device.type != "meta" and torch.is_autocast_enabled(y.device.type)
    check.alike("text_features", y.to(patches.dtype) if mixed else y, "patch_features", patches)
    return patches, y


def _clamped(r: Tensor, low: float) -> Tensor:
    # clamp itself may have no gradient at its bounds, and 1 is where a relevance begins
    return torch.where((r >= low) & (r <= 1.0), r, r.detach().clamp(low, 1.0))


def _paired(table: Tensor, index: Tensor | None) -> Tensor:
    """The rows of pairs; their gradient is summed in a fixed order, which indexing does not promise."""
    return table if index is None else F.embedding(index, table)


def _without(z: Tensor, out: Tensor | None, index: Tensor | None) -> Tensor:
    return z if out is None else z.masked_fill(out if index is None else out[index], -torch.inf)


def _largest(z: Tensor, out: Tensor | None, index: Tensor | None) -> Tensor:
    return _without(z, out, index).max(1).values


def _log_sum(z: Tensor, out: Tensor | None, index: Tensor | None) -> Tensor:
    return _without(z, out, index).logsumexp(1)
