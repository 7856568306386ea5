"""The losses of what the fusion encoder reads beside a picture: masked words, captions, questions."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastvlm_loss import caption_loss, linear_cross_entropy, vqa_loss

from .config import Config
from .views import Views
from .world import World

__all__ = ["Reading"]

Vocabulary = tuple[Tensor, Tensor]


class Reading:
    """Losses by objective, from fused views; the vocabulary is the text tower's embeddings and a bias."""

    def __init__(self, config: Config, model: Callable[..., Any], world: World, pad_id: int) -> None:
        self.config, self.model, self.world, self.pad_id = config, model, world, pad_id

    def __call__(
        self, fused: Mapping[str, Tensor], masked: tuple[Tensor, Tensor] | None, views: Views,
        question: Mapping[str, Tensor] | None, vocabulary: Vocabulary,
    ) -> dict[str, Tensor]:  # fmt: skip
        """Of the views that there are, fused `[B, T, W]`, and of what `masked` gives of the masked one."""
        losses = {}
        if masked is not None:
            rows, targets = masked
            losses["mlm"] = linear_cross_entropy(rows, vocabulary[0], targets, vocabulary[1], group=self.world.group)
        if "caption" in fused:
            own = views.inputs["tokens"][:, views.at("caption")]
            losses["caption"] = caption_loss(
                self._read(fused["caption"]), vocabulary[0], own, vocabulary[1], pad_id=self.pad_id,
                group=self.world.group,
            )  # fmt: skip
        if "question" in fused:
            assert question is not None
            if self.config.vqa.kind == "classification":
                losses["vqa"] = self._chosen(fused["question"], question)
            else:
                losses["vqa"] = self._written(fused["question"], views, question, vocabulary)
        return losses

    @torch.no_grad()
    def worth(
        self, masked: tuple[Tensor, Tensor], hidden: Tensor, views: Views, vocabulary: Vocabulary
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """Masked tokens, and the loss of each without the image less that with it; `hidden` `[B, V, T, W]`."""
        k, given = views.at("masked"), views.inputs
        alone = self.model("fuse", hidden[:, k].detach(), given["mask"][:, k], None, given["prefix"][:, k])
        (rows, targets), (blind, _) = masked, self.masked(alone, views)
        weight, bias = (t.detach() for t in vocabulary)
        with_image, without = (
            linear_cross_entropy(r.detach(), weight, targets, bias, reduction="none") for r in (rows, blind)
        )
        return targets, without - with_image

    def masked(self, fused: Tensor, views: Views) -> tuple[Tensor, Tensor]:
        """Rows `[r, W]` of the hidden words, and which they are; all pass through the head together."""
        assert views.labels is not None
        place = views.labels >= 0
        return self.model("words", fused[place]), views.labels[place]

    def _read(self, fused: Tensor) -> Tensor:
        rows: Tensor = self.model("words", fused.flatten(0, 1))
        return rows.reshape(fused.shape)

    def _written(
        self, fused: Tensor, views: Views, question: Mapping[str, Tensor], vocabulary: Vocabulary
    ) -> Tensor:  # fmt: skip
        """The answer word by word."""
        return vqa_loss(
            self._read(fused), vocabulary[0], views.inputs["tokens"][:, views.at("question")], question["weight"],
            max(1, len(fused)), vocabulary[1], pad_id=self.pad_id, prompt_lengths=question["prompt_lengths"],
            group=self.world.group,
        )  # fmt: skip

    def _chosen(self, fused: Tensor, question: Mapping[str, Tensor]) -> Tensor:
        """The answer among all: a sigmoid each, summed over them; the first token sees the question alone.

        An answer that cannot be chosen asks for none of the others.

        Source: Teney et al. 2018 (Tips and Tricks for Visual Question Answering).
        """
        logits = self.model("answers", fused)
        target = (question["choice"][:, None] == torch.arange(logits.shape[1], device=logits.device)).to(logits.dtype)
        each = F.binary_cross_entropy_with_logits(logits, target, reduction="none").sum(1)
        return (question["weight"] * each).sum() / max(1, len(each))
