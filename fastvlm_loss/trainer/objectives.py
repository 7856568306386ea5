"""The losses of a step, from what the towers made of the batch: one call of the fusion encoder serves all of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

import fastvlm_loss
from fastvlm_loss import BatchNegatives, ITMBatch, hard_negatives, itm_batch

from ..losses import parameters
from . import patches
from .config import Config
from .momentum import Teacher
from .reading import Reading
from .views import Views
from .world import World

__all__ = ["Batch", "Found", "Objectives", "contrastive_loss", "contrastive_losses"]

Model = Callable[..., Any]


def contrastive_losses() -> dict[str, Callable[..., Tensor]]:
    """Every loss of the library on pairs of features that needs nothing else of the data, by its name."""
    names = [n for n in fastvlm_loss.__all__ if n.endswith(("clip_loss", "siglip_loss", "triplet_loss"))]
    return {name: getattr(fastvlm_loss, name) for name in names if name != "graded_clip_loss"}


def contrastive_loss(config: Config) -> tuple[Callable[..., Tensor], set[str]]:
    """The run's contrastive loss and the options that it takes.

    Raises:
        ValueError: a name that is none, an option that it does not have, or what does not go with the momentum model.
    """
    name, known, taught = config.itc.loss, contrastive_losses(), config.momentum.enabled
    if name not in known:
        raise ValueError(f"itc.loss: got {name!r}, wanted one of {', '.join(known)}")
    if taught and name not in ("clip_loss", "soft_target_clip_loss"):
        raise ValueError(f"momentum.enabled: got true beside itc.loss={name}, wanted clip_loss")
    if not taught and name == "soft_target_clip_loss":
        raise ValueError("itc.loss: got soft_target_clip_loss without a teacher, wanted momentum.enabled=true")
    loss = known["soft_target_clip_loss" if taught else name]
    takes = set(parameters(loss))
    unknown = sorted(set(config.itc.options) - takes)
    if unknown:
        raise ValueError(f"itc.options: got {', '.join(unknown)}, wanted options of {name}")
    return loss, takes - ({"negatives"} if name == "margin_clip_loss" else set())  # whose scores are shifted


@dataclass(frozen=True)
class Batch:
    """What a step knows beside features: ids int64 `[B]`, the views of the texts, and the questions' answers."""

    ids: Tensor
    views: Views
    question: Mapping[str, Tensor] | None = None
    relevance: Tensor | None = None


@dataclass
class Found:
    """What a step found beside its losses, detached."""

    metrics: dict[str, Tensor] = field(default_factory=dict)
    masked_difference: tuple[Tensor, Tensor] | None = None  # tokens, and what the image is worth to them, in nats


class Objectives:
    """Raw losses by objective; the mean of each over the processes is the loss of the whole batch."""

    def __init__(self, config: Config, model: Model, world: World, pad_id: int, teacher: Teacher | None) -> None:
        self.config, self.model, self.world, self.teacher = config, model, world, teacher
        self.loss, self.takes = contrastive_loss(config)
        self.reading = Reading(config, model, world, pad_id)

    def __call__(
        self, image: Mapping[str, Tensor], text: Mapping[str, Tensor], batch: Batch, tasks: Sequence[str], step: int,
        hardness: float, vocabulary: tuple[Tensor, Tensor], scale: Tensor, bias: Tensor | None,
    ) -> tuple[dict[str, Tensor], Found]:  # fmt: skip
        """Losses of the tasks, from the towers' features and tokens (`/model` says their shapes)."""
        losses: dict[str, Tensor] = {}
        found = Found()
        features = image["features"], text["features"][:, 0]
        negatives = self._negatives(step, hardness) if {"itm", "multiscale"} & set(tasks) else None
        if "itc" in tasks:
            losses["itc"] = self._contrast(*features, scale, bias, batch, negatives, step, found)
        rows: list[tuple[Tensor, Tensor, Tensor, Tensor]] = []  # hidden, mask, image tokens, prefix, of what is fused
        if negatives is not None:
            pairs = self._pairs(features, batch, negatives, step, found)
        if "itm" in tasks:
            rows.append(self._gathered(image["tokens"], text["hidden"][:, 0], batch.views, pairs))
        for k in range(1, len(batch.views.names)):
            given = batch.views.inputs
            rows.append((text["hidden"][:, k], given["mask"][:, k], image["tokens"], given["prefix"][:, k]))
        if rows:
            hidden, mask, tokens, prefix = (torch.cat(parts) for parts in zip(*rows, strict=True))
            fused = self.model("fuse", hidden, mask, tokens, prefix).split([len(r[0]) for r in rows])
            if "itm" in tasks:
                losses["itm"] = self._match(fused[0], features, pairs, found)
            read = dict(zip(batch.views.names[1:], fused["itm" in tasks :], strict=True))
            masked = self.reading.masked(read["masked"], batch.views) if "masked" in read else None
            losses |= self.reading(read, masked, batch.views, batch.question, vocabulary)
            if masked is not None and self.config.mlm.strategy == "hard":
                found.masked_difference = self.reading.worth(masked, text["hidden"], batch.views, vocabulary)
        if "multiscale" in tasks:
            losses["multiscale"] = patches.multiscale(
                self.model, self.config.local, self.world, image["tokens"], features[1], pairs
            )
        if "late_interaction" in tasks:
            losses["late_interaction"] = patches.late_interaction(
                self.model, self.config.local, self.world, image["tokens"], text["hidden"][:, 0],
                batch.views.inputs["mask"][:, 0], batch.ids,
            )  # fmt: skip
        return losses, found

    def _negatives(self, step: int, hardness: float) -> BatchNegatives:
        return BatchNegatives(self.config.itm.k, hardness=hardness, seed=self.config.seed, step=step)

    def _contrast(
        self, image: Tensor, text: Tensor, scale: Tensor, bias: Tensor | None, batch: Batch,
        negatives: BatchNegatives | None, step: int, found: Found,
    ) -> Tensor:  # fmt: skip
        options: dict[str, Any] = {"group": self.world.group, "image_ids": batch.ids, "text_ids": batch.ids}
        if "metrics" in self.takes:
            options["metrics"] = metrics = fastvlm_loss.BatchMetrics()
        if "image_relevance" in self.takes:
            options["image_relevance"] = torch.ones_like(image[:, 0]) if batch.relevance is None else batch.relevance
        if "text_embeddings" in self.takes:
            options["text_embeddings"] = text.detach()
        more = dict(self.config.itc.options)
        if negatives is not None and "negatives" in self.takes:
            more["negatives"] = negatives
        scores = (scale, bias) if "logit_scale" in self.takes else ()
        if self.teacher is not None:
            value = self.teacher.loss(self.loss, image, text, scale, options, more, batch.ids, step)
        else:
            value = self.loss(image, text, *scores, **options, **more)
        if "metrics" in options and metrics.image_accuracy is not None:
            found.metrics["accuracy"] = metrics.image_accuracy
        return value

    def _pairs(
        self, features: tuple[Tensor, Tensor], batch: Batch, negatives: BatchNegatives, step: int, found: Found
    ) -> ITMBatch:
        """This process's share of the whole batch's pairs: indices into all images and texts, labels, weights.

        Weights sum to the number of processes over all of them, so that the mean of the processes is the weighted mean.
        """
        config = self.config.itm
        try:
            picked = negatives.found  # by the contrastive loss, of the same product
        except RuntimeError:
            picked = hard_negatives(
                *features, config.k, hardness=negatives.law.hardness, image_ids=batch.ids, text_ids=batch.ids,
                seed=self.config.seed, step=step, group=self.world.group,
            )  # fmt: skip
        if self.world.size > 1:
            every = {n: self.world.collect(v) for n, v in vars(picked).items() if v is not None and v.dim()}
            picked = replace(picked, **every)
        pairs = itm_batch(picked, config.composition, config.mode, seed=self.config.seed, step=step)
        weights = pairs.weights / pairs.weights.sum().clamp(min=1e-12) * self.world.size
        found.metrics["negative_score"] = picked.text_score.mean()
        whole = (pairs.image_index, pairs.text_index, pairs.labels, weights)
        return ITMBatch(*(t.tensor_split(self.world.size)[self.world.rank] for t in whole))

    def _gathered(
        self, tokens: Tensor, hidden: Tensor, views: Views, pairs: ITMBatch
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        image_index, text_index = pairs[:2]
        masks = self.world.collect(views.inputs["mask"][:, 0])[text_index]
        prefix = torch.full_like(text_index, hidden.shape[1])
        return self.world.spread(hidden)[text_index], masks, self.world.spread(tokens)[image_index], prefix

    def _match(self, fused: Tensor, features: tuple[Tensor, Tensor], pairs: ITMBatch, found: Found) -> Tensor:
        image_index, text_index, labels, weights = pairs
        image, text = (self.world.spread(side) for side in features)
        logits = self.model("match", fused, image[image_index], text[text_index])
        found.metrics["matching"] = (weights * (logits.argmax(1) == labels)).sum()
        return fastvlm_loss.itm_loss(logits, labels, weights, reduction="sum")
