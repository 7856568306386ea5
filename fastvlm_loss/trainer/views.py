"""The texts of a batch as the objectives want them read: plain, with masked words, as a caption, as a question.

All views of a text go through the text tower in one call, one below the other.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .world import World

__all__ = ["Views", "views_of"]

_OF = {"mlm": "masked", "caption": "caption", "vqa": "question"}  # the view an objective reads


@dataclass(frozen=True)
class Views:
    """V views of B texts, padded to the same length.

    Attributes:
        names: of the views, `plain` first.
        inputs: tokens int64 `[B, V, T]`, mask bool `[B, V, T]`, prefix int64 `[B, V]`: position i of a text sees j
            if j < prefix or j <= i.
        labels: int64 `[B, T]`, the masked tokens, -100 elsewhere; None without masking.
    """

    names: tuple[str, ...]
    inputs: dict[str, Tensor]
    labels: Tensor | None = None

    def at(self, name: str) -> int:
        """The place of a view."""
        return self.names.index(name)


def views_of(
    batch: Mapping[str, Any], tasks: Sequence[str], masked: Mapping[str, Tensor] | None, pad_id: int, world: World
) -> Views:
    """The views that these objectives read, of one length in all processes.

    `masked` are the corrupted tokens, their mask and labels.
    """
    text = batch["text"]
    names = ("plain", *(_OF[task] for task in _OF if task in tasks))
    longest = max([text["tokens"].shape[1], *([batch["question"]["tokens"].shape[1]] if "question" in names else [])])
    length = world.most(longest)
    tokens, masks, prefixes = [], [], []
    for name in names:
        given = {"masked": masked, "question": batch.get("question")}.get(name) or text
        room = (0, length - given["tokens"].shape[1])
        tokens.append(F.pad(given["tokens"], room, value=pad_id))
        masks.append(F.pad(given["mask"], room))
        rows = len(given["tokens"])
        if name == "question":
            prefixes.append(given["prompt_lengths"])
        else:  # a caption reads from left to right, the others both ways
            prefixes.append(torch.full((rows,), 1 if name == "caption" else length, device=tokens[0].device))
    inputs = {"tokens": torch.stack(tokens, 1), "mask": torch.stack(masks, 1), "prefix": torch.stack(prefixes, 1)}
    labels = None if masked is None else F.pad(masked["labels"], (0, length - masked["labels"].shape[1]), value=-100)
    return Views(names, inputs, labels)
