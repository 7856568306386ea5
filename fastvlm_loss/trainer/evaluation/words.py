"""Masked words: whether one hidden object word of each caption is found, with the picture and without it."""

from __future__ import annotations

import torch
from torch import Tensor

from ..masking import Masker
from .held import ROWS, Held, top

__all__ = ["hidden_words", "words"]


def words(held: Held, seed: int) -> dict[str, float]:
    """Accuracy over captions, and what the picture adds to it; a word of several tokens is right if all of them are."""
    tokens, labels = hidden_words(held, seed)
    some = (labels >= 0).any(1)
    if not bool(some.any()):
        return {}
    seen, blind = (100 * _right(held, tokens, labels, p)[some].double().mean().item() for p in (True, False))
    return {"mlm/accuracy": seen, "mlm/accuracy_blind": blind, "mlm/gain": seen - blind}


def hidden_words(held: Held, seed: int) -> tuple[Tensor, Tensor]:
    """Captions with an object word (or else a content word) behind [MASK], and labels, -100 elsewhere: `[N, T]` each.

    The training's masks leave a fifth of what they choose in sight or replaced; an evaluation hides all of it.
    """
    index = torch.tensor([sample.index for sample in held.samples], dtype=torch.int64)
    masker = Masker("objects", held.tokenizer, seed=seed)
    labels: Tensor = masker(held.batch, index, 0)["labels"]
    return held.batch["tokens"].masked_fill(labels >= 0, held.tokenizer.mask_id), labels


def _right(held: Held, tokens: Tensor, labels: Tensor, picture: bool) -> Tensor:
    """Bool `[N]`: whether every hidden token is the likeliest one."""
    right = torch.ones_like(labels, dtype=torch.bool)
    for part in torch.arange(len(held)).split(ROWS):
        place = labels[part] >= 0
        fused = held.fuse(tokens[part], held.batch["mask"][part], None, part if picture else None)
        found = top(held, fused[place.to(fused.device)]) == labels[part][place]
        right[part] = right[part].masked_scatter(place, found)
    return right.all(1)
