"""Multi-scale image-text matching: a text against the patches of an image, with a relevance of each patch as a prior.

c_p = <x_p, y>, r_p in (0, 1] the relevance, s the sharpness, a the relevance's weight
soft   S = ( LSE_p [s c_p + a log r_p] - LSE_p [a log r_p] ) / s
hard   S = max_p [c_p + a/s log r_p]
mul    S = max_p r_p c_p
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..engine.pair_products import pair_products
from ..scores import check
from ._patches import Patches

__all__ = ["MultiscaleScores", "multiscale_itm"]


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
    p = Patches.of(
        patch_features, text_features, patch_relevance, image_index, text_index, patch_mask,
        check.flag("check_finite", check_finite),
    )  # fmt: skip
    r, images, present, out = p.relevance, p.images, p.present, p.out
    c = pair_products(p.x, p.y, p.padding, images, p.texts)
    if mode == "mul":
        s = _largest(c if r is None else c * _paired(_clamped(r, 0.0), images), out, images)
    else:
        prior = c.new_zeros(p.x.shape[:2]) if r is None else weight * _clamped(r, floor).log()
        z = c if r is None else c + _paired(prior / sharpness, images)
        if mode == "hard":
            s = _largest(z, out, images)
        else:
            total = _paired(_log_sum(prior, out, None)[:, None], images)[:, 0]
            s = (_log_sum(sharpness * z, out, images) - total) / sharpness
    valid = present if images is None else present[images]
    return MultiscaleScores(torch.where(valid, s, 0.0), valid)


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
