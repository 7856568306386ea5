"""sentence-transformers' `GISTEmbedLoss`: in-batch negatives that a guide model finds too similar are left out."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn.functional as F
from sentence_transformers.base.losses.merged_forward import embed_columns
from sentence_transformers.sentence_transformer import losses as originals
from sentence_transformers.util import batch_to_device
from torch import Tensor

from fastvlm_loss import clip_loss, filters

from ._group import everyone, samples_before
from ._pairs import dots

__all__ = ["GISTEmbedLoss"]


class GISTEmbedLoss(originals.GISTEmbedLoss):  # type: ignore[misc]
    """The package's loss of the same name: the same values and gradients, in memory that is linear in the batch.

    Args:
        model, guide, temperature, margin_strategy, margin, contrast_anchors, contrast_positives,
            gather_across_devices: as there.

    Source: Solatorio 2024 (GISTEmbed), equation 3.
    """

    def forward(self, sentence_features: Iterable[dict[str, Tensor]], labels: Tensor | None = None) -> Tensor:
        """The loss `[]` of columns of tokens: anchors, positives and, if there are three, hard negatives."""
        columns = list(sentence_features)
        # before the model, which writes its outputs into what it is given
        with torch.no_grad():
            guides = embed_columns(self.guide, self._for_the_guide(columns))
        return self.compute_loss_from_embeddings(embed_columns(self.model, columns), guides)

    def compute_loss_from_embeddings(self, embeddings: list[Tensor], guides: list[Tensor]) -> Tensor:
        """The loss `[]` of the columns' embeddings `[B, D]` and those of the guide `[B, E]`.

        Raises:
            ValueError: neither two nor three columns, or columns of different lengths.
        """
        if len(embeddings) not in (2, 3) or len(guides) != len(embeddings):
            raise ValueError(
                f"embeddings: got {len(embeddings)} columns, wanted anchors, positives and maybe negatives"
            )
        if len({len(e) for e in (*embeddings, *guides)}) > 1:
            raise ValueError(f"embeddings: got columns of {[len(e) for e in embeddings]}, wanted as many in each")
        device, group = embeddings[0].device, everyone(self.gather_across_devices)
        with torch.autocast(device.type, enabled=False):  # whose rounding would change what is left out
            own, guide = ([_unit(e) for e in of] for of in (embeddings, guides))
            guide = [g.to(own[0].dtype) for g in guide]
            positive = dots(guide[0], guide[1])
            share = self.margin * positive.abs() if self.margin_strategy == "relative" else self.margin
            batch = _Guided((positive - share).to(own[0].dtype), 1 / self.temperature)
            place = group, samples_before(own[0], group)[0]
            alone = None, 0
            sums = [batch.log_sum(own[0], own[1:], guide[0], guide[1:], *place)]
            if self.contrast_anchors:  # theirs are not gathered
                sums.append(batch.log_sum(own[0], [own[1], own[0]], guide[0], [None, guide[0]], *alone))
            if self.contrast_positives:
                sums.append(batch.log_sum(own[1], [own[0], own[1]], guide[1], [None, guide[1]], *place))
            return _union(torch.stack(sums)).mean()

    def _for_the_guide(self, columns: list[dict[str, Tensor]]) -> list[dict[str, Tensor]]:
        """The columns in copies, tokenized anew if the guide has another vocabulary."""
        if not self.must_retokenize:
            return [dict(column) for column in columns]
        found = []
        for column in columns:
            ids: Sequence[Tensor] = list(column["input_ids"])
            if "cu_seq_lens_q" in column:  # texts that stand behind one another in one row
                lengths = column["cu_seq_lens_q"].diff().tolist()
                ids = ids[0][: sum(lengths)].split(lengths)
            texts = self.tokenizer.batch_decode(ids, skip_special_tokens=True)
            found.append(batch_to_device(self.guide.preprocess(texts), self.guide.device))
        return found


@dataclass(frozen=True)
class _Guided:
    """Candidates of a sample are those whose similarity to its anchor is, to the guide, at most `limit` `[B]`."""

    limit: Tensor
    scale: float

    def log_sum(
        self, anchors: Tensor, columns: list[Tensor], guide: Tensor, guides: Sequence[Tensor | None],
        group: dist.ProcessGroup | None, before: int,
    ) -> Tensor:  # fmt: skip
        """Log-sum `[B]` of the candidates and the positive, minus the score of the positive.

        The positive of anchor i is sample i of the first column, of which no other is a candidate if the guide has None
        for it.
        """
        count = len(anchors)
        # their products are similarity - limit, and 1 for what is no candidate; those above 0 are left out, but not a
        # text that occurs twice, whose similarity is the positive's but for rounding
        rows = torch.cat([guide, self.limit[:, None], torch.ones_like(guide[:, :1])], 1)
        none = torch.zeros_like(rows)
        none[:, -1] = 1.0
        ends = torch.tensor([-1.0, 0.0], dtype=guide.dtype, device=guide.device).expand(count, 2)
        cols = torch.cat([none if g is None else torch.cat([g, ends], 1) for g in guides])
        labels = torch.arange(count, device=anchors.device) + before * len(columns)
        look_alike = filters.similar(rows, cols, most=16 * torch.finfo(rows.dtype).eps)
        return clip_loss(
            anchors, torch.cat(columns), self.scale, labels=labels, filters=look_alike, directions="image",
            reduction="none", group=group,
        )  # fmt: skip


def _union(sums: Tensor) -> Tensor:
    """Log-sums `[K, B]`, each with the positive, of disjoint candidates: that of all of them `[B]`, with it once."""
    if len(sums) == 1:
        return sums[0]
    most = sums.detach().amax(0)
    return most + ((sums - most).exp().sum(0) - (len(sums) - 1) * (-most).exp()).log()


def _unit(features: Tensor) -> Tensor:
    return F.normalize(features.to(torch.promote_types(features.dtype, torch.float32)), dim=1)
