"""sentence-transformers' in-batch negatives losses without their score matrices.

    from fastvlm_loss.integrations.sentence_transformers import MultipleNegativesRankingLoss   # instead of ...losses

The candidates of a sample are up to four blocks of scores ("query_to_doc", "query_to_query", ...). Of each block one
number a sample is kept, log of its sum of exponentials minus the score of the positive; joint or per direction, the
loss is made of those.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.distributed as dist
import torch.nn.functional as F
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer import losses as originals
from sentence_transformers.util import cos_sim, dot_score
from torch import Tensor

from fastvlm_loss import clip_loss, hard_negative_clip_loss

from ._gist import GISTEmbedLoss
from ._group import everyone, samples_before
from ._pairs import dots, operand
from ._versions import require

__all__ = ["CachedMultipleNegativesRankingLoss", "GISTEmbedLoss", "MultipleNegativesRankingLoss"]

require("sentence-transformers")

Direction = Literal["query_to_doc", "query_to_query", "doc_to_query", "doc_to_doc"]
Hardness = Literal["in_batch_negatives", "hard_negatives", "all_negatives"]
Similarity = Callable[[Tensor, Tensor], Tensor]


class MultipleNegativesRankingLoss(originals.MultipleNegativesRankingLoss):  # type: ignore[misc]
    """The package's loss of the same name: the same values and gradients, in memory that is linear in the batch.

    All options have the package's meaning and may be set later on. With `gather_across_devices` the processes may have
    batches of different sizes.

    Args:
        model, scale, gather_across_devices, directions, partition_mode, hardness_mode, hardness_strength: as there.
        similarity_fct: `cos_sim` or `dot_score` of `sentence_transformers.util`; others are no inner products.

    Raises:
        ValueError: another similarity; what the package refuses.

    Source: van den Oord et al. 2018 (InfoNCE), equation 4; Li et al. 2023 (GTE; all directions); Lan et al. 2025,
        equation 5 (hardness).
    """

    def __init__(
        self, model: SentenceTransformer, scale: float = 20.0, similarity_fct: Similarity = cos_sim,
        gather_across_devices: bool = False, directions: tuple[Direction, ...] = ("query_to_doc",),
        partition_mode: Literal["joint", "per_direction"] = "joint", hardness_mode: Hardness | None = None,
        hardness_strength: float = 0.0,
    ) -> None:  # fmt: skip
        _normalised(similarity_fct)
        super().__init__(
            model, scale=scale, similarity_fct=similarity_fct, gather_across_devices=gather_across_devices,
            directions=directions, partition_mode=partition_mode, hardness_mode=hardness_mode,
            hardness_strength=hardness_strength,
        )  # fmt: skip

    def compute_loss_from_embeddings(self, embeddings: list[Tensor], labels: Tensor | None = None) -> Tensor:
        """The loss `[]` of the columns' embeddings `[B, D]`: queries, positives, hard negatives; labels are unused.

        Raises:
            ValueError: fewer than two columns, or columns of different shapes.
        """
        if len(embeddings) < 2:
            raise ValueError(f"embeddings: got {len(embeddings)} columns, wanted queries and documents")
        for each in embeddings:
            if each.shape != embeddings[0].shape:
                raise ValueError(f"embeddings: got {[list(e.shape) for e in embeddings]}, wanted columns of one shape")
        unit = _normalised(self.similarity_fct)
        queries, *docs = (operand(F.normalize(e, dim=1) if unit else e) for e in embeddings)
        group = everyone(self.gather_across_devices)
        batch = _Batch(queries, docs, self.scale, group, *samples_before(queries, group))
        hardness = self.hardness_mode if self.hardness_strength else None
        if hardness is None and self.partition_mode == "per_direction" and len(docs) == 1 and len(self.directions) > 1:
            return batch.symmetric().mean()
        sums = [batch.query_to_doc() if hardness is None else batch.weighted(hardness, self.hardness_strength)]
        sums += [getattr(batch, name)() for name in sorted({*self.directions} - {"query_to_doc"}) if batch.has(name)]
        found = torch.stack(sums)
        return (found.logsumexp(0) if self.partition_mode == "joint" else found.mean(0)).mean()


class CachedMultipleNegativesRankingLoss(originals.CachedMultipleNegativesRankingLoss):  # type: ignore[misc]
    """The package's loss of the same name: its gradient cache for the encoder, our loss for the whole batch at once.

    Args:
        model, scale, ...: as there; `mini_batch_size` is the encoder's alone.
        similarity_fct: `cos_sim` or `dot_score` of `sentence_transformers.util`.

    Raises:
        ValueError: another similarity; what the package refuses.

    Source: Gao et al. 2021 (GradCache).
    """

    def __init__(
        self, model: SentenceTransformer, scale: float = 20.0, similarity_fct: Similarity = cos_sim,
        mini_batch_size: int = 32, mini_batch_num_tokens: int | None = None, gather_across_devices: bool = False,
        directions: tuple[Direction, ...] = ("query_to_doc",),
        partition_mode: Literal["joint", "per_direction"] = "joint", show_progress_bar: bool = False,
        hardness_mode: Hardness | None = None, hardness_strength: float = 0.0,
    ) -> None:  # fmt: skip
        options: dict[str, Any] = {
            "scale": scale, "similarity_fct": similarity_fct, "gather_across_devices": gather_across_devices,
            "directions": directions, "partition_mode": partition_mode, "hardness_mode": hardness_mode,
            "hardness_strength": hardness_strength,
        }  # fmt: skip
        super().__init__(
            model, mini_batch_size=mini_batch_size, mini_batch_num_tokens=mini_batch_num_tokens,
            show_progress_bar=show_progress_bar, **options,
        )  # fmt: skip
        self.loss = MultipleNegativesRankingLoss(model, **options)

    def calculate_loss(
        self, reps: list[list[Tensor]], labels: Tensor | None = None, *, with_backward: bool = False
    ) -> Tensor:
        """The loss `[]` of each column's mini-batches; `with_backward` also its gradients, and the loss detached."""
        loss: Tensor = self.loss.compute_loss_from_embeddings([torch.cat(r) for r in reps])
        if with_backward:
            loss.backward()
            return loss.detach()
        return loss


@dataclass(frozen=True)
class _Batch:
    """Embeddings of queries and of each column of documents, all `[B, D]`; each block's log-sums are `[B]`.

    A log-sum is log Σ_j exp(scale · <anchor_i, candidate_j>), minus the score of the positive, scale · <q_i, d_i>.
    """

    queries: Tensor
    docs: list[Tensor]
    scale: float
    group: dist.ProcessGroup | None
    before: int
    total: int

    def query_to_doc(self) -> Tensor:
        """Of a query and all documents."""
        return clip_loss(self.queries, torch.cat(self.docs), self.scale, labels=self.places, **self.rows)

    def doc_to_query(self) -> Tensor:
        """Of a positive and all queries."""
        return clip_loss(self.docs[0], self.queries, self.scale, **self.rows)

    def symmetric(self) -> Tensor:
        """The mean of those two, where there are no hard negatives."""
        return clip_loss(self.queries, self.docs[0], self.scale, reduction="none", group=self.group)

    def query_to_query(self) -> Tensor:
        """Of a query and the others."""
        found = self.others(self.queries, self.queries, self.scale, None, self.ids)
        return found + self.scale * (dots(self.queries, self.queries) - self.positive)

    def doc_to_doc(self) -> Tensor:
        """Of a positive and all documents of other samples."""
        found = self.others(self.docs[0], torch.cat(self.docs), self.scale, self.places, self.of_docs)
        return found + self.scale * (dots(self.docs[0], self.docs[0]) - self.positive)

    def weighted(self, mode: Hardness, strength: float) -> Tensor:
        """`query_to_doc` with strength · sg(<q_i, d_j>) added to the scores of the negatives that `mode` says."""
        positive, docs = self.positive, torch.cat(self.docs)
        if mode == "hard_negatives":
            own_out: dict[str, Any] = {"image_ids": self.ids, "text_ids": self.of_docs}
            found = [clip_loss(self.queries, docs, self.scale, labels=self.places, **own_out, **self.rows)]
        else:
            found = [0.0 * positive]  # the positive itself
            if self.total > 1:
                # the score of a sharper scale, and as gradient the scale's own part of it
                sharper = self.scale + strength
                others = self.others(self.queries, docs, sharper, self.places, self.of_docs)
                kept = others.detach()
                found.append(kept + self.scale / sharper * (others - kept) + strength * positive.detach())
        for each in self.docs[1:]:  # the sample's own hard negatives
            own = dots(self.queries, each)
            extra = 0.0 if mode == "in_batch_negatives" else strength * own.detach()
            found.append(self.scale * (own - positive) + extra)
        return torch.stack(found).logsumexp(0)

    def others(self, anchors: Tensor, candidates: Tensor, scale: float, labels: Tensor | None, of: Tensor) -> Tensor:
        """Log-sum of the candidates of other samples, minus the score of the anchor's label."""
        return hard_negative_clip_loss(
            anchors, candidates, scale, beta=0.0, alpha_pos=0.0, labels=labels, image_ids=self.ids, text_ids=of,
            **self.rows,
        )  # fmt: skip

    def has(self, name: str) -> bool:
        """Whether a block has a candidate."""
        return name == "doc_to_query" or self.total > 1

    @property
    def rows(self) -> dict[str, Any]:
        """Of each anchor its own loss."""
        return {"directions": "image", "reduction": "none", "group": self.group}

    @property
    def positive(self) -> Tensor:
        return dots(self.queries, self.docs[0])

    @property
    def ids(self) -> Tensor:
        """Of each sample, among all processes."""
        return torch.arange(len(self.queries), device=self.queries.device) + self.before

    @property
    def of_docs(self) -> Tensor:
        """Of each document its sample."""
        return self.ids.repeat(len(self.docs))

    @property
    def places(self) -> Tensor:
        """Of each positive among the documents of all processes."""
        return self.ids + (len(self.docs) - 1) * self.before


def _normalised(similarity: Similarity) -> bool:
    if similarity not in (cos_sim, dot_score):
        name = getattr(similarity, "__name__", type(similarity).__name__)
        raise ValueError(
            f"similarity_fct: got {name}, wanted cos_sim or dot_score of sentence_transformers.util: "
            "only scores that are inner products need no matrix"
        )
    return bool(similarity == cos_sim)
