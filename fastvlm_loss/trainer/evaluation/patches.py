"""What the objectives of the patches have learned: multi-scale matching, and retrieval by late interaction."""

from __future__ import annotations

import torch
from torch import Tensor

from fastvlm_loss import multiscale_itm

from ...demo.evaluation import before
from ..config import LocalConfig
from .held import ROWS, Held
from .matching import hard
from .retrieval import WAYS, Ranking, recalls

__all__ = ["late_interaction", "multiscale"]

_PRODUCTS = 1 << 24  # of tokens, at once


def multiscale(held: Held, batch_size: int, config: LocalConfig) -> dict[str, float]:
    """Accuracy on the pairs of `matching.hard`."""
    made = _patches(held, "multiscale")

    def match(image: Tensor, text: Tensor) -> Tensor:
        scores, _ = multiscale_itm(
            made["patches"], held.texts.features.float(), image_index=image.to(held.device),
            text_index=text.to(held.device), mode=config.mode, sharpness=config.sharpness,
        )  # fmt: skip
        return (made["scale"] * scores + made["bias"]).cpu()

    return hard(held, batch_size, "multiscale", match)


def late_interaction(held: Held, config: LocalConfig) -> dict[str, float]:
    """Recalls where pictures choose by their patches' best words, and texts by their words' best patches."""
    made = _patches(held, "late_interaction")
    sets = (made["patches"], None), (made["words"], held.texts.mask)
    empty = torch.empty(len(held), 0, dtype=torch.int64)
    with torch.autocast(held.device.type, enabled=False):  # scores in bf16 tie
        found = {
            way: Ranking(_ranks(held.ids, *ask, *answer, summed=config.interaction == "colbert"), empty)
            for way, ask, answer in zip(WAYS, sets, sets[::-1], strict=True)
        }
    return recalls(found, "late_interaction")


def _patches(held: Held, part: str) -> dict[str, Tensor]:
    """What the model makes of all pictures, and of all texts where it wants them; scalars are the same each time."""
    given = [held.tokens, *([held.texts.hidden] if part == "late_interaction" else [])]
    made = [held.model(part, *sets) for sets in zip(*(t.split(ROWS) for t in given), strict=True)]
    return {name: torch.cat([m[name] for m in made]) if value.dim() == 3 else value for name, value in made[0].items()}


def _ranks(
    ids: Tensor, queries: Tensor, own: Tensor | None, answers: Tensor, other: Tensor | None, summed: bool
) -> Tensor:  # fmt: skip
    """By the mean (or the sum) of the best match of each of a query's tokens; masks `own` and `other` of both sides."""
    found = []
    for rows in torch.arange(len(ids)).split(max(1, _PRODUCTS // (queries.shape[1] * answers[..., 0].numel()))):
        products = torch.einsum("qpd,atd->qapt", queries[rows], answers)
        best = (products if other is None else products.masked_fill(~other[None, :, None], -torch.inf)).amax(3)
        weight = torch.ones_like(queries[rows, :, 0]) if own is None else own[rows].to(queries.dtype)
        scores = torch.einsum("qap,qp->qa", best, weight if summed else weight / weight.sum(1, keepdim=True))
        found.append(before(scores.cpu(), ids[rows, None] == ids[None, :]))
    return torch.cat(found)
