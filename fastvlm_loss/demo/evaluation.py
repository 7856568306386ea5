"""Retrieval in both directions: recall at 1, 5 and 10, counted as found when any equal caption is found."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from ..data import Pairs, WordTokenizer
    from .towers import TwoTowers

KS = (1, 5, 10)
_ROWS = 1024  # similarities are built for this many queries at a time


@dataclass(frozen=True)
class Retrieval:
    """Recall in per cent at each of ``KS``, both ways, and what guessing would give, over ``count`` pairs."""

    image_to_text: tuple[float, ...]
    text_to_image: tuple[float, ...]
    chance: tuple[float, ...]
    count: int


@torch.inference_mode()
def encode(model: TwoTowers, tokenizer: WordTokenizer, pairs: Pairs, device: torch.device) -> tuple[Tensor, Tensor]:
    """Image and text features of all pairs, fp32 [N, dim] each, on the CPU."""
    model.eval()
    images, texts = [], []
    for chosen in torch.split(torch.arange(len(pairs)), 250):
        captions = [pairs.captions[i] for i in chosen.tolist()]
        images.append(model.encode_image(pairs.images[chosen].to(device)).cpu())
        texts.append(model.encode_text(tokenizer(captions).to(device)).cpu())
    return torch.cat(images), torch.cat(texts)


def retrieval(images: Tensor, texts: Tensor, ids: Tensor) -> Retrieval:
    """Score N pairs of features [N, dim] with caption ids [N]; every pair is a query and in the gallery, both ways."""
    _, number = torch.unique(ids, return_inverse=True)
    equal = torch.bincount(number)[number]
    return Retrieval(
        _recall(ranks(images, texts, ids)), _recall(ranks(texts, images, ids)), chance(equal, len(ids)), len(ids)
    )


def ranks(queries: Tensor, gallery: Tensor, ids: Tensor) -> Tensor:
    """How many wrong items stand before (or level with) the best right one, int64 [N]; a NaN counts as before."""
    found = []
    for rows in torch.split(torch.arange(len(ids)), _ROWS):
        scores = queries[rows] @ gallery.T
        found.append(before(scores, ids[rows, None] == ids[None, :]))
    return torch.cat(found)


def before(scores: Tensor, right: Tensor) -> Tensor:
    """How many wrong items of each row have no lower score than its best right one, int64; a NaN counts as before."""
    best = scores.masked_fill(~right, -torch.inf).amax(1, keepdim=True)
    return (~(scores < best) & ~right).sum(1)


def chance(equal: Tensor, count: int) -> tuple[float, ...]:
    """Expected recall in per cent of a random order, when query i has ``equal[i]`` right items of ``count``."""
    missed = torch.ones(len(equal), dtype=torch.float64)
    recall = []
    for k in range(min(max(KS), count)):
        missed = missed * (1 - equal.double() / (count - k)).clamp(min=0)
        if k + 1 in KS:
            recall.append(100 * (1 - missed.mean().item()))
    return tuple(recall + [100.0] * (len(KS) - len(recall)))


def in_batch_accuracy(images: Tensor, texts: Tensor, ids: Tensor) -> float:
    """Share of the first 1024 images whose nearest text of the batch has their caption."""
    nearest = (images[:_ROWS] @ texts.T).argmax(1)
    return (ids[nearest] == ids[:_ROWS]).float().mean().item()


def table(result: Retrieval) -> str:
    """The result as text for a terminal."""
    head = f"{'recall (%) of ' + format(result.count, ','):<24}" + "".join(f"{'R@' + str(k):>8}" for k in KS)
    rows = (("image -> text", result.image_to_text), ("text -> image", result.text_to_image), ("chance", result.chance))
    return "\n".join([head, *(f"{name:<24}" + "".join(f"{value:8.1f}" for value in values) for name, values in rows)])


def _recall(found: Tensor) -> tuple[float, ...]:
    return tuple(100 * (found < k).double().mean().item() for k in KS)
