"""Which word of a caption a masking strategy may choose, and with which weight: log weights at words' first tokens."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from ..scores.philox import gumbel
from .data.words import CONTENT, OBJECT

NEVER = float("-inf")
CONTENT_SHARE = round(0.8 * 2**32)  # of the captions, for the strategy ``content``
TOP = {1: (1.0,), 2: (0.75, 0.25), 3: (0.55, 0.30, 0.15)}  # by how many words there are to rank


def first_of_word(word: Tensor, eligible: Tensor) -> Tensor:
    """Bool [B, T]: the first eligible token of each word; ``word`` does not decrease along a text."""
    earlier = torch.where(eligible, word, -1).cummax(1).values.roll(1, 1)
    earlier[:, 0] = -1
    return eligible & (word > earlier)


def gumbel_choice(weights: Tensor, random: Tensor) -> Tensor:
    """Bool [B, T]: one position a row with a probability in proportion to exp(weights); none where all are NEVER."""
    keys = weights + gumbel(random)
    best = keys.argmax(1, keepdim=True)
    return torch.zeros_like(keys, dtype=torch.bool).scatter_(1, best, True) & (weights > NEVER)


def candidates(
    strategy: str, text: Mapping[str, Tensor], first: Tensor, coin: Tensor, usefulness: Tensor | None
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Log weights fp32 [B, T] of the words and whether the strategy finds one in each row, bool [B].

    ``coin`` int64 [B, 1] is a random word a row, ``usefulness`` the log weights of the strategy ``hard``.
    """
    content = first & (text["kind"] & CONTENT != 0)
    if strategy == "hard":
        assert usefulness is not None
        weights = _where(first, usefulness)
    elif strategy == "objects":
        weights = _uniform(_or(first & (text["kind"] & OBJECT != 0), content))
    elif strategy == "content":
        stop = first & ~content
        weights = _uniform(torch.where(coin < CONTENT_SHARE, _or(content, stop), _or(stop, content)))
    else:
        weights = _ranked(content, text["concreteness"])
        weights = torch.where(content.any(1, keepdim=True), weights, _uniform(first))
    return weights, (weights > NEVER).any(1)


def _where(allowed: Tensor, weights: Tensor) -> Tensor:
    return torch.where(allowed, weights, NEVER)


def _uniform(allowed: Tensor) -> Tensor:
    return _where(allowed, torch.zeros((), device=allowed.device))


def _or(wanted: Tensor, otherwise: Tensor) -> Tensor:
    """``wanted`` in the rows that have any, ``otherwise`` in the others."""
    return torch.where(wanted.any(1, keepdim=True), wanted, otherwise)


def _ranked(allowed: Tensor, concreteness: Tensor) -> Tensor:
    """The log shares of the three most concrete words; among equals the earlier one ranks higher."""
    order = _where(allowed, concreteness).argsort(dim=1, descending=True, stable=True)
    table = torch.full((4, 3), NEVER, device=allowed.device)
    for count, shares in TOP.items():
        table[count, :count] = torch.tensor(shares).log()
    weights = torch.full_like(concreteness, NEVER)
    top = order[:, :3]
    return weights.scatter_(1, top, table[allowed.sum(1).clamp(max=3)][:, : top.shape[1]])
