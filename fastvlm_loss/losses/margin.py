"""Language-guided margin: negatives that mean something else must stay further away.

R_ij = max_c cos(u_ic, t_j) of frozen embeddings t of the texts and u of each image's captions, or its own text alone
s_ij = logit_scale (<image_i, text_j> + mu_ij) + logit_bias    mu_ij = min(m, m (1 - R_ij) / (1 - a)), 0 for the target
L as of clip_loss
"""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor
from typing_extensions import Unpack

from ..distributed import eager_in_group
from ..engine.ops import no_autocast
from ..scores import check
from ._batch import Batch, Options, smoothing
from ._margin import SAMPLE, captions, fall
from ._oracle import cross_entropy, entries, matrix, mean_of, sides_of, some_ids, some_weights
from ._reduce import unit
from ._spec import LossSpec, register

__all__ = ["margin_clip_loss"]


@eager_in_group
def margin_clip_loss(
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: Tensor | float,
    logit_bias: Tensor | float | None = None,
    *,
    text_embeddings: Tensor,
    caption_embeddings: Tensor | None = None,
    margin: float = 0.2,
    threshold: float | None = None,
    label_smoothing: float = 0.0,
    **options: Unpack[Options],
) -> Tensor:
    """InfoNCE with a margin that shrinks as the negative's text comes close to the positive's (LG).

    Use it where a frozen text encoder knows which captions mean nearly the same: what means something else must stay
    further away, and likely false negatives (R near 1) are repelled as if there were no margin. Nothing is attracted.

    Args:
        image_features, text_features, logit_scale, logit_bias: as of `clip_loss`.
        text_embeddings: `[N, E]` of a frozen text encoder, L2-normalised as the features are; their dtype and device.
            No gradient.
        caption_embeddings: `[M, C, E]` of all captions of each image, likewise, where it has more than are texts of the
            batch: R_ij is the largest of their cosines with text j, for C - 1 more products of M x N x E a pass. An
            image with fewer repeats one. None: an image stands at its own text (its label's) alone.
        margin: m >= 0, in units of the cosine.
        threshold: a, the similarity from which on the margin shrinks; at 1 or above it never does. None takes the 70th
            percentile of the texts' cosines with one another, over up to 512 evenly spaced ones.
        label_smoothing: as of `clip_loss`.
        **options: labels, image_ids, text_ids, filters, image_weights, text_weights, directions, normalize, reduction,
            metrics, group, check_finite, strict as of `clip_loss`; filters without features of their own, and no
            `negatives`.

    Returns:
        fp32 scalar (fp64 for fp64 features), or per-sample losses for reduction="none". Differentiable in features,
        scale and weights; the scale multiplies the margin too, and its gradient says so.

    Raises:
        TypeError, ValueError: an argument of the wrong kind, shape, dtype, device or range, named.

    Source: Zhang et al. 2023 (LG, IEEE TMM 25), whose code sums the directions where this averages them.
    """
    m = check.number("margin", margin, low=0.0)
    a = None if threshold is None else check.number("threshold", threshold)
    eps = smoothing(label_smoothing)
    alone = caption_embeddings is None
    batch = Batch.of(image_features, text_features, logit_scale, logit_bias, agreed=(a is None, alone), **options)
    p = batch.problem
    with torch.no_grad(), no_autocast(p.x.device.type):
        texts = check.features("text_embeddings", text_embeddings).detach()
        texts = unit(texts) if options.get("normalize") else texts
        if texts.shape[0] != p.y.shape[0]:
            raise ValueError(f"text_embeddings: got {texts.shape[0]} rows, wanted {p.y.shape[0]} as in text_features")
        own = captions(caption_embeddings, texts, p, options)
        slope, numbers = fall(p, texts, m, a)
    names = "text_embeddings" if alone else "caption_embeddings", "text_embeddings", "threshold"
    problem = p.beside("margin", names, own, texts, slope, own.shape[0])
    batch = batch.but(problem=replace(problem, numbers=numbers))
    if options.get("check_finite"):
        check.finite("text_embeddings", texts)
    return batch.smoothed(batch.softmax(gap=eps > 0), eps)


def _oracle(
    image_features: Tensor, text_features: Tensor, logit_scale: Tensor | float,
    logit_bias: Tensor | float | None = None, *, text_embeddings: Tensor, caption_embeddings: Tensor | None = None,
    margin: float = 0.2, threshold: float | None = None, label_smoothing: float = 0.0, labels: Tensor | None = None,
    image_ids: Tensor | None = None, text_ids: Tensor | None = None, image_weights: Tensor | None = None,
    directions: str = "both",
) -> Tensor:  # fmt: skip
    """The equation on the dense score matrix."""
    c, s = matrix(image_features, text_features, logit_scale, logit_bias)
    y, present, same = entries(c, labels, image_ids, text_ids)
    t = text_embeddings.detach()
    if threshold is None:
        some = t[torch.linspace(0, len(t) - 1, min(len(t), SAMPLE)).round().long()]
        ordered = (some @ some.T).flatten().sort().values
        threshold = ordered[max(int(0.7 * len(ordered)), 1) - 1].item()
    r = (t if labels is None else t[labels.clamp(min=0)] * (labels >= 0)[:, None]) @ t.T
    if caption_embeddings is not None:
        r = torch.einsum("mce,ne->mnc", caption_embeddings.detach(), t).amax(2)
    mu = (margin * (1 - r) / (1 - threshold)).clamp(max=margin) if threshold < 1 else torch.full_like(r, margin)
    pair, *_ = entries(c, labels, None, None)
    s = s + logit_scale * mu * ~pair

    def losses(z: Tensor, y: Tensor, live: Tensor) -> Tensor:
        return cross_entropy(z, y, live, label_smoothing)

    return mean_of(losses, sides_of(s, y, present & (y | ~same)), (image_weights, None), directions)


def _embeddings(m: int, n: int, device: torch.device, g: torch.Generator, d: int) -> Tensor:
    embeddings: Tensor = F.normalize(torch.randn(n, max(d // 2, 2), generator=g, dtype=torch.float64) + 0.5, dim=1)
    return embeddings.to(device)


def _captions_of(m: int, n: int, device: torch.device, g: torch.Generator, d: int) -> Tensor:
    return _embeddings(m, 3 * m, device, g, d).reshape(m, 3, -1)


SPEC = register(
    LossSpec(
        function=margin_clip_loss,
        oracle=_oracle,
        equation="clip_loss with s_ij = α (c_ij + min(m, m (1 − R_ij) / (1 − a))) for j ≠ i",
        paper="Zhang et al. 2023 (LG, IEEE TMM)",
        variants=(
            {"text_embeddings": _embeddings, "threshold": 0.5},
            {"text_embeddings": _embeddings, "threshold": 1.0, "image_ids": some_ids},
            {"text_embeddings": _embeddings, "threshold": 0.2, "label_smoothing": 0.1, "directions": "image"},
            {"text_embeddings": _embeddings, "threshold": 0.8, "margin": 0.5, "image_weights": some_weights,
             "image_ids": some_ids},
            {"text_embeddings": _embeddings, "caption_embeddings": _captions_of, "threshold": 0.4},
        ),
        cost=(1.5, 5),
    )
)  # fmt: skip
