"""Image-text pairs as a value, and batches of them in an order that the step number alone determines."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Protocol
from zlib import crc32

import numpy as np
import torch
from torch import Tensor

KEYWORDS = 3  # tags joined to a caption by the keyword augmentation
_ORDER, _WORDS = 0, 1  # what a random stream is for


class Images(Protocol):
    """Anything that gives uint8 [len(indices), H, W, 3] for a vector of indices: a tensor, or a lazy decoder."""

    def __len__(self) -> int: ...

    def __getitem__(self, indices: Tensor, /) -> Tensor: ...


@dataclass(frozen=True)
class Pairs:
    """N pictures and their captions, with optional tags per picture.

    ``ids`` (int64 [N]) number the distinct captions: two pairs with equal captions have equal ids.
    """

    name: str
    images: Images
    captions: Sequence[str]
    tags: Sequence[Sequence[str]] | None = None
    ids: Tensor = field(init=False, repr=False)

    def __post_init__(self) -> None:
        for what, length in (("captions", len(self.captions)), ("tags", len(self.tags or self.captions))):
            if length != len(self.images):
                raise ValueError(f"{what}: got {length} for {len(self.images)} images, wanted one each")
        object.__setattr__(self, "ids", caption_ids(self.captions))

    def __len__(self) -> int:
        return len(self.captions)

    def select(self, indices: Sequence[int], name: str | None = None) -> Pairs:
        """The pairs at ``indices``, in that order (their pictures are taken out now)."""
        tags = None if self.tags is None else [self.tags[i] for i in indices]
        images = self.images[torch.as_tensor(indices, dtype=torch.int64)]
        return Pairs(name or self.name, images, [self.captions[i] for i in indices], tags)


@dataclass(frozen=True)
class Splits:
    """Pairs to train on, pairs to test on, and one sentence that says what they are."""

    train: Pairs
    test: Pairs
    note: str


@dataclass(frozen=True)
class Batch:
    """One training batch: images uint8 [B, H, W, 3], one text per image, caption ids int64 [B]."""

    step: int
    images: Tensor
    texts: list[str]
    ids: Tensor


def caption_ids(captions: Sequence[str]) -> Tensor:
    """Number the distinct captions in order of first appearance, int64 [N]."""
    numbers: dict[str, int] = {}
    return torch.tensor([numbers.setdefault(caption, len(numbers)) for caption in captions], dtype=torch.int64)


def split_by_caption(pairs: Pairs, share: int = 10, limit: int = 1000) -> tuple[Pairs, Pairs]:
    """Hold out the captions whose hash is divisible by ``share``: (train, test), test cut to ``limit`` pairs."""
    held = [crc32(caption.encode()) % share == 0 for caption in pairs.captions]
    train = [i for i, out in enumerate(held) if not out]
    test = [i for i, out in enumerate(held) if out][:limit]
    return pairs.select(train, f"{pairs.name} train"), pairs.select(test, f"{pairs.name} test")


def batches(pairs: Pairs, batch_size: int, seed: int, steps: int, start: int = 0) -> Iterator[Batch]:
    """Yield the batches of steps ``start`` to ``steps - 1``.

    Epoch e visits a permutation of the pairs that depends on (seed, e) only, and drops the last partial batch;
    the words of step s depend on (seed, s) only. So a run that starts at step k sees what an unbroken run saw.
    Raises ValueError where there are fewer pairs than ``batch_size``.
    """
    if not 1 <= batch_size <= len(pairs):
        raise ValueError(f"batch_size: got {batch_size}, wanted 1 to {len(pairs)}, the pairs in {pairs.name}")
    per_epoch = len(pairs) // batch_size
    epoch, order = -1, np.empty(0, np.int64)
    for step in range(start, steps):
        if step // per_epoch != epoch:
            epoch = step // per_epoch
            order = np.random.default_rng((seed, _ORDER, epoch)).permutation(len(pairs))
        at = step % per_epoch * batch_size
        chosen = torch.from_numpy(order[at : at + batch_size])
        yield Batch(step, pairs.images[chosen], _texts(pairs, chosen.tolist(), seed, step), pairs.ids[chosen])


def _texts(pairs: Pairs, chosen: list[int], seed: int, step: int) -> list[str]:
    """Captions; where there are tags, every second one on average with ``KEYWORDS`` random tags behind it."""
    if pairs.tags is None:
        return [pairs.captions[i] for i in chosen]
    dice = np.random.default_rng((seed, _WORDS, step))
    texts = []
    for i in chosen:
        tags = pairs.tags[i]
        words = dice.permutation(len(tags))[:KEYWORDS] if dice.random() < 0.5 else ()
        texts.append(" ".join([pairs.captions[i], *(tags[int(w)] for w in words)]))
    return texts
