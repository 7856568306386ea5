"""What a margin by the texts' meaning is made of: what each image stands at, and how the margin falls."""

from __future__ import annotations

import torch
from torch import Tensor

from ..scores import check
from ..scores.problem import Problem
from ._batch import Options
from ._reduce import unit

__all__ = ["SAMPLE", "captions", "fall"]

SAMPLE = 512  # texts whose similarities stand for those of all
QUANTILE = 0.7


def captions(given: Tensor | None, texts: Tensor, p: Problem, options: Options) -> Tensor:
    """What the images stand at `[C M, E]`, the first of all images, then the second of all, and so on."""
    m, labels = p.x.shape[0], options.get("labels")
    if given is not None:
        given = check.sets("caption_embeddings", given, "M, C, E").detach()
        check.alike("caption_embeddings", given, "text_embeddings", texts)
        if given.shape[0] != m:
            raise ValueError(f"caption_embeddings: got {given.shape[0]} images, wanted {m} as in image_features")
        if options.get("check_finite"):
            check.finite("caption_embeddings", given)
        return (unit(given) if options.get("normalize") else given).transpose(0, 1).flatten(0, 1)
    if labels is not None and p.n:  # each image stands at its text, one without a text at 0
        return p.picked_cols(texts, labels)
    return texts if texts.shape[0] else texts.new_zeros(m, texts.shape[1])


def fall(p: Problem, texts: Tensor, m: float, a: float | None) -> tuple[Tensor, Tensor]:
    """The margin m (1 - R) / (1 - a), at most m, as its slope by R, and its most and its size at R = 0 `[2]`."""
    quantile = _quantile(p, texts) if a is None else torch.full_like(p.scale, a)
    slope = torch.where(quantile < 1, m / torch.where(quantile < 1, 1 - quantile, 1.0), 0.0)
    return slope, torch.stack([torch.full_like(slope, m), torch.where(quantile < 1, slope, m)])


def _quantile(p: Problem, texts: Tensor) -> Tensor:
    some = p.sampled_cols(texts, SAMPLE).to(p.scale.dtype)
    if not some.shape[0]:
        return some.new_zeros(())
    similarity = (some @ some.T).flatten()
    return similarity.kthvalue(max(int(QUANTILE * len(similarity)), 1)).values
