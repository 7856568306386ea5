"""The pairs for image-text matching that a fusion encoder is shown.

Of B positives (i, i): (i, i), (wrong image, text i), (image i, wrong text)      shares 1/2, 1/4, 1/4
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from ..distributed import eager_in_group, shard_of
from ..scores import check
from ..scores.negatives import HardNegatives
from ..scores.philox import WORD, halves, philox
from ..scores.problem import _target

__all__ = ["ITMBatch", "itm_batch"]

HALF = (0.5, 0.25, 0.25)
LAST = 2**32  # above every random word


class ITMBatch(NamedTuple):
    """Pairs for image-text matching: first the positives, then those with a negative; `n` of them, on any draw.

    In a group of processes the indices are the group's, and M and N its numbers of images and texts.

    Attributes:
        image_index: int64 `[n]`; from M on it is slot `image_index - M` of the queue of images.
        text_index: int64 `[n]`; from N on it is slot `text_index - N` of the queue of texts.
        labels: int64 `[n]`, 1 for a match, 0 for none.
        weights: fp32 `[n]`, of mean 1, or all 0 where there is no negative at all.
    """

    image_index: Tensor
    text_index: Tensor
    labels: Tensor
    weights: Tensor


@eager_in_group
@torch.no_grad()
def itm_batch(
    negatives: HardNegatives,
    composition: Sequence[float] = HALF,
    mode: Literal["sample", "weight", "albef"] = "sample",
    *,
    seed: int | None = None,
    step: int | Tensor | None = None,
    labels: Tensor | None = None,
    group: object = None,
) -> ITMBatch:
    """The pairs of a batch and their weights: positives, wrong images and wrong texts.

    Use it between `hard_negatives` and the fusion encoder: gather images and texts by its indices (with a queue,
    `FeatureQueue.gather`: its slots stand behind the batch's own), and give labels and weights to `itm_loss`. The
    anchors are the B positive pairs; each has k negatives a side in `negatives`.

    How many pairs there are depends on sizes alone, so nothing waits for a GPU. Where a negative is missing the slot
    holds its positive once more, with label 1 and weight 0, and the others of its kind share its weight; where a kind
    has none at all, the other kind has its weight. Where neither has any (a batch of one), all weights are 0, the
    positives' too: learning from positives alone is degenerate. A warning says so, where values can be read without
    waiting.

    Args:
        negatives: of `hard_negatives`, or `found` of `BatchNegatives`.
        composition: shares of the positives, of wrong images and of wrong texts in the mean loss; they sum to 1. Not of
            mode "albef".
        mode: "sample", B + k B pairs: floor(B/2) anchors, in a random order that is a function of (seed, step), give
            their negative images, the others their negative texts (for other shares of the two, as many as their
            ratio says; one that has none gives of the other kind). "weight", B + 2 k B pairs: every anchor gives both,
            and weights make the shares, 1.5, 0.75 and 0.75 by default. "albef": the same pairs with weights of 1.
        seed, step: ints >= 0 (`step` also an int64 tensor `[]`), of mode "sample".
        labels: int `[M]`, the text of each image, as of `hard_negatives`; needed if M != N, else the text of the same
            index. An image with the label -1 is no anchor: its slots hold it with text 0, at weight 0; nor is one
            whose id, or whose text's id, was -1, or whose features were not finite. Images of one text share its
            negative images.
        group: None, or the group of `hard_negatives` or of the loss with `negatives=`: the anchors are those of all its
            processes, whose indices, numbers, order and weights are those of one process with the whole batch. Returned
            are the pairs of the own images. `fastvlm_loss.distributed.gathered` fetches what the indices stand for,
            and `itm_loss` takes the group too.

    Returns:
        `ITMBatch`, on the device of the negatives; empty if there are no texts.

    Raises:
        TypeError, ValueError: an argument of the wrong kind, shape, dtype, device or range, named.

    Source: Li et al. 2021 (ALBEF), section 3.2; the 50/25/25 composition is of this project's reference document.
    """
    if not isinstance(negatives, HardNegatives):
        raise TypeError(f"negatives: got {type(negatives).__name__}, wanted HardNegatives (`found` of BatchNegatives)")
    check.choice("mode", mode, ("sample", "weight", "albef"))
    positive, image_share, text_share = _shares(composition)
    if mode == "albef" and tuple(composition) != HALF:
        raise ValueError(f"composition: got {tuple(composition)} beside mode='albef', wanted the default")
    if mode == "sample":
        check.draw(seed, step, "mode='sample'")
    of_text, of_image = negatives.text_index, negatives.image_index
    text_valid, image_valid = negatives.text_valid, negatives.image_valid
    image_in, text_in, rows = negatives.image_in, negatives.text_in, slice(None)
    shard = None
    if group is not None:
        told = mode, tuple(composition), seed, labels is None, image_in is None, text_in is None
        shard = shard_of(group, of_text, of_image, told)
    target = _target("labels", labels, of_text, of_image, False, shard)
    if shard is not None:  # a few numbers of each anchor, so that what follows is what one process does
        rows, of_rows, of_cols = shard.own_rows, shard.gather_rows, shard.gather_cols
        of_text, text_valid, of_image, image_valid = (
            of_rows(of_text), of_rows(text_valid), of_cols(of_image), of_cols(image_valid)
        )  # fmt: skip
        image_in, text_in = (None if t is None else of(t) for t, of in ((image_in, of_rows), (text_in, of_cols)))
    (m, k), n = of_text.shape, of_image.shape[0]
    here = torch.arange(m, device=of_text.device)
    if not n:
        none = here[:0]
        return ITMBatch(none, none, none, none.to(torch.float32))
    own = here if target is None else target
    anchor, own = own >= 0, own.clamp(min=0)
    if image_in is not None and text_in is not None:
        anchor = anchor & image_in & text_in[own]
    has_text, has_image = text_valid & anchor[:, None], image_valid[own] & anchor[:, None]
    count, total = anchor.sum().to(torch.float32), m + m * k * (1 if mode == "sample" else 2)
    if mode == "sample":
        assert seed is not None and step is not None
        half = (count * (image_share / (image_share + text_share)) + 1e-6).floor()
        chosen = _rank(anchor, here, seed, step) < half
        any_image, any_text = has_image.any(1), has_text.any(1)
        to_image = torch.where(chosen, any_image | ~any_text, any_image & ~any_text)[:, None]
        blocks = [(to_image & has_image, ~to_image & has_text)]
        image_mass, text_mass = ((1 - positive) * total * part for part in (half, count - half))
    else:
        blocks = [(has_image, torch.zeros_like(has_image)), (torch.zeros_like(has_text), has_text)]
        if mode == "albef":
            positive, image_share, text_share = (part / (1 + 2 * k) for part in (1, k, k))
        image_mass, text_mass = (share * total * count for share in (image_share, text_share))
    images, texts = (torch.stack([b[side].sum() for b in blocks]).sum() for side in (0, 1))
    of_image_weight = _each(image_mass, text_mass, images, texts, count)
    of_text_weight = _each(text_mass, image_mass, texts, images, count)
    some = images + texts > 0
    parts = [(here, own, torch.ones_like(here), anchor * (positive * total / count.clamp(min=1)) * some)]
    for a, b in blocks:
        image, text = torch.where(a, of_image[own], here[:, None]), torch.where(b, of_text, own[:, None])
        parts.append((image, text, (~(a | b)).to(torch.int64), (a * of_image_weight + b * of_text_weight) * some))
    if m and check.readable(some) and not bool(some):
        warnings.warn("negatives: got none that is valid, all weights are 0: no matching in this step", stacklevel=4)
    return ITMBatch(*(torch.cat([part[side][rows].flatten() for part in parts]) for side in range(4)))


def _each(mass: Tensor, other_mass: Tensor, number: Tensor, others: Tensor, count: Tensor) -> Tensor:
    """Weight of each of `number` pairs that share mass / count, and the other kind's too where it has no pair."""
    return torch.where(others > 0, mass, mass + other_mass) / (count * number).clamp(min=1)


def _rank(anchor: Tensor, here: Tensor, seed: int, step: int | Tensor) -> Tensor:
    """Place of each anchor in a random order of the anchors, `[M]`; what is none comes after them."""
    # no pair of `hard_negatives` has this second word in its counter, so the order is independent of every draw
    counter = (here, WORD, step & WORD, step >> 32 & WORD)
    order = torch.where(anchor, philox(counter, halves(seed))[0], LAST).argsort(stable=True)
    return torch.zeros_like(here).scatter(0, order, here)


def _shares(composition: object) -> tuple[float, float, float]:
    if not isinstance(composition, (tuple, list)) or len(composition) != 3:
        raise TypeError(f"composition: got {composition!r}, wanted three shares: positives, wrong images, wrong texts")
    positive, image, text = (check.number("composition", share, low=0.0) for share in composition)
    if not (0 < positive < 1 and math.isclose(positive + image + text, 1.0, abs_tol=1e-6)):
        raise ValueError(f"composition: got {tuple(composition)}, wanted a sum of 1 and both positives and negatives")
    return positive, image, text
