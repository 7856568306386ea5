"""Captioning, on `linear_cross_entropy`: what is shifted and ignored.

L = sum over the tokens that count of l_t / their number         target of position t is token t + 1
"""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from ..distributed import eager_in_group
from ._oracle import some_bias, some_tokens
from ._spec import Learned, LossSpec, register
from ._tokens import shifted
from .linear_ce import _oracle as dense
from .linear_ce import linear_cross_entropy

__all__ = ["caption_loss"]


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
    states, targets = shifted(hidden, tokens, pad_id, prompt_lengths, shift, ignore_index)
    return linear_cross_entropy(
        states, weight, targets, bias, ignore_index=ignore_index, label_smoothing=label_smoothing, reduction=reduction,
        normalizer=normalizer, group=group,
    )  # fmt: skip


def _oracle(
    hidden: Tensor, weight: Tensor, tokens: Tensor, bias: Tensor | None = None, *, pad_id: int | None = None,
    label_smoothing: float = 0.0, reduction: str = "mean",
) -> Tensor:  # fmt: skip
    """The equation on the dense logits."""
    states, targets = hidden[..., :-1, :], tokens[..., 1:]
    ignored = -100 if pad_id is None else pad_id
    return dense(
        states, weight, targets, bias, ignore_index=ignored, label_smoothing=label_smoothing, reduction=reduction
    )


SPEC = register(
    LossSpec(
        function=caption_loss,
        oracle=_oracle,
        equation="mean_t ℓ_t of token t + 1, padding and prompt ignored",
        paper="Yu et al. 2022 (CoCa), equation 2",
        variants=(
            {"tokens": some_tokens},
            {"tokens": some_tokens, "pad_id": 0, "bias": Learned(some_bias), "label_smoothing": 0.1},
            {"tokens": some_tokens, "pad_id": 0, "reduction": "none"},
        ),
        names={"image_features": "hidden", "text_features": "weight"},
        cost=(1, 3),
    )
)
