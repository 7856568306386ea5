"""`Interaction`: two sets of sets of tokens that are scored pair by pair, as a value; no pair's scores are stored.

image scores  a_ij = sum_p w_ip max_t <x_ip, y_jt>      text scores  b_ij = sum_t v_jt max_p <x_ip, y_jt>
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from . import check
from .problem import Problem, _distinct, _without_invalid

__all__ = ["FIELDS", "Interaction", "Tokens"]

FIELDS = 11  # tensors that travel through the op boundary


@dataclass(frozen=True)
class Tokens:
    """One side, checked: the tokens of every image, or of every text.

    Attributes:
        name: "image" or "text", as its arguments begin.
        features: `[rows, tokens, D]`, as given.
        padding: bool `[rows, tokens]`, True where a token is none, or None.
        relevance: `[rows, tokens]` or None, with gradient.
    """

    name: str
    features: Tensor
    padding: Tensor | None
    relevance: Tensor | None

    @classmethod
    def of(cls, name: str, features: object, mask: object, relevance: object) -> Tokens:
        """Check the arguments `<name>_tokens`, `<name>_mask` and `<name>_relevance`."""
        given = check.sets(f"{name}_tokens", features)
        shape = given.shape[:2]
        padding = None if mask is None else ~check.mask(f"{name}_mask", mask, shape, given)
        own = None if relevance is None else check.floating(f"{name}_relevance", relevance, shape, given)
        return cls(name, given, padding, own)

    @classmethod
    def both(
        cls, features: tuple[object, object], masks: tuple[object, object], relevance: tuple[object, object],
        directions: str, finite: bool,
    ) -> tuple[Tokens, Tokens]:  # fmt: skip
        """Check both sides, images first, beside the directions asked for; `finite` reads the values too."""
        images, texts = map(cls.of, ("image", "text"), features, masks, relevance)
        check.alike("text_tokens", texts.features, "image_tokens", images.features)
        for side, other in ((images, "text"), (texts, "image")):
            if side.relevance is not None and directions == other:
                raise ValueError(
                    f"{side.name}_relevance: got a value beside directions={other!r}, "
                    f"which has no scores of the {side.name}s' own, wanted None"
                )
        if check.flag("check_finite", finite):
            images.check_finite()
            texts.check_finite()
        return images, texts

    def check_finite(self) -> None:
        """Raise on NaN, infinity and negative relevance of tokens that are no padding."""
        check.finite(f"{self.name}_tokens", self.filled())
        if self.relevance is not None:
            real = self.relevance if self.padding is None else self.relevance.masked_fill(self.padding, 0.0)
            check.finite(f"{self.name}_relevance", real)
            if bool((real < 0).any()):
                raise ValueError(f"{self.name}_relevance: got {real.min().item():g}, wanted values >= 0")

    def first(self) -> Tensor:
        """Features `[rows, D]` that stand for the samples where only their number, dtype and device matter."""
        first = self.features.detach()[:, 0]
        return first if self.padding is None else first.masked_fill(self.padding[:, :1], 0.0)

    def filled(self) -> Tensor:
        """The features with 0 as padding: what stands there, NaN too, reaches nothing."""
        return self.features if self.padding is None else self.features.masked_fill(self.padding[..., None], 0.0)

    def weights(self, dtype: torch.dtype, summed: bool) -> Tensor:
        """Weights `[rows, tokens]` of the tokens in the scores of their own side, 0 for padding, differentiable.

        They sum to 1, or with `summed` to the number of tokens. A relevance that is negative or not finite counts as 0;
        where it is 0 everywhere, all count alike.
        """
        shape = self.features.shape[:2]
        real = self.features.new_ones(shape, dtype=dtype) if self.padding is None else (~self.padding).to(dtype)
        number = real.sum(1, keepdim=True)
        even = real / number.clamp(min=1)
        if self.relevance is None:
            return real if summed else even
        r = self.relevance.to(dtype)
        r = torch.where((real > 0) & (r >= 0) & (r < torch.inf), r, 0.0)
        total = r.sum(1, keepdim=True)
        share = torch.where(total > 0, r / torch.where(total > 0, total, 1.0), even)
        return number * share if summed else share


@dataclass(frozen=True)
class Interaction:
    """Tokens of images and texts, checked and ready for a backend.

    Attributes:
        pairs: scale, bias, targets and ids of the samples; its features only stand for them.
        x: image tokens `[M, P, D]`, contiguous, in the dtype of the features of `pairs`, padding 0.
        y: text tokens `[N, T, D]`, likewise.
        x_weight, y_weight: `[M, P]`, `[N, T]` in the statistics' dtype, with gradient.
        x_padding, y_padding: bool `[M, P]`, `[N, T]`, or None: tokens that are nobody's best match.

    Of a group of processes (`pairs.shard`) these are the own images and texts.
    """

    pairs: Problem
    x: Tensor
    y: Tensor
    x_weight: Tensor
    y_weight: Tensor
    x_padding: Tensor | None
    y_padding: Tensor | None

    @classmethod
    def of(cls, pairs: Problem, images: Tokens, texts: Tokens, x: Tensor, y: Tensor, summed: bool) -> Interaction:
        """With the features `x` and `y` in place of those of `images` and `texts`; no token at all is as an id of -1.

        `pairs` has their `first` for features, `summed` is as of `Tokens.weights`.
        """
        x_weight, y_weight = (side.weights(pairs.scale.dtype, summed) for side in (images, texts))
        x, y = (t.to(pairs.x.dtype).contiguous() for t in (x, y))  # autocast has cast `first`
        pairs = _without_empty(pairs, images.padding, texts.padding)
        return cls(pairs, x, _distinct(y, x), x_weight, y_weight, images.padding, texts.padding)

    @classmethod
    def from_tensors(cls, tensors: tuple[Any, ...]) -> Interaction:
        """What `tensors` lists."""
        x, y, x_weight, y_weight, x_padding, y_padding, *own = tensors
        return cls(Problem(x[:, 0], y[:, 0], *own), x, y, x_weight, y_weight, x_padding, y_padding)

    def turned(self) -> Interaction:
        """Images and texts in each other's place, but for `pairs`."""
        return Interaction(self.pairs, self.y, self.x, self.y_weight, self.x_weight, self.y_padding, self.x_padding)

    def tensors(self) -> tuple[Tensor | None, ...]:
        """What travels through the op boundary."""
        p = self.pairs
        own = p.scale, p.bias, p.target, p.row_id, p.col_id
        return self.x, self.y, self.x_weight, self.y_weight, self.x_padding, self.y_padding, *own


def _without_empty(pairs: Problem, x_padding: Tensor | None, y_padding: Tensor | None) -> Problem:
    """The pairs with an id of -1 for samples whose tokens are all padding."""
    if x_padding is None and y_padding is None:
        return pairs
    row_id, col_id = pairs.row_id, pairs.col_id
    if row_id is None or col_id is None:  # ids that say no more than the targets do
        m, n = pairs.m, pairs.n
        place = torch.arange(m, device=pairs.x.device)
        row_id = place if pairs.target is None else torch.where(pairs.target >= 0, pairs.target, n + place)
        col_id = torch.arange(n, device=pairs.x.device)
    if x_padding is not None:
        row_id = row_id.masked_fill(pairs.of_rows(x_padding.all(1)), -1)
    if y_padding is not None:
        col_id = col_id.masked_fill(pairs.of_cols(y_padding.all(1)), -1)
    return replace(pairs, target=_without_invalid(pairs.target, row_id, col_id), row_id=row_id, col_id=col_id)
