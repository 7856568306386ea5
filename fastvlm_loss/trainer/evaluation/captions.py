"""Captions: how often the model writes the reference, and what it writes for a few pictures."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .held import Held
from .writing import agreement, written

__all__ = ["Caption", "captions", "some_captions"]


@dataclass(frozen=True)
class Caption:
    """Of held-out sample `sample`: the likeliest words one by one, and words drawn with their probabilities."""

    sample: int
    greedy: str
    drawn: str


def captions(held: Held) -> dict[str, float]:
    """Share of captions whose greedy text equals the reference, and of tokens that are right given those before."""
    own = torch.arange(len(held))
    agrees, counts = agreement(held, held.batch["tokens"], held.batch["mask"], torch.ones_like(own), own)
    return {
        "caption/exact": 100 * (agrees | ~counts).all(1).double().mean().item(),
        "caption/token_accuracy": 100 * agrees.sum().item() / max(1, counts.sum().item()),
    }


def some_captions(held: Held, shown: Tensor, seed: int) -> list[Caption]:
    """What is written for the samples `shown` (int64)."""
    begin, prompts = held.batch["tokens"][shown, :1], torch.ones_like(shown)
    most = held.batch["tokens"].shape[1] - 1
    noise = torch.Generator().manual_seed(seed)
    texts = (written(held, begin, prompts, shown, most, n) for n in (None, noise))
    return [Caption(*found) for found in zip(shown.tolist(), *texts, strict=True)]
