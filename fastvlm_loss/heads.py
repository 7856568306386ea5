"""A light head for image-text matching on pooled features, for want of a fusion encoder."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .scores import check
from .scores.problem import _autocast

__all__ = ["MatchingHead"]


class MatchingHead(torch.nn.Module):
    """Match logits `[n, 2]` of pairs of pooled features: products, one hidden layer, class 1 a match.

    Use it with `itm_loss` where there is no fusion encoder. A linear layer on the concatenation of x and y is a sum of
    a function of x and a function of y, which cannot say whether they match; this head sees [x, y, x * y, |x - y|].

    Args:
        dim: D of both features.
        hidden: width of the hidden layer; D by default.
        device, dtype: of the parameters.

    Raises:
        TypeError, ValueError: an argument of the wrong kind, shape, dtype, device or range, named.

    Source: the features of Conneau et al. 2017 (InferSent).
    """

    def __init__(
        self, dim: int, hidden: int | None = None, *, device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        self.dim = check.whole("dim", dim, low=1)
        self.hidden = self.dim if hidden is None else check.whole("hidden", hidden, low=1)
        self.inner = torch.nn.Linear(4 * self.dim, self.hidden, device=device, dtype=dtype)
        self.outer = torch.nn.Linear(self.hidden, 2, device=device, dtype=dtype)

    def forward(
        self, image_features: Tensor, text_features: Tensor, image_index: Tensor | None = None,
        text_index: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """Logits `[n, 2]`.

        Args:
            image_features: floating `[M, D]`.
            text_features: `[N, D]`, same dtype and device.
            image_index, text_index: int `[n]`, the pairs, for instance of `itm_batch`; None takes each in order.
        """
        named = ("image_features", image_features), ("text_features", text_features)
        given = [_autocast(check.features(name, features)) for name, features in named]
        check.alike("text_features", given[1], "image_features", given[0])
        if given[0].shape[1] != self.dim:
            raise ValueError(f"image_features: got shape {list(given[0].shape)}, wanted D = {self.dim}")
        x, y = _rows("image_index", given[0], image_index), _rows("text_index", given[1], text_index)
        if x.shape[0] != y.shape[0]:
            raise ValueError(f"text_index: got {y.shape[0]} texts for {x.shape[0]} images, wanted as many: pairs")
        features = torch.cat([x, y, x * y, (x - y).abs()], 1)
        return self.outer(F.gelu(self.inner(features)))  # type: ignore[no-any-return]

    def extra_repr(self) -> str:
        """Its sizes."""
        return f"dim={self.dim}, hidden={self.hidden}"


def _rows(name: str, features: Tensor, index: Tensor | None) -> Tensor:
    if index is None:
        return features
    places = check.indices(name, index, features, features.shape[0])
    # a row in many pairs adds up its gradient in fp32, and in a fixed order
    wide = torch.promote_types(features.dtype, torch.float32)
    return F.embedding(places, features.to(wide)).to(features.dtype)
