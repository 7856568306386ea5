"""Retrieval both ways by the features, and with the best candidates in the order that matching gives them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ...demo.evaluation import KS, before, chance, ranks
from .held import ROWS, Held

__all__ = ["Ranking", "candidates", "contrast", "rank", "recalls", "rerank"]

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


def candidates(first: dict[str, Ranking], k: int) -> tuple[Tensor, Tensor]:
    """Pictures and texts int64 `[2, N, k]` of the `k` best pairs of each query, a row for each of `WAYS`."""
    answers = {way: first[way].order[:, :k] for way in WAYS}
    queries = torch.arange(len(answers["i2t"]))[:, None].expand_as(answers["i2t"])
    return torch.stack([queries, answers["t2i"]]), torch.stack([answers["i2t"], queries])


def contrast(held: Held, image: Tensor, text: Tensor, logit_scale: Tensor) -> Tensor:
    """Scores fp32 of pairs by their features."""
    features, texts = held.features.float().cpu(), held.texts.features.float().cpu()
    return logit_scale.cpu() * (features[image] * texts[text]).sum(-1)


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
