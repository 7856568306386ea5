"""PyTorch Metric Learning's `NTXentLoss` without its positives x negatives matrix, and a miner of hard negatives.

    from fastvlm_loss.integrations.metric_learning import NTXentLoss, HardNegativeMiner   # instead of losses.NTXentLoss

A positive pair (i, p) has the loss log(1 + Σ_n exp(s_in - s_ip)) over the negatives n of i. The sum is one number of
each anchor, made without the scores; the scores of the positive pairs are a gather.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from pytorch_metric_learning import losses, miners
from pytorch_metric_learning.distances import BaseDistance, CosineSimilarity, DotProductSimilarity
from pytorch_metric_learning.utils import common_functions, loss_and_miner_utils
from torch import Tensor

from fastvlm_loss import hard_negative_clip_loss, hard_negatives

from ._pairs import operand, pair_dots
from ._versions import require

__all__ = ["HardNegativeMiner", "NTXentLoss"]

require("pytorch-metric-learning")

Indices = tuple[Tensor, ...]


class NTXentLoss(losses.NTXentLoss):  # type: ignore[misc]
    """The package's loss of the same name: the same values and gradients, in memory linear in batch and positive pairs.

    With labels alone the negatives are streamed over. Pairs or triplets of a miner (`indices_tuple`) are scored as
    listed. Reducers, regularizers, `SelfSupervisedLoss` and the other wrappers work as with the package's.

    A loss above 87 (708 in fp64), where the package's stops and has no gradient, goes on.

    Args:
        temperature: of the scores, > 0.
        distance: `CosineSimilarity` (the default) or `DotProductSimilarity`, with power=1; others are no inner product,
            and the package's own computation runs, with its matrix.
        **kwargs: reducer, embedding_regularizer, embedding_reg_weight, collect_stats: as of the package.

    Raises:
        ValueError: a temperature that is not positive.

    Source: Chen et al. 2020 (SimCLR), equation 1; with labels, each positive pair on its own.
    """

    def __init__(self, temperature: float = 0.07, **kwargs: Any) -> None:
        super().__init__(temperature=temperature, **kwargs)
        if not temperature > 0:
            raise ValueError(f"temperature: got {temperature}, wanted a number > 0")

    def compute_loss(
        self, embeddings: Tensor, labels: Tensor | None, indices_tuple: Indices | None, ref_emb: Tensor,
        ref_labels: Tensor | None,
    ) -> dict[str, Any]:  # fmt: skip
        """The losses of the positive pairs `[P]` and their indices, for the reducer."""
        common_functions.labels_or_indices_tuple_required(labels, indices_tuple)
        if not _inner_product(self.distance):
            theirs: dict[str, Any] = super().compute_loss(embeddings, labels, indices_tuple, ref_emb, ref_labels)
            return theirs
        x, y = _operands(self.distance, embeddings, ref_emb)
        scale = 1 / self.temperature
        if indices_tuple is None and labels is not None:
            all_pairs = Positives.of(labels, ref_labels)
            a, p, negatives = all_pairs.anchor, all_pairs.positive, int(all_pairs.negatives.sum())
        else:
            listed = loss_and_miner_utils.convert_to_pairs(indices_tuple, labels, ref_labels)
            all_pairs, (a, p), negatives = None, listed[:2], len(listed[3])
        if max(len(a), negatives) <= 1 or not min(len(a), negatives):  # of which the package makes nothing
            nothing: dict[str, Any] = self.zero_losses()
            return nothing
        found = _listed(x, y, scale, listed) if all_pairs is None else _streamed(x, y, scale, all_pairs)
        found = found.to(embeddings.dtype)  # as the package's, whose reducers compare it with embeddings
        return {"loss": {"losses": found, "indices": (a, p), "reduction_type": "pos_pair"}}


class HardNegativeMiner(miners.BaseMiner):  # type: ignore[misc]
    """All positive pairs, and of each anchor k hard negatives: the hardest, or drawn with a preference for hard ones.

    `HardNegativeMiner()` finds what `BatchEasyHardMiner("all", "hard")` does, without the matrix of distances.

    Args:
        k: negatives of each anchor, 1 to 64; fewer where there are fewer.
        hardness, scale, seed: as of `fastvlm_loss.hard_negatives`; a finite hardness needs a seed, and each call is
            another draw.
        distance: `CosineSimilarity` (the default) or `DotProductSimilarity`, with power=1.
        **kwargs: as of the package's miners.

    Raises:
        ValueError: another distance; what `hard_negatives` refuses, when it is called.
    """

    def __init__(
        self, k: int = 1, hardness: float = math.inf, scale: float = 1 / 0.07, seed: int | None = None, **kwargs: Any
    ) -> None:
        super().__init__(**kwargs)
        if not _inner_product(self.distance):
            got = f"{type(self.distance).__name__} with power={self.distance.power}"
            raise ValueError(
                f"distance: got {got}, wanted CosineSimilarity or DotProductSimilarity with power=1: only scores that "
                "are inner products need no matrix"
            )
        self.k, self.hardness, self.scale, self.seed, self.step = k, hardness, scale, seed, 0
        self.add_to_recordable_attributes(list_of_names=["k", "hardness", "scale"], is_stat=False)

    def get_default_distance(self) -> BaseDistance:
        """Cosines."""
        return CosineSimilarity()

    def mine(self, embeddings: Tensor, labels: Tensor, ref_emb: Tensor, ref_labels: Tensor | None) -> Indices:
        """Anchors and positives `[P]`, anchors and negatives `[Q]`, in the order of the anchors."""
        x, y = _operands(self.distance, embeddings, ref_emb)
        positives = Positives.of(labels, ref_labels)
        found = hard_negatives(
            x, y, self.k, hardness=self.hardness, scale=self.scale, seed=self.seed, step=self.step,
            labels=torch.full_like(positives.ids, -1), image_ids=positives.ids, text_ids=positives.ref_ids,
        )  # fmt: skip
        self.step += 1
        anchor = torch.arange(len(x), device=x.device)[:, None].expand_as(found.text_index)
        return positives.anchor, positives.positive, anchor[found.text_valid], found.text_index[found.text_valid]


@dataclass(frozen=True)
class Positives:
    """All positive pairs, in the order of the anchors, found without a matrix.

    Attributes:
        anchor, positive: int64 `[P]`.
        ids, ref_ids: `[M]`, `[N]`, int64 >= 0, equal where the labels are.
        first: `[M]`, which of the pairs is the first of an anchor; where `count` is 0 of no meaning.
        count: `[M]`, pairs of an anchor.
        negatives: `[M]`, how many references have another label.
    """

    anchor: Tensor
    positive: Tensor
    ids: Tensor
    ref_ids: Tensor
    first: Tensor
    count: Tensor
    negatives: Tensor

    @classmethod
    def of(cls, labels: Tensor, ref_labels: Tensor | None) -> Positives:
        """Of labels `[M]` and those of the references `[N]`; None or the same tensor: nobody is its own positive."""
        others = labels if ref_labels is None else ref_labels
        alone = others is labels
        both = labels if alone else torch.cat([labels, others])
        ids = both.unique(return_inverse=True)[1]
        ids, ref_ids = (ids, ids) if alone else (ids[: len(labels)], ids[len(labels) :])
        order = ref_ids.argsort(stable=True)
        ordered = ref_ids[order]
        begin, end = (torch.searchsorted(ordered, ids, right=right) for right in (False, True))
        same = end - begin
        anchor = torch.arange(len(ids), device=ids.device).repeat_interleave(same)
        behind = torch.arange(len(anchor), device=ids.device) - (same.cumsum(0) - same)[anchor]
        positive = order[begin[anchor] + behind]
        if alone:
            keep = positive != anchor
            anchor, positive = anchor[keep], positive[keep]
        count = same - 1 if alone else same
        return cls(anchor, positive, ids, ref_ids, count.cumsum(0) - count, count, len(ref_ids) - same)


def _streamed(x: Tensor, y: Tensor, scale: float, of: Positives) -> Tensor:
    """Losses `[P]` of all positive pairs against all other labels."""
    first = of.positive[of.first.clamp(max=len(of.positive) - 1)].masked_fill(of.count == 0, -1)
    # log of the sum over the negatives, minus the score of the first positive
    excess = hard_negative_clip_loss(
        x, y, scale, beta=0.0, alpha_pos=0.0, labels=first, image_ids=of.ids, text_ids=of.ref_ids, directions="image",
        reduction="none",
    )[of.anchor]  # fmt: skip
    if bool((of.count > 1).any()):
        scores = scale * pair_dots(x, y, of.anchor, of.positive)
        excess = excess + scores[of.first[of.anchor]] - scores
    losses = torch.logaddexp(excess, torch.zeros_like(excess))
    return torch.where(of.negatives[of.anchor] > 0, losses, 0.0)


def _listed(x: Tensor, y: Tensor, scale: float, indices: Indices) -> Tensor:
    """Losses `[P]` of listed positive pairs against the listed negatives of their anchors."""
    a1, p, a2, n = indices
    positive, negative = scale * pair_dots(x, y, a1, p), scale * pair_dots(x, y, a2, n)
    top = torch.full_like(x[:, 0], -torch.inf, dtype=negative.dtype).scatter_reduce(0, a2, negative.detach(), "amax")
    top = torch.where(top == -torch.inf, 0.0, top).detach()
    total = torch.zeros_like(top).index_add(0, a2, (negative - top[a2]).exp())
    excess = (top + total.log())[a1] - positive  # -inf of an anchor without a negative
    return torch.logaddexp(excess, torch.zeros_like(excess))


def _operands(distance: BaseDistance, embeddings: Tensor, ref_emb: Tensor) -> tuple[Tensor, Tensor]:
    """What the distance makes inner products of."""
    distance.reset_stats()
    distance.check_shapes(embeddings, ref_emb)
    x = distance.maybe_normalize(embeddings)
    y = x if ref_emb is embeddings else distance.maybe_normalize(ref_emb)
    distance.set_default_stats(embeddings, ref_emb, x, y)
    return operand(x), operand(y)


def _inner_product(distance: BaseDistance) -> bool:
    """Whether the scores are inner products of what `_operands` gives, which is what needs no matrix."""
    return type(distance) in (CosineSimilarity, DotProductSimilarity) and distance.power == 1
