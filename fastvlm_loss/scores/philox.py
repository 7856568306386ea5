"""Philox4x32-10 (Salmon et al. 2011), the counter-based generator: random words are a function of where they are used.

Nothing is drawn in order, so the same words come out of any tiling, thread count, device and number of processes.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["gumbel", "halves", "philox"]

MULTIPLIERS, WEYL, WORD, ROUNDS = (0xD2511F53, 0xCD9E8D57), (0x9E3779B9, 0xBB67AE85), 0xFFFFFFFF, 10
Counter = tuple[Tensor | int, Tensor | int, Tensor | int, Tensor | int]


def philox(counter: Counter, key: tuple[Tensor | int, Tensor | int]) -> tuple[Tensor, ...]:
    """Four independent uniform words of 32 bits, as int64 tensors of the counter's broadcast shape.

    Args:
        counter, key: int64 tensors or ints in [0, 2**32), at least one of them a tensor.
    """
    a, b, c, d = counter
    k, l = key  # noqa: E741
    for _ in range(ROUNDS):
        a, b, c, d = _high(MULTIPLIERS[1], c) ^ b ^ k, _low(MULTIPLIERS[1], c), *_second(a, d, l)
        k, l = (k + WEYL[0]) & WORD, (l + WEYL[1]) & WORD  # noqa: E741
    return tuple(torch.broadcast_tensors(*(torch.as_tensor(word) for word in (a, b, c, d))))


def _second(a: Tensor | int, d: Tensor | int, key: Tensor | int) -> tuple[Tensor | int, Tensor | int]:
    return _high(MULTIPLIERS[0], a) ^ d ^ key, _low(MULTIPLIERS[0], a)


def _high(multiplier: int, word: Tensor | int) -> Tensor | int:
    # the product may wrap around int64; its upper half is right nevertheless
    return (word * multiplier >> 32) & WORD


def _low(multiplier: int, word: Tensor | int) -> Tensor | int:
    return (word * multiplier) & WORD


def halves(number: int) -> tuple[int, int]:
    """A 64-bit number as its low and high words."""
    return number & WORD, number >> 32 & WORD


def gumbel(word: Tensor) -> Tensor:
    """Standard Gumbel numbers, fp32, of uniform words: between -2.8 and 22.9, and never equal at the top.

    -log(-log1p(-v)) with v near 0 where the number is large: there fp32 is dense, and -log(-log(u)) with u near 1,
    where it is not, would tie in 6 % of rows of a million.
    """
    v = (word.to(torch.float32) * 2.0**-32 + 2.0**-33).clamp(max=1.0 - 2.0**-24)
    return -(-torch.log1p(-v)).log()
