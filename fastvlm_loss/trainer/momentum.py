"""ALBEF's momentum model: towers whose parameters are running averages teach the contrastive loss."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fastvlm_loss import FeatureQueue

from .config import MomentumConfig

__all__ = ["Teacher"]


class Teacher:
    """Averaged towers, and the queues of their features.

    The contrastive targets are `(1 - alpha) * own pair + alpha * softmax(teacher's scores)`, alpha growing from 0; with
    a queue, images choose among the teacher's texts of this batch and of earlier ones, and texts likewise.

    Args:
        model: the averaged copy; its parameters take no gradient.
        features: D, for the queues.

    Source: Li et al. 2021 (ALBEF), sections 3.2 and 3.3; He et al. 2020 (MoCo).
    """

    def __init__(
        self, config: MomentumConfig, model: nn.Module, features: int, steps: int, device: torch.device
    ) -> None:
        self.config, self.model, self.steps = config, model.requires_grad_(False).eval(), steps
        self.queues = [FeatureQueue(config.queue, features, device=device) for _ in range(2 if config.queue else 0)]
        self._made: tuple[Tensor, Tensor] | None = None

    def alpha(self, step: int) -> float:
        """Share of the soft targets at a step."""
        return self.config.alpha * min(1.0, step / max(1.0, self.config.ramp * self.steps))

    @torch.no_grad()
    def look(self, images: Tensor, tokens: Tensor, mask: Tensor, rows: int) -> None:
        """Make the features of a batch, `rows` at a time."""
        image = [self.model("image", part)["features"] for part in images.split(rows)]
        parts = zip(tokens.split(rows), mask.split(rows), strict=True)
        text = [self.model("text", t, m)["features"] for t, m in parts]
        self._made = torch.cat(image), torch.cat(text)

    def loss(
        self, function: Callable[..., Tensor], image: Tensor, text: Tensor, scale: Tensor, options: Mapping[str, Any],
        more: Mapping[str, Any], ids: Tensor, step: int,
    ) -> Tensor:  # fmt: skip
        """The contrastive loss of the batch that was last looked at."""
        assert self._made is not None
        image_m, text_m = self._made
        alpha, kept = self.alpha(step), dict(options)
        if not self.queues:
            return function(
                image, text, scale, teacher_image_features=image_m, teacher_text_features=text_m, alpha=alpha, **kept,
                **more,
            )  # fmt: skip
        for name in ("metrics", "text_ids", "image_ids"):
            kept.pop(name, None)
        more = {name: value for name, value in more.items() if name != "negatives"}
        (of_images, of_texts), count, group = self.queues, len(ids), kept["group"]
        images, image_ids = of_images.extend(image_m, ids, step, group=group)
        texts, text_ids = of_texts.extend(text_m, ids, step, group=group)
        to_text = function(
            image, texts, scale, teacher_image_features=image_m, teacher_text_features=texts, alpha=alpha,
            labels=of_texts.places(count, group=group), image_ids=ids, text_ids=text_ids, directions="image",
            **kept, **more,
        )  # fmt: skip
        to_image = function(
            images, text, scale, teacher_image_features=images, teacher_text_features=text_m, alpha=alpha,
            labels=of_images.labels(count, group=group), image_ids=image_ids, text_ids=ids, directions="text",
            **kept, **more,
        )  # fmt: skip
        return (to_text + to_image) / 2

    @torch.no_grad()
    def follow(self, model: nn.Module, ids: Tensor, step: int, group: object) -> None:
        """After a step of the optimiser: average, and store the features and ids of the whole batch."""
        mine, theirs = list(self.model.parameters()), list(model.parameters())
        for a, b in zip(mine, theirs, strict=True):
            a.lerp_(b, 1 - self.config.decay)
        if self._made is not None:
            for queue, made in zip(self.queues, self._made, strict=False):
                queue.push(made, ids, step, group=group)
        self._made = None

    def state(self) -> dict[str, Tensor]:
        """Averages and queues, by name, for a checkpoint."""
        found = {f"momentum.{name}": p for name, p in self.model.state_dict().items()}
        for k, queue in enumerate(self.queues):
            found |= {f"queue{k}.{name}": b for name, b in queue.state_dict().items()}
        return found
