"""Objectives of a picture's patches: multi-scale matching, and contrast by late interaction."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from fastvlm_loss import ITMBatch, late_interaction_loss, multiscale_itm_loss

from .config import LocalConfig
from .world import World

__all__ = ["late_interaction", "multiscale"]


def multiscale(
    model: Callable[..., Any], config: LocalConfig, world: World, image_tokens: Tensor, text_features: Tensor,
    pairs: ITMBatch,
) -> Tensor:  # fmt: skip
    """Texts against the patches of the pictures that they are paired with; `pairs` as of `Objectives._pairs`."""
    made = model("multiscale", image_tokens)
    return multiscale_itm_loss(
        world.spread(made["patches"]), world.spread(text_features), pairs, made["scale"], made["bias"],
        mode=config.mode, sharpness=config.sharpness, reduction="sum",
    )  # fmt: skip


def late_interaction(
    model: Callable[..., Any], config: LocalConfig, world: World, image_tokens: Tensor, hidden: Tensor,
    mask: Tensor, ids: Tensor,
) -> Tensor:  # fmt: skip
    """Every patch against its best token of a text, [CLS] and [SEP] too, and the other way, over the whole batch."""
    made = model("late_interaction", image_tokens, hidden)
    return late_interaction_loss(
        made["patches"], made["words"], made["scale"], text_mask=mask, interaction=config.interaction,
        image_ids=ids, text_ids=ids, group=world.group,
    )  # fmt: skip
