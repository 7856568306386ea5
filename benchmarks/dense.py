"""Each loss as a user would write it today: all scores in one matrix, then PyTorch's own functions."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["WRITTEN", "Loss", "autocast", "under_autocast"]

Loss = Callable[..., Tensor]


def autocast(features: Tensor) -> torch.autocast:
    """What users of half-precision features run a dense loss under; off for fp32."""
    half = features.dtype in (torch.bfloat16, torch.float16)
    return torch.autocast(features.device.type, features.dtype if half else None, enabled=half)


def under_autocast(loss: Loss) -> Loss:
    """The same under the autocast of its first argument, all by name."""

    @functools.wraps(loss)
    def called(**named: Tensor) -> Tensor:
        with autocast(next(iter(named.values()))):
            return loss(**named)

    return called


@under_autocast
def clip_loss(image_features: Tensor, text_features: Tensor, logit_scale: Tensor) -> Tensor:
    """Cross-entropy of the rows and of the columns."""
    return _symmetric(logit_scale * image_features @ text_features.T)


@under_autocast
def siglip_loss(image_features: Tensor, text_features: Tensor, logit_scale: Tensor, logit_bias: Tensor) -> Tensor:
    """The sigmoid loss of each score, summed over the columns."""
    scores = logit_scale * image_features @ text_features.T + logit_bias
    signs = 2 * torch.eye(len(scores), device=scores.device, dtype=scores.dtype) - 1
    return -F.logsigmoid(signs * scores).sum() / len(scores)


@under_autocast
def relevance_clip_loss(
    image_features: Tensor, text_features: Tensor, logit_scale: Tensor, image_relevance: Tensor
) -> Tensor:
    """Cross-entropies weighted by the clamped relevance."""
    scores = logit_scale * image_features @ text_features.T
    weights = (image_relevance / image_relevance.mean()).clamp(0.25, 4)
    labels = torch.arange(len(scores), device=scores.device)
    each = F.cross_entropy(scores, labels, reduction="none") + F.cross_entropy(scores.T, labels, reduction="none")
    return (weights * each).sum() / weights.sum() / 2


@under_autocast
def soft_target_clip_loss(
    image_features: Tensor, text_features: Tensor, logit_scale: Tensor, teacher_image_features: Tensor,
    teacher_text_features: Tensor, teacher_scale: float,
) -> Tensor:  # fmt: skip
    """Cross-entropy against the softmax of the teacher's scores."""
    scores = logit_scale * image_features @ text_features.T
    teacher = teacher_scale * teacher_image_features @ teacher_text_features.T
    return (F.cross_entropy(scores, teacher.softmax(1)) + F.cross_entropy(scores.T, teacher.T.softmax(1))) / 2


@under_autocast
def graded_clip_loss(
    image_features: Tensor, text_features: Tensor, logit_scale: Tensor, relevant: Tensor, relevance: Tensor
) -> Tensor:
    """Cross-entropy against all grades, most of them 0, of the samples that have some."""
    scores = logit_scale * image_features @ text_features.T
    grades = torch.zeros_like(scores, dtype=relevance.dtype)
    grades = grades.scatter_add(1, relevant.clamp(min=0), relevance * (relevant >= 0))
    total = 0.0
    for s, r in ((scores, grades), (scores.T, grades.T)):
        sums = r.sum(1, keepdim=True)
        each = F.cross_entropy(s.float(), r / sums.clamp(min=1e-12), reduction="none")
        total = total + each.sum() / (sums > 0).sum()
    return total / 2


@under_autocast
def hard_negative_clip_loss(image_features: Tensor, text_features: Tensor, logit_scale: Tensor) -> Tensor:
    """The equations of the paper, line by line, at beta = 0.25."""
    scores = logit_scale * image_features @ text_features.T
    total = 0.0
    for s in (scores.float(), scores.T.float()):
        others = s.masked_fill(torch.eye(len(s), dtype=torch.bool, device=s.device), -torch.inf)
        weights = (len(s) - 1) * (0.25 * others).softmax(1)
        negatives = (weights * others.exp()).sum(1)
        positive = s.diagonal()
        total = total + (torch.log(positive.exp() + negatives) - positive).mean()
    return total / 2


@under_autocast
def margin_clip_loss(
    image_features: Tensor, text_features: Tensor, logit_scale: Tensor, text_embeddings: Tensor, threshold: float
) -> Tensor:
    """Cross-entropies of the scores with their margins, at a margin of 0.2."""
    alike = text_embeddings @ text_embeddings.T
    margins = (0.2 * (1 - alike) / (1 - threshold)).clamp(max=0.2).fill_diagonal_(0)
    return _symmetric(logit_scale * (image_features @ text_features.T + margins))


@under_autocast
def triplet_loss(image_features: Tensor, text_features: Tensor) -> Tensor:
    """VSE++'s sum of hinges, at a margin of 0.2."""
    scores = image_features @ text_features.T
    positive = scores.diagonal()[:, None]
    own = torch.eye(len(scores), dtype=torch.bool, device=scores.device)
    texts = (0.2 + scores - positive).clamp(min=0).masked_fill(own, 0)
    images = (0.2 + scores - positive.T).clamp(min=0).masked_fill(own, 0)
    return texts.sum(dtype=torch.float32) + images.sum(dtype=torch.float32)


@under_autocast
def linear_cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Logits, then their cross-entropy."""
    return F.cross_entropy(hidden @ weight.T, targets)


@under_autocast
def caption_loss(hidden: Tensor, weight: Tensor, tokens: Tensor) -> Tensor:
    """Logits of all positions, each against the next token."""
    logits = hidden @ weight.T
    return F.cross_entropy(logits[:-1], tokens[1:])


@under_autocast
def vqa_loss(hidden: Tensor, weight: Tensor, tokens: Tensor, answer_weights: Tensor, images: int) -> Tensor:
    """The same, summed over the answer and weighted."""
    logits = hidden @ weight.T
    return answer_weights * F.cross_entropy(logits[:-1], tokens[1:], reduction="sum") / images


def _symmetric(scores: Tensor) -> Tensor:
    labels = torch.arange(len(scores), device=scores.device)
    return (F.cross_entropy(scores, labels) + F.cross_entropy(scores.T, labels)) / 2


WRITTEN: dict[str, Loss] = {
    loss.__name__: loss
    for loss in (
        clip_loss, siglip_loss, relevance_clip_loss, soft_target_clip_loss, graded_clip_loss, hard_negative_clip_loss,
        margin_clip_loss, triplet_loss, linear_cross_entropy, caption_loss, vqa_loss,
    )
}  # fmt: skip
