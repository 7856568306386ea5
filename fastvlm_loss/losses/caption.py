"""Captioning and visual question answering, on `linear_cross_entropy`: what is shifted, ignored and divided by what.

caption   L = sum over the tokens that count of l_t / their number         target of position t is token t + 1
answers   L = 1/B sum over the answers k of their weight w_k times sum_t l_kt        (sum over tokens, B images)
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from ..distributed import eager_in_group, group_of
from ..scores import check
from ._spec import Learned, LossSpec, register
from .linear_ce import _oracle as dense
from .linear_ce import linear_cross_entropy

__all__ = ["caption_loss", "vqa_loss"]


@eager_in_group
def caption_loss(
    hidden: Tensor,
    weight: Tensor,
    tokens: Tensor,
    bias: Tensor | None = None,
    *,
    pad_id: int | None = None,
    prompt_lengths: Tensor | None = None,
    shift: bool = True,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    reduction: Literal["mean", "sum", "none"] = "mean",
    normalizer: Tensor | float | None = None,
    group: object = None,
) -> Tensor:
    """Next-token loss of captions: the hidden state at position t predicts token t + 1.

    Use it for a text decoder (CoCa, BLIP, a language model behind a projector): it shifts, and leaves out padding and
    prompt, which `linear_cross_entropy` leaves to the caller.

    Args:
        hidden: `[..., T, H]` of the decoder, one state a token, the beginning of the sequence included.
        weight: `[V, H]` of the language-model head; `bias`: `[V]` or None.
        tokens: int `[..., T]`, the input tokens themselves; or with `shift=False` the target of every position.
        pad_id: token that is padding and no target; None: padding already stands as `ignore_index`. (open_clip's CoCa
            takes 0; an id that also ends a caption would drop the end.)
        prompt_lengths: int `[...]`, how many first tokens of each sequence are prompt (or visual prefix), no targets.
        shift: whether targets are the tokens one position later.
        ignore_index: target that does not count.
        label_smoothing: eps in [0, 1); BLIP takes 0.1.
        reduction: "mean" over the tokens that count, "sum", or "none" (`[..., T - 1]`, or `[..., T]` without shift).
        normalizer: of "mean", what the sum is divided by instead: the tokens of all processes and accumulation steps.
        group: as of `linear_cross_entropy`.

    Returns:
        fp32 (fp64 for fp64 features) scalar, or a loss a token. Differentiable in hidden, weight and bias.

    Raises:
        TypeError, ValueError: an argument of the wrong kind, shape, dtype, device or range, named.

    Source: Yu et al. 2022 (CoCa), equation 2; Li et al. 2022 (BLIP), section 3.2.
    """
    states, targets = _shifted(hidden, tokens, pad_id, prompt_lengths, check.flag("shift", shift), ignore_index)
    return linear_cross_entropy(
        states, weight, targets, bias, ignore_index=ignore_index, label_smoothing=label_smoothing, reduction=reduction,
        normalizer=normalizer, group=group,
    )  # fmt: skip


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
    states, targets = _shifted(hidden, tokens, pad_id, prompt_lengths, check.flag("shift", shift), ignore_index)
    w = check.floating("answer_weights", answer_weights, targets.shape[:-1], hidden)
    total = linear_cross_entropy(
        states, weight, targets, bias, ignore_index=ignore_index, label_smoothing=label_smoothing, reduction="sum",
        token_weights=w[..., None].expand(targets.shape), group=group,
    )  # fmt: skip
    if group is None:
        return total / count
    return total / group_of(group).total(total.new_full((), count))


def _shifted(
    hidden: Tensor, tokens: Tensor, pad_id: int | None, prompt_lengths: Tensor | None, shift: bool, ignore_index: int
) -> tuple[Tensor, Tensor]:
    """States and their targets, what is padding or prompt ignored."""
    check.tokens("hidden", hidden)
    if hidden.dim() < 2:
        raise ValueError(f"hidden: got shape {list(hidden.shape)}, wanted [..., T, H]")
    shape = hidden.shape[:-1]
    targets = check.whole_numbers("tokens", tokens, shape, hidden)
    if pad_id is not None:
        targets = targets.masked_fill(targets == check.whole("pad_id", pad_id), ignore_index)
    if prompt_lengths is not None:
        lengths = check.whole_numbers("prompt_lengths", prompt_lengths, shape[:-1], hidden)
        place = torch.arange(shape[-1], device=targets.device)
        targets = targets.masked_fill(place < lengths[..., None], ignore_index)
    return (hidden[..., :-1, :], targets[..., 1:]) if shift else (hidden, targets)


def _caption_oracle(
    hidden: Tensor, weight: Tensor, tokens: Tensor, bias: Tensor | None = None, *, pad_id: int | None = None,
    label_smoothing: float = 0.0, reduction: str = "mean",
) -> Tensor:  # fmt: skip
    """The equation on the dense logits."""
    states, targets = hidden[..., :-1, :], tokens[..., 1:]
    ignored = -100 if pad_id is None else pad_id
    return dense(
        states, weight, targets, bias, ignore_index=ignored, label_smoothing=label_smoothing, reduction=reduction
    )


def _vqa_oracle(
    hidden: Tensor, weight: Tensor, tokens: Tensor, answer_weights: Tensor, images: int, bias: Tensor | None = None, *,
    pad_id: int | None = None,
) -> Tensor:  # fmt: skip
    """The equation on the dense logits."""
    each = _caption_oracle(hidden, weight, tokens, bias, pad_id=pad_id, reduction="none")
    return (answer_weights * each.sum(-1)).sum() / images


def _tokens(m: int, n: int, device: torch.device, g: torch.Generator) -> Tensor:
    tokens = torch.randint(0, n, (m,), generator=g)
    tokens[m - m // 4 :] = 0
    return tokens.to(device)


def _weight(m: int, n: int, device: torch.device, g: torch.Generator) -> Tensor:
    return torch.rand((), generator=g).to(device)


def _bias(m: int, n: int, device: torch.device, g: torch.Generator) -> Tensor:
    return torch.randn(n, generator=g).to(device)


NAMES = {"image_features": "hidden", "text_features": "weight"}

register(
    LossSpec(
        function=caption_loss,
        oracle=_caption_oracle,
        equation="mean_t ℓ_t of token t + 1, padding and prompt ignored",
        paper="Yu et al. 2022 (CoCa), equation 2",
        variants=(
            {"tokens": _tokens},
            {"tokens": _tokens, "pad_id": 0, "bias": Learned(_bias), "label_smoothing": 0.1},
            {"tokens": _tokens, "pad_id": 0, "reduction": "none"},
        ),
        names=NAMES,
        cost=(1, 3),
    )
)
register(
    LossSpec(
        function=vqa_loss,
        oracle=_vqa_oracle,
        equation="1/B Σ_k w_k Σ_t ℓ_kt",
        paper="Li et al. 2021 (ALBEF), section 5",
        variants=(
            {"tokens": _tokens, "answer_weights": _weight, "images": 1},
            {"tokens": _tokens, "answer_weights": Learned(_weight), "images": 3, "pad_id": 0, "bias": Learned(_bias)},
        ),
        names=NAMES,
        cost=(1, 3),
        reduction="sum",
    )
)
