"""Retrieval both ways: by the features, with hubs held back, and with the best candidates in another judge's order."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ...demo.evaluation import KS, before, chance, ranks
from .held import ROWS, Held

__all__ = ["Ranking", "candidates", "contrast", "csls", "rank", "recalls", "rerank"]

WAYS = ("i2t", "t2i")  # a picture asks for texts; a text asks for pictures
NEIGHBOURS = 10  # as published


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
    images, texts = _features(held)
    return {way: _ranked(*ask, held.ids, shown) for way, ask in _ways(images, texts).items()}


def csls(held: Held, shown: int) -> dict[str, Ranking]:
    """As `rank`, each answer's score less half the mean of its `NEIGHBOURS` best ones: one that suits all stands back.

    The other queries of the gallery are known to it, their answers are not.

    Source: Conneau et al. 2018 (word translation without parallel data), equation 3 (CSLS).
    """
    found, one = {}, torch.ones(len(held), 1)
    for way, (queries, gallery) in _ways(*_features(held)).items():
        ask = torch.cat([queries, one], 1), torch.cat([gallery, -_hubness(queries, gallery)[:, None]], 1)
        found[way] = _ranked(*ask, held.ids, shown)
    return found


def candidates(first: dict[str, Ranking], k: int) -> tuple[Tensor, Tensor]:
    """Pictures and texts int64 `[2, N, k]` of the `k` best pairs of each query, a row for each of `WAYS`."""
    answers = {way: first[way].order[:, :k] for way in WAYS}
    queries = torch.arange(len(answers["i2t"]))[:, None].expand_as(answers["i2t"])
    return torch.stack([queries, answers["t2i"]]), torch.stack([answers["i2t"], queries])


def contrast(held: Held, image: Tensor, text: Tensor, logit_scale: Tensor, hubs: bool = True) -> Tensor:
    """Scores fp32 of pairs `[2, N, k]` by their features; without `hubs` as `csls` counts them."""
    images, texts = _features(held)
    found = []
    for i, t, answer, ask in zip(image, text, (text[0], image[1]), _ways(images, texts).values(), strict=True):
        parts = zip(i.split(ROWS), t.split(ROWS), strict=True)
        scores = torch.cat([(images[a] * texts[b]).sum(-1) for a, b in parts])
        found.append(scores if hubs else scores - _hubness(*ask)[answer])
    return logit_scale.cpu() * torch.stack(found)


def rerank(
    first: dict[str, Ranking], image: Tensor, text: Tensor, scores: Tensor, ids: Tensor
) -> dict[str, Ranking]:  # fmt: skip
    """The `candidates` of each query by `scores` `[2, N, k]`; those beyond keep their places.

    Scores are sums over judges, contrast among them: the match logit alone forgets what the features know, because it
    was learned on pairs that they find alike.

    Source: Li et al. 2022 (BLIP), whose retrieval code adds score and match logit, unscaled.
    """
    answers = {"i2t": text[0], "t2i": image[1]}
    return {w: reordered(first[w].ranks, answers[w], s, ids) for w, s in zip(WAYS, scores, strict=True)}


def _features(held: Held) -> tuple[Tensor, Tensor]:
    return held.features.float().cpu(), held.texts.features.float().cpu()


def _ways(images: Tensor, texts: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
    """Queries and gallery of each way."""
    return dict(zip(WAYS, ((images, texts), (texts, images)), strict=True))


def _ranked(queries: Tensor, gallery: Tensor, ids: Tensor, shown: int) -> Ranking:
    k = min(shown, len(gallery))
    with torch.autocast("cpu", enabled=False):  # scores in bf16 tie
        order = torch.cat([(part @ gallery.T).topk(k).indices for part in queries.split(ROWS)])
        return Ranking(ranks(queries, gallery, ids), order)


def _hubness(queries: Tensor, gallery: Tensor) -> Tensor:
    """Half the mean of the best scores of each of the gallery, fp32 `[N]`."""
    k = min(NEIGHBOURS, len(queries))
    with torch.autocast("cpu", enabled=False):
        return torch.cat([(part @ queries.T).topk(k).values.mean(1) / 2 for part in gallery.split(ROWS)])


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
