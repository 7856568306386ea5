"""Retrieval both ways by the features, and with the best candidates in the order that matching gives them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ...demo.evaluation import KS, before, chance, ranks
from .held import ROWS, Held

__all__ = ["Ranking", "rank", "recalls", "rerank"]

WAYS = ("i2t", "t2i")  # a picture asks for texts; a text asks for pictures


@dataclass(frozen=True)
class Ranking:
    """What N queries find among N answers.

    Attributes:
        ranks: int64 `[N]`, how many wrong answers stand before (or level with) the best right one.
        order: int64 `[N, k]`, the best answers of each query, best first.
    """

    ranks: Tensor
    order: Tensor


def rank(held: Held, shown: int) -> dict[str, Ranking]:
    """By the products of features, in each of `WAYS`; `shown` best answers of each query are kept."""
    images, texts = held.features.float().cpu(), held.texts.features.float().cpu()
    found = {}
    for way, queries, gallery in (("i2t", images, texts), ("t2i", texts, images)):
        k = min(shown, len(gallery))
        with torch.autocast("cpu", enabled=False):  # scores in bf16 tie
            order = torch.cat([(part @ gallery.T).topk(k).indices for part in queries.split(ROWS)])
            found[way] = Ranking(ranks(queries, gallery, held.ids), order)
    return found


def rerank(held: Held, first: dict[str, Ranking], k: int, logit_scale: Tensor) -> dict[str, Ranking]:
    """The `k` best candidates of each query by both judges, score plus match logit; those beyond keep their places.

    The match logit alone forgets what the features know: it was learned on pairs that they find alike.

    Source: Li et al. 2022 (BLIP), whose retrieval code adds the two, unscaled.
    """
    features, texts = held.features.float().cpu(), held.texts.features.float().cpu()
    candidates = {way: first[way].order[:, :k] for way in WAYS}
    queries = torch.arange(len(held))[:, None]
    image = torch.stack([queries.expand_as(candidates["i2t"]), candidates["t2i"]])
    text = torch.stack([candidates["i2t"], queries.expand_as(candidates["t2i"])])
    scores = held.match(image, text) + logit_scale.cpu() * (features[image] * texts[text]).sum(-1)
    found = dict(zip(WAYS, scores, strict=True))
    return {way: reordered(first[way].ranks, candidates[way], found[way], held.ids) for way in WAYS}


def reordered(first: Tensor, candidates: Tensor, scores: Tensor, ids: Tensor) -> Ranking:
    """Candidates int64 `[N, k]` by scores `[N, k]`; a right one level with a wrong one, or NaN, stands behind it."""
    right = ids[candidates] == ids[:, None]
    wrong = before(scores, right)
    order = candidates.gather(1, scores.argsort(dim=1, descending=True, stable=True))
    return Ranking(torch.where(right.any(1), wrong, first), order)


def recalls(found: dict[str, Ranking], prefix: str) -> dict[str, float]:
    """Recall in per cent at each of `KS`, both ways, and the mean of both at 10."""
    values = {f"{prefix}/{way}_r{k}": 100 * (found[way].ranks < k).double().mean().item() for way in WAYS for k in KS}
    return {**values, f"{prefix}/r10": (values[f"{prefix}/i2t_r10"] + values[f"{prefix}/t2i_r10"]) / 2}


def guessed(ids: Tensor) -> dict[str, float]:
    """Recall of a random order."""
    _, number = torch.unique(ids, return_inverse=True)
    values = chance(torch.bincount(number)[number], len(ids))
    return {f"retrieval/chance_r{k}": value for k, value in zip(KS, values, strict=True)}
