"""Visual question answering, on `linear_cross_entropy`: weighted answers, divided by the images.

L = 1/B sum over the answers k of their weight w_k times sum_t l_kt        (sum over tokens, B images)
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..distributed import eager_in_group, group_of
from ..scores import check
from ._oracle import some_bias, some_tokens
from ._spec import Learned, LossSpec, register
from ._tokens import shifted
from .caption import _oracle as captions
from .linear_ce import linear_cross_entropy

__all__ = ["vqa_loss"]


@eager_in_group
def vqa_loss(
    hidden: Tensor,
    weight: Tensor,
    tokens: Tensor,
    answer_weights: Tensor,
    images: int,
    bias: Tensor | None = None,
    *,
    pad_id: int | None = None,
    prompt_lengths: Tensor | None = None,
    shift: bool = True,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    group: object = None,
) -> Tensor:
    """Generative question answering: the answers of all images one after another, each with its weight.

    Use it where an image has several weighted answers (VQAv2). One image with one answer of weight 1 gives
    `caption_loss` summed over its tokens.

    Tokens are summed and images averaged, so that a long answer counts more than a short one, as published. An image
    without an answer in the vocabulary contributes 0 and still counts among the images.

    Args:
        hidden: `[A, T, H]` (one answer: `[T, H]`) of the answer decoder; `weight`: `[V, H]`; `bias`: `[V]` or None.
        tokens: int `[A, T]`, as of `caption_loss`.
        answer_weights: floating `[A]` (one answer: `[]`), the share of the annotators who gave it; Visual Genome's
            single answers take 0.5 (ALBEF), 0.2 (BLIP) or 1 (LAVIS).
        images: B >= 1, what the sum is divided by.
        pad_id, prompt_lengths, shift, ignore_index, label_smoothing, group: as of `caption_loss`.

    Returns:
        fp32 (fp64 for fp64 features) scalar, differentiable in hidden, weight, bias and answer weights.

    Raises:
        TypeError, ValueError: an argument of the wrong kind, shape, dtype, device or range, named.

    Source: Li et al. 2021 (ALBEF), section 5 and code; Li et al. 2022 (BLIP), section 5.3.
    """
    count = check.whole("images", images, low=1)
    states, targets = shifted(hidden, tokens, pad_id, prompt_lengths, shift, ignore_index)
    w = check.floating("answer_weights", answer_weights, targets.shape[:-1], hidden)
    total = linear_cross_entropy(
        states, weight, targets, bias, ignore_index=ignore_index, label_smoothing=label_smoothing, reduction="sum",
        token_weights=w[..., None].expand(targets.shape), group=group,
    )  # fmt: skip
    if group is None:
        return total / count
    return total / group_of(group).total(total.new_full((), count))


def _oracle(
    hidden: Tensor, weight: Tensor, tokens: Tensor, answer_weights: Tensor, images: int, bias: Tensor | None = None, *,
    pad_id: int | None = None,
) -> Tensor:  # fmt: skip
    """The equation on the dense logits."""
    each = captions(hidden, weight, tokens, bias, pad_id=pad_id, reduction="none")
    return (answer_weights * each.sum(-1)).sum() / images


def _weight(m: int, n: int, device: torch.device, g: torch.Generator) -> Tensor:
    return torch.rand((), generator=g).to(device)


SPEC = register(
    LossSpec(
        function=vqa_loss,
        oracle=_oracle,
        equation="1/B Σ_k w_k Σ_t ℓ_kt",
        paper="Li et al. 2021 (ALBEF), section 5",
        variants=(
            {"tokens": some_tokens, "answer_weights": _weight, "images": 1},
            {
                "tokens": some_tokens,
                "answer_weights": Learned(_weight),
                "images": 3,
                "pad_id": 0,
                "bias": Learned(some_bias),
            },
        ),
        names={"image_features": "hidden", "text_features": "weight"},
        cost=(1, 3),
        reduction="sum",
    )
)
